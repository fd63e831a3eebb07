"""Real results of the commands on the toy world, made once: what the exchange formats are held against."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator

from lustral.catalog import SIFTERS
from lustral.cli import main
from lustral.core.records import Cost, OnProgress
from lustral.vision.records import ImageSet, Sifted, TrainingView, Victim
from lustral.vision.victims import save_victim
from toy import tinted_images, toy_images

SHORT = (
    "--hidden 32 --samples 48 --search.steps 150 --inverter.batch-size 16 --search.batch-size 16 --inverter.steps 15"
)
QUICK = f"--method mask_area {SHORT}"


@dataclass(frozen=True, kw_only=True)
class Corner:
    """List what has a white corner."""

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "eyes"
    cost_passes: ClassVar[float] = 0.01
    least_images: ClassVar[int] = 30

    threshold: float = 0.95

    def sift(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Sifted:
        scores = torch.cat([batch.inputs[:, :, -2:, -2:].mean((1, 2, 3)) for batch in view.untrusted.batches(50)])
        cost = Cost(seconds=0.5, image_passes=3.0, peak_memory_bytes=0, clean_images=0)
        said = {"scores": scores, "flagged": scores > self.threshold, "threshold": self.threshold, "cost": cost}
        return Sifted(**said, basis="The score is how bright the corner is.")


@dataclass(frozen=True)
class Results:
    """The folder of everything, what each command printed with --json, and its exit code."""

    folder: Path
    printed: Mapping[str, Any]
    codes: Mapping[str, int]

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


def write_sets(path: Path, clean: ImageSet, test: ImageSet) -> Path:
    arrays = {}
    for split, data in (("train", clean), ("test", test)):
        arrays[f"{split}_images"] = data.images.permute(0, 2, 3, 1).numpy()
        arrays[f"{split}_labels"] = data.labels.numpy()
    np.savez(path, class_names=np.array(["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]), **arrays)
    return path


def write_pictures(folder: Path, data: ImageSet) -> Path:
    for number, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        path = folder / "abcdefg"[label] / f"picture {number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(path)
    return folder


def make_results(place: Path, backdoored: Victim) -> Results:
    """Run every command that writes a record, and keep what it wrote and printed."""
    test = toy_images(420, seed=1)
    save_victim(place / "victim", backdoored, test)
    data = write_sets(place / "toy.npz", toy_images(5600, seed=2), test)  # 5 % of it are the defender's
    poisoned = tinted_images(160, seed=3)
    poisoned.images[:12, :, -3:, -3:], poisoned.labels[:12] = 255, 1
    pictures = write_pictures(place / "pictures", poisoned)
    model = f"{place}/victim --data {data} --seed 1"
    files = "--cyclonedx {0}/{1}.cdx.json --attestation {0}/{1}.intoto.json"
    lines = {
        "scan": f"{model} --out {place}/scan --sarif {place}/scan.sarif {files.format(place, 'scan')} {QUICK}",
        "erase": f"{model} --out {place}/erase {files.format(place, 'erase')} --verdict {place}/scan "
        f"--method baeraser {SHORT} --epochs 1 --rounds 1 --least-steps 1",
        "plain": f"{model} --out {place}/plain --method bn_refresh {files.format(place, 'plain')}",
        "sift": f"{pictures} --out {place}/sift --method corner --arch small_cnn:width=4 --sarif {place}/sift.sarif",
        "train": f"{pictures} --out {place}/train --method plain --arch small_cnn:width=4 --epochs 1",
        "evaluate": f"{place}/victim --data {data} --model {place}/erase/model.safetensors --out {place}/evaluate",
    }
    printed, codes = {}, {}
    for name, line in lines.items():
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
            patch.setitem(SIFTERS, "corner", Corner)
            words = [name.replace("plain", "erase"), *line.split(), "--json", "--quiet", "--device", "cpu"]
            codes[name] = main(words)
        printed[name] = json.loads(out.getvalue())
    return Results(place, printed, codes)
