"""Benign references from Python and from the command line: opened as the model is, scanned before it, recorded; or trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from torch import nn

import lustral
from lustral.api import calls
from lustral.api.models import as_loaded
from lustral.cli import main
from lustral.cli.arguments import Erase, Scan, parse
from lustral.cli.opening import REFERENCES_FILE
from lustral.core.cost import Deadline
from lustral.exchange.schemas import closed, schema_of
from lustral.vision.detectors import Cascade
from lustral.vision.models import Classifier, build_classifier, save_model
from lustral.vision.records import DefenderView, Verdict
from toy import mask_verdict, scans_are, toy_images, toy_trainer, true_trigger

ARCH = "small_cnn:width=2"
CLEAN = toy_images(70, seed=2)


def by_first_weight(self: Any, view: DefenderView, **_: Any) -> Verdict:
    """Stand in for a scan: the statistic is the network's first weight, and 2 accuses."""
    network = getattr(view.model, "network", view.model)
    score = float(next(network.parameters()).detach().flatten()[0])
    areas = [40.0, 41.0, 42.0, 43.0, 4.0, 44.0, 45.0]
    found = mask_verdict(areas, (4,) if score >= 2 else (), triggers=(true_trigger(),))
    return replace(found, score=score)


class ByFirstWeight:
    inspect = by_first_weight


def network(weight: float, classes: int = 7) -> Classifier:
    built = build_classifier(ARCH, num_classes=classes, image_shape=(3, 12, 12))
    nn.init.constant_(next(built.network.parameters()), weight)
    return built.eval()


