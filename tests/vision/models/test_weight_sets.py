"""Weights are found wherever they are, several sets are never confused, and a file comes back with others in their place."""

import argparse
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from lustral.vision.models import LoadedModel, ModelFileError, build_classifier, load_model, save_like
from lustral.vision.models.files.weight_sets import NamedTensors, find_mappings, find_sets

ARCH = "small_cnn:width=2"
SHAPE = (3, 8, 8)
State = dict[str, Tensor]


def weights(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    network = build_classifier(ARCH, num_classes=4, image_shape=SHAPE, generator=generator).network
    return network.state_dict()


def load(path: Path, **more: Any) -> LoadedModel:
    return load_model(path, arch=ARCH, image_shape=SHAPE, mean=(0.5,) * 3, std=(0.5,) * 3, **more)


def assert_holds(loaded: LoadedModel, expected: State) -> None:
    found = loaded.model.network.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def renamed(state: State, change: Callable[[str], str]) -> State:
    return {change(key): value for key, value in state.items()}


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda state: {"netC": state, "identity_grid": torch.rand(1, 8, 8, 2), "best": torch.tensor(9.0)}, "netC"),
        (lambda state: {"a": {"b": {"c": {"d": {"any name": state}}}}}, "a.b.c.d.any name"),
        (lambda state: [{"epoch": 1}, (state, 3)], "1.0"),
        (lambda state: {"args": argparse.Namespace(lr=1, init=state)}, "args.init"),
        (lambda state: {**state, "epoch": 3, "accuracy": np.float64(0.5)}, "."),
        (lambda state: {"model": state, "ema": {"decay": torch.tensor(0.9)}}, "model"),
    ],
)
def test_every_mapping_is_considered_whatever_its_name_and_depth(
    tmp_path: Path, wrap: Callable[[State], Any], name: str
) -> None:
    torch.save(wrap(weights()), tmp_path / "a.pth.tar")
    loaded = load(tmp_path / "a.pth.tar")
    assert loaded.weights == name
    assert_holds(loaded, weights())


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace("features.", "features.module."),
        lambda key: f"student.backbone.{key}",
        lambda key: f"1.{key}",  # nn.Sequential(Normalise(), network); the network has parts called "1" as well
        lambda key: "module." + key.replace("features.", "features._orig_mod.wrapped."),
        lambda key: key.replace(".weight", ".parametrized.weight"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_wrappers_names_are_taken_off_anywhere(tmp_path: Path, change: Callable[[str], str], suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    given = renamed(weights(), change)
    safetensors.torch.save_file(given, path) if suffix == ".safetensors" else torch.save(given, path)
    loaded = load(path)
    assert_holds(loaded, weights())
    save_like(tmp_path / "b", build(1), loaded)
    assert_holds(load(tmp_path / f"b{suffix}"), weights(1))


def test_a_network_inside_of_a_users_wrapper_finds_bare_keys(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\nfrom lustral.vision.models import SmallCNN\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.inner = SmallCNN(num_classes, width=2)\n"
        "    def forward(self, x):\n"
        "        return self.inner(x)\n"
    )
    torch.save(weights(), tmp_path / "a.pt")
    loaded = load_model(tmp_path / "a.pt", arch=f"{tmp_path / 'net.py'}:Net", image_shape=SHAPE)
    assert_holds(loaded, renamed(weights(), lambda key: f"inner.{key}"))


def test_keys_that_the_network_does_not_use_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({**weights(), "head_dist.weight": torch.ones(2)}, tmp_path / "a.pt")
    with caplog.at_level(logging.WARNING):
        assert_holds(load(tmp_path / "a.pt"), weights())
    assert "does not use 1 tensors of the file: head_dist.weight" in caplog.text
    short = weights()
    del short["linear.bias"]
    torch.save({**short, "head_dist.weight": torch.ones(2)}, tmp_path / "b.pt")
    with pytest.raises(ModelFileError, match=r"1 missing: linear\.bias\n.*1 unexpected: head_dist\.weight"):
        load(tmp_path / "b.pt")


SEVERAL: list[tuple[Callable[[State, State], Any], str, str]] = [
    (lambda a, b: {"state_dict": a, "state_dict_ema": b}, "state_dict", "state_dict_ema"),
    (lambda a, b: {"best": {"model": a}, "last": {"model": b}}, "best.model", "last.model"),
    (lambda a, b: {**a, "ema": b}, ".", "ema"),
    (
        lambda a, b: {"w": {**renamed(a, "student.{}".format), **renamed(b, "module.teacher.{}".format)}},
        "w.student",
        "w.module.teacher",
    ),
    (lambda a, b: [a, b], "0", "1"),
]


@pytest.mark.parametrize(("wrap", "first", "second"), SEVERAL)
def test_several_sets_are_asked_about(
    tmp_path: Path, wrap: Callable[[State, State], Any], first: str, second: str
) -> None:
    torch.save(wrap(weights(1), weights(2)), tmp_path / "a.pt")
    with pytest.raises(ModelFileError, match=rf"several sets .* they differ: {first}, {second}; .*--weights NAME"):
        load(tmp_path / "a.pt")
    for name, seed in {first: 1, second: 2}.items():
        loaded = load(tmp_path / "a.pt", weights=name)
        assert loaded.weights == name
        assert_holds(loaded, weights(seed))
    with pytest.raises(ModelFileError, match=rf"no weights 'third' .* expected one of {first}, {second}"):
        load(tmp_path / "a.pt", weights="third")


@pytest.mark.parametrize(("wrap", "first", "second"), SEVERAL)
def test_equal_sets_need_no_question_and_stay_equal(
    tmp_path: Path, wrap: Callable[[State, State], Any], first: str, second: str
) -> None:
    torch.save(wrap(weights(1), weights(1)), tmp_path / "a.pt")
    loaded = load(tmp_path / "a.pt")
    assert loaded.weights == first
    save_like(tmp_path / "b", build(2), loaded)
    assert_holds(load(tmp_path / "b.pt", weights=second), weights(2))


def test_a_set_of_another_size_is_no_question_but_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher = build_classifier("small_cnn:width=4", num_classes=4, image_shape=SHAPE).network.state_dict()
    torch.save({"teacher": teacher, "student": weights()}, tmp_path / "a.pt")
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path / "a.pt").weights == "student"
    assert "looked at student; not looked at: teacher" in caplog.text


def test_an_optimizers_memory_is_no_set_of_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = build(0).network
    optimizer = torch.optim.Adam(network.parameters())
    sum(parameter.sum() for parameter in network.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    momentum = {key: torch.full_like(value, 2) for key, value in weights().items()}
    content = {"optimizer": optimizer.state_dict(), "model": weights(), "optim": {"momentum": momentum}}
    torch.save(content, tmp_path / "a.pt")
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path / "a.pt").weights == "model"
    assert "not looked at: optim.momentum" in caplog.text  # a name is no proof


def test_many_mappings_and_long_keys_take_no_long_search() -> None:
    state = weights()
    content = {str(n): {f"{'x.' * 1000}{m}": torch.empty(0) for m in range(20)} for n in range(2000)}
    mappings = find_mappings(Path("a.pt"), {**content, "model": state})
    assert [found.name for found in find_sets(mappings, state)] == ["model"]


def test_mappings_are_found_once_and_in_order() -> None:
    one = torch.ones(1)
    inner = {"a": one}
    found = find_mappings(Path("a.pt"), {"x": inner, "y": inner, "z": {"b": one, 3: one, "c": 4}})
    assert [(mapping.path, sorted(mapping.tensors)) for mapping in found] == [(("x",), ["a"]), (("z",), ["b"])]
    assert isinstance(found[0], NamedTensors)


# What came in goes out


def build(seed: int) -> Any:
    model = build_classifier(ARCH, num_classes=4, image_shape=SHAPE)
    model.network.load_state_dict(weights(seed))
    return model


def content_of(path: Path) -> Any:
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin", "a.ckpt", "a.pth.tar", "a.tar"])
@pytest.mark.parametrize("legacy", [False, True])
def test_the_file_comes_back_with_other_weights_and_nothing_else_changed(
    tmp_path: Path, name: str, legacy: bool
) -> None:
    half = {f"module.{key}": value.half() if value.is_floating_point() else value for key, value in weights().items()}
    half["module.features.0.weight"] = half["module.features.0.weight"].contiguous(memory_format=torch.channels_last)
    half = dict(reversed(half.items()))
    given = {
        "epoch": 7,
        "net": half,
        "args": argparse.Namespace(lr=0.1),
        "acc": np.float64(94),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(5)}}},
    }
    torch.save(given, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    loaded = load(tmp_path / name)
    assert (loaded.weights, loaded.key_prefix) == ("net", "module.")
    written = save_like(tmp_path / "out", build(5), loaded)
    assert written.name == name.replace("a.", "out.", 1)
    found = content_of(written)
    assert list(found) == list(given)
    assert list(found["net"]) == list(half)
    assert found["args"] == given["args"]
    assert found["acc"] == 94
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], torch.ones(5))
    for key, value in weights(5).items():
        tensor = found["net"][f"module.{key}"]
        assert tensor.dtype == half[f"module.{key}"].dtype
        assert tensor.stride() == half[f"module.{key}"].stride()
        assert torch.equal(tensor, value.to(tensor.dtype))
    if not legacy:
        with zipfile.ZipFile(written) as file:
            assert file.testzip() is None  # the checksums are right
    assert written.stat().st_size == (tmp_path / name).stat().st_size


