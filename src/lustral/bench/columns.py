"""The columns of a cell: what tables group by, and what they call attacks and defences.

A label is the method's name with what differs from its defaults, unless the plan gives another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lustral.bench.plan import data_label
from lustral.catalog import ATTACKS, DETECTORS, PURIFIERS
from lustral.core.settings import describe
from lustral.tables.rows import BENIGN
from lustral.vision.victims import NO_ATTACK

DEFENCES: dict[str, type] = {**PURIFIERS, **DETECTORS}
SCAN_METHOD = "mask_area"  # the detector that purifiers start from
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
        "defence_kind": "purifier" if method in PURIFIERS else "detector",
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
    by = SCAN_METHOD if scan is None else defence_label(scan["defence"])
    audited = "" if defence.get("audit", True) else " audit=False"
    return f"{label}{'' if by == SCAN_METHOD else f' scan: {by}'}{audited}"


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
