"""What classes say of themselves in class variables; first of all ``version``, which changes when what a class computes changes.

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
def class_variables() -> dict[str, dict[str, Any]]:
    """Return the class variables of every class of the library, read from the source: so tables and pages need no torch.

    Returns:
        The values by class and variable, e.g. ``["SAU"]["version"]``: of top-level classes, as far as they are literals.
    """
    nodes = [node for text in _sources(files("lustral")) for node in ast.parse(text).body]
    found = {node.name: dict(_class_variables_of(node)) for node in nodes if isinstance(node, ast.ClassDef)}
    return {name: variables for name, variables in found.items() if variables}


@cache
def current_versions() -> dict[str, int]:
    """Return the version of every class of the library that has one."""
    return {name: values["version"] for name, values in class_variables().items() if "version" in values}


@cache
def listed_methods() -> dict[str, dict[str, Any]]:
    """Return the class variables of every method of the catalog, by its name there, read from the source.

    >>> listed_methods()["badnets"]["threat_model"]
    'supplies data: dirty labels'
    """
    tree = ast.parse(files("lustral").joinpath("catalog.py").read_text(encoding="utf-8"))
    tables = [line.value for line in tree.body if isinstance(line, ast.AnnAssign) and isinstance(line.value, ast.Dict)]
    return {
        ast.literal_eval(name): class_variables()[kind.id]
        for table in tables
        for name, kind in zip(table.keys, table.values, strict=True)
        if name is not None and isinstance(kind, ast.Name)
    }


@cache
def listed_rooms() -> dict[str, str]:
    """Return which table of the catalog lists each method, e.g. "SIFTERS", read from the source.

    >>> listed_rooms()["badnets"], listed_rooms()["fst"]
    ('ATTACKS', 'PURIFIERS')
    """
    tree = ast.parse(files("lustral").joinpath("catalog.py").read_text(encoding="utf-8"))
    return {
        ast.literal_eval(name): line.target.id
        for line in tree.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.value, ast.Dict) and isinstance(line.target, ast.Name)
        for name, method in zip(line.value.keys, line.value.values, strict=True)
        if name is not None and isinstance(method, ast.Name)  # a class, and no sentence about one
    }


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
            if ": ClassVar[" in text:
                yield text


def _class_variables_of(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for line in (line for line in node.body if isinstance(line, ast.AnnAssign)):
        if ast.unparse(line.annotation).startswith("ClassVar[") and isinstance(line.value, ast.Constant):
            yield ast.unparse(line.target), line.value.value
