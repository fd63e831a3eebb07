"""Find the sets of weights in what a model file held: every mapping of names to tensors, wherever it is.

A file may hold several sets that fit one network: averaged weights beside the last ones, teacher and student, the best and
the latest. Which of them was looked at is said, never guessed: a set that nobody looks at is a place to hide a backdoor.

A key of the file belongs to a key of the network if they are equal, or are equal once a common prefix and the names of
wrappers are gone: ``module.layer1.0.weight`` and ``layer1.module.0.weight`` are both ``layer1.0.weight``. A wrapper's name
is one that no key of the network has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lustral.vision.models.files.state_dicts import PROBE_CLASSES, ModelFileError, listing

TOP = "."  # the name of a set that is not inside of anything
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # torch's own
_COUNTS_BATCHES = "num_batches_tracked"  # old files lack it, and no answer depends on it
_MOST_PARTS = 8  # of a common prefix
_LONGEST_NAME = 200  # characters
_MOST_NEAREST = 16  # mappings looked through for an error message


@dataclass(frozen=True, kw_only=True)
class WeightSet:
    """Weights of one network in a file.

    Attributes:
        name: says where it is: "state_dict", "model.ema", "state_dict.teacher"; "." at the top.
        path: the names that lead to its mapping.
        prefix: what stands before each of its keys there, e.g. "module.".
        keys: the file's key of each of the network's keys, in the file's order.
        tensors: by the network's keys, in the file's order.
        unwanted: keys under ``prefix`` that are not the network's.
    """

    name: str
    path: tuple[str, ...]
    prefix: str
    keys: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    unwanted: tuple[str, ...]


@dataclass(frozen=True)
class NamedTensors:
    """A mapping of names to tensors, and the names that lead to it."""

    path: tuple[str, ...]
    tensors: Mapping[str, Tensor]

    @property
    def of_optimizer(self) -> bool:
        """Whether it is an optimizer's memory of each weight, by the names that lead to it."""
        return any("optim" in name.lower() for name in self.path)


def find_mappings(file: Path, content: Any) -> list[NamedTensors]:
    """Return every mapping that holds tensors by name, outer ones first.

    Raises:
        ModelFileError: there is none.
    """
    found, seen = [], set()
    waiting: list[tuple[tuple[str, ...], Any]] = [((), content)]
    for path, value in waiting:  # which grows
        if id(value) in seen:
            continue
        if isinstance(value, Mapping | list | tuple):
            seen.add(id(value))
            items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
            tensors = {key: item for key, item in items if isinstance(key, str) and isinstance(item, Tensor)}
            if tensors and isinstance(value, Mapping):
                found.append(NamedTensors(path, tensors))
            waiting += [((*path, str(key)), item) for key, item in items if isinstance(item, Mapping | list | tuple)]
    if not found:
        names = listing(map(str, content)) if isinstance(content, Mapping) else ""
        got = f"a mapping with {names}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ModelFileError(f"{file}: no state dict in it: expected names and tensors; found {got}")
    return found


def known_keys(mappings: Sequence[NamedTensors]) -> list[str]:
    """Return all keys without the names that wrappers give, to tell forms of an architecture apart."""
    parts = (key.split(".") for mapping in mappings for key in mapping.tensors)
    return [".".join(part for part in key if part not in _WRAPPERS) for key in parts]


def find_sets(mappings: Sequence[NamedTensors], expected: Collection[str]) -> list[WeightSet]:
    """Return the sets that have every key which a network expects, in the file's order.

    Args:
        mappings: see ``find_mappings``.
        expected: the network's keys.
    """
    required = [key for key in expected if not key.endswith(_COUNTS_BATCHES)]
    sets: list[WeightSet] = []
    for mapping in mappings:
        found: dict[frozenset[str], tuple[tuple[int, int], WeightSet]] = {}
        for prefix in _prefixes(mapping.tensors, len(required)):
            fitted, clashes = fit_keys(mapping, prefix, expected)
            if clashes or not all(key in fitted.keys for key in required):
                continue
            exact = sum(key == prefix + name for name, key in fitted.keys.items())
            same, rank = frozenset(fitted.keys.values()), (exact, len(prefix))
            if same not in found or found[same][0] < rank:
                found[same] = rank, fitted
        several = len(found) > 1
        sets += [_named(fitted, with_prefix=several) for _, fitted in found.values()]
    return sets


def nearest_set(mappings: Sequence[NamedTensors], expected: Collection[str]) -> WeightSet:
    """Return the part of a file that has most of the keys which a network expects, to say what it lacks."""
    candidates = [
        fit_keys(mapping, prefix, expected)[0]
        for mapping in sorted(mappings, key=lambda mapping: -len(mapping.tensors))[:_MOST_NEAREST]
        for prefix in ("", _common_prefix(mapping.tensors))
    ]
    return max(candidates, key=lambda candidate: (len(candidate.keys), -len(candidate.unwanted)))


