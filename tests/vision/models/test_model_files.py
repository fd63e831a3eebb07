"""Hostile model files: nothing in them runs, hangs, or takes memory that the file does not back."""

import argparse
import codecs
import collections
import contextlib
import datetime
import io
import json
import os
import pathlib
import pickle
import struct
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import lustral.vision.models.files.contents
from lustral.vision.models import ModelFileError, load_model
from lustral.vision.models.build import build_network
from lustral.vision.models.files.contents import read_model_file
from lustral.vision.models.files.torch_files import reads_pickles

ARCH = "small_cnn:width=2"
SHAPE = (3, 8, 8)


def weights() -> dict[str, Tensor]:
    return build_network(ARCH, num_classes=4, image_shape=SHAPE).state_dict()


class Call:
    """Calls a function when ``pickle`` reads it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.wanted = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.wanted


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **numbers: bytes) -> None:
    """Write a file as torch.save does, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, content in {"version": b"3\n", "byteorder": b"little"}.items():
            file.writestr(f"archive/{name}", content)
        for name, content in numbers.items():
            file.writestr(f"archive/data/{name.removeprefix('n')}", content)


def refused(path: Path, reason: str) -> None:
    with pytest.raises(ModelFileError, match=reason):
        read_model_file(path)


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        (Call(bytearray, 6_000_000_000), "builtins.bytearray"),
        (Call(torch.Tensor, 10**6, 10**6), "torch.Tensor"),
        (Call(codecs.decode, b"x", "zlib"), "_codecs.decode"),
        (Call(list, range(3)), "builtins.list"),
        (Call(os.system, "true"), "posix.system"),
        (Call(getattr, torch.Size, "count"), "builtins.getattr"),
        (Call(torch.load, "b.pt"), "torch.serialization.load"),
        (Call(bytes, 6_000_000_000), "builtins.bytes"),
        (Call(np.zeros, 10**10), "numpy.*zeros"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_calls_that_take_memory_or_run_code_are_refused_by_name(
    tmp_path: Path, payload: Call, name: str, legacy: bool
) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": weights(), "x": payload}, path, _use_new_zipfile_serialization=not legacy)
    refused(path, f"refused: it does not hold weights alone.*{name}")


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    torch.save({"x": Call(codecs.encode, "a" * 99, "hex")}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "bytes in the encoding 'hex'")


def rebuild(count: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """Return the pickle of a tensor over the storage "0" of 4 float32."""

    def number(value: int) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    def shape(sizes: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, sizes)) + b"t"

    return (
        b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n"
        + b"X\x01\0\0\x000X\x03\0\0\0cpu"
        + (number(count) + b"tQ" + number(offset) + shape(size) + shape(stride) + b"\x89}tRs.")
    )


@pytest.mark.parametrize(
    ("count", "offset", "size", "stride"),
    [
        (2**40, 0, (2**40,), (1,)),
        (4, 0, (5,), (1,)),
        (4, 1, (4,), (1,)),
        (4, 0, (2, 2), (3, 2)),
        (4, -1, (2,), (1,)),
        (4, 0, (-2,), (1,)),
        (4, 0, (2,), (-1,)),
        (4, 0, (2,), ()),
        (4, 0, (2**62, 2**62), (0, 0)),
        (-4, 0, (2,), (1,)),
    ],
)
def test_tensors_larger_than_their_numbers_are_refused(
    tmp_path: Path, count: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    archive(tmp_path / "a.pt", rebuild(count, offset, size, stride), n0=bytes(16))
    refused(tmp_path / "a.pt", "damaged or cut short")
    archive(tmp_path / "b.pt", rebuild(4, 1, (3,), (1,)), n0=struct.pack("<4f", 1, 2, 3, 4))
    assert read_model_file(tmp_path / "b.pt").content["a"].tolist() == [2, 3, 4]


@pytest.mark.parametrize("size", [(10**7, 0), (0, 10**7), (10**7,)])
def test_tensors_that_cost_nothing_on_disk_build_no_network(tmp_path: Path, size: tuple[int, ...]) -> None:
    state = weights()
    state["linear.weight"] = torch.zeros(1).expand(size) if 0 not in size else torch.zeros(size)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ModelFileError, match=r"shape|classes"):
        load_model(tmp_path / "a.pt", arch=ARCH, image_shape=SHAPE)


PLAIN = b"\x80\x02"


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (PLAIN + b"]" + b"Na" * 1_100_000 + b".", "more than 1000000 steps"),
        (PLAIN + b"]" * 1000 + b"a" * 999 + b".", "more than 64 containers inside each other"),
        (PLAIN + b"K\x01" + b"\x85" * 1000 + b".", "more than 64 containers inside each other"),
        (
            PLAIN + b"]q\0" + b"".join(b"]q%c(%se" % (n + 1, b"h%c" % n * 10) for n in range(9)) + b".",
            "10000000 values",
        ),
        (PLAIN + b"]q\0h\0a.", "holds itself"),
        (PLAIN + b"]q\0\x85h\0Na.", "filled after"),
        (PLAIN + b"}]\x85Ns.", "a key that is a list"),
        (PLAIN + b"}\x8a\x08" + b"\xff" * 7 + b"\x7fNs.", "a key that is a int"),
        (PLAIN + b"\x8b\xff\xff\xff\x7f.", "damaged pickle"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".", "damaged pickle"),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b".", "damaged pickle"),
        (PLAIN + b"I" + b"9" * 10**6 + b"\n.", "damaged pickle"),
        (PLAIN + b"(iposix\nsystem\n.", "instruction INST"),
        (PLAIN + b"\x82\x01.", "instruction EXT1"),
        (PLAIN + b"Pname\n.", "instruction PERSID"),
        (PLAIN + b"S'\\X'\n0N.", None),  # an odd escape in old text is no warning
    ],
)
def test_hostile_pickles_are_refused(tmp_path: Path, pickled: bytes, reason: str | None) -> None:
    archive(tmp_path / "a.pt", pickled)
    if reason is None:
        assert read_model_file(tmp_path / "a.pt").content is None
    else:
        refused(tmp_path / "a.pt", reason)


