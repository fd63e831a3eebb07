"""The version of a method: a class variable ``version`` that changes when what the class computes changes.

Specifications of results, and so their names, hold the versions of all classes that took part: an old result never passes
for a new one. Nothing here imports torch.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any


def versions_of(*parts: Any) -> dict[str, int]:
    """Return the version of each class that takes part, by the class's name.

    Args:
        parts: instances, classes, or networks' modules; the fields of dataclass instances count as well. Classes without a
            ``version`` are left out: what they do is their owner's to count.
    """
    found: dict[str, int] = {}
    for part in parts:
        kind = part if isinstance(part, type) else type(part)
        version = getattr(kind, "version", None)
        if isinstance(version, int) and kind.__module__.startswith("lustral."):
            found[kind.__name__] = version
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            found |= versions_of(*(getattr(part, field.name) for field in dataclasses.fields(part)))
    return dict(sorted(found.items()))


@cache
def current_versions() -> dict[str, int]:
    """Return the version of every class of the library that has one, read from the source: so tables need no torch."""
    nodes = [node for text in _sources(files("lustral")) for node in ast.parse(text).body]
    return {node.name: number for node in nodes if isinstance(node, ast.ClassDef) for number in _written(node)}


def outdated(versions: object) -> str | None:
    """Say how recorded versions differ from those of this library; None if they do not.

    >>> outdated(None)
    'no versions recorded'
    >>> outdated({"BadNets": 0})
    'BadNets 0, now 1'
    """
    if not isinstance(versions, Mapping) or not versions:
        return "no versions recorded"
    now = current_versions()
    changed = [f"{name} {was}, now {now.get(name, 'gone')}" for name, was in versions.items() if now.get(name) != was]
    return ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "") or None


def _sources(folder: Traversable) -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _sources(entry)
        elif entry.name.endswith(".py"):
            text = entry.read_text(encoding="utf-8")
            if "version: ClassVar[int]" in text:
                yield text


def _written(node: ast.ClassDef) -> Iterator[int]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) == "version" and line.value is not None:
            yield ast.literal_eval(line.value)