def fit_keys(mapping: NamedTensors, prefix: str, expected: Collection[str]) -> tuple[WeightSet, bool]:
    """Return what a network finds of itself under a prefix, and whether two keys of the file claim one of its keys."""
    words = {part for key in expected for part in key.split(".")}
    root = _common_prefix(expected)
    keys: dict[str, str] = {}
    unwanted: list[str] = []
    clashes = False
    tails = {key: key.removeprefix(prefix) for key in mapping.tensors if key.startswith(prefix)}
    taken = {tail for tail in tails.values() if tail in expected}
    for key, tail in tails.items():
        bare = ".".join(part for part in tail.split(".") if part in words)
        name = next((name for name in (tail, bare, root + tail, root + bare) if name in expected), None)
        if name is None or (name in taken and name != tail):
            unwanted.append(key)
        elif name in keys:
            clashes = True
        else:
            keys[name] = key
    tensors = {name: mapping.tensors[key] for name, key in keys.items()}
    fitted = WeightSet(name=TOP, path=mapping.path, prefix=prefix, keys=keys, tensors=tensors, unwanted=tuple(unwanted))
    return _named(fitted, with_prefix=False), clashes


def choose_set(
    file: Path, sets: Sequence[WeightSet], probe: Mapping[str, Tensor], *, wanted: str | None, sizes_known: bool
) -> tuple[WeightSet, list[WeightSet]]:
    """Return the set to look at, and others that hold the same numbers.

    Args:
        file: for messages.
        sets: at least one, see ``find_sets``.
        probe: the network's tensors, built for ``PROBE_CLASSES`` classes.
        wanted: a name that the user gave.
        sizes_known: whether ``probe`` was built for images of the right shape, so that its shapes say which sets fit.

    Raises:
        ModelFileError: there is no set of the wanted name, or several differ and none is wanted.
    """
    names = ", ".join(found.name for found in sets)
    if wanted is not None:
        chosen = [found for found in sets if found.name == wanted]
        if not chosen:
            raise ModelFileError(f"{file}: no weights {wanted!r} that fit the network in it; expected one of {names}")
    else:
        chosen = [found for found in sets if not sizes_known or has_shapes(found, probe)] or list(sets)
    first, *others = chosen
    same = [other for other in sets if other is not first and _equal(first, other)]
    if different := [other.name for other in others if other not in same]:
        raise ModelFileError(
            f"{file}: several sets of weights fit the network, and they differ: {first.name}, {', '.join(different)}; "
            "name the one that is in use (--weights NAME), and look at each: any may be the one that is deployed"
        )
    return first, same


def has_shapes(found: WeightSet, probe: Mapping[str, Tensor]) -> bool:
    """Tell whether the shapes are those of the network, whatever the number of classes."""
    return all(
        tensor.ndim == probe[key].ndim
        and all(size in (PROBE_CLASSES, got) for size, got in zip(probe[key].shape, tensor.shape, strict=True))
        for key, tensor in found.tensors.items()
    )


def _equal(first: WeightSet, second: WeightSet) -> bool:
    return first.tensors.keys() == second.tensors.keys() and all(
        tensor.dtype == second.tensors[key].dtype
        and tensor.shape == second.tensors[key].shape
        and torch.equal(tensor, second.tensors[key])
        for key, tensor in first.tensors.items()
    )


def _named(fitted: WeightSet, *, with_prefix: bool) -> WeightSet:
    parts = (*fitted.path, fitted.prefix.rstrip(".")) if with_prefix and fitted.prefix else fitted.path
    name = "".join(letter if letter.isprintable() else "?" for letter in ".".join(parts)[:_LONGEST_NAME])
    return WeightSet(**{**vars(fitted), "name": name or TOP})


def _prefixes(keys: Collection[str], least: int) -> list[str]:
    """Return the beginnings that at least so many keys share, the empty one first."""
    counts = Counter(prefix for key in keys for prefix in _beginnings(key))
    return [prefix for prefix, count in counts.items() if count >= least]


def _beginnings(key: str) -> Iterator[str]:
    yield ""
    end = -1
    for _ in range(_MOST_PARTS):
        end = key.find(".", end + 1)
        if end < 0:
            return
        yield key[: end + 1]


def _common_prefix(keys: Collection[str]) -> str:
    """Return the longest beginning, in whole parts, that all keys share."""
    return max((prefix for prefix in _prefixes(keys, len(keys))), key=len, default="")
