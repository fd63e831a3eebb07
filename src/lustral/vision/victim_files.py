"""The files of a victim folder: written so that a kill leaves no folder that reads as whole, and read as anyone's.

``victim.json`` is written last and holds the SHA-256 of the files it belongs to, so a new model never passes for the one that an
old record describes. Everything in the folder is hostile input: sizes are looked at before anything is read.

Errors::

    ValueError
    └── VictimError    a folder that cannot be used; the message says why and what to do
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import struct
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from lustral.core.files import write_json_atomic
from lustral.core.limits import (
    LARGEST_IMAGE,
    LARGEST_RECORD,
    LARGEST_TRIGGER,
    MOST_CLASSES,
    is_class_count,
    is_image_shape,
)

logger = logging.getLogger(__name__)

VICTIM_SCHEMA = 1
RECORD_FILE = "victim.json"
MODEL_FILE = "model.safetensors"
TRIGGER_FILE = "trigger.safetensors"
PICTURE_FILE = "trigger.png"
_HASHED = (MODEL_FILE, TRIGGER_FILE)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST_NUMBER = 25  # characters; settings, counts and rates need fewer
_LARGEST_HEADER = 2**20  # bytes, of a trigger's tensors
_AGAIN = "make the victim again"


class VictimError(ValueError):
    """A victim folder is missing something or was written by something else."""


def write_folder(folder: Path, write: Callable[[Path], None], record: Mapping[str, Any]) -> None:
    """Write a victim folder, in place of the one that may be there.

    All files are written beside their places first. Then the old record goes, so that the folder is no victim; the files move
    in; the new record moves in last.

    Args:
        folder: made if there is none.
        write: writes model, picture and, where there is one, trigger into the folder it is given.
        record: what ``victim.json`` says; the checksums are added.

    Raises:
        OSError: a file could not be written; the old folder is intact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".new") as scratch:
        new = Path(scratch)
        write(new)
        hashes = {name: _hash_of(new / name) for name in _HASHED if (new / name).is_file()}
        write_json_atomic(new / RECORD_FILE, {**record, "files": hashes})
        (folder / RECORD_FILE).unlink(missing_ok=True)
        for name in (*_HASHED, PICTURE_FILE):
            if (new / name).is_file():
                os.replace(new / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)  # of the victim before
        os.replace(new / RECORD_FILE, folder / RECORD_FILE)


def read_record(folder: Path) -> dict[str, Any]:
    """Read ``victim.json``, and check the model and the trigger beside it against its checksums.

    Returns:
        What ``write_folder`` was given, with plain values of the right types.

    Raises:
        VictimError: there is no such file, or it is too large, no JSON, lacks something, or belongs to other files.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        raise VictimError(f"{folder} is not a victim folder: expected {RECORD_FILE} in it, as `lustral implant` writes")
    with path.open("rb") as file:
        content = file.read(LARGEST_RECORD + 1)
    if len(content) > LARGEST_RECORD:
        raise VictimError(f"{path}: expected {LARGEST_RECORD:,} bytes at most; {_AGAIN}")
    try:
        record = json.loads(content.decode(), parse_int=_int, parse_float=_float, parse_constant=_float)
    except (ValueError, RecursionError) as error:
        raise VictimError(f"{path} is not readable JSON ({_short(error)}); {_AGAIN}") from error
    if not isinstance(record, dict) or record.get("schema") != VICTIM_SCHEMA:
        raise VictimError(f"{path}: expected schema {VICTIM_SCHEMA}; {_AGAIN} with this version")
    missing = {"attack", "settings", "image_shape", "num_classes", "metrics"} - record.keys()
    if missing:
        raise VictimError(f"{path} lacks {', '.join(sorted(missing))}; {_AGAIN}")
    _check_values(path, record)
    _check_files(folder, record.pop("files", None))
    return record


def read_trigger(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a learnt trigger; none where there is no such file.

    Raises:
        VictimError: the file is too large or damaged.
    """
    path = folder / TRIGGER_FILE
    if not path.is_file():
        return {}
    size = path.stat().st_size
    if size > LARGEST_TRIGGER:
        raise VictimError(f"{path}: expected {LARGEST_TRIGGER:,} bytes at most; got {size:,}; {_AGAIN}")
    return tensors_in(path.read_bytes(), where=str(path))


