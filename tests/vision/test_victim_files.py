"""A victim folder is whole or refused, whatever interrupted its writing and whoever wrote it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lustral.api.opening import model_file
from lustral.core.allocation import AllocationLimit, TooLargeError
from lustral.core.limits import LARGEST_RECORD
from lustral.vision.attacks import InputAware
from lustral.vision.models import ModelFileError
from lustral.vision.records import Victim
from lustral.vision.victim_files import VictimError, read_record, tensors_in
from lustral.vision.victims import implant, load_victim, save_victim
from toy import toy_images, toy_trainer


@pytest.fixture(scope="module")
def learnt() -> Victim:
    """Return a victim with a learnt trigger, hardly trained."""
    attack = InputAware(width=4, steps=2, mask_epochs=1)
    train, test = toy_images(300, seed=0), toy_images(60, seed=1)
    return implant(
        attack, train, test, arch="small_cnn:width=4", trainer=toy_trainer(epochs=1), seed=0, data_name="toy"
    )


@pytest.fixture(scope="module")
def original(learnt: Victim, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("victims") / "learnt"
    save_victim(folder, learnt, toy_images(20, seed=2))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "victim"))


def edit(folder: Path, **changes: Any) -> None:
    """Change the record, not the files."""
    path = folder / "victim.json"
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in record.items() if value is not ...}))


def test_the_record_names_the_files_it_belongs_to(folder: Path) -> None:
    assert set(json.loads((folder / "victim.json").read_text())["files"]) == {
        "model.safetensors",
        "trigger.safetensors",
    }
    assert load_victim(folder).tensors.keys() == load_file(folder / "trigger.safetensors").keys()
    assert model_file(folder) == folder / "model.safetensors"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def put_other_model(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors")


def put_other_trigger(folder: Path) -> None:
    tensors = load_file(folder / "trigger.safetensors")
    save_file({name: tensor * 1 for name, tensor in tensors.items()}, folder / "trigger.safetensors", {"by": "another"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            put_other_model,
            r"model\.safetensors: not the file that victim\.json was written with.*make the victim again",
        ),
        (put_other_trigger, r"trigger\.safetensors: not the file that victim\.json was written with"),
        (lambda folder: (folder / "trigger.safetensors").unlink(), r"trigger\.safetensors: it is missing"),
        (lambda folder: edit(folder, files={}), "expected the SHA-256"),
        (lambda folder: edit(folder, files=["model.safetensors"]), "expected the SHA-256"),
        (lambda folder: edit(folder, files={"model.safetensors": 5}), "expected the SHA-256"),
        (
            lambda folder: edit(folder, files={"model.safetensors": "0" * 64, "/etc/passwd": "0" * 64}),
            "expected the SHA-256",
        ),
        (lambda folder: edit(folder, files={"model.safetensors": "0" * 64}), "not the file that|says otherwise"),
    ],
)
def test_files_of_another_victim_are_refused(folder: Path, change: Callable[[Path], None], message: str) -> None:
    change(folder)
    for use in (load_victim, model_file):
        with pytest.raises(VictimError, match=message):
            use(folder)


def test_a_folder_without_checksums_opens_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, files=...)
    assert load_victim(folder).tensors
    assert "without checksums" in caplog.text


def test_a_model_of_another_kind_is_refused_without_checksums_too(folder: Path) -> None:
    edit(folder, files=..., num_classes=9, class_names=[])
    with pytest.raises(VictimError, match="it tells of 9 classes"):
        load_victim(folder)


def test_an_interrupted_writing_leaves_the_old_victim_or_none(
    folder: Path, benign: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between any two changes of names, over an old folder with a learnt trigger and without checksums."""
    edit(folder, files=...)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace, unlink, left = os.replace, Path.unlink, 0

    class Killed(BaseException):
        pass

    def counted(change: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any, **named: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            change(*arguments, **named)

        return call

    outcomes = []
    for changes in range(100):
        for name, content in before.items():
            (folder / name).write_bytes(content)
        left = changes
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(replace))
            patch.setattr(Path, "unlink", counted(unlink))
            try:
                save_victim(folder, benign, toy_images(20, seed=2))
                killed = False
            except Killed:
                killed = True
        try:
            victim = load_victim(folder)
        except VictimError as error:
            outcomes.append("none" if "not a victim folder" in str(error) else str(error))
        else:
            same = all((folder / name).read_bytes() == content for name, content in before.items())
            assert same == killed, "a victim of two parts"
            outcomes.append("old" if same else "new")
            assert victim.provenance["attack"] == ("input_aware" if same else "none")
            assert bool(victim.tensors) == same
        if not killed:
            break
    assert list(dict.fromkeys(outcomes)) == ["old", "none", "new"]
    assert outcomes[-1] == "new"
    assert outcomes.count("none") >= 4


