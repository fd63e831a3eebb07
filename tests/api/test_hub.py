"""The page about hub folders: its lines run on a folder of timm's and on one of transformers'; and the command beside them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lustral
from hub_folders import write_pictures, write_timm, write_vit
from lustral.api.opening import model_file
from lustral.api.results import recovered_rates
from lustral.cli import main
from lustral.exchange.records import RESULTS
from lustral.vision.inverters import MaskSearch, MaxEntropy
from lustral.vision.models import ModelFileError
from lustral.vision.records import ImageSet, Victim
from toy import clean_images, toy_images, true_trigger

PAGE = Path(__file__).parents[2] / "docs" / "hub.md"
OURS = {"README.md", "result.json", "report.html"}
NEEDS_TRANSFORMERS = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


@pytest.fixture(scope="module")
def data() -> ImageSet:
    return toy_images(70, seed=4)


def make_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick: dict[type, dict[str, object]] = {
        MaskSearch: {"steps": 2, "batch_size": 4},
        MaxEntropy: {"steps": 1, "hidden": 4, "samples": 3, "batch_size": 4},
    }
    for kind, changes in quick.items():
        initialise: Any = vars(kind)["__init__"]
        monkeypatch.setattr(initialise, "__kwdefaults__", {**initialise.__kwdefaults__, **changes})


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("write", [write_timm, pytest.param(write_vit, marks=NEEDS_TRANSFORMERS)])
def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: ImageSet, write: Callable[[Path, ImageSet], Path]
) -> None:
    given = write(tmp_path / "theirs", data)
    write_pictures(tmp_path / "pictures", data)
    monkeypatch.chdir(tmp_path)
    make_quick(monkeypatch)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    found, erased, again = names["found"], names["erased"], names["again"]
    assert found.verdict.clean_accuracy == 1.0
    assert "<img" in found._repr_html_()
    assert erased._repr_html_()
    assert names_in(Path("erased")) == names_in(given) | OURS
    card = Path("erased/README.md").read_text()
    assert hashlib.sha256(Path("erased/model.safetensors").read_bytes()).hexdigest() in card
    assert hashlib.sha256((given / "model.safetensors").read_bytes()).hexdigest() in card
    assert "| clean accuracy, clean images | 100.0% of 70 images |" in card
    assert again.class_names == ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
    assert lustral.evaluate(again, "pictures").accuracy == pytest.approx(
        json.loads(Path("erased/result.json").read_text())["accuracy"]["clean images"]["after"]["value"]
    )
    if write is write_vit:
        from transformers import ViTForImageClassification

        opened = ViTForImageClassification.from_pretrained("erased")
        assert torch.equal(opened.classifier.weight, again.model.network.classifier.weight)
        assert not torch.equal(opened.classifier.bias, torch.zeros(7))


def test_the_command_gives_a_sharded_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: ImageSet, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = write_timm(tmp_path / "theirs", data, shards=3), tmp_path / "erased"
    (given / "pytorch_model.bin").write_bytes(b"not erased")
    write_pictures(tmp_path / "pictures", data)
    line = ["erase", str(given), "--data", str(tmp_path / "pictures"), "--out", str(out), "--method", "bn_refresh"]
    for _ in range(2):  # the second run takes the place of the first
        capsys.readouterr()
        assert main([*line, "--json", "--quiet", "--device", "cpu"]) == 0
    record = json.loads(capsys.readouterr().out)
    RESULTS["erase"].model_validate(record)
    assert names_in(out) == (names_in(given) | OURS) - {"pytorch_model.bin"}
    weights = [name for name in names_in(given) if name.endswith(".safetensors")]
    assert len(weights) == 3
    assert any((given / name).read_bytes() != (out / name).read_bytes() for name in weights)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# A model\n\n<!-- lustral: begin -->")
    assert card.count("## Backdoor check") == 1
    assert "| left out, not erased | `pytorch_model.bin` |" in card
    assert "| done | erased, method `bn_refresh`, with 70 clean images |" in card
    for name in weights:
        for place in (given, out):
            assert hashlib.sha256((place / name).read_bytes()).hexdigest() in card
    written = {Path(each["file"]).name: each["sha256"] for each in record["written_safety"]["files"]}
    assert written == {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in weights}
    assert record["recovered"] == []
    opened = lustral.open_model(out)
    assert lustral.evaluate(opened, tmp_path / "pictures").accuracy > 0.9


def test_a_recovered_trigger_is_tried_on_clean_images_of_other_classes(backdoored: Victim, benign: Victim) -> None:
    clean, trigger = clean_images(), true_trigger()
    rates = recovered_rates(trigger, backdoored.model, benign.model, clean)
    others = clean.subset(clean.labels != trigger.target_label)
    stamped = (trigger(others.images / 255) * 255).round() / 255
    with torch.inference_mode():
        expected = [int((each.model.eval()(stamped).argmax(1) == 4).sum()) for each in (backdoored, benign)]
    assert (rates.label, rates.before.hits, rates.after.hits) == (4, *expected)
    assert rates.before.total == rates.after.total == len(others) == 240
    assert rates.before.value > 0.9
    assert rates.after.value < 0.1


def test_what_cannot_be_copied_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: ImageSet, capsys: pytest.CaptureFixture[str]
) -> None:
    given = write_timm(tmp_path / "theirs", data)
    write_pictures(tmp_path / "pictures", data)
    monkeypatch.setattr("lustral.cli.commands.run_eraser", lambda *_, **__: pytest.fail("the work had begun"))
    monkeypatch.setattr("lustral.api.verbs.run_eraser", lambda *_, **__: pytest.fail("the work had begun"))
    line = ["erase", str(given), "--data", str(tmp_path / "pictures"), "--method", "bn_refresh", "--device", "cpu"]
    assert main([*line, "--out", str(given)]) == 2
    assert "expected another folder" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    assert main([*line, "--out", str(tmp_path / "full")]) == 2
    assert "expected a new or empty folder" in " ".join(capsys.readouterr().err.split())
    (given / "key").symlink_to(tmp_path / "full" / "notes.txt")
    assert main([*line, "--out", str(tmp_path / "out")]) == 2
    assert "is a link or no regular file" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelFileError, match="is a link or no regular file"):
        lustral.erase(given, tmp_path / "pictures", method="bn_refresh")
    assert model_file(given) == given  # a scan writes nothing, and may look at it
