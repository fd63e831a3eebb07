"""The flat table of a store: one row per cell, with the columns that tables group by and average. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic_core import from_json

from lustral.core.settings import shortened
from lustral.store.former import former_note, is_former
from lustral.store.store import Kind, Store, StoreError
from lustral.store.waste import age_of

MEASURED: tuple[Kind, ...] = (  # cells with rates of a victim: each is a row
    *("victims", "scans", "purifications", "siftings", "trainings"),
)
BENIGN = "benign"  # what the records call the attack of a clean model
UNDEFENDED = "none"  # the defence in the rows of victims as they are
RATES = ("acc", "asr", "ra")  # the records hold Wilson intervals of these
SIFTED = ("tpr", "fpr", "precision", "listed")  # rates of a list of suspicious images

ROW_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "kind", "status", "title")),
        *((name, pa.string()) for name in ("data", "arch", "attack", "attack_method")),
        ("poison_rate", pa.float64()),
        ("target_label", pa.int64()),
        *((name, pa.string()) for name in ("defence", "defence_method", "defence_kind")),
        *((name, pa.int64()) for name in ("clean_images", "seed", "defence_seed")),
        ("victim_key", pa.string()),
        *((name, pa.float64()) for name in ("acc0", "asr0", "ra0")),
        *((f"{rate}{end}", pa.float64()) for rate in RATES for end in ("", "_low", "_high")),
        *((name, pa.float64()) for name in ("natural_rate", "der", "rir", "acc_loss")),
        ("erased", pa.bool_()),
        ("non_finite", pa.bool_()),
        ("outcome", pa.string()),
        ("correct", pa.bool_()),
        ("alarm", pa.bool_()),
        *((name, pa.float64()) for name in ("auroc", "auprc", *SIFTED)),
        *((name, pa.float64()) for name in ("seconds", "image_passes")),
        ("peak_memory_bytes", pa.int64()),
        ("victim_seconds", pa.float64()),
        ("error", pa.string()),
        ("device", pa.string()),
        ("threads", pa.int64()),
        ("at", pa.string()),
        ("outdated", pa.string()),
    ]
)
EMPTY_ROW = dict.fromkeys(ROW_SCHEMA.names)
ATTACK_COLUMNS = ("attack", "attack_method", "poison_rate", "target_label", "victim_key")
DEFENCE_COLUMNS = ("defence", "defence_method", "defence_kind", "kind")
DIMENSIONS = (
    *("data", "arch", "seed", "clean_images", "defence_seed", "device", "threads", "outdated"),
    *ATTACK_COLUMNS,
    *DEFENCE_COLUMNS,
)
IDENTITY = ("data", "arch", "attack", "poison_rate")  # of an attack; target labels change with the seed


def load_cells(store: Store) -> pa.Table:
    """Read the records of a store into one table with the columns of ``ROW_SCHEMA``.

    A row is a scan, a purification, a sifting or a training; or a victim without a defence (defence "none": after is before,
    DER and RIR 0.5 if it is attacked, no cost, "erased" null); or one of them that failed (status "failed", nothing measured).
    ``victim_key`` is the victim that was measured, so a victim's own key in its row. ``acc`` and the like are after the defence
    and null for detectors and sifters; ``auroc`` and the like are null for all that list no images. ``outdated`` says which
    class has another version by now; null: none. Audits have no row, and records of the store's first layout none either
    (``current_cells`` counts them).

    Raises:
        StoreError: a record cannot be read.
    """
    rows = [row for kind in MEASURED for row in _rows(store, kind, _row)]
    training = {row["key"]: row["victim_seconds"] for row in rows if row["kind"] == "victim"}
    done = {row["key"] for row in rows}  # a second try may have succeeded, and the note of the first still be there
    rows += [row for row in _rows(store, "failures", _failed_row) if row["key"] not in done]
    for row in rows:
        row["victim_seconds"] = training.get(row["victim_key"])
    columns = zip(*map(itemgetter(*ROW_SCHEMA.names), rows), strict=True) if rows else [()] * len(ROW_SCHEMA)
    arrays = []
    for column, values in zip(ROW_SCHEMA, columns, strict=True):
        try:
            arrays.append(pa.array(values, type=column.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, ValueError, TypeError) as error:
            raise StoreError(f"a record in {store.url} has an unexpected {column.name}: {shortened(error)}") from error
    return pa.table(arrays, schema=ROW_SCHEMA)


def current_cells(store: Store) -> tuple[pa.Table, str | None]:
    """Return the rows of today's versions, and sentences about what is left out, if there is anything.

    Raises:
        StoreError: a record cannot be read.
    """
    cells, note = without_outdated(load_cells(store))
    notes = [text for text in (note, former_note(store)) if text is not None]
    return cells, " ".join(notes) or None


def every_cell(store: Store) -> tuple[pa.Table, str | None]:
    """Return the rows of all versions, and a sentence about those of older ones, if there are any.

    Raises:
        StoreError: a record cannot be read.
    """
    cells = load_cells(store)
    old = cells.num_rows - cells.column("outdated").null_count
    note = (
        f"{old} of {cells.num_rows} cells were made by older versions of a class that takes part; they are shown."
        if old
        else None
    )
    return cells, note


def without_outdated(cells: pa.Table) -> tuple[pa.Table, str | None]:
    """Return the rows of today's versions, and a sentence about those that are left out, if there are any."""
    old = [reason for reason in cells.column("outdated").to_pylist() if reason is not None]
    if not old:
        return cells, None
    (most, _), *others = Counter(old).most_common()
    reasons = f"{most}; and {len(others)} other reasons" if others else most
    note = f"{len(old)} of {cells.num_rows} cells were made by older versions and are left out ({reasons})."
    return cells.filter(pc.is_null(cells.column("outdated"))), note


