"""The columns of a cell: what tables group by, and what they call attacks and defences.

A label is the method's name with what differs from its defaults, unless the plan gives another.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lustral.bench.plan import data_label
from lustral.catalog import ATTACKS, DETECTORS, PURIFIERS, SAFE_TRAINERS, SIFTERS
from lustral.core.settings import describe
from lustral.tables.rows import BENIGN
from lustral.vision.erasing import scan_method
from lustral.vision.victims import NO_ATTACK

_ROOMS: dict[str, dict[str, Any]] = {  # what each kind of defence is called, and its methods; no name is in two
    "purifier": PURIFIERS,
    "detector": DETECTORS,
    "sifter": SIFTERS,
    "safe trainer": SAFE_TRAINERS,
}
DEFENCES: Mapping[str, type] = ChainMap(*_ROOMS.values())
OWN_COLUMNS = ("target_label", "poison_rate")  # settings of attacks that are columns of every table


def victim_columns(victim: Mapping[str, Any], *, attack: str | None = None) -> dict[str, Any]:
    """Return the columns of a victim, from its specification; ``attack`` is its label in tables."""
    own = victim["attack"]
    return {
        "data": data_label(victim["data"]),
        "arch": victim["arch"],
        "attack": attack or attack_label(victim),
        "attack_method": own["method"],
        "poison_rate": own["settings"].get("poison_rate"),
        "target_label": own["settings"].get("target_label"),
        "seed": victim["seed"],
    }


def defence_columns(
    spec: Mapping[str, Any], *, attack: str | None = None, defence: str | None = None
) -> dict[str, Any]:
    """Return the columns of a defence that meets a victim; ``attack`` and ``defence`` are their labels in tables."""
    method = spec["defence"]["method"]
    return {
        **victim_columns(spec["victim"], attack=attack),
        "defence": defence or defence_label(spec["defence"], spec.get("scan")),
        "defence_method": method,
        "defence_kind": next(kind for kind, methods in _ROOMS.items() if method in methods),
        "defence_seed": spec["seed"],
        "clean_images": spec["clean_images"],
    }


def attack_label(victim: Mapping[str, Any]) -> str:
    """Return an attack's name with what differs from its defaults, e.g. "blended alpha=0.1"."""
    method = victim["attack"]["method"]
    if method == NO_ATTACK:
        return BENIGN
    label = _label(method, victim["attack"]["settings"], ATTACKS[method], OWN_COLUMNS)
    return label if victim["start"] is None else f"{label} (fine-tuned)"


def defence_label(defence: Mapping[str, Any], scan: Mapping[str, Any] | None = None) -> str:
    """Return a defence's name with what differs from its defaults; ``scan`` is the specification of the one it starts from."""
    label = _label(defence["method"], defence["settings"], DEFENCES[defence["method"]], ())
    usual = scan_method(DEFENCES[defence["method"]])
    by = usual if scan is None else defence_label(scan["defence"])
    told = "" if defence.get("audit", True) else " audit=False"
    told += " own_model=True" if defence.get("own_model", False) else ""
    return f"{label}{'' if by == usual else f' scan: {by}'}{told}"


def _label(method: str, settings: Mapping[str, Any], kind: Any, apart: Iterable[str]) -> str:
    differences = [
        f"{name}={value}" for name, value in _differences(settings, describe(kind()), "") if name not in apart
    ]
    return " ".join([method, *differences])


def _differences(settings: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            yield from _differences(value, default, f"{prefix}{name}.")
        elif value != default:
            yield prefix + name, value