def test_a_full_disk_leaves_the_old_victim(folder: Path, benign: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save_victim(folder, benign, toy_images(20, seed=2))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    load_victim(folder)


def test_a_new_victim_takes_the_place_of_one_with_a_trigger(folder: Path, benign: Victim) -> None:
    save_victim(folder, benign, toy_images(20, seed=2))
    assert load_victim(folder).tensors == {}
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "victim.json", "trigger.png"}


HOSTILE_RECORDS = [
    ("[" * 100_000 + "]" * 100_000, "not readable JSON"),
    ('{"a":' * 50_000 + "1" + "}" * 50_000, "not readable JSON"),
    ('{"schema": ' + "9" * 5000 + "}", "not readable JSON"),
    ('{"schema": 1, "seed": 1' + "0" * 22 + "}", "not readable JSON.*2.64"),
    ('{"schema": NaN}', "not readable JSON.*finite"),
    ('{"schema": -Infinity}', "not readable JSON.*finite"),
    ('{"schema": 1e999}', "not readable JSON.*finite"),
    ("", "not readable JSON"),
    ('"schema"', "expected schema 1"),
    ('{"schema": true}', "lacks attack"),
    ('{"schema": 1}', "lacks attack"),
    ('{"schema": "' + "x" * LARGEST_RECORD + '"}', "expected 4,194,304 bytes at most"),
]


@pytest.mark.parametrize(("text", "message"), HOSTILE_RECORDS)
def test_a_hostile_record_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "victim.json").write_text(text)
    with pytest.raises(VictimError, match=message) as caught:
        read_record(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "link loop", "dangling"])
def test_what_is_no_file_is_no_record(folder: Path, kind: str) -> None:
    path = folder / "victim.json"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "link loop": "victim.json", "dangling": "nowhere"}[kind])
    with pytest.raises((VictimError, OSError), match=r"not a victim folder|symbolic links"):
        read_record(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"image_shape": [3, 10**9, 10**9]},
        {"image_shape": [3, -12, 12]},
        {"image_shape": [3.0, 12, 12]},
        {"image_shape": [True, 12, 12]},
        {"image_shape": {"0": 3}},
        {"image_shape": "3,12,12"},
        {"image_shape": [3, 2000, 2000]},
        {"num_classes": 10**9},
        {"num_classes": "4"},
        {"num_classes": None},
        {"num_classes": 4.0},
        {"class_names": ["a"] * 5},
        {"class_names": [1, 2, 3, 4]},
        {"class_names": "abcd"},
        {"data": 5},
        {"data": ["digits"]},
        {"arch": {"name": "small_cnn"}},
        {"attack": {}},
        {"settings": []},
        {"settings": {"width": 10**9, "steps": 2}},
        {"settings": {"width": 4, "steps": 10**9}},
        {"settings": {"width": 4, "steps": 60}},
        {"settings": {"width": [4]}},
        {"settings": {"width": "x" * 100_000}},
        {"settings": {"mode": "x" * 100_000}},
        {"attack": "wanet", "settings": {"control_points": 10**7}},
        {"attack": "ssba", "settings": {"encoder": {"bits": 10**12, "width": 10**6}}},
        {"attack": "blended", "settings": {"alpha": 1e300}},
        {"attack": "badnets", "settings": {"size": 10**15}},
        {"attack": "bpp", "settings": {"levels": -1}},
        {"metrics": {}},
        {"metrics": {"acc": 3}},
        {"metrics": []},
    ],
)
def test_hostile_values_are_refused_and_take_nothing(folder: Path, change: dict[str, Any]) -> None:
    edit(folder, **change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(VictimError) as caught:
        load_victim(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024  # KiB
    assert len(str(caught.value)) < 2500


def header_of(content: object) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**19) + b"{}",
        header_of({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}),
        header_of({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
        header_of({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}) + b"\x00",
        header_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}),
        header_of([]),
        header_of({str(number): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for number in range(30_000)}),
    ],
)
def test_hostile_tensors_of_a_trigger_are_refused(content: bytes) -> None:
    with pytest.raises(VictimError, match="damaged"):
        tensors_in(content, where="trigger.safetensors")


def test_a_huge_trigger_is_not_read(folder: Path) -> None:
    edit(folder, files=...)
    with (folder / "trigger.safetensors").open("r+b") as file:
        file.truncate(2**40)  # sparse: no block of it is on the disk
    with pytest.raises(VictimError, match="268,435,456 bytes at most; got 1,099,511,627,776"):
        load_victim(folder)


def test_a_missing_model_is_told_by_its_reader(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match="no such file"):
        load_victim(folder)


def test_the_allocation_limit_counts_what_is_made() -> None:
    with AllocationLimit(1000):
        torch.rand(100, generator=torch.Generator())
        torch.rand(100, generator=torch.Generator())
        with pytest.raises(TooLargeError):
            torch.rand(100, generator=torch.Generator())
    with AllocationLimit(1000):
        assert torch.nn.Linear(10, 10)(torch.ones(1, 10)).shape == (1, 10)
    torch.zeros(10_000)
