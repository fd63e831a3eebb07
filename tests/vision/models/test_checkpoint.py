import errno
import io
import json
import logging
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from lustral.core.randomness import child
from lustral.vision.models import (
    Classifier,
    ModelFileError,
    build_classifier,
    checkpoint,
    load_model,
    save_model,
    variants,
)
from lustral.vision.models.files.state_dicts import check_tensors

ARCH = "small_cnn:width=2"
SHAPE = (3, 8, 8)
Wrap = Callable[[dict[str, Tensor]], object]


def small_model(arch: str = ARCH, shape: tuple[int, int, int] = SHAPE, num_classes: int = 5) -> Classifier:
    """Return a model whose every tensor, buffers included, differs from a fresh one's."""
    model = build_classifier(
        arch, num_classes=num_classes, image_shape=shape, mean=[0.4] * shape[0], std=[0.3] * shape[0]
    )
    generator = child(3, "weights")
    with torch.no_grad():
        for tensor in model.network.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 9 + 0.1)
    return model.eval()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize(
    ("arch", "shape"),
    [
        (ARCH, SHAPE),
        ("preact_resnet18:width=2", (1, 8, 8)),
        ("vgg11_bn:width=2", SHAPE),
        ("vgg11:width=2,silu=1,dropout=30", SHAPE),
        ("lenet:width=3,tanh=1", (1, 28, 28)),
        ("mobilenet:width=2,repeats=1", SHAPE),
        ("small_vit:width=8,depth=2", (1, 28, 28)),
        ("timm:test_vit", (1, 32, 32)),
    ],
)
def test_a_saved_model_loads_by_itself(tmp_path: Path, arch: str, shape: tuple[int, int, int]) -> None:
    path = tmp_path / "a.safetensors"
    model = small_model(arch, shape)
    save_model(path, model, arch=arch, image_shape=shape, extra={"note": "mine"})
    loaded = load_model(path)
    assert (loaded.arch, loaded.num_classes, loaded.image_shape) == (arch, 5, shape)
    assert (loaded.key_prefix, loaded.nesting, loaded.metadata["note"]) == ("", None, "mine")
    assert not loaded.model.training
    images = torch.rand(3, *shape)
    assert torch.equal(loaded.model(images), model(images))
    assert_same(safetensors.torch.load_file(path), model.network.state_dict())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "network."])
@pytest.mark.parametrize("nesting", [None, "state_dict", "net", "model_state", "model.model_state_dict"])
def test_nested_and_prefixed_weights_come_back_as_they_were(tmp_path: Path, prefix: str, nesting: str | None) -> None:
    model = small_model()
    state = {prefix + key: tensor for key, tensor in model.network.state_dict().items()}
    content: Any = dict(state)
    for name in reversed(nesting.split(".") if nesting else []):
        content = {"epoch": 3, name: content}
    torch.save(content, tmp_path / "given.pth")

    loaded = load_model(tmp_path / "given.pth", arch=ARCH, image_shape=SHAPE, mean=[0.4] * 3, std=[0.3] * 3)
    assert (loaded.key_prefix, loaded.nesting, loaded.num_classes) == (prefix, nesting, 5)
    images = torch.rand(3, *SHAPE)
    assert torch.equal(loaded.model(images), model(images))

    for name in ("out.safetensors", "out.pth"):
        save_model(
            tmp_path / name,
            loaded.model,
            arch=loaded.arch,
            image_shape=loaded.image_shape,
            key_prefix=loaded.key_prefix,
            nesting=loaded.nesting,
            layout=loaded.layout,
        )
    assert_same(safetensors.torch.load_file(tmp_path / "out.safetensors"), state)
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    for name in nesting.split(".") if nesting else []:
        written = written[name]
    assert list(written) == list(state)
    assert_same(written, state)


