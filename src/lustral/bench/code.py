"""The files of Python code that specifications name: their content is part of what a cell depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lustral.bench.cells import CellError
from lustral.core.files import read_regular
from lustral.vision.models.architecture import PythonFile, as_architecture, code_in, innermost

MOST_BYTES = 1 << 20  # of a file with a network


def code_digests(content: Any) -> dict[str, str]:
    """Return the SHA-256 of the file behind each architecture of Python code in plain data, by the architecture.

    Raises:
        OSError: a file cannot be read.
        NotRegularError: it is no regular file, or larger than ``MOST_BYTES``.
    """
    return {arch: _digest(arch) for arch in sorted(set(code_in(content)))}


def require_unchanged(spec: Mapping[str, Any]) -> None:
    """Refuse a cell whose code, or that of a cell it needs, is not what its specification was made of.

    Raises:
        CellError: a file has another content by now, or is gone.
    """
    for part in spec.values():
        if isinstance(part, Mapping) and "kind" in part:
            require_unchanged(part)
    for arch, digest in dict(spec.get("code", {})).items():
        try:
            now = _digest(arch)
        except (ValueError, OSError) as error:
            raise CellError(f"the code of {arch} cannot be read: {error}") from error
        if now != digest:
            raise CellError(f"{arch} has changed since this cell was named; the plan makes another cell of it now")


def _digest(arch: str) -> str:
    found = innermost(as_architecture(arch))
    if not isinstance(found, PythonFile):
        raise CellError(f"{arch} names no Python file")
    return hashlib.sha256(read_regular(Path(found.file), most=MOST_BYTES)).hexdigest()
