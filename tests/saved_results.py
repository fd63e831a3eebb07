"""Results of commands as they are saved: what ``lustral report`` reads."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import torch

from lustral.api.results import purified_record
from lustral.core.history import HistoryEntry
from lustral.core.rates import Rate
from lustral.core.records import Cost
from lustral.vision.evaluation import Evaluation
from lustral.vision.records import Purified, Verdict
from lustral.vision.verdict_files import verdict_record
from toy import mask_verdict, true_trigger

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
ABOUT: dict[str, Any] = {
    "schema": 2,
    "command": "lustral scan m.pt",
    "model": "<m>.pt",
    "weights": ".",
    "other_weights": [],
    "sha256": "0" * 64,
    "arch": "small_cnn",
    "data": "toy.npz",
    "classes": NAMES,
    "image_shape": [3, 12, 12],
    "clean_images": 70,
    "seed": 3,
    "device": "cpu",
    "method": "mask_area",
    "settings": {"holdout": 0.2},
    "versions": {"torch": "2"},
    "file_safety": {
        "runs_code": True,
        "files": [
            {
                "file": "m.pt",
                "format": "pickle",
                "bytes": 12,
                "sha256": "0" * 64,
                "imports": [{"name": "os.system", "times": 1, "is_data": False}],
            }
        ],
    },
}


def verdict() -> Verdict:
    return mask_verdict([40.0, math.inf, 50.0, 41.5, 4.25, 60.0, 39.0], suspects=[4], triggers=[true_trigger()])


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record as JSON gives it back, with null for what JSON has not."""
    text = json.dumps(record).replace("Infinity", "null").replace("NaN", "null")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def scanned() -> dict[str, Any]:
    return plain({**ABOUT, "verdict": verdict_record(verdict())})


def erased() -> dict[str, Any]:
    history = tuple(HistoryEntry(count=n, clean_accuracy=0.9, recovered_asr=1.0 - n / 2) for n in range(3))
    cost = Cost(seconds=2.0, image_passes=9.0, peak_memory_bytes=7, clean_images=70)
    audit = replace(mask_verdict([40.0] * 7), triggers=())
    purified = Purified(
        model=torch.nn.Identity(),
        history=history,
        selected=2,
        cost=cost,
        verdict=verdict(),
        audit=audit,
        notes=("A note.",),
    )
    rates = {name: Rate(hits, 60) for name, hits in {"acc": 55, "asr": 1, "ra": 50, "natural_rate": 1}.items()}
    after = Evaluation(**rates, per_class=(Rate(5, 6),) * 7, num_non_finite=0)
    before = replace(after, asr=Rate(60, 60), ra=Rate(0, 60))
    line = {"images": 96, "are_unseen": True, "has_true_trigger": True, "shares": [0, 0.5, 1]}
    return plain(
        {
            **ABOUT,
            "accuracy": {},
            "purified": purified_record(purified),
            "out": "o",
            "written": "o/m.pt",
            "before": before.to_dict(),
            "after": after.to_dict(),
            "weight_line": {**line, "clean": [0.1, 0.2, 0.1], "triggered": [9.0, None, 0.1]},
        }
    )