def test_a_safetensors_file_keeps_its_own_metadata(tmp_path: Path) -> None:
    safetensors.torch.save_file(weights(), tmp_path / "a.safetensors", {"format": "pt", "note": "theirs"})
    written = save_like(tmp_path / "b", build(3), load(tmp_path / "a.safetensors"))
    with safetensors.safe_open(written, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "theirs"}
    assert_holds(load(written), weights(3))


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    torch.save({"model": weights(), "epoch": 3}, tmp_path / "a.pt")
    save_like(tmp_path / "b", build(0), load(tmp_path / "a.pt"))
    assert (tmp_path / "b.pt").read_bytes() == (tmp_path / "a.pt").read_bytes()


def test_other_sets_stay_as_they_were(tmp_path: Path) -> None:
    torch.save({"model": weights(1), "ema": weights(2)}, tmp_path / "a.pt")
    save_like(tmp_path / "b", build(3), load(tmp_path / "a.pt", weights="ema"))
    assert_holds(load(tmp_path / "b.pt", weights="model"), weights(1))
    assert_holds(load(tmp_path / "b.pt", weights="ema"), weights(3))


def test_what_cannot_be_written_back_is_refused(tmp_path: Path) -> None:
    state = weights()
    shared = torch.ones(4)
    state |= {"features.1.weight": shared[:2], "features.1.bias": shared[:2]}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ModelFileError, match=r"share numbers in it and no longer can: features\.1\.weight"):
        save_like(tmp_path / "b", build(3), load(tmp_path / "a.pt"))
    torch.save({key: value.half() for key, value in weights().items()}, tmp_path / "c.pt")
    large = build(3)
    large.network.state_dict()["linear.bias"][0] = 1e6
    loaded = load(tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"NaN or infinite weights in linear\.bias"):
        save_like(tmp_path / "b", large, loaded)
    torch.save(weights(9), tmp_path / "c.pt")
    with pytest.raises(ModelFileError, match="changed while it was worked on"):
        save_like(tmp_path / "b", build(3), loaded)
    assert not (tmp_path / "b.pt").exists()
