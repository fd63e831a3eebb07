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
from lustral.core.versions import outdated
from lustral.store.store import Kind, Store, StoreError

BENIGN = "benign"  # what the records call the attack of a clean model
UNDEFENDED = "none"  # the defence in the rows of victims as they are
RATES = ("acc", "asr", "ra")  # the records hold Wilson intervals of these

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
    """Read every record of a store into one table with the columns of ``ROW_SCHEMA``.

    A row is a result; or a victim without a defence (defence "none": after is before, DER and RIR 0.5 if it is attacked, no
    cost, "erased" null); or a cell of either kind that failed (status "failed", nothing measured). ``victim_key`` is the
    victim that was measured, so a victim's own key in its row. ``acc`` and the like are after the defence and null for
    detectors. ``outdated`` says which class has another version by now; null: none.

    Raises:
        StoreError: a record cannot be read.
    """
    victims = list(_rows(store, "victims", _victim_row))
    training = {row["key"]: row["victim_seconds"] for row in victims}
    rows = [*victims, *_rows(store, "results", _result_row)]
    done = {row["key"] for row in rows}  # a second try may have succeeded, and the note of the first still be there
    rows += [row for row in _rows(store, "failures", _common) if row["key"] not in done]
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


def age_of(spec: Mapping[str, Any]) -> str | None:
    """Say which classes of a cell have another version by now; None if all are as they were."""
    own = outdated(spec.get("versions"))
    return own or outdated(spec["victim"].get("versions")) if spec["kind"] == "result" else own


def without_outdated(cells: pa.Table) -> tuple[pa.Table, str | None]:
    """Return the rows of today's versions, and a sentence about those that are left out, if there are any."""
    old = [reason for reason in cells.column("outdated").to_pylist() if reason is not None]
    if not old:
        return cells, None
    (most, _), *others = Counter(old).most_common()
    reasons = f"{most}; and {len(others)} other reasons" if others else most
    note = f"{len(old)} of {cells.num_rows} cells were made by older versions and are left out ({reasons})."
    return cells.filter(pc.is_null(cells.column("outdated"))), note


def _rows(store: Store, kind: Kind, make: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for path, content in store.contents(kind):
        try:
            yield make(from_json(content, allow_inf_nan=False))  # twice as fast as json: it matters with 10,000 records
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(f"{path} is not a readable record of this version ({shortened(error)})") from error


def _common(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that every record fills."""
    is_result, made = record["kind"] == "result", record["made"]
    if not isinstance(record["key"], str) or not isinstance(record["victim_key"], str | None):
        raise TypeError("expected names as text")
    told = ("data", "arch", "attack", "attack_method", *(("defence", "defence_method") if is_result else ()))
    if not all(isinstance(record["facts"][name], str) for name in told):
        raise TypeError(f"expected {', '.join(told)} as text")
    row = {
        **EMPTY_ROW,
        **record["facts"],
        "key": record["key"],
        "kind": record["kind"],
        "status": record["status"],
        "title": record["title"],
        "victim_key": record["victim_key"] if is_result else record["key"],
        "error": record.get("error"),
        "device": made["device"],
        "threads": made["threads"],
        "at": made["at"],
        "outdated": age_of(record["spec"]),
    }
    if not is_result:
        row |= {"defence": UNDEFENDED, "defence_method": UNDEFENDED, "defence_kind": UNDEFENDED, "clean_images": 0}
    return row


def _victim_row(record: Mapping[str, Any]) -> dict[str, Any]:
    before = record["metrics"]["before"]
    even = None if before["asr"]["value"] is None else 0.5  # what DER and RIR give to a defence that does nothing
    return {
        **_common(record),
        **_before(before),
        **_after(before),
        **{"der": even, "rir": even, "acc_loss": 0.0},
        **{"seconds": 0.0, "image_passes": 0.0, "peak_memory_bytes": 0},
        "victim_seconds": record["cost"]["seconds"],
    }


def _result_row(record: Mapping[str, Any]) -> dict[str, Any]:
    metrics, cost = record["metrics"], record["cost"]
    row = {
        **_common(record),
        **_before(metrics["before"]),
        **{name: cost[name] for name in ("seconds", "image_passes", "peak_memory_bytes")},
    }
    if "after" in metrics:
        row |= _after(metrics["after"])
        row |= {name: metrics["compare"][name] for name in ("der", "rir", "acc_loss", "erased")}
    if "detection" in metrics:
        row |= {name: metrics["detection"][name] for name in ("outcome", "correct", "alarm")}
    return row


def _before(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{rate}0": evaluation[rate]["value"] for rate in RATES}


def _after(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    row = {"natural_rate": evaluation["natural_rate"]["value"], "non_finite": evaluation["non_finite"]}
    for rate in RATES:
        found = evaluation[rate]
        row[rate], row[f"{rate}_low"], row[f"{rate}_high"] = found["value"], found["low"], found["high"]
    return row
