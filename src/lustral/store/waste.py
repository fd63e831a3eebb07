"""What can go from a store: leftovers of killed processes, and records that no plan names or that failed. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from lustral.core.settings import shortened
from lustral.core.versions import outdated
from lustral.store.former import former_records, is_former
from lustral.store.store import CELLS, Kind, Store, StoreError, content_key

GOES_WITH: dict[Kind, str] = {
    "audits": "purification"
}  # plans do not name these: they stay as long as what they are of
UNREADABLE = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    IndexError,
    AssertionError,
    RecursionError,
)


@dataclass
class Waste:
    """What a clean-up removes.

    Attributes:
        leftovers: files and folders that killed processes left.
        records: (kind, key, title) of records that no plan names, or that failed.
    """

    leftovers: list[str] = field(default_factory=list)
    records: list[tuple[Kind, str, str]] = field(default_factory=list)


def find_waste(
    store: Store,
    *,
    keep: Collection[Mapping[str, Any]] | None = None,
    failures: bool = False,
    old: bool = False,
    grace_seconds: float = 3600.0,
) -> Waste:
    """Return what can go.

    Args:
        store: where to look.
        keep: specifications of the cells that stay, of whatever versions; None: all cells stay.
        failures: whether failed cells go too, so that the next run tries them again.
        old: whether what older versions made goes too.
        grace_seconds: younger leftovers may be in use and stay.

    Raises:
        StoreError: a record is damaged; then nothing can be said of what it names.
    """
    waste = Waste(leftovers=store.leftovers(grace_seconds=grace_seconds))
    named = {content_key(versionless(spec)) for spec in keep or ()}

    def goes(kind: Kind, record: Mapping[str, Any]) -> bool:
        spec = record["spec"][GOES_WITH[kind]] if kind in GOES_WITH else record["spec"]
        if keep is not None and content_key(versionless(spec)) not in named:
            return True
        return (failures and kind == "failures") or (old and age_of(record["spec"]) is not None)

    kinds: tuple[Kind, ...] = (*CELLS, "failures")  # no assets: attacks of other plans may need them, and they are dear
    for kind in kinds:
        waste.records += _chosen(store, kind, goes)
    if old:
        waste.records += [(kind, record["key"], str(record.get("title"))) for kind, record in former_records(store)]
    return waste


def _chosen(store: Store, kind: Kind, goes: Callable[[Kind, Mapping[str, Any]], bool]) -> list[tuple[Kind, str, str]]:
    found: list[tuple[Kind, str, str]] = []
    for record in store.records(kind):
        try:
            if not is_former(record) and goes(kind, record):
                found.append((kind, record["key"], str(record.get("title"))))
        except UNREADABLE as error:
            raise StoreError(f"{kind}/{record['key'][:12]} is not a readable record ({shortened(error)})") from error
    return found


def remove_waste(store: Store, waste: Waste) -> None:
    """Remove what ``find_waste`` found; what needs others goes before them."""
    order: dict[Kind, int] = {kind: -place for place, kind in enumerate(CELLS)}
    for kind, key, _ in sorted(waste.records, key=lambda entry: order.get(entry[0], -len(CELLS))):
        store.remove(kind, key)
    for path in waste.leftovers:
        store.discard(path)


def versionless(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a specification as any version of its methods has it."""
    return {
        name: versionless(value) if isinstance(value, Mapping) else value
        for name, value in spec.items()
        if name != "versions"
    }


def age_of(spec: Mapping[str, Any]) -> str | None:
    """Say which classes of a cell, or of one that it needs, have another version by now; None if all are as they were."""
    own = outdated(spec.get("versions"))
    if own is not None:
        return own
    inner = (part for part in spec.values() if isinstance(part, Mapping) and "kind" in part)
    return next((reason for part in inner if (reason := age_of(part)) is not None), None)
