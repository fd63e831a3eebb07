"""Two defences on the same victims: the mean difference, and whether the seeds could have made it.

Cells are paired where victim, clean budget and defence seed agree. The differences of one victim are averaged; the victims
(attacks x seeds) are then drawn again with replacement many times, and the middle 95 % of the means are the interval. A
difference whose interval holds 0 is a tie. Nothing here imports torch.

Reference:
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lustral.core.settings import suggest
from lustral.tables.rows import IDENTITY, UNDEFENDED
from lustral.tables.summary import CONFIDENCE, METRICS, Query, QueryError, require_values, selection, value_sql

LEAST_RESAMPLES = 1_000
EXACT = 1e-12  # differences up to this are rounding
FEW = 6  # below this number of victims even unanimous signs are no evidence at 5 %: 2 · 0.5⁵ > 0.05
DRAWS_AT_ONCE = 2_000_000  # numbers drawn per block of resamples, which bounds memory


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two defences do on the same victims.

    Attributes:
        first: a defence, as the table names it.
        second: the other.
        metric: what is compared.
        pairs: victims (attacks x seeds) that have both.
        cells: pairs of cells behind them: more than ``pairs`` with several budgets or defence seeds.
        attacks: different attacks among the victims.
        unpaired: finished cells of either defence without a partner or without this metric.
        mean_first: mean of the first over the pairs, fraction (or seconds, passes, bytes).
        mean_second: mean of the second.
        difference: first - second.
        low: lower end of the 95 % bootstrap interval of the difference; None for a single pair.
        high: upper end.
        wins: pairs in which the first is better.
        ties: pairs in which they are equal.
        losses: pairs in which the second is better.
        resamples: bootstrap resamples.
        verdict: which one is better, "tie" if the interval holds 0, "unknown" for a single pair.
    """

    first: str
    second: str
    metric: str
    pairs: int
    cells: int
    attacks: int
    unpaired: int
    mean_first: float
    mean_second: float
    difference: float
    low: float | None
    high: float | None
    wins: int
    ties: int
    losses: int
    resamples: int
    verdict: Literal["first", "second", "tie", "unknown"]

    @property
    def note(self) -> str:
        """A warning if the pairs are too few for the interval to be trusted; else empty."""
        if self.pairs >= FEW:
            return ""
        return f"Fewer than {FEW} victims ({self.pairs}): an interval from so few is too narrow."