def test_a_memo_of_a_huge_index_takes_no_memory(tmp_path: Path) -> None:
    archive(tmp_path / "a.pt", PLAIN + b"]r\xff\xff\xff\x7f.")
    assert read_model_file(tmp_path / "a.pt").content == []


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    archive(tmp_path / "a.pt", PLAIN + b"]" + b"Na" * 10**6 + b".", zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.pt").stat().st_size < 20_000
    refused(tmp_path / "a.pt", "compressed or encrypted entries")


def test_archives_that_are_not_what_they_say_are_refused(tmp_path: Path) -> None:
    archive(tmp_path / "a.pt", rebuild(4, 0, (4,), (1,)), n0=bytes(16))
    content = (tmp_path / "a.pt").read_bytes()
    end = content.rfind(b"PK\x05\x06")
    entry = content.find(b"PK\x01\x02")
    changes = {
        "size": content[: entry + 20] + struct.pack("<II", 2**31, 2**31) + content[entry + 28 :],
        "directory": content[: end + 12] + struct.pack("<I", 2**31) + content[end + 16 :],
        "place": content[: entry + 42] + struct.pack("<I", 2**31) + content[entry + 46 :],
        "hole": content[: end + 16] + struct.pack("<I", 2**31) + content[end + 20 :],
    }
    for name, changed in changes.items():
        (tmp_path / f"{name}.pt").write_bytes(changed)
        refused(tmp_path / f"{name}.pt", "damaged or cut short")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "a.pt", "a") as file:
        file.writestr("archive/data.pkl", PLAIN + b"N.")
    refused(tmp_path / "a.pt", "two entries of one name")


def test_the_two_lines_take_the_weights_out_of_a_torchscript_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build_network(ARCH, num_classes=4, image_shape=SHAPE).eval()
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to leave TorchScript behind
        torch.jit.trace(network, torch.rand(1, *SHAPE)).save("program.pt")  # its code is long enough to be compressed
        with pytest.raises(ModelFileError, match="a TorchScript program") as caught:
            load_model(tmp_path / "program.pt", arch=ARCH, image_shape=SHAPE)
        lines = str(caught.value).splitlines()[1:]
        assert len(lines) == 2
        exec("\n".join(["import torch", *map(str.strip, lines)]))
    loaded = load_model(tmp_path / "weights.pt", arch=ARCH, image_shape=SHAPE)
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.model.network.state_dict()[name], tensor), name