def test_a_torchvision_network_keeps_its_keys_shapes_and_half_precision(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    network = resnet18(weights=None, num_classes=6).half()
    network.load_state_dict(small_model("torchvision:resnet18", (3, 32, 32), 6).network.state_dict())
    state = network.state_dict()
    torch.save(state, tmp_path / "given.pt")
    loaded = load_model(tmp_path / "given.pt", arch="torchvision:resnet18", image_shape=(3, 32, 32))
    assert loaded.num_classes == 6
    assert next(loaded.model.parameters()).dtype == torch.float32
    save_model(
        tmp_path / "out.safetensors", loaded.model, arch=loaded.arch, image_shape=(3, 32, 32), layout=loaded.layout
    )
    assert_same(safetensors.torch.load_file(tmp_path / "out.safetensors"), state)


def test_keys_that_old_files_lack_stay_out_of_the_new_one(tmp_path: Path) -> None:
    state = small_model().network.state_dict()
    old = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pt")
    loaded = load_model(tmp_path / "old.pt", arch=ARCH, image_shape=SHAPE)
    save_model(tmp_path / "new.pt", loaded.model, arch=ARCH, image_shape=SHAPE, layout=loaded.layout)
    assert_same(torch.load(tmp_path / "new.pt", weights_only=True), old)


@pytest.mark.parametrize(
    ("arch", "shape", "readable"),
    [
        ("vgg13_bn:width=2", (1, 8, 8), False),
        ("torchvision:squeezenet1_1", (3, 64, 64), False),  # its head is a convolution
        ("timm:test_vit", (1, 48, 48), True),
        ("timm:test_efficientnet", (4, 32, 32), False),
    ],
)
def test_classes_channels_and_size_are_read_off_the_weights(
    tmp_path: Path, arch: str, shape: tuple[int, int, int], readable: bool
) -> None:
    path = tmp_path / "a.safetensors"  # which sorts its keys
    safetensors.torch.save_file(small_model(arch, shape, 7).network.state_dict(), path)
    if readable:
        loaded = load_model(path, arch=arch)
    else:
        with pytest.raises(ModelFileError, match=rf"size of its images \({shape[0]} channels\); pass image_shape"):
            load_model(path, arch=arch)
        loaded = load_model(path, arch=arch, image_shape=shape)
    assert (loaded.num_classes, loaded.image_shape) == (7, shape)


def test_the_size_of_torchvisions_transformer_is_read_off_its_positions(tmp_path: Path) -> None:
    from torchvision.models import VisionTransformer

    (tmp_path / "net.py").write_text(
        "from torchvision.models import VisionTransformer\n"
        "def net(num_classes):\n"
        "    return VisionTransformer(32, 8, 1, 2, 8, 8, num_classes=num_classes)\n"
    )
    torch.save(VisionTransformer(32, 8, 1, 2, 8, 8, num_classes=3).state_dict(), tmp_path / "a.pt")
    loaded = load_model(tmp_path / "a.pt", arch=f"{tmp_path / 'net.py'}:net")
    assert (loaded.num_classes, loaded.image_shape) == (3, (3, 32, 32))


def test_a_network_with_classes_of_its_own_needs_no_count(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Linear(6, 3))\n"
    )
    arch = f"{tmp_path / 'net.py'}:net"
    torch.save(build_classifier(arch, num_classes=3, image_shape=(3, 4, 4)).network.state_dict(), tmp_path / "a.pt")
    assert load_model(tmp_path / "a.pt", arch=arch, image_shape=(3, 4, 4)).num_classes == 3
    with pytest.raises(ValueError, match="gives 3 logits; expected 4"):
        load_model(tmp_path / "a.pt", arch=arch, image_shape=(3, 4, 4), num_classes=4)


def test_unknown_normalisation_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(small_model().network.state_dict(), tmp_path / "a.pt")
    with caplog.at_level(logging.WARNING):
        load_model(tmp_path / "a.pt", arch=ARCH, image_shape=SHAPE)
    assert "no mean and std are known" in caplog.text


