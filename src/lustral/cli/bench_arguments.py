"""The flags of ``lustral bench``. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lustral.cli.parsing import FLAT, Common, Switch, UsageError, run_tyro


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """What plans and stores may ask for besides computing.

    Attributes:
        allow_code: build architectures FILE.py:function that a plan or a store names: this runs those files.
        allow_paths: open data that a plan or a store names by a path, or that torchvision downloads; else names alone.
    """

    allow_code: Switch = False
    allow_paths: Switch = False


@dataclass(frozen=True, kw_only=True)
class BenchRun:
    """Compute the cells of plans that the store does not have. Killed or interrupted, the same line goes on.

    Attributes:
        plans: plan files (.toml), taken as one.
        store: folder of results, or an fsspec URL; made if there is none.
        site: write the pages there afterwards.
        cards: folder of method cards, for the published numbers on the pages.
        ray: send the cells to a Ray cluster: "auto", or its address; in this process if left out.
        where: COLUMN=VALUE: only these cells, and the victims they need; commas part values: defence=sau,tsbd.
        shard: I/N: only part I of N, e.g. of a batch scheduler's array.
        retry_failed: try cells again that have failed before.
        audit: try to wake up the purified models, too; see ``lustral bench audit``.
    """

    plans: tyro.conf.Positional[tuple[Path, ...]]
    store: str
    site: Path | None = None
    cards: Path | None = None
    ray: str | None = None
    where: tuple[str, ...] = ()
    shard: str = "1/1"
    retry_failed: Switch = False
    audit: Switch = False
    allowed: Annotated[Allowed, FLAT] = Allowed()
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class BenchAudit:
    """Try to wake up the models that a plan's purifiers made, and show what came of it. The same line goes on where it stopped.

    Attributes:
        plans: plan files (.toml), run before; they need an attack with method "none" to compare with.
        store: folder or URL of its results.
        where: COLUMN=VALUE: only audits of these results; commas part values: defence=sau,tsbd.
        ray: send the audits to a Ray cluster: "auto", or its address; in this process if left out.
        retry_failed: try audits again that have failed before.
    """

    plans: tyro.conf.Positional[tuple[Path, ...]]
    store: str
    where: tuple[str, ...] = ()
    ray: str | None = None
    retry_failed: Switch = False
    allowed: Annotated[Allowed, FLAT] = Allowed()
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """Check plans; show their cells, what is done already, and how long the rest may take.

    Attributes:
        plans: plan files (.toml), taken as one.
        store: folder or URL to compare with.
        where: COLUMN=VALUE: only these cells, and the victims they need; commas part values.
        cells: list every cell.
    """

    plans: tyro.conf.Positional[tuple[Path, ...]]
    store: str | None = None
    where: tuple[str, ...] = ()
    cells: Switch = False
    allowed: Annotated[Allowed, FLAT] = Allowed()
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class BenchTable:
    """Average over seeds and show a table.

    Attributes:
        store: folder or URL.
        by: columns to group by, with commas: defence, attack, data, arch, poison_rate, clean_images, seed.
        metric: what to average, with commas: acc, asr, ra, der, rir, acc_loss, correct, max_asr, share_low_asr, ...
        where: COLUMN=VALUE filters; commas part values: attack=badnets,blended.
        least_asr: DER and RIR count cells whose victim's attack succeeds more often than this.
        old: show results of older versions of a method too, in rows of their own; else they are left out and counted.
        generators: show the generators of molecules and what met them instead; the other flags are not for these.
        out: file to write instead of printing: .csv, .parquet, .tex, .md or .json.
    """

    store: str
    by: str = "defence,attack"
    metric: str = "acc,asr,ra,der"
    where: tuple[str, ...] = ()
    least_asr: float = 0.5
    old: Switch = False
    generators: Switch = False
    out: Path | None = None
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class BenchCompare:
    """Compare two defences on the same victims, with a paired bootstrap interval.

    Attributes:
        first: a defence, as tables call it.
        second: another.
        store: folder or URL.
        metric: what to compare.
        where: COLUMN=VALUE filters; commas part values.
        least_asr: DER and RIR count victims whose attack succeeds more often than this.
    """

    first: tyro.conf.Positional[str]
    second: tyro.conf.Positional[str]
    store: str
    metric: str = "der"
    where: tuple[str, ...] = ()
    least_asr: float = 0.5
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class BenchSite:
    """Write the leaderboard: static pages that open from the disk.

    Attributes:
        out: folder for the pages.
        store: folder or URL.
        cards: folder of method cards, for the published numbers.
        title: of the site.
    """

    out: tyro.conf.Positional[Path]
    store: str
    cards: Path | None = None
    title: str = "lustral leaderboard"
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class BenchVerify:
    """Check a store: checksums, names, counts, and a sample of models measured again. Exit code 1 on any fault.

    Attributes:
        store: folder or URL.
        plan: plan file; cells that are missing or failed count as faults.
        sample: number of models to measure again.
    """

    store: str
    plan: Path | None = None
    sample: int = 3
    allowed: Annotated[Allowed, FLAT] = Allowed()
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class BenchGc:
    """Remove what killed runs left, and what no plan names.

    Attributes:
        store: folder or URL.
        keep: plan files: cells of none of them go; all cells stay if left out.
        failures: remove failed cells too, so that the next run tries them again.
        old: remove what older versions of a method made, too; tables leave it out anyway.
        grace: leftovers younger than this many seconds may be in use and stay.
        dry_run: only say what would go.
    """

    store: str
    keep: tuple[Path, ...] = ()
    failures: Switch = False
    old: Switch = False
    grace: float = 3600.0
    dry_run: Switch = False
    allowed: Annotated[Allowed, FLAT] = Allowed()
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class BenchRepeat:
    """Compute a stored cell again, and compare. Exit code 1 if its rates differ.

    Attributes:
        key: the cell's name in the store, or the start of it.
        store: folder or URL.
    """

    key: tyro.conf.Positional[str]
    store: str
    allowed: Annotated[Allowed, FLAT] = Allowed()
    common: Annotated[Common, FLAT] = Common()


Action = (
    Annotated[BenchRun, tyro.conf.subcommand("run")]
    | Annotated[BenchAudit, tyro.conf.subcommand("audit")]
    | Annotated[BenchPlan, tyro.conf.subcommand("plan")]
    | Annotated[BenchTable, tyro.conf.subcommand("table")]
    | Annotated[BenchCompare, tyro.conf.subcommand("compare")]
    | Annotated[BenchSite, tyro.conf.subcommand("site")]
    | Annotated[BenchVerify, tyro.conf.subcommand("verify")]
    | Annotated[BenchGc, tyro.conf.subcommand("gc")]
    | Annotated[BenchRepeat, tyro.conf.subcommand("repeat")]
)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Run a plan of attacks and defences, and show what came out.

    Attributes:
        action: what to do.
    """

    action: Annotated[Action, FLAT]

    @property
    def common(self) -> Common:
        """The flags of every command."""
        return self.action.common


def parse_bench(argv: Sequence[str]) -> Action:
    """Turn a command line that begins with ``bench`` into an action; see ``run_tyro`` for the errors."""
    if sum(word.partition("=")[0] == "--where" for word in argv) > 1:  # of two, the first would be ignored
        raise UsageError("expected --where once; write all filters behind it: --where attack=badnets seed=0")
    action: Action = run_tyro(Action, list(argv[1:]), prog="lustral bench")
    return action
