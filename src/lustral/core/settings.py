"""A method's dataclass from plain data and back: what plan files, victim folders and stored results are written in.

The dataclass fields are the only defaults. Values are checked by pydantic against the fields' types, ranges by the
dataclass itself; an unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TypeVar, cast, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

Kind = TypeVar("Kind")


class SettingsError(ValueError):
    """Settings do not fit their method; the message has one line for each problem."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?", or the list of what is known.

    >>> suggest("epoch", ["epochs", "seed"])
    "; did you mean 'epochs'?"
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; expected one of {', '.join(known)}" if known else "; it has no settings"


def shortened(value: object, most: int = 120) -> str:
    """Return ``repr`` of a value, cut where it is long: plans and records may hold anything.

    >>> shortened("a" * 300, most=10)
    "'aaaaaa..."
    """
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def describe(settings: Any) -> dict[str, Any]:
    """Return a dataclass instance as nested plain data, as JSON would give it back: tuples become lists."""
    return cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(settings), allow_nan=False)))


def build(kind: type[Kind], values: Mapping[str, Any], *, base: Kind | None = None) -> Kind:
    """Make a dataclass from plain data.

    Args:
        kind: the dataclass.
        values: fields by name, nested dataclasses as nested mappings; what is left out keeps its value in ``base``.
        base: an instance to start from; None starts from the defaults. (A method's default for a nested dataclass need
            not be that dataclass's own default: this keeps the method's.)

    Raises:
        SettingsError: unknown keys, wrong types, values out of range; all problems found, one a line.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(f"expected settings by name; got {values!r}")
    problems = list(_unknown_keys(kind, values, ""))
    if problems:
        raise SettingsError("\n".join(problems))
    start = describe(kind() if base is None else base) if base is not None or _has_defaults(kind) else {}
    try:
        return cast(Kind, _adapter(cast(Any, kind)).validate_python(merge(start, values)))
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(problem) for problem in error.errors())) from error


def merge(start: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``start`` with nested ``changes``.

    >>> merge({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 5}})
    {'a': 1, 'b': {'c': 5, 'd': 3}}
    """
    merged = dict(start)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return merged


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _has_defaults(kind: type) -> bool:
    return all(
        field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        for field in dataclasses.fields(cast(Any, kind))
    )


def _unknown_keys(kind: type, values: Mapping[str, Any], prefix: str) -> Iterable[str]:
    every = get_type_hints(kind)  # also of what belongs to the class, as its version
    hints = {field.name: every[field.name] for field in dataclasses.fields(cast(Any, kind))}
    for key, value in values.items():
        if key not in hints:
            yield f"unknown setting {prefix + str(key)!r}{suggest(str(key), hints)}"
            continue
        inner = next((part for part in (hints[key], *get_args(hints[key])) if dataclasses.is_dataclass(part)), None)
        if inner is not None and isinstance(value, Mapping):
            yield from _unknown_keys(cast(type, inner), value, f"{prefix}{key}.")


def _explain(problem: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # the dataclass's own check says what was expected and what came
        return f"{place}: {text}" if place else text
    return f"{place}: {text[0].lower()}{text[1:]}; got {shortened(problem['input'])}"
