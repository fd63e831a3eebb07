"""What the scripts of the site read: all cells, and the means over seeds and over attacks, by columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from lustral.core.characters import visible
from lustral.report.words import is_number
from lustral.tables.rows import BENIGN, UNDEFENDED
from lustral.tables.summary import Query, table

CELL_COLUMNS = (
    *("key", "kind", "status", "title", "data", "arch", "attack", "attack_method", "poison_rate"),
    *("defence", "defence_method", "defence_kind", "clean_images", "seed", "defence_seed", "victim_key"),
    *("acc", "acc_low", "acc_high", "asr", "asr_low", "asr_high", "ra", "der", "acc_loss", "seconds"),
    *("auroc", "tpr", "fpr", "listed"),
    *("erased", "outcome", "correct", "error", "device", "threads"),
)
FEW_WORDS = (  # columns in which the same texts come again and again
    *("kind", "status", "data", "arch", "attack", "attack_method", "defence", "defence_method", "defence_kind"),
    *("victim_key", "outcome", "error", "device"),
)
SETTING = ("data", "arch", "poison_rate", "clean_images", "attack", "attack_method", "defence", "defence_method")
MEAN = ("data", "arch", "poison_rate", "clean_images", "defence", "defence_method")
METRICS = (
    *("der", "asr", "acc", "ra", "rir", "acc_loss", "erased", "correct", "alarm", "seconds", "asr0"),
    *("auroc", "tpr", "fpr", "listed"),
)
ENDS = ("", "_half", "_low", "_high")
LONGEST_ERROR = 200  # characters; the page of the cell has the whole


def settings_of(cells: pa.Table) -> list[dict[str, Any]]:
    """Return the mean over seeds of every attack and defence on every data set, network, rate and clean budget.

    A row has the columns of ``SETTING``, for each metric m its mean, m_half, m_low, m_high and m_n (cells in it), and the
    numbers of cells, seeds and failures. Victims without defence have no clean budget.
    """
    return _means(cells, SETTING, {})


def means_of(cells: pa.Table) -> list[dict[str, Any]]:
    """Return the mean over attacks of every defence: as ``settings_of``, without the benign model."""
    attacks = [name for name in cells.column("attack").unique().to_pylist() if name != BENIGN]
    return _means(cells, MEAN, {"attack": attacks}) if attacks else []


def _means(cells: pa.Table, by: tuple[str, ...], where: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table(cells, Query(by=by, metrics=METRICS, where=where)).rows.to_pylist()
    for row in rows:
        for name in METRICS:
            row[f"{name}_n"] = row["cells"] - row[f"{name}_skipped"]
        if row["defence"] == UNDEFENDED:
            row["clean_images"] = None
    return rows


def settings_script(settings: Sequence[Mapping[str, Any]], means: Sequence[Mapping[str, Any]]) -> str:
    """Return the script with both tables of means."""
    numbers = tuple(f"{name}{end}" for name in METRICS for end in (*ENDS, "_n"))
    counts = ("cells", "attacks", "seeds", "failed")
    tables = {
        "settings": _by_columns(settings, (*SETTING, *numbers, *counts), FEW_WORDS),
        "means": _by_columns(means, (*MEAN, *numbers, *counts), FEW_WORDS),
    }
    return _script(tables)


def cells_script(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the script with one row per cell, in the given order.

    Victims without a defence get no clean budget, time, DER and loss: nothing was done to them.
    """
    nothing = dict.fromkeys(("clean_images", "seconds", "der", "acc_loss"))
    shown = [{**row, **(nothing if row["defence"] == UNDEFENDED else {}), "error": short(row["error"])} for row in rows]
    return _script({"cells": _by_columns(shown, CELL_COLUMNS, FEW_WORDS)})


def short(text: str | None) -> str | None:
    """Return the first line of an error, not too much of it."""
    if text is None:
        return None
    line = text.partition("\n")[0]
    return line if len(line) <= LONGEST_ERROR else f"{line[:LONGEST_ERROR]}…"


def script_json(content: Any) -> str:
    """Return JSON that may stand in a script, in a file of its own or in a page: ASCII, and it cannot end the element.

    >>> script_json({"name": "</script>"})
    '{"name":"<\\\\/script>"}'
    """
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("</", "<\\/").replace("<!--", "<\\u0021--")


def _script(tables: Mapping[str, Any]) -> str:
    lines = ['"use strict";', "window.LUSTRAL = window.LUSTRAL || {};"]
    lines += [f"LUSTRAL.{name} = {script_json(content)};" for name, content in tables.items()]
    return "\n".join(lines) + "\n"


def _by_columns(rows: Sequence[Mapping[str, Any]], names: Iterable[str], worded: Sequence[str]) -> dict[str, Any]:
    """Return {"length", "columns"}: values by column, texts that repeat as a list of words and a number for each row."""
    columns: dict[str, Any] = {}
    for name in names:
        values = [_slim(row[name]) for row in rows]
        if all(value is None for value in values) and name not in CELL_COLUMNS and name not in SETTING:
            continue  # a metric that was never measured
        columns[name] = _worded(values) if name in worded else values
    return {"length": len(rows), "columns": columns}


def _worded(values: Sequence[Any]) -> dict[str, Any]:
    places: dict[Any, int] = {}
    codes = [-1 if value is None else places.setdefault(value, len(places)) for value in values]
    return {"words": list(places), "codes": codes}


def _slim(value: Any) -> Any:
    """Return a value with as many digits as anybody reads; what is not finite is nothing, and text is safe to show."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, float):
        return float(f"{value:.6g}") if is_number(value) else None
    return value
