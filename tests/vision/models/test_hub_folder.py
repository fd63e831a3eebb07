"""Folders as model hubs have them: what they say is used, and nothing in them runs."""

import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from lustral.api.opening import model_file
from lustral.vision.models import LoadedModel, ModelFileError, load_model, save_like
from lustral.vision.models.files.hub_folder import image_size_of, is_hub_folder, read_hub_folder
from lustral.vision.victims import VictimError

NAMES = ["ant", "bee", "cat", "dog"]
RECIPE = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "fixed_input_size": False}
CONFIG = {"architecture": "test_resnet", "num_classes": 4, "pretrained_cfg": RECIPE, "label_names": NAMES}


def state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=4).state_dict()


def write_folder(folder: Path, config: Any = CONFIG, *, shards: int = 1, suffix: str = "safetensors") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for number, (key, value) in enumerate(state().items()):
        parts[number % shards][key] = value
    names = [
        f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}" if shards > 1 else f"{stem}.{suffix}"
        for number in range(shards)
    ]
    for name, part in zip(names, parts, strict=True):
        safetensors.torch.save_file(part, folder / name, {"format": "pt"}) if stem == "model" else torch.save(
            part, folder / name
        )
    if shards > 1:
        listed = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


def assert_holds(loaded: LoadedModel, expected: dict[str, Tensor]) -> None:
    found = loaded.model.network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_opens_by_itself_and_comes_back_as_it_was(tmp_path: Path, suffix: str, shards: int) -> None:
    given = write_folder(tmp_path / "given", shards=shards, suffix=suffix)
    loaded = load_model(given)
    assert (loaded.arch, loaded.num_classes, loaded.image_shape) == ("timm:test_resnet", 4, (3, 32, 32))
    assert loaded.class_names == tuple(NAMES)
    assert loaded.model.normalise.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert loaded.model.normalise.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert_holds(loaded, state())
    assert image_size_of(given) == (32, 32)
    loaded.model.network.load_state_dict(state(1))
    (tmp_path / "out").mkdir()
    assert save_like(tmp_path / "out" / "model", loaded.model, loaded) == tmp_path / "out"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in given.iterdir()}
    assert (tmp_path / "out" / "config.json").read_bytes() == (given / "config.json").read_bytes()
    assert_holds(load_model(tmp_path / "out"), state(1))
    assert_holds(load_model(given), state())


def test_the_size_is_the_users_to_choose_where_the_network_takes_any(tmp_path: Path) -> None:
    given = write_folder(tmp_path / "any")
    assert load_model(given, image_shape=(3, 48, 48)).image_shape == (3, 48, 48)
    with pytest.raises(ModelFileError, match=r"made for images of shape \(3, 32, 32\); expected \(1, 32, 32\)"):
        load_model(given, image_shape=(1, 32, 32))
    fixed = write_folder(tmp_path / "fixed", {**CONFIG, "pretrained_cfg": {**RECIPE, "fixed_input_size": True}})
    with pytest.raises(ModelFileError, match="made for images of shape"):
        load_model(fixed, image_shape=(3, 48, 48))


def test_names_of_classes_come_in_the_order_of_the_logits(tmp_path: Path) -> None:
    names = {str(label): name for label, name in reversed([*enumerate(NAMES)])}
    config = {**{key: value for key, value in CONFIG.items() if key != "label_names"}, "id2label": names}
    assert read_hub_folder(write_folder(tmp_path / "a", config)).class_names == tuple(NAMES)
    config["id2label"] = {str(label): f"LABEL_{label}" for label in range(4)}
    assert read_hub_folder(write_folder(tmp_path / "b", config)).class_names is None


def test_other_weights_in_the_folder_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = write_folder(tmp_path / "given")
    torch.save(state(1), given / "pytorch_model.bin")
    with caplog.at_level(logging.WARNING):
        assert_holds(load_model(given), state())
    assert "looked at model.safetensors; not looked at: pytorch_model.bin" in caplog.text


