"""The order of the classes: a model counts them one way, a folder of images another.

A class is known by its name, so labels can be brought into the model's order where both sides name the same classes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lustral.core.characters import visible
from lustral.vision.records import ImageSet
from lustral.vision.sources.record import SourceError

MOST_BYTES = 2**20  # of a file of names
MOST_NAMES = 8  # in a message
LONGEST_SHOWN = 100  # characters of a name there


class ClassNamesError(SourceError):
    """The names of the classes cannot be read, or are not those of the data."""


def read_class_names(path: Path) -> tuple[str, ...]:
    """Return the names in a file, in its order.

    Args:
        path: one name a line; or JSON: a list of names, an object of names by number, or one that holds such an object as
            ``id2label``, as a config.json does.

    Raises:
        ClassNamesError: it is none of these, names a class twice, or is larger than 1 MiB.
    """
    if not path.is_file():
        raise ClassNamesError(f"{path}: no such file; expected the names of the classes, one a line or a JSON list")
    if path.stat().st_size > MOST_BYTES:
        raise ClassNamesError(
            f"{path}: {path.stat().st_size:,} bytes; expected names of classes, at most {MOST_BYTES:,}"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ClassNamesError(f"{path}: expected names as UTF-8 text: {error}") from error
    names = _from_json(path, text)
    if names is None:
        names = tuple(line.strip() for line in text.split("\n") if line.strip())
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ClassNamesError(f"{path}: expected each class once; more than once: {_listed(twice)}")
    if len(names) < 2:
        raise ClassNamesError(f"{path}: expected at least 2 names, one a line or a JSON list; got {len(names)}")
    return names


def in_class_order(images: ImageSet, names: Sequence[str]) -> ImageSet:
    """Return the set with its labels moved to the places that their classes' names have among ``names``.

    Args:
        images: a set with class names.
        names: the same names in another order; case, blanks, "-" and "_" do not matter.

    Raises:
        ClassNamesError: the names are not those of the set, one for one; the message lists both.
    """
    places = check_class_names(images.class_names, names)
    moved = torch.tensor(places, device=images.labels.device)
    return replace(images, labels=moved[images.labels], class_names=tuple(names))


def check_class_names(own: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the place of each of the data's class names among the model's; raises as ``in_class_order``."""
    if not own:
        raise ClassNamesError("the data do not name their classes, so their order cannot be told; leave out --classes")
    for form in (str, _plain):
        model, data = [form(name) for name in names], [form(name) for name in own]
        if sorted(model) == sorted(set(data)) and len(model) == len(data):
            places = {name: place for place, name in enumerate(model)}
            return [places[name] for name in data]
    known_to_data, known_to_model = {*map(_plain, own)}, {*map(_plain, names)}
    only_model = [name for name in names if _plain(name) not in known_to_data]
    only_data = [name for name in own if _plain(name) not in known_to_model]
    raise ClassNamesError(
        f"the classes of the model and of the data are not the same: {len(names)} of the model ({_listed(names)}), {len(own)} of "
        f"the data ({_listed(own)}); only the model has: {_listed(only_model)}; only the data have: {_listed(only_data)}"
    )


def names_nothing(names: Sequence[str]) -> bool:
    """Say whether names only number the classes: "0", "1", ... or "LABEL_0", "LABEL_1", ...

    >>> names_nothing(["0", "1"]), names_nothing(["LABEL_0", "LABEL_1"]), names_nothing(["1", "0"]), names_nothing(["cat"])
    (True, True, False, False)
    """
    return all(name in (str(place), f"LABEL_{place}") for place, name in enumerate(names))


def _from_json(path: Path, text: str) -> tuple[str, ...] | None:
    """Return the names of a JSON text, or None for a text of lines: a name may begin with a bracket."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if path.suffix == ".json":
            raise ClassNamesError(f"{path}: damaged JSON: {error}") from error
        return None
    if isinstance(content, Mapping):
        content = _by_number(path, content.get("id2label", content))
    if not isinstance(content, list) or not all(isinstance(name, str) and name.strip() for name in content):
        raise ClassNamesError(f'{path}: expected a JSON list of names, or an object like {{"0": "cat", "1": "dog"}}')
    return tuple(name.strip() for name in content)


def _by_number(path: Path, content: Any) -> list[Any]:
    """Return the values of {"0": ..., "1": ...} in the order of the numbers."""
    if not isinstance(content, Mapping) or set(content) != {str(place) for place in range(len(content))}:
        raise ClassNamesError(f"{path}: expected the classes as id2label, by numbers from 0 on without a gap")
    return [content[str(place)] for place in range(len(content))]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _listed(names: Sequence[str]) -> str:
    shown = [
        visible(name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}...") for name in names[:MOST_NAMES]
    ]
    more = [f"{len(names) - MOST_NAMES} more"] if len(names) > MOST_NAMES else []
    return ", ".join([*shown, *more]) or "none"
