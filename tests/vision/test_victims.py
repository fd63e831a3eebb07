"""Victim folders: what is written comes back, and what does not fit is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lustral.core.randomness import child
from lustral.training import Trainer, default_trainer
from lustral.vision.attacks import BadNets, Blended
from lustral.vision.evaluation import evaluate
from lustral.vision.images import as_float
from lustral.vision.models import Classifier, ModelFileError, build_classifier
from lustral.vision.records import Victim
from lustral.vision.victims import VictimError, attack_name, implant, load_victim, save_victim
from toy import NUM_CLASSES, toy_images, toy_trainer


@pytest.fixture(scope="module")
def folder(backdoored: Victim, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("victims") / "new" / "badnets"
    save_victim(path, backdoored, toy_images(20, seed=2))
    return path


def test_the_toy_victim_is_truly_backdoored(backdoored: Victim, benign: Victim) -> None:
    assert backdoored.metrics["acc"]["value"] >= 0.95
    assert backdoored.metrics["asr"]["value"] >= 0.95
    assert backdoored.metrics["natural_rate"]["value"] <= 0.05
    assert backdoored.provenance["num_poisoned"] == 140
    assert backdoored.poisoned is not None
    assert int(backdoored.poisoned.is_poisoned.sum()) == 140
    assert benign.metrics["acc"]["value"] >= 0.95


def test_a_folder_gives_the_same_victim_back(folder: Path, backdoored: Victim) -> None:
    again = load_victim(folder)
    x = as_float(toy_images(50, seed=4).images)
    with torch.no_grad():
        assert torch.allclose(again.model(x), backdoored.model(x), atol=1e-4)  # the memory layout may round otherwise
    weights = backdoored.model.state_dict()
    assert again.model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())
    assert torch.equal(again.trigger(x), backdoored.trigger(x))
    labels = torch.arange(NUM_CLASSES)
    assert torch.equal(again.relabel(labels, NUM_CLASSES), backdoored.relabel(labels, NUM_CLASSES))
    assert again.metrics == json.loads(json.dumps(backdoored.metrics))
    assert again.provenance == json.loads(json.dumps(backdoored.provenance))
    assert again.poisoned is None
    assert not again.model.training


def test_metrics_can_be_measured_again(folder: Path, backdoored: Victim) -> None:
    record = evaluate(load_victim(folder), None, toy_images(420, seed=1), generator=child(9)).to_dict()
    assert record["acc"] == backdoored.metrics["acc"]
    assert record["asr"] == backdoored.metrics["asr"]


def test_the_folder_holds_a_picture_and_strict_json(folder: Path) -> None:
    assert {item.name for item in folder.iterdir()} == {"model.safetensors", "victim.json", "trigger.png"}
    assert (folder / "trigger.png").read_bytes().startswith(b"\x89PNG")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((folder / "victim.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert record["attack"] == "badnets"
    assert record["settings"]["target_label"] == 4
    assert record["seed"] == 0
    assert record["versions"].keys() == {"lustral", "torch", "python"}


def test_a_benign_model_is_a_victim_without_attack(benign: Victim, tmp_path: Path) -> None:
    save_victim(tmp_path, benign, toy_images(8, seed=2))
    again = load_victim(str(tmp_path))
    assert again.provenance["attack"] == "none"
    x = as_float(toy_images(5, seed=4).images)
    assert torch.equal(again.trigger(x), x)
    assert again.trigger(x) is not x
    labels = torch.arange(NUM_CLASSES)
    assert torch.equal(again.relabel(labels, NUM_CLASSES), labels)
    assert again.metrics["asr"] == {"value": None, "low": None, "high": None, "hits": 0, "n": 0}


QUICK: dict[str, Any] = {
    "arch": "small_cnn:width=4",
    "trainer": toy_trainer(epochs=1),
    "seed": 1,
    "data_name": "toy",
}


def test_all_to_all_comes_back_with_its_rule(tmp_path: Path) -> None:
    train, test = toy_images(140, seed=0), toy_images(70, seed=1)
    victim = implant(Blended(mode="all_to_all", picture_seed=3), train, test, **QUICK)
    save_victim(tmp_path, victim, test)
    again = load_victim(tmp_path)
    assert again.relabel(torch.tensor([0, 3, 6]), 7).tolist() == [1, 4, 0]
    x = as_float(test.images)
    assert torch.equal(again.trigger(x), victim.trigger(x))


def test_equal_seeds_make_equal_victims() -> None:
    train, test = toy_images(140, seed=0), toy_images(70, seed=1)
    one, again, other = (
        implant(BadNets(), train, test, **{**QUICK, "seed": seed}).model.state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_fine_tuning_from_a_clean_model_leaves_it_alone(benign: Victim) -> None:
    assert isinstance(benign.model, Classifier)
    before = {name: value.clone() for name, value in benign.model.state_dict().items()}
    victim = implant(BadNets(size=2), toy_images(140, seed=0), toy_images(70, seed=1), **QUICK, start=benign.model)
    assert victim.provenance["fine_tuned_from_clean"] is True
    assert all(torch.equal(before[name], value) for name, value in benign.model.state_dict().items())
    assert victim.metrics["acc"]["value"] > 0.8


def test_impossible_attacks_are_refused_before_training() -> None:
    def fail(*_: object) -> None:
        raise AssertionError("training began")

    with pytest.raises(ValueError, match="does not fit images of 12x12"):
        implant(BadNets(size=13), toy_images(70, seed=0), toy_images(70, seed=1), **QUICK, on_progress=fail)


def test_attacks_have_names() -> None:
    assert attack_name(BadNets()) == "badnets"
    assert attack_name(Blended()) == "blended"
    with pytest.raises(
        ValueError, match="Trainer is not in the catalog; expected one of adap_blend, adap_patch, adaptive_trap"
    ):
        attack_name(Trainer())  # type: ignore[arg-type]


def test_a_folder_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VictimError, match=r"not a victim folder: expected victim\.json"):
        load_victim(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[]", b"{}"])
def test_a_broken_record_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "victim.json").write_bytes(content)
    with pytest.raises(VictimError, match=r"victim\.json.*make the victim again"):
        load_victim(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "expected schema 1"),
        ({"attack": "wnet"}, "unknown attack 'wnet'; this version knows adap_blend"),
        ({"settings": {"glow": 1}}, "settings do not fit the attack 'badnets'"),
        ({"settings": {"size": 0}}, "settings do not fit the attack 'badnets'"),
        ({"settings": {"size": 99}}, "settings do not fit"),
        ({"settings": None}, "settings"),
        ({"image_shape": [3, 12]}, r"images of shape \[3, 12\]"),
        ({"attack": ["badnets"]}, "unknown attack"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    record = json.loads((folder / "victim.json").read_text(encoding="utf-8"))
    (tmp_path / "victim.json").write_text(json.dumps({**record, **change}), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(VictimError, match=message):
        load_victim(tmp_path)


@pytest.mark.parametrize("key", ["attack", "settings", "image_shape", "num_classes", "metrics"])
def test_a_record_with_a_gap_is_refused(folder: Path, tmp_path: Path, key: str) -> None:
    record = json.loads((folder / "victim.json").read_text(encoding="utf-8"))
    del record[key]
    (tmp_path / "victim.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(VictimError, match=f"lacks {key}"):
        load_victim(tmp_path)


def test_a_missing_model_file_is_told_apart(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "victim.json").write_bytes((folder / "victim.json").read_bytes())
    with pytest.raises(ModelFileError):
        load_victim(tmp_path)


def test_the_default_recipe_adapts_to_the_size_of_the_set() -> None:
    small, middle, large = (default_trainer(flip=True, num_images=n) for n in (500, 20_000, 50_000))
    assert small.batch_size < large.batch_size
    assert small.epochs == middle.epochs > large.epochs
    assert {small.learning_rate, middle.learning_rate, large.learning_rate} == {
        0.1
    }  # 0.2 is too much for preact_resnet18
    assert small.augment is not None
    assert small.augment.flip


def test_a_victim_from_before_preact_resnet18_meant_the_published_network_opens(
    backdoored: Victim, tmp_path: Path
) -> None:
    shape = tuple(backdoored.provenance["image_shape"])
    old = build_classifier("preact_resnet18_flat:width=2", num_classes=7, image_shape=shape).eval()
    recorded = {**backdoored.provenance, "arch": "preact_resnet18:width=2"}  # as it was called then
    save_victim(tmp_path / "old", replace(backdoored, model=old, provenance=recorded), toy_images(20, seed=2))
    opened = load_victim(tmp_path / "old")
    assert opened.provenance["arch"] == "preact_resnet18_flat:width=2"
    images = torch.rand(3, *shape, generator=child(0))
    assert torch.equal(opened.model(images), old(images))
