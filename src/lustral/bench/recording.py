"""Records of cells as plain data: what every one of them has, and the parts that several kinds write alike.

See ``docs/benchmarks.md`` for the fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

import lustral
from lustral.bench.cells import Cell
from lustral.core.files import json_ready
from lustral.vision.figures import stamp_sheet
from lustral.vision.images import as_float, as_uint8, at_most
from lustral.vision.records import ImageSet, Verdict
from lustral.vision.victims import library_versions

RECORD_SCHEMA = 1


def finished(cell: Cell, own: Mapping[str, Any], seconds: float, device: torch.device) -> dict[str, Any]:
    """Return the record of a cell that was done; ``own`` is what its kind adds."""
    return {**_common(cell, "done"), **own, "made": build_info(seconds, device)}


def failure(cell: Cell, error: BaseException, seconds: float, device: torch.device | None = None) -> dict[str, Any]:
    """Return the record of a cell that raised."""
    return {
        **_common(cell, "failed"),
        "error": writable(f"{type(error).__name__}: {error}"),
        "traceback": writable("".join(traceback.format_exception(error))),
        "made": build_info(seconds, device),
    }


def _common(cell: Cell, status: str) -> dict[str, Any]:
    return {
        "schema": RECORD_SCHEMA,
        "kind": cell.spec["kind"],
        "status": status,
        "title": cell.title,
        "facts": dict(cell.columns),
        "spec": cell.spec,
        "victim_key": cell.victim_key,
    }


def writable(text: str) -> str:
    """Return a text with what UTF-8 cannot hold written out: messages quote file names, which may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def without_per_class(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return an evaluation without its longest part, and that part: the accuracy of each class."""
    return {name: value for name, value in metrics.items() if name != "per_class"}, metrics["per_class"]


def evidence(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as plain data, without its triggers."""
    return {
        "outcome": verdict.outcome,
        "suspects": list(verdict.suspect_labels),
        "score": verdict.score,
        "threshold": verdict.threshold,
        "basis": verdict.basis,
        "evidence": [dataclasses.asdict(entry) for entry in verdict.evidence],
    }


def recovered_picture(verdict: Verdict, clean: ImageSet) -> bytes:
    """Return a PNG of the first recovered trigger on clean images of other classes."""
    trigger = verdict.triggers[0].to("cpu")
    others = at_most(clean.subset(clean.labels != trigger.target_label), 8)
    originals = others.images.cpu()
    return stamp_sheet(originals, as_uint8(trigger(as_float(originals))))


def set_digest(data: ImageSet) -> str:
    """Return the SHA-256 of a set's images and labels, in hexadecimal."""
    digest = hashlib.sha256()
    for part in (data.images, data.labels):
        digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def as_json(content: Any) -> bytes:
    """Return JSON bytes; numbers that are not finite become null."""
    return json.dumps(json_ready(content), allow_nan=False).encode()


def build_info(seconds: float, device: torch.device | None = None) -> dict[str, Any]:
    """Return by what and when something was made: recorded, but no part of its name."""
    name = "cpu" if device is None else str(device)
    if device is not None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "seconds": seconds,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": library_versions(),
        "code": code_version(),
        "machine": platform.machine(),
        "device": name,
        "threads": torch.get_num_threads(),
    }


@cache
def code_version() -> str:
    """Return a fingerprint of the library's source: 12 hexadecimal digits."""
    root = Path(lustral.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