def write(path: Path, weight: float, classes: int = 7) -> Path:
    save_model(path, network(weight, classes), arch=ARCH, image_shape=(3, 12, 12))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three benign models, and a text that is none."""
    place = tmp_path / "benign"
    place.mkdir()
    for number, weight in enumerate((0.5, 2.5, 1.0)):
        write(place / f"model{number}.safetensors", weight)
    (place / "README.txt").write_text("Not a model.")
    return place


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    np.savez(tmp_path / "pool.npz", images=CLEAN.images.numpy(), labels=CLEAN.labels.numpy())
    return tmp_path / "pool.npz"


def test_a_folder_of_references_withdraws_an_accusation(folder: Path) -> None:
    for weight, outcome in ((2.4, "cannot tell"), (2.6, "backdoored"), (1.5, "clean")):
        found = lustral.scan(network(weight), CLEAN, method=ByFirstWeight(), references=folder)
        assert found.outcome == outcome
        record = found.to_dict()
        compared = record["references"]
        assert [Path(each["name"]).name for each in compared["models"]] == [f"model{k}.safetensors" for k in range(3)]
        assert [each["statistic"] for each in compared["models"]] == [0.5, 2.5, 1.0]
        assert (compared["threshold"], compared["least_p_value"]) == (2.5, 0.25)
        assert compared["digest"][:12] in record["verdict"]["basis"]
        ranked = next(entry for entry in record["verdict"]["evidence"] if entry["measure"] == "reference_rank")
        assert (ranked["label"], ranked["p_value"]) == (None, 0.25 if weight == 2.6 else 0.5)


def test_references_in_any_form_give_the_same(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    forms: list[Any] = [files[0], lustral.open_model(files[1]), network(1.0)]
    found = lustral.scan(network(2.4), CLEAN, method=ByFirstWeight(), references=forms).about["references"]
    whole = lustral.scan(network(2.4), CLEAN, method=ByFirstWeight(), references=folder).about["references"]
    same = ("weights", "statistic", "outcome")
    assert [[each[key] for key in same] for each in found["models"]] == [
        [each[key] for key in same] for each in whole["models"]
    ]
    assert [each["name"] for each in found["models"]] == [str(files[0]), "number 2", "number 3"]


def test_the_page_states_the_rank(folder: Path) -> None:
    found = lustral.scan(network(2.6), CLEAN, method=ByFirstWeight(), references=folder)
    assert ("chance of this in a benign model", "25%") in found.finding.figures
    without = lustral.scan(network(2.6), CLEAN, method=ByFirstWeight())
    assert "references" not in without.to_dict()
    assert "reference" not in without.verdict.basis


def refused(references: Any, **more: Any) -> str:
    with pytest.raises(ValueError) as caught:
        lustral.scan(network(3.0), CLEAN, method=ByFirstWeight(), references=references, **more)
    return str(caught.value)


def test_references_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    other = write(folder / "model7.safetensors", 1.7, classes=5)
    assert str(other) in refused(folder)
    assert "5" in refused([other])
    assert "reference number 1: it knows 5 classes of images (3, 12, 12); the model to be scanned knows 7" in refused(
        [lustral.open_model(other)]
    )
    other.write_bytes(b"\0" * 40)
    assert refused(folder).startswith(f"reference {other}: ")
    assert refused([tmp_path / "none.pt"]).startswith(f"reference {tmp_path / 'none.pt'}: ")
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "model.onnx").write_bytes(b"\0")
    assert "ONNX is no form to scan" in refused(tmp_path / "graph")
    (tmp_path / "empty").mkdir()
    assert "expected benign reference models in" in refused(tmp_path / "empty")
    assert refused(tmp_path / "pool").endswith("expected a folder of benign reference models")
    assert "expected references or train_references, not both" in refused(folder, train_references=3)


def test_references_are_trained_on_what_the_scan_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    data, given = toy_images(770, seed=4), network(9.0)
    asked: list[int] = []

    def recipe(*, flip: bool, num_images: int) -> Any:
        asked.append(num_images)
        return toy_trainer(epochs=1)

    monkeypatch.setattr(calls, "default_trainer", recipe)
    opened = replace(as_loaded(given, (3, 12, 12), (None, None)), arch=ARCH)
    stages: list[str] = []
    found = lustral.scan(
        opened,
        data,
        clean=70,
        method=ByFirstWeight(),
        train_references=2,
        on_progress=lambda report: stages.append(report.stage),
    )
    models = found.about["references"]["models"]
    assert [each["name"] for each in models] == ["trained 1", "trained 2"]
    assert models[0]["weights"] != models[1]["weights"]
    assert asked == [700]
    assert {"training reference 1 of 2", "training reference 2 of 2", "scanning benign references"} <= set(stages)
    with pytest.raises(
        ValueError, match=r"^699 clean images are left .* beside the 71 of the scan; expected at least 700, 100"
    ):
        lustral.scan(opened, data, clean=71, method=ByFirstWeight(), train_references=2)
    with pytest.raises(ValueError, match="expected at least one reference to train; got 0"):
        lustral.scan(opened, data, clean=70, method=ByFirstWeight(), train_references=0)
    with pytest.raises(ValueError, match=r"^no reference can be trained: .*; give benign models instead"):
        lustral.scan(given, data, clean=70, method=ByFirstWeight(), train_references=1)


def test_the_command_line_writes_down_references_before_the_scan(
    folder: Path, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suspect, out = write(tmp_path / "suspect.safetensors", 2.4), tmp_path / "out"
    was_written: list[bool] = []

    def inspect(self: Any, view: DefenderView, **rest: Any) -> Verdict:
        was_written.append((out / REFERENCES_FILE).is_file())
        return by_first_weight(self, view, **rest)

    scans_are(monkeypatch, inspect)
    line = [
        "scan",
        str(suspect),
        "--data",
        str(pool),
        "--references",
        str(folder),
        "--out",
        str(out),
        "--json",
        "--quiet",
    ]
    assert main([*line, "--device", "cpu"]) == 3
    record = json.loads(capsys.readouterr().out)
    assert was_written == [False, False, False, True]
    assert json.loads((out / REFERENCES_FILE).read_text()) == record["references"]
    jsonschema.Draft202012Validator(closed(schema_of("scan"))).validate(record)
    assert main([*line, "--train-references", "2"]) == 2
    assert "not both" in capsys.readouterr().err


def test_a_time_limit_reaches_scan_and_audit(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suspect, limits = write(tmp_path / "suspect.safetensors", 1.0), list[float]()

    def inspect(self: Any, view: DefenderView, *, deadline: Deadline, **rest: Any) -> Verdict:
        limits.append(deadline.left)
        return by_first_weight(self, view, **rest)

    scans_are(monkeypatch, inspect)
    line = ["scan", str(suspect), "--data", str(pool), "--json", "--quiet", "--device", "cpu", "--max-time"]
    assert main([*line, "3000"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["max_time"] == 3000
    assert "max_time" not in record["settings"]  # a scan is named by what it computes
    jsonschema.Draft202012Validator(closed(schema_of("scan"))).validate(record)
    assert lustral.scan(suspect, CLEAN, max_time=2000.0).to_dict()["max_time"] == 2000
    assert [round(left, -2) for left in limits] == [3000, 2000]
    for words, complaint in ((["0"], "above 0; got 0"), (["9", "--method", "mask_area"], "keeps no time limit")):
        assert main([*line, *words]) == 2
        assert complaint in capsys.readouterr().err
    erasing = parse(["erase", "m.pt", "--data", "d", "--out", "o", "--max-time", "60"])
    assert isinstance(erasing, Erase)
    assert erasing.scanning.max_time == 60
    scanning = parse(["scan", "m.pt", "--data", "d"])
    assert isinstance(scanning, Scan)
    assert (scanning.max_time, scanning.references, scanning.train_references) == (None, None, None)
    assert isinstance(scanning.settings, Cascade)
