"""What is said of a model file without opening it: format, size, digest, and every name that its pickles would import."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lustral.vision.models.files.contents import read_model_file
from lustral.vision.models.files.safety import COMPUTED, DAMAGED, file_facts, imports_of, safety_record
from lustral.vision.models.files.state_dicts import ModelFileError

PLAIN = {"collections.OrderedDict", "torch.FloatStorage", "torch._utils._rebuild_tensor_v2"}


class Shell:
    """Wants to run a command when it is read."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch it_ran",)


def weights() -> dict[str, Tensor]:
    return nn.Linear(
        128, 1, bias=False
    ).state_dict()  # 128 numbers: in an old file their count looks like a pickle's start


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=path.name != "old.pt")
    return path


@pytest.mark.parametrize(
    ("name", "form", "imports"),
    [
        ("new.pt", "torch archive", PLAIN),
        ("old.pt", "torch before 1.6", PLAIN),
        ("w.safetensors", "safetensors", set[str]()),
    ],
)
def test_files_of_weights_import_data_alone(name: str, form: str, imports: set[str], tmp_path: Path) -> None:
    path = write(tmp_path / name, weights())
    facts = file_facts(path)
    assert (facts.format, facts.num_bytes, facts.code) == (form, path.stat().st_size, ())
    assert {entry.name for entry in facts.imports} == imports
    assert facts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert safety_record([facts])["runs_code"] is False


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_is_named_and_not_run_in_every_protocol(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"weights": [1.5], "again": (Shell(), Shell())}
    for name, write_it in (
        ("plain.bin", lambda path: path.write_bytes(pickle.dumps(content, protocol))),
        ("new.pt", lambda path: torch.save(content, path, pickle_protocol=max(protocol, 2))),
    ):
        write_it(tmp_path / name)
        facts = file_facts(tmp_path / name)
        assert facts.code == ("posix.system",)
        (entry,) = facts.imports
        assert entry.times in (1, 2)  # later protocols keep the name for the second time
        assert safety_record([facts])["runs_code"] is True
    assert not Path("it_ran").exists()


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", ["posix.system"]),
        (b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94h\x00h\x01\x93.", ["posix.system"]),  # from the memo
        (
            b"\x80\x04\x8c\x05posix\x8c\x06system\x8c\x05torch\x8c\x04Size00\x93.",
            [COMPUTED],
        ),  # what looks harmless is popped
        (b"\x80\x04\x8c\x05posix\x8c\x04exec)R\x93.", [COMPUTED]),
        (b"\x80\x02\x82\x01.", ["(a name from the reader's extension registry)"]),
        (b"(iposix\nsystem\n.", ["posix.system"]),
        (b"\x80\x04cposix\nsystem\n", ["posix.system", DAMAGED]),
        (b"\x80\x02N.\x80\x02cposix\nsystem\n.", ["posix.system"]),  # the second of two
    ],
)
def test_names_are_read_where_they_stand(content: bytes, names: list[str]) -> None:
    assert imports_of(content) == Counter(names)


def test_what_the_reader_accepts_has_no_code_and_what_has_code_it_refuses(tmp_path: Path) -> None:
    odd = {"a": weights(), "when": torch.Size([2]), "sets": {1, 2}, "dtype": torch.float16, "n": 1 + 2j}
    path = write(tmp_path / "odd.pt", odd)
    read_model_file(path)
    assert file_facts(path).code == ()
    path = write(tmp_path / "bad.pt", {"a": weights(), "x": Shell()})
    with pytest.raises(ModelFileError, match="would run code"):
        read_model_file(path)
    assert file_facts(path).code == ("posix.system",)


def test_damaged_files_are_told_and_others_are_not_guessed_at(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", pickle.dumps(Shell()) * 50)
    for name, content, form, code in (
        ("packed.pt", packed.getvalue(), "torch archive", (DAMAGED,)),
        ("empty.bin", b"", "unknown", ()),
        ("text.bin", b"hello, world", "unknown", ()),
        ("long.bin", b"c" + b"m" * 10_000 + b"\nx\n.", "pickle", ("m" * 200,)),
        ("cut.bin", pickle.dumps(Shell())[:-10], "pickle", (DAMAGED, "posix.system")),
    ):
        (tmp_path / name).write_bytes(content)
        facts = file_facts(tmp_path / name)
        assert (facts.format, facts.code) == (form, code), name