def _rows(
    store: Store, kind: Kind, make: Callable[[dict[str, Any]], dict[str, Any] | None]
) -> Iterator[dict[str, Any]]:
    for path, content in store.contents(kind):
        try:
            row = make(from_json(content, allow_inf_nan=False))  # twice as fast as json: it matters with 10,000 records
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(f"{path} is not a readable record of this version ({shortened(error)})") from error
        if row is not None:
            yield row


def _common(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that every record fills."""
    is_victim, made = record["kind"] == "victim", record["made"]
    if not isinstance(record["key"], str) or not isinstance(record["victim_key"], str | None):
        raise TypeError("expected names as text")
    told = ("data", "arch", "attack", "attack_method", *(() if is_victim else ("defence", "defence_method")))
    if not all(isinstance(record["facts"][name], str) for name in told):
        raise TypeError(f"expected {', '.join(told)} as text")
    row = {
        **EMPTY_ROW,
        **record["facts"],
        "key": record["key"],
        "kind": record["kind"],
        "status": record["status"],
        "title": record["title"],
        "victim_key": record["key"] if is_victim else record["victim_key"],
        "error": record.get("error"),
        "device": made["device"],
        "threads": made["threads"],
        "at": made["at"],
        "outdated": age_of(record["spec"]),
    }
    if is_victim:
        row |= {"defence": UNDEFENDED, "defence_method": UNDEFENDED, "defence_kind": UNDEFENDED, "clean_images": 0}
    return row


def _failed_row(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the row of a failure; None where nothing would have been measured, or the first layout has it."""
    return None if is_former(record) or f"{record['kind']}s" not in MEASURED else _common(record)


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a finished cell: what its metrics hold, whichever kind it is."""
    metrics, cost, row = record["metrics"], record["cost"], _common(record)
    row |= _before(metrics["before"])
    if record["kind"] == "victim":
        even = None if metrics["before"]["asr"]["value"] is None else 0.5  # what a defence gets that does nothing
        row |= _after(metrics["before"]) | {"der": even, "rir": even, "acc_loss": 0.0}
        return row | {"seconds": 0.0, "image_passes": 0.0, "peak_memory_bytes": 0, "victim_seconds": cost["seconds"]}
    row |= {name: cost[name] for name in ("seconds", "image_passes", "peak_memory_bytes")}
    if "after" in metrics:
        row |= _after(metrics["after"])
        row |= {name: metrics["compare"][name] for name in ("der", "rir", "acc_loss", "erased")}
    if "detection" in metrics:
        row |= {name: metrics["detection"][name] for name in ("outcome", "correct", "alarm")}
    if "sifting" in metrics:
        row |= {name: metrics["sifting"][name] for name in ("auroc", "auprc")}
        row |= {name: metrics["sifting"][name]["value"] for name in SIFTED}
    return row


def _before(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{rate}0": evaluation[rate]["value"] for rate in RATES}


def _after(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    row = {"natural_rate": evaluation["natural_rate"]["value"], "non_finite": evaluation["non_finite"]}
    for rate in RATES:
        found = evaluation[rate]
        row[rate], row[f"{rate}_low"], row[f"{rate}_high"] = found["value"], found["low"], found["high"]
    return row