def test_programs_and_other_archives_are_told_apart(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as file:
        file.writestr("m/data.pkl", PLAIN + b"N.")
        file.writestr("m/code/net.py", "")
    refused(tmp_path / "script.pt", "a TorchScript program")
    for name in ("net.onnx", "net.torchscript", "net.ptl"):
        (tmp_path / name).touch()
    refused(tmp_path / "net.onnx", r"ONNX is no form to scan or erase: .* lustral\.scan\(network, data\)")
    refused(tmp_path / "net.torchscript", "a TorchScript program")
    refused(tmp_path / "net.ptl", "a TorchScript program")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    (tmp_path / "arrays.npz").rename(tmp_path / "arrays.pt")
    refused(tmp_path / "arrays.pt", "without a data.pkl")
    (tmp_path / "old.pt").write_bytes(bytes(257) + b"ustar" + bytes(300))
    refused(tmp_path / "old.pt", "a tar archive")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_only_regular_files_are_opened(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    refused(tmp_path / f"pipe{suffix}", "expected a regular file; got a pipe")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    refused(tmp_path / f"device{suffix}", "expected a regular file; got a device")
    (tmp_path / f"folder{suffix}").mkdir()
    refused(tmp_path / f"folder{suffix}", "expected a regular file; got a folder")
    (tmp_path / f"loop{suffix}").symlink_to(tmp_path / f"loop{suffix}")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        read_model_file(tmp_path / f"loop{suffix}")
    with (tmp_path / f"sparse{suffix}").open("wb") as file:
        file.truncate(10**12)
    refused(tmp_path / f"sparse{suffix}", "1000000000000 bytes; expected at most 8589934592")


def test_headers_of_safetensors_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refused(path, "a header of 4611686018427387904 bytes")
    header = json.dumps(
        {f"k{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(66_000)}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(path, "66000 tensors; expected at most 65536")
    header = b'{"a":' + b"[" * 10**5
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(path, "damaged or cut short")


def test_a_huge_tensor_of_a_sparse_file_is_compared_before_it_is_read(tmp_path: Path) -> None:
    header = json.dumps({"linear.weight": {"dtype": "F32", "shape": [2**30], "data_offsets": [0, 2**32]}}).encode()
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2**32)
    with pytest.raises(ModelFileError, match="16 missing"):
        load_model(tmp_path / "a.safetensors", arch=ARCH, image_shape=SHAPE)


def test_pickles_are_read_from_torch_2_10_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = ("2.6.0", "2.9.1+cu128", "2.10.0", "2.14.1+cpu", "3.0.0", "odd")
    assert [reads_pickles(version) for version in versions] == [False, False, True, True, True, False]
    torch.save(weights(), tmp_path / "a.pt")
    state = {"linear.bias": torch.ones(3)}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    monkeypatch.setattr(lustral.vision.models.files.contents, "reads_pickles", lambda version: False)
    refused(tmp_path / "a.pt", r"not opened with torch .*CVE-2025-32434, CVE-2026-24747.*\.safetensors")
    assert torch.equal(read_model_file(tmp_path / "a.safetensors").content["linear.bias"], torch.ones(3))


NESTED = argparse.Namespace(lr=0.1, sizes=(1, 2), inner=types.SimpleNamespace(name="x"))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_plain_data_beside_the_weights_is_read(tmp_path: Path, protocol: int, legacy: bool) -> None:
    content = {
        "state_dict": weights(),
        "accuracy": np.float64(0.93),
        "half": np.float16(0.5),
        "count": np.int64(7),
        "flag": np.bool_(True),
        "big_endian": np.arange(3, dtype=">i4"),
        "array": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "words": np.array(["ab", "c"]),
        "empty": np.zeros((0, 3)),
        "random": np.random.RandomState(0).get_state(),
        "ordered": collections.OrderedDict(a=1),
        "defaults": collections.defaultdict(list, a=[1]),
        "counts": collections.Counter("aab"),
        "args": NESTED,
        "folder": pathlib.Path("runs/1"),
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "when": datetime.datetime(2020, 1, 2),
        "took": datetime.timedelta(seconds=3),
        "set": {1, 2},
        "frozen": frozenset("ab"),
        "complex": 1 + 2j,
        "bytes": b"\xff\x00",
        "bytearray": bytearray(b"\x01\xff"),
        "last": collections.deque([1, 2], maxlen=3),
        "range": range(3),
        "day": np.array(["2020-01-01"], dtype="datetime64[D]"),
        "kind": int,
        "pairs": {(1, "a"): 2},
        "text": "é",
        "long": 2**100,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "optimizer": torch.optim.Adam([torch.ones(2, requires_grad=True)]).state_dict(),
    }
    path = tmp_path / "a.pt"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    found = read_model_file(path).content
    same = ("accuracy", "half", "count", "flag", "ordered", "counts", "size", "dtype", "set", "frozen", "complex")
    for name in (*same, "bytes", "text", "long"):
        assert found[name] == content[name], name
    for name in ("big_endian", "array", "words"):
        np.testing.assert_array_equal(found[name], content[name])
        assert found[name].dtype == content[name].dtype  # type: ignore[attr-defined]
    assert found["defaults"] == {"a": [1]}
    assert found["args"] == {"lr": 0.1, "sizes": (1, 2), "inner": {"name": "x"}}
    assert found["folder"] == "runs/1"
    assert found["bytearray"] == b"\x01\xff"
    assert found["last"] == [1, 2]
    assert found["pairs"] == {"(1, 'a')": 2}
    assert found["range"] == "range(0, 3, 1)"
    assert found["parameter"].tolist() == [1, 1]
    assert all(torch.equal(found["state_dict"][key], value) for key, value in weights().items())
    assert load_model(path, arch=ARCH, image_shape=SHAPE).weights == "state_dict"


def test_classes_of_settings_are_never_imported(tmp_path: Path) -> None:
    settings = b"cyacs.config\nCfgNode\n)\x81X\x02\0\0\0LRK\x01s}X\x04\0\0\0_newK\x02sb"  # NEWOBJ, SETITEM, BUILD
    archive(tmp_path / "a.pt", PLAIN + b"}X\x03\0\0\0cfg" + settings + b"s.")
    assert read_model_file(tmp_path / "a.pt").content == {"cfg": {"LR": 1, "_new": 2}}
    archive(tmp_path / "b.pt", PLAIN + b"cmine\nSettings\n)\x81.")
    refused(tmp_path / "b.pt", r"would run code \(mine\.Settings\)")


@pytest.mark.parametrize("value", [np.array([None, 1], dtype=object), np.array([(1, 2.0)], dtype="i4,f4")])
def test_numpy_data_that_are_no_numbers_are_refused_with_a_reason(tmp_path: Path, value: Any) -> None:
    torch.save({"w": weights(), "x": value}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "numpy data")


def test_a_numpy_array_longer_than_its_bytes_is_refused(tmp_path: Path) -> None:
    pickled = pickle.dumps(np.zeros(3, dtype=np.uint8), 2)
    assert pickled.count(b"K\x03\x85") == 1
    archive(tmp_path / "a.pt", pickled.replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85"))
    refused(tmp_path / "a.pt", "not as long as its shape says")


@pytest.mark.parametrize("legacy", [False, True])
def test_mutated_files_are_read_or_refused(tmp_path: Path, legacy: bool) -> None:
    buffer = io.BytesIO()
    content = {"state_dict": weights(), "acc": np.float64(1), "args": NESTED, "array": np.arange(5)}
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    good = buffer.getvalue()
    pickled = good.find(b"state_dict") if not legacy else 0
    random = np.random.RandomState(7)
    for _ in range(300):
        changed = bytearray(good)
        for place in random.randint(max(0, pickled - 60), min(len(good), pickled + 3000), random.randint(1, 4)):
            changed[place] = random.randint(256)
        (tmp_path / "a.pt").write_bytes(changed)
        with contextlib.suppress(ModelFileError):
            read_model_file(tmp_path / "a.pt")