class MakesFile:
    """Creates a file when unpickled by ``pickle``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


def malicious_zip(path: Path, payload: object) -> None:
    torch.save({"state_dict": small_model().network.state_dict(), "extra": payload}, path)


def malicious_legacy(path: Path, payload: object) -> None:
    torch.save({"extra": payload}, path, _use_new_zipfile_serialization=False)


def malicious_pickle(path: Path, payload: object) -> None:
    path.write_bytes(pickle.dumps(payload))


@pytest.mark.parametrize("write", [malicious_zip, malicious_legacy, malicious_pickle])
def test_a_file_that_runs_code_is_refused_and_does_not(tmp_path: Path, write: Callable[[Path, object], None]) -> None:
    mark = tmp_path / "ran"
    write(tmp_path / "evil.pt", MakesFile(mark))
    with pytest.raises(ModelFileError, match=r"refused: .* would run code.* torch\.save\(model\.state_dict\(\)"):
        load_model(tmp_path / "evil.pt", arch=ARCH, image_shape=SHAPE)
    assert not mark.exists()
    pickle.loads(pickle.dumps(MakesFile(mark))).close()
    assert mark.exists()  # so the payload does work where a file is trusted


def test_a_pickled_model_is_refused_by_the_name_of_its_class(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(ModelFileError, match=r"refused: .*torch\.nn\.modules\.linear\.Linear"):
        load_model(tmp_path / "a.pt", arch=ARCH)


def test_an_architecture_in_metadata_is_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "net.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    save_model(tmp_path / "a.safetensors", small_model(), arch=f"{tmp_path / 'net.py'}:net", image_shape=SHAPE)
    with pytest.raises(ModelFileError, match=r"is Python code and is not run .*pass arch"):
        load_model(tmp_path / "a.safetensors")
    assert not mark.exists()
    assert load_model(tmp_path / "a.safetensors", arch=ARCH).num_classes == 5


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_cut_short_torch_file_is_named_damaged(tmp_path: Path, fraction: float, legacy: bool) -> None:
    buffer = io.BytesIO()
    torch.save(small_model().network.state_dict(), buffer, _use_new_zipfile_serialization=not legacy)
    (tmp_path / "a.pt").write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * fraction)])
    with pytest.raises(ModelFileError, match=r"a\.pt: damaged or cut short"):
        load_model(tmp_path / "a.pt", arch=ARCH, image_shape=SHAPE)


@pytest.mark.parametrize("content", [b"", b"hello, this is text", bytes(100), b"\x89PNG\r\n\x1a\n" + bytes(50)])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_of_another_kind_are_named_damaged(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="damaged or cut short, or not a"):
        load_model(path, arch=ARCH, image_shape=SHAPE)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.5, 0.99])
def test_a_cut_short_safetensors_file_is_named_damaged(tmp_path: Path, fraction: float) -> None:
    path = tmp_path / "a.safetensors"
    save_model(path, small_model(), arch=ARCH, image_shape=SHAPE)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(ModelFileError, match=r"a\.safetensors: damaged or cut short"):
        load_model(path)


@pytest.mark.parametrize(
    ("wrap", "found"),
    [
        (lambda state: [*state.values()], "a list"),
        (lambda state: 3, "a int"),
        (lambda state: {}, "a mapping with "),
        (lambda state: {"epoch": 3, "notes": {"of": "mine"}}, "a mapping with epoch, notes"),
    ],
)
def test_a_file_without_a_state_dict_is_explained(tmp_path: Path, wrap: Wrap, found: str) -> None:
    torch.save(wrap(small_model().network.state_dict()), tmp_path / "a.pt")
    with pytest.raises(ModelFileError, match=f"no state dict in it: .*; found {found}"):
        load_model(tmp_path / "a.pt", arch=ARCH)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    model = small_model()
    model.network.state_dict()["linear.bias"][2] = value
    torch.save(model.network.state_dict(), tmp_path / "a.pt")
    with pytest.raises(ModelFileError, match=r"NaN or infinite weights in linear\.bias"):
        load_model(tmp_path / "a.pt", arch=ARCH, image_shape=SHAPE)
    with pytest.raises(ValueError, match=r"refusing to write .* linear\.bias"):
        save_model(tmp_path / "b.pt", model, arch=ARCH, image_shape=SHAPE)
    assert not (tmp_path / "b.pt").exists()


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(1).expand(10**12),  # one number in the file, a terabyte in memory
        torch.zeros(3, dtype=torch.complex64),
        torch.eye(3).to_sparse(),
        torch.zeros(3, device="meta"),
    ],
    ids=["expanded", "complex", "sparse", "meta"],
)
def test_odd_tensors_are_refused(odd: Tensor) -> None:
    with pytest.raises(ModelFileError, match=r"tensors: linear\.bias"):
        check_tensors(Path("a.pt"), {"linear.bias": odd})


def test_a_wrong_architecture_lists_what_differs(tmp_path: Path) -> None:
    torch.save(small_model().network.state_dict(), tmp_path / "a.pt")
    with pytest.raises(ModelFileError) as caught:
        load_model(tmp_path / "a.pt", arch="preact_resnet18:width=2", image_shape=SHAPE)
    first, missing, unexpected = str(caught.value).split("\n")
    assert "do not fit preact_resnet18:width=2; is it the right architecture?" in first
    assert "missing: conv1.weight, layer1.0.bn1.weight" in missing
    assert missing.endswith("more")
    assert missing.count(",") == 8
    assert "unexpected: features.0.weight" in unexpected
    with pytest.raises(ModelFileError, match=r"of another shape: features\.0\.weight \(2, 3, 3, 3\), expected \(4, 3"):
        load_model(tmp_path / "a.pt", arch="small_cnn:width=4", image_shape=SHAPE)


def test_what_was_asked_must_agree_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_model(path, small_model(), arch=ARCH, image_shape=SHAPE)
    with pytest.raises(ModelFileError, match="the weights have 5 classes; expected 10"):
        load_model(path, num_classes=10)
    with pytest.raises(ModelFileError, match=r"made for images of shape \(3, 8, 8\); expected \(1, 8, 8\)"):
        load_model(path, image_shape=(1, 8, 8))
    with pytest.raises(ValueError, match=r"unknown architecture 'small_cn'.*did you mean 'small_cnn'"):
        load_model(path, arch="small_cn")


def test_missing_files_and_unknown_kinds_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"a\.pt: no such file"):
        load_model(tmp_path / "a.pt")
    (tmp_path / "a.onnx").touch()
    with pytest.raises(ModelFileError, match=r"unknown kind of model file '\.h5'; expected \.safetensors, \.bin"):
        load_model(tmp_path / "a.h5")
    with pytest.raises(ModelFileError, match=r"unknown kind of model file '\.onnx'"):
        save_model(tmp_path / "b.onnx", small_model(), arch=ARCH, image_shape=SHAPE)
    torch.save(small_model().network.state_dict(), tmp_path / "a.pt")
    with pytest.raises(ModelFileError, match=r"does not say which architecture it is; pass arch \(--arch\)"):
        load_model(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lustral": "2"}, "written in format '2'"),
        ({"num_classes": "many"}, "damaged metadata: ValueError"),
        ({"image_shape": "3,8"}, "damaged metadata: ValueError"),
        ({"image_shape": "3,900000,900000"}, "damaged metadata: image shape"),
        ({"mean": "nan,0,0"}, "damaged metadata: mean nan"),
        ({"mean": None}, "damaged metadata: KeyError: 'mean'"),
        ({"num_classes": "6"}, "the weights have 5 classes; expected 6"),
        ({"std": "0,0,0"}, "expected positive standard deviations"),
    ],
)
def test_metadata_is_not_believed_blindly(tmp_path: Path, change: dict[str, str | None], message: str) -> None:
    path = tmp_path / "a.safetensors"
    save_model(path, small_model(), arch=ARCH, image_shape=SHAPE)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    metadata = json.loads(content[8 : 8 + length])["__metadata__"] | change
    safetensors.torch.save_file(
        small_model().network.state_dict(), path, {k: v for k, v in metadata.items() if v is not None}
    )
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_bad_layouts_and_reserved_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks tensors of the layout: fc\.weight"):
        save_model(tmp_path / "a.pt", small_model(), arch=ARCH, image_shape=SHAPE, layout={"fc.weight": torch.float32})
    some = {key: tensor.dtype for key, tensor in small_model().network.state_dict().items() if not key.endswith("bias")}
    with pytest.raises(ValueError, match=r"layout leaves out tensors of the model: .*bias"):
        save_model(tmp_path / "a.pt", small_model(), arch=ARCH, image_shape=SHAPE, layout=some)
    with pytest.raises(ValueError, match="reserved names in extra metadata: arch, mean"):
        save_model(
            tmp_path / "a.safetensors", small_model(), arch=ARCH, image_shape=SHAPE, extra={"mean": "", "arch": ""}
        )


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_a_full_disk_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / name
    save_model(path, small_model(), arch=ARCH, image_shape=SHAPE)
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device; nothing was written to"):
        save_model(path, small_model(num_classes=3), arch=ARCH, image_shape=SHAPE)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_equal_models_give_equal_files_also_over_the_one_they_came_from(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_model(path, small_model(), arch=ARCH, image_shape=SHAPE)
    loaded = load_model(path)
    before = path.read_bytes()
    save_model(path, loaded.model, arch=ARCH, image_shape=SHAPE, layout=loaded.layout)
    assert path.read_bytes() == before


def test_channels_last_weights_are_written(tmp_path: Path) -> None:
    model = small_model().to(memory_format=torch.channels_last)
    model.train()
    save_model(tmp_path / "a.safetensors", model, arch=ARCH, image_shape=SHAPE)
    assert all(module.training for module in model.modules())
    assert_same(safetensors.torch.load_file(tmp_path / "a.safetensors"), model.network.state_dict())


FLAT = "preact_resnet18_flat:width=2"


@pytest.mark.parametrize("given", [None, "preact_resnet18:width=2"])
@pytest.mark.parametrize("conditioned", [False, True])
def test_files_from_before_preact_resnet18_meant_the_published_network_still_open(
    tmp_path: Path, given: str | None, conditioned: bool
) -> None:
    outer = "conditioned:blocks.7.conv1@" if conditioned else ""
    model = small_model(outer + FLAT, SHAPE)
    save_model(tmp_path / "old.safetensors", model, arch=f"{outer}preact_resnet18:width=2", image_shape=SHAPE)
    loaded = load_model(tmp_path / "old.safetensors", arch=given and outer + given)
    assert loaded.arch == outer + FLAT
    images = torch.rand(3, *SHAPE)
    assert torch.equal(loaded.model(images), model(images))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("final_norm", [0, 1])
def test_one_name_opens_the_public_preact_resnet18_with_and_without_a_final_normalisation(
    tmp_path: Path, final_norm: int, prefix: str
) -> None:
    full = "preact_resnet18:width=2" + final_norm * ",final_norm=1"
    model = small_model(full, SHAPE)
    torch.save({prefix + key: value for key, value in model.network.state_dict().items()}, tmp_path / "a.pth")
    loaded = load_model(
        tmp_path / "a.pth", arch="preact_resnet18:width=2", image_shape=SHAPE, mean=[0.0] * 3, std=[1.0] * 3
    )
    assert loaded.arch == full
    images = torch.rand(3, *SHAPE)
    assert torch.equal(loaded.model(images), model(images))


@pytest.mark.parametrize(
    ("given", "true"),
    [
        ("small_cnn", "preact_resnet18:width=2"),
        ("resnet18", "preact_resnet18:width=2,final_norm=1"),
        ("preact_resnet18", "resnet18:width=2"),
        ("preact_resnet18", "resnet18:width=2,fc=1"),
        ("torchvision:resnet18", "resnet18:width=64,fc=1,downsample=1"),
        ("preact_resnet18:width=4", "preact_resnet18:width=2"),
        ("resnet18", "resnet20:width=4"),
        ("small_cnn", "wrn16:width=2"),
        ("vgg11_bn:width=2", "vgg16_bn:width=2,classifier=1"),
        ("preact_resnet18", "torchvision:mobilenet_v3_small"),
        ("timm:resnet18", "resnet18:width=2"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_misfit_names_the_network_that_fits(tmp_path: Path, given: str, true: str, prefix: str) -> None:
    state = small_model(true, (3, 32, 32)).network.state_dict()
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "a.pth")
    with pytest.raises(ModelFileError, match=rf"do not fit {given}\S*; .* Keys and sizes are those of {true}\n"):
        load_model(tmp_path / "a.pth", arch=given, image_shape=(3, 32, 32))
    loaded = load_model(tmp_path / "a.pth", arch=true, image_shape=(3, 32, 32), mean=[0.0] * 3, std=[1.0] * 3)
    assert loaded.arch == true


def test_a_misfit_of_no_known_network_names_none(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(3, 3), "b.weight": torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(ModelFileError) as caught:
        load_model(tmp_path / "a.pth", arch="small_cnn", image_shape=(3, 32, 32))
    assert "Keys and sizes" not in str(caught.value)


def test_a_misfit_of_many_sets_builds_each_other_network_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer's state has a mapping for each weight, a hostile file as many as it likes."""
    asked: list[int] = []
    built: list[str] = []
    plain, get_model = checkpoint.nearest_network, torchvision.models.get_model

    def count(tensors: Any, networks: Any) -> Any:
        asked.append(len(tensors))
        return plain(tensors, networks)

    def note(name: str, **settings: Any) -> nn.Module:
        built.append(name)
        return get_model(name, **settings)

    monkeypatch.setattr(checkpoint, "nearest_network", count)
    monkeypatch.setattr(torchvision.models, "get_model", note)
    variants._keys_of_torchvision.cache_clear()
    torch.save({f"set{number}": {"a": torch.ones(1), "b": torch.ones(1)} for number in range(100)}, tmp_path / "x.pt")
    with pytest.raises(ModelFileError, match="do not fit small_cnn"):
        load_model(tmp_path / "x.pt", arch="small_cnn", image_shape=SHAPE)
    assert 1 <= len(asked) <= 16
    assert len(built) == len(set(built)) > 1


@pytest.mark.parametrize(
    ("name", "option"), [("resnet18", "fc"), ("resnet18", "downsample"), ("vgg11_bn", "classifier")]
)
def test_the_name_of_the_head_is_read_off_the_keys(tmp_path: Path, name: str, option: str) -> None:
    full = f"{name}:width=2,{option}=1"
    torch.save(small_model(full, (3, 32, 32)).network.state_dict(), tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth", arch=f"{name}:width=2", image_shape=SHAPE, mean=[0.0] * 3, std=[1.0] * 3)
    assert loaded.arch == full
