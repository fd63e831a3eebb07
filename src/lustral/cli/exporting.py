"""Files for other tools beside a command's own: the flags that ask for them, and writing them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lustral
from lustral.core.files import json_ready, write_json_atomic
from lustral.exchange.attestation import attestation_of_erase, attestation_of_scan
from lustral.exchange.cyclonedx import cyclonedx_of_erase, cyclonedx_of_scan
from lustral.exchange.sarif import below, sarif_of_refusal, sarif_of_scan, sarif_of_sift
from lustral.vision.models.files.contents import SAFETENSORS, TORCH_SUFFIXES
from lustral.vision.models.files.safety import FileFacts, file_facts
from lustral.vision.models.files.state_dicts import ModelFileError

MOST_FILES = 1_000  # of a folder, looked at for the weights of a model that was refused
FAILED = 2  # exit code of a command that could not do its work


@dataclass(frozen=True, kw_only=True)
class SetExports:
    """Files for other tools, of a training set.

    Attributes:
        sarif: write the listed images as a SARIF 2.1.0 file, for code scanning.
    """

    sarif: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ModelExports:
    """Files for other tools, of a model.

    Attributes:
        cyclonedx: write a CycloneDX 1.6 bill of materials: the model, its hashes, a model card, what was checked.
        attestation: write what was checked as an in-toto statement (test result), to be signed.
    """

    cyclonedx: Path | None = None
    attestation: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ScanExports(ModelExports):
    """Files for other tools, of a scanned model.

    Attributes:
        sarif: write what was found as a SARIF 2.1.0 file, for code scanning; also where the model file is refused.
        cyclonedx: write a CycloneDX 1.6 bill of materials: the model, its hashes, a model card, what was checked.
        attestation: write what was checked as an in-toto statement (test result), to be signed.
    """

    sarif: Path | None = None


Exports = SetExports | ModelExports


def prepare_exports(exports: Exports, given: str | os.PathLike[str]) -> None:
    """Make the folders of the files before the work starts, and refuse to write over what was given.

    Raises:
        ValueError: a file is a folder, the given model or data, or the same as another.
    """
    wanted = {part.name: path for part in fields(exports) if (path := getattr(exports, part.name)) is not None}
    for name, path in wanted.items():
        if path.is_dir():
            raise ValueError(f"--{name} {path} is a folder; expected the name of a file to write")
        if path.exists() and os.path.exists(given) and path.samefile(given):
            raise ValueError(f"--{name} {path} would write over what is looked at; choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
    if len({os.path.realpath(path) for path in wanted.values()}) < len(wanted):
        raise ValueError(f"{' and '.join(f'--{name}' for name in wanted)} name one file twice; give each its own")


def write_scan_exports(exports: ScanExports, record: Mapping[str, Any], *, code: int) -> list[str]:
    """Write the files that a line of ``scan`` asks for, and return a sentence for each."""
    record = json_ready(record)
    files = {
        exports.sarif: ("SARIF", lambda: below(sarif_of_scan(record, exit_code=code), os.getcwd())),
        exports.cyclonedx: ("CycloneDX", lambda: cyclonedx_of_scan(record, made=timestamp())),
        exports.attestation: ("Attestation", lambda: attestation_of_scan(record)),
    }
    return _write(files)


def write_erase_exports(exports: ModelExports, record: Mapping[str, Any]) -> list[str]:
    """Write the files that a line of ``erase`` asks for, and return a sentence for each."""
    record = json_ready(record)
    files = {
        exports.cyclonedx: ("CycloneDX", lambda: cyclonedx_of_erase(record, made=timestamp())),
        exports.attestation: ("Attestation", lambda: attestation_of_erase(record)),
    }
    return _write(files)


def write_sift_exports(exports: SetExports, record: Mapping[str, Any], *, code: int) -> list[str]:
    """Write the file that a line of ``sift`` asks for, and return a sentence for it."""
    record = json_ready(record)
    return _write({exports.sarif: ("SARIF", lambda: below(sarif_of_sift(record, exit_code=code), os.getcwd()))})


def _write(files: Mapping[Path | None, Any]) -> list[str]:
    sentences = []
    for path, (name, content) in files.items():
        if path is not None:
            write_json_atomic(path, content())
            sentences.append(f"{name}: {path}")
    return sentences


@contextmanager
def refusal_told(exports: ScanExports, model: Path, command: str) -> Iterator[None]:
    """Write a SARIF file too where a model file is refused within the block; the error goes on."""
    try:
        yield
    except ModelFileError as error:
        if exports.sarif is not None:
            log = sarif_of_refusal(
                str(model),
                [facts.to_dict() for facts in _readable_facts(model)],
                message=str(error),
                command=command,
                version=lustral.__version__,
                exit_code=FAILED,
            )
            write_json_atomic(exports.sarif, below(log, os.getcwd()))
        raise


def _readable_facts(model: Path) -> Iterator[FileFacts]:
    """Yield the facts about a file, or about the weights in a folder, where they can be had."""
    files = sorted(model.iterdir())[:MOST_FILES] if model.is_dir() else [model]
    for file in files:
        if file == model or file.suffix in (SAFETENSORS, *TORCH_SUFFIXES):
            with suppress(OSError, ValueError):  # missing, no regular file, too large: the error of the model says it
                yield file_facts(file)


def timestamp() -> str:
    """Return the time in UTC; the environment variable SOURCE_DATE_EPOCH fixes it, for builds that repeat."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = datetime.fromtimestamp(int(fixed), UTC) if fixed.isdecimal() else datetime.now(UTC)
    return now.isoformat(timespec="seconds").replace("+00:00", "Z")
