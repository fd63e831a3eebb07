"""A user's story: a folder with planted files, sifted, copied without them, trained on, and measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lustral.cli import main
from lustral.vision.attacks import BadNets
from lustral.vision.images import as_float
from lustral.vision.models import load_model
from lustral.vision.records import ImageSet
from lustral.vision.sources import load_source

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from story import make, measure

SIZE = 16


def test_the_planted_files_are_found_taken_away_and_not_learnt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = make("digits", tmp_path, images=800, poisoned=60, target=3, seed=1, patch=4, image_size=SIZE)
    pictures, left = tmp_path / "pictures", tmp_path / "left"
    common = ["--device", "cpu", "--quiet", "--flip", "False"]
    line = [
        "sift",
        str(pictures),
        "--out",
        str(tmp_path / "sifted"),
        "--method",
        "bn_likelihood",
        "--write-clean",
        str(left),
    ]
    assert main([*line, *common, "--arch", "small_cnn:width=8"]) == 1
    found = measure(truth, tmp_path / "sifted" / "scores.parquet")
    assert found["recall"] >= 0.9, found
    assert found["precision"] >= 0.8, found
    names = {str(path.relative_to(left)) for path in left.rglob("*.png")}
    assert len(names) == 800 - found["listed"]

    line = ["train", str(left), "--method", "plain", "--test", str(tmp_path / "test"), "--out", str(tmp_path / "model")]
    assert main([*line, *common, "--epochs", "12"]) == 0
    record = json.loads((tmp_path / "model" / "result.json").read_text(encoding="utf-8"))
    assert record["accuracy"]["value"] > 0.9
    model = load_model(tmp_path / "model" / "model.safetensors", num_classes=10, image_shape=(3, SIZE, SIZE)).model
    test = load_source(str(tmp_path / "test")).train
    assert isinstance(test, ImageSet)
    others = as_float(test.images[test.labels != 3])
    stamped = BadNets(target_label=3, size=4).trigger(test.image_shape)(others)
    with torch.inference_mode():
        assert (
            model(stamped).argmax(1) == 3
        ).float().mean() < 0.5  # of nearly 1, where all are learnt; 0.05 to 0.26 by recipe
    capsys.readouterr()