def test_no_code_of_a_folder_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    config = {
        "model_type": "mine",
        "auto_map": {"AutoModelForImageClassification": "modeling.Net"},
        "id2label": dict(enumerate(NAMES)),
    }
    given = write_folder(tmp_path / "given", config)
    (given / "modeling.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    with pytest.raises(ModelFileError, match=r"model_type 'mine' is no image classifier known here .*pass arch"):
        load_model(given)
    for name in ("../modeling.py:Net", "modeling.py:Net", "hf-hub:someone/model", "local-dir:/tmp", "x\ny"):
        (given / "config.json").write_text(json.dumps({**CONFIG, "architecture": name}))
        with pytest.raises(ValueError, match=r"unknown timm model|is Python code|expected"):
            load_model(given)
    assert not mark.exists()
    assert (
        load_model(given, arch="timm:test_resnet", image_shape=(3, 32, 32)).num_classes == 4
    )  # the user may know better


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[" * 10**5, "no readable JSON"),
        ("3", "expected a JSON object; got a int"),
        ('{"a": ' + "9" * 10**5 + "}", "no readable JSON"),
        (" " * 2**22 + "{}", "more than 4194304 bytes"),
        ({**CONFIG, "num_classes": 10**9}, "number of classes 1000000000"),
        ({**CONFIG, "num_classes": 5}, "4 class names for 5 classes"),
        ({**CONFIG, "label_names": ["a", "b", "c", "\x1b[2J"]}, "characters that can be printed"),
        ({**CONFIG, "label_names": ["a", "b", "c", "\u202e"]}, "characters that can be printed"),
        ({**CONFIG, "label_names": {"0": "a", "7": "b"}}, "not 0, 1, 2"),
        ({**CONFIG, "pretrained_cfg": {**RECIPE, "input_size": [3, 10**6, 10**6]}}, "image shape"),
        ({**CONFIG, "pretrained_cfg": {**RECIPE, "input_size": [3]}}, "damaged"),
        ({**CONFIG, "pretrained_cfg": {**RECIPE, "std": [0, 1, 1]}}, "mean or std"),
        ({**CONFIG, "pretrained_cfg": {**RECIPE, "mean": [float("nan")] * 3}}, "mean or std"),
        ({**CONFIG, "model_args": {"checkpoint_path": "/etc/passwd"}}, r"model_args \(checkpoint_path\).*pass arch"),
        ({**CONFIG, "global_pool": "max"}, "pools features by 'max', timm:test_resnet by 'avg'"),
        ({"model_type": "vit", "num_hidden_layers": 10**6}, "num_hidden_layers beyond 512"),
        ({"model_type": "vit", "hidden_size": 10**9}, "hidden_size beyond 65536"),
        ({"model_type": "vit", "image_size": 10**9}, "image shape"),
    ],
)
def test_hostile_configurations_are_refused(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        load_model(write_folder(tmp_path / "given", config))


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "a.bin", "a.py", "", "a\n.safetensors"])
def test_an_index_names_files_beside_it(tmp_path: Path, name: str) -> None:
    given = write_folder(tmp_path / "given", shards=2)
    index = given / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["conv1.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ModelFileError, match="expected at most 256 files"):
        load_model(given)


def test_an_index_and_its_files_agree(tmp_path: Path) -> None:
    given = write_folder(tmp_path / "given", shards=2)
    index = given / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    key, name = next(iter(content["weight_map"].items()))
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "more": name}}))
    with pytest.raises(ModelFileError, match="that the index names are missing: more"):
        load_model(given)
    del content["weight_map"][key]
    index.write_text(json.dumps(content))
    with pytest.raises(ModelFileError, match=f"that the index does not name: {key}"):
        load_model(given)
    (given / name).unlink()
    with pytest.raises(ModelFileError, match="no such file"):
        load_model(given)


def test_what_is_no_such_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "config.json")
    assert not is_hub_folder(tmp_path / "a")
    with pytest.raises(VictimError, match=r"folder without victim\.json: name a model file, .* config\.json"):
        model_file(tmp_path / "a")
    given = write_folder(tmp_path / "given")
    assert model_file(given) == given
    (given / "victim.json").write_text("{}")
    with pytest.raises(VictimError, match="schema"):  # a victim's folder is told by its record
        model_file(given)
    (given / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"no weights; expected model\.safetensors or"):
        load_model(given)
    (given / "onnx").mkdir()
    (given / "onnx" / "model.onnx").touch()
    with pytest.raises(ModelFileError, match=r"no weights; .* ONNX is no form to scan or erase"):
        load_model(given)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("rescale", [1 / 255, 1 / 127.5])
def test_a_folder_of_transformers_opens_by_itself(tmp_path: Path, rescale: float) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    names = dict(enumerate(NAMES))
    network = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, id2label=names)).eval()
    network.save_pretrained(tmp_path / "given")
    content = {"do_normalize": True, "do_rescale": True, "rescale_factor": rescale, "size": {"height": 32, "width": 32}}
    content |= {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "given" / "preprocessor_config.json").write_text(json.dumps(content))
    loaded = load_model(tmp_path / "given", num_classes=4, image_shape=(3, 32, 32))
    assert (loaded.arch, loaded.class_names, loaded.image_shape) == ("transformers:vit", tuple(NAMES), (3, 32, 32))
    images = torch.rand(2, 3, 32, 32)
    expected = network(pixel_values=(images * 255 * rescale - 0.5) / 0.25).logits
    torch.testing.assert_close(loaded.model(images), expected, atol=1e-4, rtol=1e-4)
    (tmp_path / "out").mkdir()
    with torch.no_grad():
        loaded.model.network.classifier.bias.fill_(3)  # type: ignore[union-attr, operator]
    save_like(tmp_path / "out" / "model", loaded.model, loaded)
    again = ViTForImageClassification.from_pretrained(tmp_path / "out")
    assert again.classifier.bias.tolist() == [3] * 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pretrained_cfg": "x"}, "expected names and values under pretrained_cfg; got x"),
        ({"pretrained_cfg": [1, 2]}, "expected names and values under pretrained_cfg"),
        ({"model_args": 3.5}, "expected names and values under model_args; got 3.5"),
        ({"model_type": "vit", "image_size": 8, "num_channels": 10**10}, "image shape"),
        ({"model_type": "vit", "image_size": 8, "num_channels": "3"}, "image shape"),
    ],
)
def test_parts_of_other_kinds_are_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    given = write_folder(tmp_path / "given", {**CONFIG, **changes})
    (given / "preprocessor_config.json").write_text('{"do_normalize": false}')
    with pytest.raises(ModelFileError, match=reason):
        read_hub_folder(given)
