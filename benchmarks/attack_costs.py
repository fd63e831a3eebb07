"""What an attack costs its attacker: the time to make a victim, as a multiple of training a benign model, in one run.

    python benchmarks/attack_costs.py [--images 2000] [--rounds 2]

Every attack takes its turn between two benign trainings and is divided by their mean, so that a machine whose speed drifts hits
both alike; ratios are medians over rounds. A victim is poisoned and trained for 12 epochs, as in the cpu setting, on fewer
random images: speed does not depend on them. What an attack builds once and keeps (surrogates, encoders, mask networks) is
timed apart, in benign trainings too; how much of it there is was scaled down with the images.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lustral.catalog import ATTACKS
from lustral.core.files import write_json_atomic
from lustral.core.randomness import child
from lustral.core.settings import build
from lustral.training import Augment, Trainer
from lustral.vision.records import ImageSet
from lustral.vision.victims import implant

RESULT = Path(__file__).resolve().parent / "results" / "attack_costs_cpu.json"
FULL = 47_500  # training images of the cpu setting
BOUNDS = {"wanet": 1.5, "bpp": 1.5, "input_aware": 3.5}  # the others: 1.1, but for IMC, which has no bound
RATES = {"sig": 0.05, "label_consistent": 0.05, "tact": 0.01, "adap_blend": 0.01, "adap_patch": 0.01}


class Kept:
    """Assets in memory."""

    def __init__(self) -> None:
        self.held: dict[str, Mapping[str, Tensor]] = {}
        self.seconds, self.depth = 0.0, 0

    def get(self, spec: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        name = json.dumps(spec, sort_keys=True)
        if name not in self.held:
            began = time.perf_counter()
            self.depth += 1
            self.held[name] = make()  # may ask for others, whose time is part of this
            self.depth -= 1
            if not self.depth:
                self.seconds += time.perf_counter() - began
        return self.held[name]


def random_set(count: int) -> ImageSet:
    stream = child(0, "benchmark")
    return ImageSet(
        images=torch.randint(256, (count, 3, 32, 32), generator=stream, dtype=torch.uint8),
        labels=torch.arange(count) % 10,
        num_classes=10,
    )


def settings(name: str, share: float) -> dict[str, Any]:
    """Return an attack's settings, with what it builds once scaled to a set of ``share`` of the full size."""
    chosen: dict[str, Any] = {"poison_rate": RATES.get(name, 0.1)}
    if name in ("tact", "adap_blend", "adap_patch"):
        chosen["cover_rate"] = 0.01
    if name == "ssba":
        steps = round(2500 * share)
        chosen |= {"encoder": {"steps": steps, "ramp": steps // 2}, "least_bit_accuracy": 0.0, "least_psnr": 0.0}
    return chosen


def seconds(name: str | None, train: ImageSet, kept: Kept, share: float) -> float:
    """Return the time to make one victim, without what is built once."""
    attack: Any = None if name is None else build(ATTACKS[name], settings(name, share))
    trainer = Trainer(epochs=12, augment=Augment(crop_padding=2))
    before, began = kept.seconds, time.perf_counter()
    few = train.subset(torch.arange(20))
    implant(
        attack, train, few, arch="preact_resnet18:width=16", trainer=trainer, seed=0, data_name="random", assets=kept
    )
    return time.perf_counter() - began - (kept.seconds - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    train, share = random_set(options.images), options.images / FULL
    ratios: dict[str, list[float]] = {name: [] for name in ATTACKS}
    once: dict[str, float] = {}
    with (
        patch("lustral.vision.attacks.surrogates.LEAST_STEPS", 1),
        patch("lustral.vision.attacks.input_aware.LEAST_MASK_STEPS", 1),
    ):
        seconds(None, train, Kept(), share)  # warm up
        for _ in range(options.rounds):
            last = seconds(None, train, Kept(), share)
            benign = [last]
            for name in ATTACKS:
                kept = Kept()
                spent = seconds(name, train, kept, share)
                following = seconds(None, train, Kept(), share)
                ratios[name].append(2 * spent / (last + following))
                once[name] = 2 * kept.seconds / (last + following)
                benign.append(following)
                last = following
    rows = {}
    for name, found in ratios.items():
        bound = BOUNDS.get(name, None if name == "imc" else 1.1)
        rows[name] = {"ratio": statistics.median(found), "all": found, "built_once": once[name], "bound": bound}
        verdict = "" if bound is None else ("met" if rows[name]["ratio"] <= bound else "missed")
        print(f"{name:18} {rows[name]['ratio']:.2f} x a benign training, and {once[name]:.2f} once  {verdict}")
    print(f"a benign training: {statistics.median(benign):.1f} s, {min(benign):.1f} to {max(benign):.1f}")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    outcome = {"machine": machine, "images": options.images, "rounds": options.rounds, "attacks": rows}
    write_json_atomic(RESULT, outcome)


if __name__ == "__main__":
    main()