def compare(
    cells: pa.Table,
    first: str,
    second: str,
    metric: str = "der",
    *,
    where: Mapping[str, Sequence[Any]] | None = None,
    least_asr: float = 0.5,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare two defences on the victims that both have met.

    Args:
        cells: as ``lustral.tables.summary.load_cells`` returns them.
        first: a defence's label, as in the column "defence"; "none" for the victims as they are, which pair with any budget.
        second: the other.
        metric: a name from ``lustral.tables.summary.METRICS`` of which more or less is better.
        where: admitted values by column, as in ``Query``; benign models count only if it names the attack.
        least_asr: DER and RIR leave out victims whose ASR before the defence was not above this, fraction.
        resamples: bootstrap resamples, at least 1,000.
        seed: of the bootstrap; equal seeds give equal intervals.

    Raises:
        QueryError: an unknown name, or nothing to compare.
    """
    query = _checked(cells, first, second, metric, where or {}, least_asr, resamples)
    with duckdb.connect(":memory:", config={"threads": 1}) as base:
        base.register("cells", cells)
        _make_pairs(base, query, first, second, metric, least_asr)
        rows = base.execute(
            "SELECT avg(first_value), avg(second_value) FROM pairs GROUP BY victim ORDER BY victim"
        ).fetchall()
        num_cells, num_attacks = _row(base, "SELECT count(*), count(DISTINCT attack) FROM pairs")
        (unpaired,) = _row(
            base,
            """SELECT count(*) FROM measured WHERE defence IN (?, ?)
            AND rowid NOT IN (SELECT first_row FROM pairs UNION SELECT second_row FROM pairs)""",
            [first, second],
        )
        if not rows:
            count = "SELECT count(*), count(value) FROM measured WHERE defence = ?"
            found = {name: _row(base, count, [name]) for name in (first, second)}
            raise QueryError(_nothing(found, metric, least_asr))
    one, two = np.array(rows, dtype=np.float64).T
    low, high = _bootstrap(one - two, resamples, np.random.default_rng(seed))
    gain = METRICS[metric].better * (one - two)
    return Comparison(
        first=first,
        second=second,
        metric=metric,
        pairs=len(rows),
        cells=num_cells,
        attacks=num_attacks,
        unpaired=unpaired,
        mean_first=float(one.mean()),
        mean_second=float(two.mean()),
        difference=float((one - two).mean()),
        low=low,
        high=high,
        wins=int((gain > EXACT).sum()),
        ties=int((np.abs(gain) <= EXACT).sum()),
        losses=int((gain < -EXACT).sum()),
        resamples=resamples,
        verdict=_verdict(low, high, METRICS[metric].better),
    )


def _make_pairs(
    base: duckdb.DuckDBPyConnection, query: Query, first: str, second: str, metric: str, least_asr: float
) -> None:
    """Make the tables "measured", a value for each defence and victim, and "pairs", two values on the same victim."""
    condition, values = selection(query.where, ("defence",))
    base.execute(
        f"""CREATE TEMP TABLE measured AS
        SELECT defence, victim_key, clean_images, defence_seed, {", ".join(IDENTITY)}, count(*) AS cells,
            avg({value_sql(metric, least_asr)}) AS value
        FROM cells WHERE status = 'done' AND {condition} GROUP BY ALL""",
        values,
    )
    same = (
        ""
        if UNDEFENDED in (first, second)
        else " AND a.clean_images = b.clean_images AND a.defence_seed = b.defence_seed"
    )
    base.execute(
        f"""CREATE TEMP TABLE pairs AS
        SELECT a.rowid AS first_row, b.rowid AS second_row, a.victim_key AS victim,
            ({", ".join(f"a.{name}" for name in IDENTITY)}) AS attack, a.value AS first_value, b.value AS second_value
        FROM measured a JOIN measured b ON a.victim_key = b.victim_key{same}
        WHERE a.defence = ? AND b.defence = ? AND a.value IS NOT NULL AND b.value IS NOT NULL""",
        [first, second],
    )


def _checked(
    cells: pa.Table,
    first: str,
    second: str,
    metric: str,
    where: Mapping[str, Sequence[Any]],
    least_asr: float,
    resamples: int,
) -> Query:
    """Return the selection of cells, or raise ``QueryError`` with all problems."""
    ranked = [name for name, kind in METRICS.items() if kind.better]
    known = sorted(cells.column("defence").unique().to_pylist())
    problems = []
    if metric not in ranked:
        what = "neither more nor less of it is better" if metric in METRICS else "unknown metric"
        problems.append(f"cannot compare {metric!r}: {what}{suggest(metric, ranked)}")
    if not known:
        problems.append("there is no cell to compare")
    else:
        problems += [f"unknown defence {name!r}{suggest(name, known)}" for name in (first, second) if name not in known]
    if first == second:
        problems.append(f"expected two different defences; got {first!r} twice")
    if resamples < LEAST_RESAMPLES:
        problems.append(f"expected at least {LEAST_RESAMPLES:,} resamples; got {resamples:,}")
    query = None
    try:
        query = Query(by=("defence",), where=where, least_asr=least_asr)
        require_values(cells, query.where)
    except QueryError as error:
        problems.append(str(error))
    if problems or query is None:
        raise QueryError("\n".join(problems))
    return query


def _row(base: duckdb.DuckDBPyConnection, sql: str, values: Sequence[Any] = ()) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = base.execute(sql, list(values)).fetchone()
    assert row is not None, "a count is one row"
    return row


def _nothing(found: Mapping[str, tuple[Any, ...]], metric: str, least_asr: float) -> str:
    """Say why there is no pair."""
    counts = ", ".join(f"{name!r} {measured:,} of {total:,}" for name, (total, measured) in found.items())
    text = (
        f"no victim has {METRICS[metric].heading} after both defences, at the same clean budget and defence seed; "
        f"finished cells that have it: {counts}"
    )
    if METRICS[metric].strong_only:
        text += f"; it needs an ASR above {100 * least_asr:g} % before the defence"
    return text


def _bootstrap(
    differences: NDArray[np.float64], resamples: int, generator: np.random.Generator
) -> tuple[float, float] | tuple[None, None]:
    """Return the percentile interval of the mean of (n,) paired differences; None for fewer than two."""
    count = len(differences)
    if count < 2:
        return None, None
    block = max(1, DRAWS_AT_ONCE // count)
    means = [
        differences[generator.integers(count, size=(min(block, resamples - start), count))].mean(axis=1)
        for start in range(0, resamples, block)
    ]
    low, high = np.quantile(np.concatenate(means), [1 - CONFIDENCE, CONFIDENCE])
    return float(low), float(high)


def _verdict(low: float | None, high: float | None, better: int) -> Literal["first", "second", "tie", "unknown"]:
    if low is None or high is None:
        return "unknown"
    if low <= 0 <= high:
        return "tie"
    return "first" if (low > 0) == (better > 0) else "second"