def tensors_in(content: bytes, *, where: str) -> dict[str, Tensor]:
    """Return the tensors of a small safetensors file.

    Raises:
        VictimError: it is damaged, or declares more than it holds.
    """
    length = struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else None
    if length is None or length > min(_LARGEST_HEADER, len(content) - 8):
        raise VictimError(f"{where} is damaged: its header has {length} bytes, the file {len(content):,}; {_AGAIN}")
    try:
        return load(content)
    except Exception as error:  # hostile bytes can raise anything
        raise VictimError(f"{where} is damaged ({_short(error)}); {_AGAIN}") from error


def _check_values(path: Path, record: Mapping[str, Any]) -> None:
    """Refuse values of other types, and absurd sizes."""
    kinds: dict[str, type] = {"attack": str, "data": str, "arch": str, "settings": dict, "metrics": dict}
    for name, kind in kinds.items():
        if name in record and not isinstance(record[name], kind):
            wanted = "text" if kind is str else "names and values"
            raise VictimError(f"{path}: unknown {name} {_short(record[name])}; expected {wanted}; {_AGAIN}")
    shape, classes, names = record["image_shape"], record["num_classes"], record.get("class_names", [])
    if not is_image_shape(shape):
        raise VictimError(
            f"{path}: expected an image shape of three whole numbers and {LARGEST_IMAGE:,} at most in one image; got images of "
            f"shape {_short(shape)}; {_AGAIN}"
        )
    if not is_class_count(classes):
        raise VictimError(f"{path}: expected 2 to {MOST_CLASSES:,} classes; got {_short(classes)}; {_AGAIN}")
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names) and len(names) in (0, classes)):
        raise VictimError(f"{path}: expected one class name for each of {classes} classes, or none; {_AGAIN}")


def _check_files(folder: Path, hashes: object) -> None:
    """Compare the files with the checksums of the record."""
    if hashes is None:
        _warn_of_unknown(folder)
        return
    whole = (
        isinstance(hashes, dict)
        and MODEL_FILE in hashes
        and hashes.keys() <= set(_HASHED)
        and all(isinstance(value, str) and _SHA256.fullmatch(value) for value in hashes.values())
    )
    if not whole:
        raise VictimError(
            f"{folder / RECORD_FILE}: expected the SHA-256 of {MODEL_FILE} and, of a learnt trigger, of {TRIGGER_FILE}; {_AGAIN}"
        )
    assert isinstance(hashes, dict)
    for name in _HASHED:
        path = folder / name
        there = path.is_file()
        if not there and name == MODEL_FILE:
            continue  # whoever opens it says so
        if there != (name in hashes):
            raise VictimError(
                f"{path}: it is {'there, but ' if there else 'missing, and '}{RECORD_FILE} says otherwise: writing was "
                f"interrupted, or a file was taken from elsewhere; {_AGAIN}"
            )
        if there and _hash_of(path) != hashes[name]:
            raise VictimError(
                f"{path}: not the file that {RECORD_FILE} was written with, by its SHA-256: writing was interrupted, or a file "
                f"was exchanged; {_AGAIN}"
            )


@cache
def _warn_of_unknown(folder: Path) -> None:
    logger.warning(
        "%s: written by an older version, without checksums: whether its files belong together is not known; %s to be sure",
        folder,
        _AGAIN,
    )


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _int(text: str) -> int:
    if len(text) > _LONGEST_NUMBER or not -(2**64) <= int(text) <= 2**64:
        raise ValueError(f"expected whole numbers up to 2^64; got {text[:_LONGEST_NUMBER]}...")
    return int(text)


def _float(text: str) -> float:
    value = float(text) if len(text) <= _LONGEST_NUMBER else float("inf")
    if value - value != 0:
        raise ValueError(f"expected finite numbers; got {text[:_LONGEST_NUMBER]}")
    return value


def _short(value: object) -> str:
    text = str(value) if isinstance(value, BaseException) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
