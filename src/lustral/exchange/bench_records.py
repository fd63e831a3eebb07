"""What ``--json`` of ``lustral bench`` prints; ``records`` says how such descriptions are kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lustral.exchange.records import Count, Part

BENCH_SCHEMA = 1  # of what is described here; ``cli.bench_commands`` writes it


class BenchResult(Part):
    """What every record has."""

    schema_: Annotated[Literal[1], Field(alias="schema")]  # ``BENCH_SCHEMA``
    """Number of this description."""


class Counted(BenchResult):
    """How a run ended."""

    computed: Count
    """Cells that were computed now."""
    present: Count
    """Cells that were there."""
    failed: Count
    """Cells that failed."""
    blocked: Count
    """Cells that need a failed one."""


class BenchRunResult(Counted):
    """How `lustral bench run` ended."""

    store: str
    """The store."""
    cells: Count
    """Cells of the plan, or of this shard of it."""


class BenchAuditResult(Counted):
    """What `lustral bench audit` measured."""

    audits: list[dict[str, Any]]
    """Title, key and rates of each purified model."""


class PlannedCell(Part):
    """A cell of a plan."""

    key: str
    """SHA-256 of what it is."""
    kind: str
    """Victims, purifications, scans, and so on."""
    title: str
    """In words."""
    state: Literal["done", "failed", "to do"]
    """In the store."""


class BenchPlanResult(BenchResult):
    """What a plan holds, by `lustral bench plan`."""

    done: Count
    """Cells in the store."""
    failed: Count
    """Cells that failed before."""
    left: Count
    """Cells to do."""
    seconds: float
    """Estimate for those with a precedent in the store."""
    unknown: Count
    """Cells without one."""
    excluded: dict[str, Count]
    """Combinations that were left out, by reason."""
    cells: list[PlannedCell]
    """Every one."""


class BenchTableResult(BenchResult):
    """Rows of `lustral bench table`."""

    rows: list[dict[str, Any]]
    """One for each group of cells: what they share, means and intervals."""
    notes: tuple[str, ...] = ()
    """What limits them."""
    left_out: Count = 0
    """With --generators: cells of older versions."""


class BenchCompareResult(BenchResult):
    """Two defences on the same victims, by `lustral bench compare`."""

    first: str
    """A defence."""
    second: str
    """The other."""
    metric: str
    """What is compared."""
    pairs: Count
    """Victims that have both."""
    cells: Count
    """Pairs of cells behind them."""
    attacks: Count
    """Different attacks among the victims."""
    unpaired: Count
    """Cells without a partner."""
    mean_first: float
    """Over the pairs."""
    mean_second: float
    """Over the pairs."""
    difference: float
    """First less second."""
    low: float | None
    """Lower end of its bootstrap 95 % interval; null of a single pair."""
    high: float | None
    """Upper end."""
    wins: Count
    """Pairs in which the first is better."""
    ties: Count
    """Pairs in which they are equal."""
    losses: Count
    """Pairs in which the second is better."""
    resamples: Count
    """Of the bootstrap."""
    verdict: Literal["first", "second", "tie", "unknown"]
    """Which is better."""
    left_out: str | None
    """What older versions left in the store."""


class BenchSiteResult(BenchResult):
    """Where `lustral bench site` wrote its pages."""

    out: str
    """The folder."""


class BenchVerifyResult(BenchResult):
    """What `lustral bench verify` found."""

    faults: list[str]
    """A sentence each."""
    records: dict[str, Count]
    """Records that were looked at, by kind."""
    files: Count
    """Files whose checksums were compared."""
    measured: list[str]
    """Cells that were measured again."""
    missing: list[str]
    """Cells of the plan that are not there."""
    failed: list[str]
    """Cells of the plan that failed."""


class BenchGcResult(BenchResult):
    """What `lustral bench gc` removed."""

    dry_run: bool
    """Whether it only looked."""
    leftovers: list[str]
    """Files and folders that killed processes left."""
    records: list[tuple[str, str, str]]
    """Kind, key and title of records that no plan names, or that failed."""


class BenchRepeatResult(BenchResult):
    """What `lustral bench repeat` computed again."""

    key: str
    """SHA-256 of the cell."""
    metrics: dict[str, Any]
    """Measured now."""
    differences: list[str]
    """What is not as it is stored."""


BENCH_RESULTS: dict[str, type[BenchResult]] = {
    "run": BenchRunResult,
    "audit": BenchAuditResult,
    "plan": BenchPlanResult,
    "table": BenchTableResult,
    "compare": BenchCompareResult,
    "site": BenchSiteResult,
    "verify": BenchVerifyResult,
    "gc": BenchGcResult,
    "repeat": BenchRepeatResult,
}
