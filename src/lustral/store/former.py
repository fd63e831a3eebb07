"""What a store holds of its first layout: results and their audits, which this version counts and leaves out.

There, purifications and scans were one kind, "results", named by specifications that this version does not make: a purifier
held the scan it started from. Victims were as they are today. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lustral.store.store import FORMER, Kind, Store

HOLDING: tuple[Kind, ...] = (*FORMER, "audits", "failures")  # kinds among whose records there may be former ones


def is_former(record: Mapping[str, Any]) -> bool:
    """Say whether a record is a result of the first layout, an audit of one, or a failure of one.

    >>> is_former({"spec": {"kind": "result"}}), is_former({"spec": {"kind": "victim"}})
    (True, False)
    """
    spec = record.get("spec")
    return isinstance(spec, Mapping) and (spec.get("kind") == "result" or "result" in spec)


def former_records(store: Store) -> Iterator[tuple[Kind, dict[str, Any]]]:
    """Yield (kind, record) of all records of the first layout.

    Raises:
        StoreError: one of the records among them is damaged.
    """
    for kind in HOLDING:
        yield from ((kind, record) for record in store.records(kind, check=False) if is_former(record))


def former_note(store: Store) -> str | None:
    """Return a sentence about what is left out because an earlier version made it; None where there is nothing."""
    counts = Counter(kind for kind, _ in former_records(store))
    if not counts:
        return None
    held = ", ".join(f"{number:,} {kind if number > 1 else kind[:-1]}" for kind, number in counts.items())
    return (
        f"Of an earlier version, left out: {held}. The victims stay in use; `lustral bench gc --old` removes the rest."
    )
