"""Tables made from the rows of a store: means with 95 % intervals, grouped by their columns.

Within an attack (data set, architecture, attack, poison rate) all cells of one seed are averaged first, because the seed that
trained the victim moves the numbers most; then the seeds; then the attacks. The attacks were chosen, not drawn: only the seeds
make the interval. With n_a seeds, mean m_a and standard deviation s_a of attack a, and A attacks::

    mean = Σ m_a / A        standard error = √(Σ s_a² / n_a) / A

The t quantile has the Welch-Satterthwaite degrees of freedom (Σ v_a)² / Σ (v_a² / (n_a − 1)), v_a = s_a² / n_a. One attack gives
the usual t interval. Nothing here imports torch.

Reference:
    Welch, The generalization of "Student's" problem when several different population variances are involved,
    Biometrika 1947; Satterthwaite, An approximate distribution of estimates of variance components, Biometrics 1946.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa
from scipy.special import stdtrit

from lustral.core.settings import suggest
from lustral.tables.rows import (
    ATTACK_COLUMNS,
    BENIGN,
    DEFENCE_COLUMNS,
    DIMENSIONS,
    IDENTITY,
    RATES,
    ROW_SCHEMA,
    UNDEFENDED,
)

LOW_ASR = 0.1  # an attack below this counts as gone in "share_low_asr"
CONFIDENCE = 0.975  # quantile of a two-sided 95 % interval


class QueryError(ValueError):
    """A table cannot be made; the message has one line for each problem."""


@dataclass(frozen=True)
class Metric:
    """How a column of the cells is averaged and shown.

    Attributes:
        heading: of its column in tables for people.
        form: "percent" of a fraction, "points" for a difference of fractions, "score" with three decimals, or a cost.
        better: 1 if more is better, -1 if less is, 0 if it depends.
        strong_only: averaged over victims whose attack worked before the defence.
    """

    heading: str
    form: Literal["percent", "points", "score", "seconds", "passes", "bytes"] = "percent"
    better: Literal[-1, 0, 1] = 0
    strong_only: bool = False


METRICS: dict[str, Metric] = {
    "acc": Metric("ACC", better=1),
    "asr": Metric("ASR", better=-1),
    "ra": Metric("RA", better=1),
    "der": Metric("DER", form="score", better=1, strong_only=True),
    "rir": Metric("RIR", form="score", better=1, strong_only=True),
    "acc_loss": Metric("ACC loss", form="points", better=-1),
    "erased": Metric("erased", better=1),
    "natural_rate": Metric("without trigger"),
    "acc0": Metric("ACC before"),
    "asr0": Metric("ASR before"),
    "ra0": Metric("RA before"),
    "alarm": Metric("alarm"),
    "correct": Metric("correct", better=1),
    "auroc": Metric("AUROC", form="score", better=1),
    "auprc": Metric("AUPRC", form="score", better=1),
    "tpr": Metric("TPR", better=1),
    "fpr": Metric("FPR", better=-1),
    "precision": Metric("precision", better=1),
    "listed": Metric("listed"),
    "seconds": Metric("mean seconds", form="seconds", better=-1),
    "image_passes": Metric("mean image passes", form="passes", better=-1),
    "peak_memory_bytes": Metric("mean peak memory", form="bytes", better=-1),
}
EXTREMES: dict[str, Metric] = {  # one number per group, without an interval
    "max_asr": Metric("largest ASR", better=-1),
    "share_low_asr": Metric("attacks under 10 % ASR", better=1),
    "benign_alarm": Metric("alarm on benign", better=-1),
}
FIXED = pa.schema(
    [
        *((name, pa.int64()) for name in ("cells", "attacks", "seeds", "failed", "left_out", "broken")),
        *((name, pa.float64()) for name in ("benign_acc_loss", "seconds_median", "image_passes_median")),
        ("peak_memory_bytes_max", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Query:
    """What a table shows.

    Attributes:
        by: columns of the cells that make the groups, from ``DIMENSIONS``; none for one group of everything.
        metrics: names from ``METRICS`` (with intervals) and ``EXTREMES`` ("max_asr": the largest of the attacks' mean ASR;
            "share_low_asr": the share of attacks whose mean ASR is under 10 %; "benign_alarm": false alarms).
        where: admitted values by column; text is converted to the column's type, None stands for "has none".
        least_asr: DER and RIR leave out victims whose ASR before the defence was not above this, fraction.

    Benign models count only where ``by`` or ``where`` names a column of the attack, victims without a defence only where one
    names a column of the defence: else they would be averaged into something else.
    """

    by: tuple[str, ...] = ("data", "defence")
    metrics: tuple[str, ...] = ("acc", "asr", "der")
    where: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    least_asr: float = 0.5

    def __post_init__(self) -> None:
        """Check the names and convert the values."""
        known = {**METRICS, **EXTREMES}
        problems = [f"unknown column {name!r}{suggest(name, DIMENSIONS)}" for name in self.by if name not in DIMENSIONS]
        problems += [f"unknown metric {name!r}{suggest(name, known)}" for name in self.metrics if name not in known]
        twice = [name for names in (self.by, self.metrics) for name in dict.fromkeys(names) if names.count(name) > 1]
        problems += [f"{name!r} is named twice" for name in twice]
        if not self.metrics:
            problems.append(f"expected at least one metric of {', '.join(known)}")
        if not 0 <= self.least_asr < 1:
            problems.append(f"expected least_asr in [0, 1), a fraction; got {self.least_asr}")
        where = dict[str, tuple[Any, ...]]()
        for name, values in self.where.items():
            if name not in DIMENSIONS:
                problems.append(f"unknown column {name!r}{suggest(name, DIMENSIONS)}")
            elif isinstance(values, str) or not values:
                problems.append(f"{name}: expected a list with at least one value; got {values!r}")
            else:
                try:
                    where[name] = tuple(_typed(name, value) for value in values)
                except ValueError as error:
                    problems.append(str(error))
        if problems:
            raise QueryError("\n".join(problems))
        object.__setattr__(self, "where", where)


def _typed(column: str, value: Any) -> Any:
    """Return a value as the column's type has it."""
    kind = ROW_SCHEMA.field(column).type
    if value is None or kind == pa.string():
        return None if value is None else str(value)
    try:
        number = int(value) if kind == pa.int64() else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or (isinstance(value, float) and number != value):
        expected = "a whole number" if kind == pa.int64() else "a number"
        raise ValueError(f"{column}: expected {expected}; got {value!r}")
    return number


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A table of means.

    Attributes:
        query: what was asked.
        rows: one row per group, sorted by the group's columns. For a metric m: m (mean), m_half (half width of the 95 %
            interval), m_low and m_high (its ends; of "t" ends they may leave [0, 1]), m_interval ("t" over seeds,
            "wilson" over the test images of the group's only cell, or null: unknown, because an attack has one seed),
            m_skipped (finished cells without this value). Of the ``EXTREMES`` only the value. Then ``FIXED``: cells (finished),
            attacks, seeds, failed, left_out (cells that DER and RIR leave out), broken (cells whose model gives numbers that
            are not finite), benign_acc_loss (mean loss of accuracy on benign models), medians of seconds and image passes,
            and the largest peak memory. Rates are fractions.
        notes: sentences that belong under the table.
    """

    query: Query
    rows: pa.Table
    notes: tuple[str, ...]

    @property
    def caption(self) -> str:
        """All notes in one paragraph."""
        return " ".join(self.notes)


def table(cells: pa.Table, query: Query) -> Summary:
    """Group cells and average their metrics; see the module for the statistics.

    Args:
        cells: as ``lustral.tables.rows.load_cells`` returns them.
        query: what to show.

    Raises:
        QueryError: a value in ``where`` does not occur.
    """
    require_values(cells, query.where)
    wanted = [name for name in query.metrics if name in METRICS]
    measured = list(dict.fromkeys([*wanted, *(["asr"] if set(query.metrics) & {"max_asr", "share_low_asr"} else [])]))
    with duckdb.connect(":memory:", config={"threads": 1}) as base:
        base.register("cells", cells)
        condition, values = selection(query.where, query.by)
        base.execute(f"CREATE TEMP TABLE chosen AS SELECT * FROM cells WHERE {condition}", values)
        groups = _fetch(base, _groups_sql(query))
        means = _fetch(base, _means_sql(query.by, measured, query.least_asr)) if measured else []
        benign = _benign(base, query)
        mixed = base.execute(MIXED_SQL).fetchone()
    _add_intervals(means)
    by_group = {(tuple(row[name] for name in query.by), row["metric"]): row for row in means}
    rows = []
    for group in groups:
        place = tuple(group[name] for name in query.by)
        row = {name: group[name] for name in query.by}
        for name in query.metrics:
            if name in METRICS:
                row |= _mean_columns(name, by_group.get((place, name)), group["cells"])
        attacks = by_group.get((place, "asr"), {})
        clean = benign.get(tuple(group[name] for name in _shared_with_benign(query.by)), {})
        extremes = {"max_asr": attacks.get("largest"), "share_low_asr": attacks.get("share_low")}
        extremes["benign_alarm"] = clean.get("alarm")
        row |= {name: extremes[name] for name in query.metrics if name in EXTREMES}
        rows.append({**row, **group, "benign_acc_loss": clean.get("acc_loss")})
    schema = _schema(query)
    return Summary(
        query=query,
        rows=pa.Table.from_pylist(rows, schema=schema),
        notes=tuple(_notes(query, rows, mixed[0] if mixed else 0)),
    )


def require_values(cells: pa.Table, where: Mapping[str, Sequence[Any]]) -> None:
    """Raise ``QueryError`` if a value does not occur in its column; an empty table may be asked anything."""
    problems = []
    for name, values in where.items() if cells.num_rows else ():
        there = cells.column(name).unique().to_pylist()
        known = sorted(str(value) for value in there if value is not None)
        problems += [
            f"no cell has {name} {value!r}" + (suggest(str(value), known) if known else "")
            for value in values
            if value not in there
        ]
    if problems:
        raise QueryError("\n".join(problems))


def selection(where: Mapping[str, Sequence[Any]], by: Sequence[str] = ()) -> tuple[str, list[Any]]:
    """Return the SQL condition, and its values, of the cells that belong into a table."""
    parts, values = ["TRUE"], list[Any]()
    for name, admitted in where.items():
        given = [value for value in admitted if value is not None]
        choices = [f"{name} IN ({', '.join('?' for _ in given)})"] if given else []
        choices += [f"{name} IS NULL"] if None in admitted else []
        parts.append(f"({' OR '.join(choices)})")
        values += given
    named = {*where, *by}
    if not named & set(ATTACK_COLUMNS):
        parts.append(f"attack <> '{BENIGN}'")
    if not named & set(DEFENCE_COLUMNS):
        parts.append(f"defence <> '{UNDEFENDED}'")
    return " AND ".join(parts), values


def value_sql(name: str, least_asr: float) -> str:
    """Return the SQL expression of a metric: null where it does not count."""
    value = f"CAST({name} AS DOUBLE)"
    return f"CASE WHEN asr0 > {least_asr} THEN {value} END" if METRICS[name].strong_only else value


def _groups_sql(query: Query) -> str:
    """Return the query for what every group has beside its metrics."""
    columns = "".join(f"{name}, " for name in query.by)
    order = ", ".join(f"{name} NULLS LAST" for name in query.by)
    return f"""
        SELECT {columns}
            count(*) FILTER (status = 'done') AS cells,
            count(DISTINCT ({", ".join(IDENTITY)})) FILTER (status = 'done') AS attacks,
            count(DISTINCT seed) FILTER (status = 'done') AS seeds,
            count(*) FILTER (status = 'failed') AS failed,
            count(*) FILTER (der IS NOT NULL AND NOT asr0 > {query.least_asr}) AS left_out,
            count(*) FILTER (non_finite) AS broken,
            median(seconds) AS seconds_median,
            median(image_passes) AS image_passes_median,
            max(peak_memory_bytes) AS peak_memory_bytes_max
        FROM chosen {f"GROUP BY {columns.rstrip(', ')}" if columns else ""} HAVING count(*) > 0
        {f"ORDER BY {order}" if order else ""}"""


def _means_sql(by: Sequence[str], metrics: Sequence[str], least_asr: float) -> str:
    """Return the query for one row per group and metric: cells -> seeds -> attacks -> group."""
    attack = list(dict.fromkeys([*by, *IDENTITY]))
    seed = list(dict.fromkeys([*attack, "seed"]))
    values = " UNION ALL ".join(
        f"""SELECT {", ".join(seed)}, '{name}' AS metric, {value_sql(name, least_asr)} AS value,
            {f"{name}_low" if name in RATES else "NULL"} AS low, {f"{name}_high" if name in RATES else "NULL"} AS high
            FROM chosen WHERE status = 'done'"""
        for name in metrics
    )
    return f"""
        WITH long AS ({values}),
        seeds AS (
            SELECT {", ".join(seed)}, metric, avg(value) AS value, count(*) AS cells, min(low) AS low, max(high) AS high
            FROM long WHERE value IS NOT NULL GROUP BY {", ".join(seed)}, metric
        ),
        attacks AS (
            SELECT {", ".join(attack)}, metric, avg(value) AS value, var_samp(value) / count(*) AS spread,
                count(*) AS seeds, sum(cells) AS cells, min(low) AS low, max(high) AS high
            FROM seeds GROUP BY {", ".join(attack)}, metric
        )
        SELECT {"".join(f"{name}, " for name in by)} metric, avg(value) AS mean, count(*) AS attacks,
            min(seeds) AS least_seeds, sum(spread) AS spread, sum(spread * spread / (seeds - 1)) AS spread_of_spread,
            CAST(sum(cells) AS BIGINT) AS used, min(low) AS low, max(high) AS high, max(value) AS largest,
            avg(CASE WHEN value < {LOW_ASR} THEN 1.0 ELSE 0.0 END) AS share_low
        FROM attacks GROUP BY {"".join(f"{name}, " for name in by)} metric"""


MIXED_SQL = f"""
    SELECT count(*) FROM (
        SELECT 1 FROM chosen WHERE status = 'done' GROUP BY {", ".join(IDENTITY)}, seed HAVING count(DISTINCT victim_key) > 1
    )"""


def _add_intervals(means: Sequence[dict[str, Any]]) -> None:
    """Add "half" to each row: half the width of its t interval, or None where an attack has one seed."""
    known = [row for row in means if row["least_seeds"] > 1]
    spread = np.array([row["spread"] for row in known])
    of_spread = np.array([row["spread_of_spread"] for row in known])
    freedom = np.divide(spread**2, of_spread, out=np.ones_like(spread), where=of_spread > 0)
    halves = stdtrit(freedom, CONFIDENCE) * np.sqrt(spread) / np.array([row["attacks"] for row in known])
    for row in means:
        row["half"] = None
    for row, half in zip(known, halves.tolist(), strict=True):
        row["half"] = half


def _mean_columns(name: str, found: Mapping[str, Any] | None, cells: int) -> dict[str, Any]:
    """Return the columns of one metric in one group."""
    if found is None:
        return {f"{name}_skipped": cells}
    columns = {name: found["mean"], f"{name}_skipped": cells - found["used"]}
    if found["half"] is not None:
        low, high, kind = found["mean"] - found["half"], found["mean"] + found["half"], "t"
    elif cells == 1 and found["low"] is not None:
        low, high, kind = found["low"], found["high"], "wilson"
    else:
        return columns
    return {
        **columns,
        **{f"{name}_half": (high - low) / 2, f"{name}_low": low, f"{name}_high": high, f"{name}_interval": kind},
    }


def _shared_with_benign(by: Sequence[str]) -> list[str]:
    """Return the columns in which a group and the benign cells beside it agree."""
    return [name for name in by if name not in ATTACK_COLUMNS]


def _benign(base: duckdb.DuckDBPyConnection, query: Query) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return what the same defences do to benign models."""
    shared = _shared_with_benign(query.by)
    where = {name: values for name, values in query.where.items() if name not in ATTACK_COLUMNS}
    condition, values = selection({**where, "attack": [BENIGN]}, query.by)
    columns = "".join(f"{name}, " for name in shared)
    rows = _fetch(
        base,
        f"""SELECT {columns} avg(acc_loss) AS acc_loss, avg(CAST(alarm AS DOUBLE)) AS alarm
            FROM cells WHERE status = 'done' AND {condition} {f"GROUP BY {columns.rstrip(', ')}" if columns else ""}""",
        values,
    )
    return {tuple(row[name] for name in shared): row for row in rows}


def _fetch(base: duckdb.DuckDBPyConnection, sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
    found = base.execute(sql, list(values))
    names = [column[0] for column in found.description or ()]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def _schema(query: Query) -> pa.Schema:
    fields = [ROW_SCHEMA.field(name) for name in query.by]
    for name in query.metrics:
        fields.append(pa.field(name, pa.float64()))
        if name in METRICS:
            fields += [pa.field(f"{name}_{end}", pa.float64()) for end in ("half", "low", "high")]
            fields += [pa.field(f"{name}_interval", pa.string()), pa.field(f"{name}_skipped", pa.int64())]
    return pa.schema([*fields, *FIXED])


def _notes(query: Query, rows: Sequence[Mapping[str, Any]], mixed: int) -> Iterator[str]:
    """Yield what a reader has to know about the table."""
    averaged = [name for name in query.metrics if name in METRICS]
    kinds = {row.get(f"{name}_interval") for row in rows for name in averaged if row.get(name) is not None}
    yield "Means over attacks, of each attack over its seeds."
    if "t" in kinds:
        yield "± is half a 95 % t interval over seeds, the attacks taken as fixed."
    if "wilson" in kinds:
        yield "[low, high] is the Wilson 95 % interval of the group's only model."
    if None in kinds:
        yield "No interval where an attack has a single seed."
    if strong := [METRICS[name].heading for name in averaged if METRICS[name].strong_only]:
        left_out = sum(row["left_out"] for row in rows)
        yield (
            f"{' and '.join(strong)}: only victims with an ASR above {100 * query.least_asr:g} % before the defence "
            f"({left_out:,} {'cell' if left_out == 1 else 'cells'} left out)."
        )
    benign = "" if {*query.by, *query.where} & set(ATTACK_COLUMNS) else ", which count nowhere else"
    yield f"Benign: mean loss of accuracy on clean models{benign}."
    yield "Seconds and image passes are medians, memory is the largest."
    if broken := sum(row["broken"] for row in rows):
        yield f"{broken:,} cells have models whose logits are not finite: their low ASR means nothing."
    if mixed:
        yield f"Victims of equal attack and seed but other training or label were averaged as one seed ({mixed:,} times)."
