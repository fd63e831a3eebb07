"""Records as bytes: what they must hold, and their checksum. A store may come from anywhere. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lustral.core.files import canonical, is_deep
from lustral.core.settings import shortened
from lustral.store.disk import StoreError

DEEPEST = 64  # mappings and lists inside each other


def content_key(spec: Mapping[str, Any]) -> str:
    """Return the name of a specification: the SHA-256 of its canonical JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(spec)).hexdigest()


def checksum_of(record: Mapping[str, Any]) -> str:
    """Return the checksum of a record: over everything but the checksum itself."""
    return hashlib.sha256(canonical({k: v for k, v in record.items() if k != "checksum"})).hexdigest()


def read_json(content: bytes) -> Any:
    """Return JSON of a stranger: raises ``ValueError`` for NaN, infinity and what is nested too deeply too."""
    try:
        found = json.loads(content, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if content.count(b"[") + content.count(b"{") > DEEPEST and is_deep(found, DEEPEST):
        raise ValueError("nested too deeply")
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def parse_record(content: bytes, path: str, *, check: bool = True) -> dict[str, Any]:
    """Return the record that a file holds; raises ``StoreError`` where it is none, or has changed since it was written."""
    try:
        record: dict[str, Any] = read_json(content)
        for name in (record["key"], record.get("folder", "-"), *record["files"]):
            if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:  # a store may come from anywhere
                raise StoreError(f"{path} names a file outside of its folder: {shortened(name)}")
        _require_types(record)
        if check and (record["checksum"] != checksum_of(record) or content != canonical(record)):  # to the byte
            raise StoreError(f"{path} has changed since it was written: its checksum differs")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} is not a readable record ({shortened(error)})") from error
    return record


def _require_types(record: Mapping[str, Any]) -> None:
    """Raise ``TypeError`` where what every record holds is something else."""
    if not isinstance(record["key"], str):
        raise TypeError("expected a name as text")
    if not isinstance(record["files"], dict) or (record["files"] and not isinstance(record["folder"], str)):
        raise TypeError("expected files by name, and their folder")
    for name, file in record["files"].items():
        if not (isinstance(file["sha256"], str) and isinstance(file["bytes"], int)):
            raise TypeError(f"expected a checksum and a size of {shortened(name)}")
