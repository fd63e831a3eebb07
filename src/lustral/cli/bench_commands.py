"""The commands of ``lustral bench``. Torch is imported only by those that compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from lustral.cli.bench_arguments import (
    Action,
    Allowed,
    BenchAudit,
    BenchCompare,
    BenchGc,
    BenchPlan,
    BenchRepeat,
    BenchRun,
    BenchSite,
    BenchTable,
    BenchVerify,
    parse_bench,
)
from lustral.cli.bench_console import ProgressBoard
from lustral.cli.console import Screen
from lustral.cli.parsing import UsageError
from lustral.core.characters import visible
from lustral.core.settings import shortened
from lustral.store.former import former_note
from lustral.store.store import CELLS, Store, StoreError
from lustral.store.waste import UNREADABLE

if TYPE_CHECKING:
    from lustral.bench.grid import Grid
    from lustral.bench.runner import RunSummary
    from lustral.bench.trust import Trust

OUTPUT_SCHEMA = 1
FAULTS = 1  # exit code of ``verify`` and ``repeat``
SOME_FAILED = 1  # exit code of ``run``


def run_bench(argv: Sequence[str]) -> int:
    """Run a command line that begins with ``bench``."""
    action: Action = parse_bench(argv)
    screen = Screen(json=action.common.json, quiet=action.common.quiet, wide=True)
    match action:
        case BenchRun():
            return run(action, screen)
        case BenchAudit():
            return audit(action, screen)
        case BenchPlan():
            return plan(action, screen)
        case BenchTable():
            return table(action, screen)
        case BenchCompare():
            return compare_evaluations(action, screen)
        case BenchSite():
            return site(action, screen)
        case BenchVerify():
            return verify(action, screen)
        case BenchGc():
            return gc(action, screen)
        case BenchRepeat():
            return repeat(action, screen)


def run(command: BenchRun, screen: Screen) -> int:
    """Compute what is missing; exit code 1 if cells failed."""
    index, count = read_shard(command.shard)
    trust = trusted(command.allowed)
    grid = open_grid(command.plans, command.where, trust=trust, audits=command.audit).shard(index, count)
    store = Store(absolute(command.store)).open(create=True)
    tell_former(store, screen)
    summary = work_through(grid, store, command, screen)
    screen.show(
        f"{summary.computed} cells computed, {summary.present} were there, {summary.failed} failed, "
        f"{summary.blocked} not run because what they need failed."
    )
    if summary.failed:
        screen.show(
            f"Failed cells are kept with their tracebacks; --retry-failed tries them again: {command.store}/failures"
        )
    if command.site is not None:
        write_pages(store, command.site, command.cards, grid.plan.name, screen)
    counts = dataclasses.asdict(summary)
    screen.record({"schema": OUTPUT_SCHEMA, "store": command.store, "cells": len(grid.cells), **counts})
    return SOME_FAILED if summary.failed else 0


def work_through(grid: Grid, store: Store, command: BenchRun | BenchAudit, screen: Screen) -> RunSummary:
    """Compute the cells of a grid that are missing, here or on a cluster, and show how it goes."""
    from lustral.bench.runner import run_local
    from lustral.cli.opening import pick_device

    device, trust = pick_device(command.common.device), trusted(command.allowed)
    with ProgressBoard(screen, grid) as board:
        if command.ray is None:
            return run_local(
                grid,
                store,
                device=device,
                retry_failed=command.retry_failed,
                trust=trust,
                on_event=board.record_event,
                on_progress=board.report,
            )
        from lustral.bench.ray_runner import run_on_ray

        return run_on_ray(
            grid,
            store,
            address=command.ray,
            device=command.common.device,
            retry_failed=command.retry_failed,
            trust=trust,
            on_event=board.record_event,
            on_progress=board.report,
        )


def audit(command: BenchAudit, screen: Screen) -> int:
    """Try to wake purified models up; exit code 1 if audits failed."""
    grid = open_grid(command.plans, command.where, trust=trusted(command.allowed), audits=True).of_kind("audits")
    store = Store(absolute(command.store)).open(create=False, write=True)
    tell_former(store, screen)
    summary = work_through(grid, store, command, screen)
    names = ("defence", "attack", "seed", "ASR", "retuned", "benign", "resistance", "pushed")
    shown, rows = Table(*names, title="Reactivation, in per cent"), []
    for cell in grid.cells:
        if not store.has("audits", cell.key):
            continue
        checks = store.read("audits", cell.key)["metrics"]
        rows.append({"title": cell.title.removeprefix("audit of "), "key": cell.key, **checks})
        rates = [
            checks["before"]["purified"]["asr"],
            checks["retuned"]["purified"]["asr"],
            checks["retuned"]["benign"]["asr"],
            checks["resistance"],
            checks["pushed"]["purified"]["asr"],
        ]
        named = (str(cell.defence), cell.attack, str(cell.columns["seed"]))
        shown.add_row(*named, *("n/a" if rate is None else f"{100 * rate:.1f}" for rate in rates))
    counts = dataclasses.asdict(summary)
    screen.show(shown, f"{', '.join(f'{number} {state}' for state, number in counts.items())}.")
    screen.record({"schema": OUTPUT_SCHEMA, **counts, "audits": rows})
    return SOME_FAILED if summary.failed else 0


def plan(command: BenchPlan, screen: Screen) -> int:
    """Show what a plan holds and how much of it is done."""
    grid = open_grid(command.plans, command.where, trust=trusted(command.allowed))
    from lustral.store.estimate import estimate

    store = None
    if command.store is not None:
        store = Store(absolute(command.store)).open(create=False)
        tell_former(store, screen)
    whole, states = estimate(grid.cells, store)
    shown = Table("", "cells", "done", "failed", "to do", title=f"Plan {grid.plan.name}")
    for kind in dict.fromkeys(cell.kind for cell in grid.cells):
        cells = grid.of_kind(kind).cells
        counts = [sum(states[cell.key] == state for cell in cells) for state in ("done", "failed", "to do")]
        shown.add_row(kind, str(len(cells)), *map(str, counts))
    screen.show(shown)
    for reason, number in grid.excluded.items():
        screen.show(f"{number} left out: {reason}")
    if command.cells:
        listing = Table("state", "cell", "name")
        for cell in grid.cells:
            listing.add_row(states[cell.key], cell.title, cell.key[:12])
        screen.show(listing)
    screen.show(f"Remaining time: {remaining(whole.left, whole.seconds, whole.unknown)}.")
    cells_shown = [{"key": c.key, "kind": c.kind, "title": c.title, "state": states[c.key]} for c in grid.cells]
    excluded = dict(grid.excluded)
    screen.record({"schema": OUTPUT_SCHEMA, **dataclasses.asdict(whole), "excluded": excluded, "cells": cells_shown})
    return 0


def table(command: BenchTable, screen: Screen) -> int:
    """Average over seeds."""
    from lustral.tables import exports, rows, summary

    if command.generators:
        return generators_table(command, screen)
    store, by, note = Store(absolute(command.store)).open(create=False), words(command.by), None
    if command.old:
        cells, by = rows.load_cells(store), tuple(dict.fromkeys([*by, "outdated"]))
    else:
        cells, note = rows.current_cells(store)
    query = summary.Query(
        by=by,
        metrics=words(command.metric),
        where=read_filters(command.where),
        least_asr=command.least_asr,
    )
    found = summary.table(cells, query)
    if note is not None:
        found = dataclasses.replace(found, notes=(*found.notes, f"{note} --old shows them."))
    if command.out is not None:
        exports.write_summary(found, command.out)
        screen.show(f"Written to {command.out}")
    else:
        screen.show(exports.rich_table(found))
    screen.record({"schema": OUTPUT_SCHEMA, "notes": list(found.notes), "rows": found.rows.to_pylist()})
    return 0


def generators_table(command: BenchTable, screen: Screen) -> int:
    """Show the generators of molecules of a store, and the defences that met them."""
    from lustral.tables.generators import HEADINGS, generator_rows

    if command.out is not None or command.where:
        raise UsageError(
            "--generators shows all of them, here: leave --out and --where away; --json gives every figure"
        )
    found, old = generator_rows(Store(absolute(command.store)).open(create=False))
    measured = Table("data", "attack", "rate", "erased by", "cells", *HEADINGS.values(), "seconds", title="Generators")
    measured.caption = "per cent, means over seeds; FCD as it is"
    defences = Table("data", "attack", "rate", "defence", "said", "seconds", title="Siftings and scans")
    for row in found:
        rate = row.about["poison_rate"]
        about = [
            row.about["data"],
            row.about["attack"],
            "" if rate is None else f"{100 * rate:g} %",
            row.about["defence"],
        ]
        if row.is_measured:
            shown = [figure_text(name, row.means[name], row.spreads[name]) for name in HEADINGS]
            measured.add_row(*about, str(row.cells), *shown, f"{row.seconds:.0f}")
        else:
            defences.add_row(*about, row.told, f"{row.seconds:.0f}")
    screen.show(*(table for table in (measured, defences) if table.row_count))
    if old or not found:
        screen.show(f"{old} cells were made by older versions and are left out." if old else "There are no generators.")
    screen.record({"schema": OUTPUT_SCHEMA, "left_out": old, "rows": [dataclasses.asdict(row) for row in found]})
    return 0


def figure_text(name: str, value: float | None, spread: float | None) -> str:
    """Return a figure of a generator in per cent, with its spread over seeds.

    >>> figure_text("asr", 0.812, 0.02), figure_text("frechet", 4.31, None), figure_text("asr", None, None)
    ('81.2 ±2.0', '4.3', '')
    """
    if value is None:
        return ""
    factor = 1 if name == "frechet" else 100
    return f"{factor * value:.1f}" + ("" if spread is None else f" ±{factor * spread:.1f}")


def compare_evaluations(command: BenchCompare, screen: Screen) -> int:
    """Compare two defences on the same victims."""
    from lustral.tables import comparison, exports, rows

    cells, note = rows.current_cells(Store(absolute(command.store)).open(create=False))
    found = comparison.compare(
        cells,
        command.first,
        command.second,
        command.metric,
        where=read_filters(command.where),
        least_asr=command.least_asr,
        seed=command.common.seed,
    )
    screen.show(*exports.comparison_lines(found))
    if note is not None:
        screen.show(note)
    screen.record({"schema": OUTPUT_SCHEMA, **dataclasses.asdict(found), "left_out": note})
    return 0


def site(command: BenchSite, screen: Screen) -> int:
    """Write the pages."""
    store = Store(absolute(command.store)).open(create=False)
    write_pages(store, command.out, command.cards, command.title, screen)
    screen.record({"schema": OUTPUT_SCHEMA, "out": str(command.out)})
    return 0


def verify(command: BenchVerify, screen: Screen) -> int:
    """Check a store; exit code 1 on any fault."""
    from lustral.bench.verification import verify as check
    from lustral.cli.opening import pick_device

    store = Store(absolute(command.store)).open(create=False)
    tell_former(store, screen)
    grid = None if command.plan is None else open_grid([command.plan], trust=trusted(command.allowed))
    with screen.steps() as on_step:
        report = check(
            store,
            grid=grid,
            sample=command.sample,
            seed=command.common.seed,
            device=pick_device(command.common.device),
            trust=trusted(command.allowed),
            on_step=on_step,
        )
    counted = ", ".join(f"{number} {kind}" for kind, number in report.records.items())
    screen.show(f"Looked at {counted} and {report.files} files; measured {len(report.measured)} models again.")
    faults = [*report.faults]
    faults += [f"missing: {title}" for title in report.missing] + [f"failed: {title}" for title in report.failed]
    for fault in faults:
        screen.show(flagged("fault", "red", fault))
    screen.show(f"{len(faults)} faults." if faults else "No fault.")
    screen.record({"schema": OUTPUT_SCHEMA, **dataclasses.asdict(report)})
    return FAULTS if faults else 0


def gc(command: BenchGc, screen: Screen) -> int:
    """Clean a store up."""
    from lustral.store.waste import find_waste, remove_waste

    store = Store(absolute(command.store)).open(create=False)
    if not command.old:
        tell_former(store, screen)
    grids = [open_grid([path], trust=trusted(command.allowed)) for path in command.keep]
    keep = [cell.spec for grid in grids for cell in grid.cells] if grids else None
    waste = find_waste(store, keep=keep, failures=command.failures, old=command.old, grace_seconds=command.grace)
    for kind, key, title in waste.records:
        screen.show(f"{kind} {key[:12]} {title}")
    for path in waste.leftovers:
        screen.show(path)
    if not command.dry_run:
        remove_waste(store, waste)
    verb = "would go" if command.dry_run else "removed"
    screen.show(f"{len(waste.records)} records and {len(waste.leftovers)} leftovers {verb}.")
    screen.record({"schema": OUTPUT_SCHEMA, "dry_run": command.dry_run, **dataclasses.asdict(waste)})
    return 0


def repeat(command: BenchRepeat, screen: Screen) -> int:
    """Compute a stored cell again; exit code 1 if its rates differ."""
    from lustral.bench import verification
    from lustral.bench.kinds import cell_of
    from lustral.cli.opening import pick_device

    store = Store(absolute(command.store)).open(create=False)
    stored = find_record(store, command.key)
    try:
        num_threads = verification.threads_of(stored)
        cell = cell_of(stored["spec"], attack=stored["facts"]["attack"], defence=stored["facts"].get("defence"))
    except UNREADABLE as error:
        raise StoreError(f"{command.key} is not a readable record ({shortened(error)})") from error
    with screen.progress() as on_progress:
        again, found = verification.repeat(
            cell,
            store,
            device=pick_device(command.common.device),
            num_threads=num_threads,
            trust=trusted(command.allowed),
            on_progress=on_progress,
        )
    screen.show(cell.title)
    for line in found:
        screen.show(flagged("differs", "red", line))
    if not found:
        screen.show("The rates are the stored ones.")
    screen.record({"schema": OUTPUT_SCHEMA, "key": cell.key, "metrics": again["metrics"], "differences": found})
    return FAULTS if found else 0


def tell_former(store: Store, screen: Screen) -> None:
    """Say what an earlier version left in a store, if it did."""
    note = former_note(store)
    if note is not None:
        screen.show(note)


def write_pages(store: Store, out: Path, cards: Path | None, title: str, screen: Screen) -> None:
    """Write the site, say where it is and what it had to leave out."""
    from lustral.site.pages import write_site

    with screen.steps() as on_step:
        report = None if on_step is None else lambda done, total: on_step("writing pages", done, total)
        summary = write_site(store, out, cards=cards, title=title, on_progress=report)
    for problem in summary.problems:
        screen.show(flagged("left out", "yellow", problem))
    screen.show(f"Pages: {out / 'index.html'}")


def flagged(word: str, colour: str, text: str) -> Text:
    """Return a line that begins with a word in a colour."""
    return Text.assemble((word, colour), f" {visible(text)}", no_wrap=True)


def trusted(allowed: Allowed) -> Trust:
    """Return what the flags allow."""
    from lustral.bench.trust import Trust

    return Trust(code=allowed.allow_code, paths=allowed.allow_paths)


def open_grid(
    paths: Sequence[Path], where: Sequence[str] = (), *, trust: Trust | None = None, audits: bool = False
) -> Grid:
    """Read plans and turn them into cells, with audits or without, or into those that ``--where`` admits."""
    from lustral.bench.expansion import expand, with_audits
    from lustral.bench.grid import Grid
    from lustral.bench.plan import read_plan
    from lustral.bench.sources import Sources

    sources = Sources() if trust is None else Sources(trust=trust)
    if not paths:
        raise UsageError("expected at least one plan file, e.g. benchmarks/plans/toy.toml")
    grid = Grid.joined([expand(read_plan(path), sources) for path in paths])
    return (with_audits(grid) if audits else grid).where(read_filters(where))


def find_record(store: Store, key: str) -> dict[str, Any]:
    """Return the record of a cell by the start of its name."""
    matches = [(kind, full) for kind in CELLS for full in store.keys(kind) if full.startswith(key)]
    if len(matches) != 1 or not key:
        advice = "give more of the name" if matches else "`lustral bench plan PLAN --cells` lists names"
        raise StoreError(f"{key!r} is the start of {len(matches)} names in {store.url}; expected one: {advice}")
    kind, full = matches[0]
    return store.read(kind, full)


def read_shard(text: str) -> tuple[int, int]:
    """Return (index from 0, count) of "I/N".

    >>> read_shard("2/4")
    (1, 4)
    """
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise UsageError(f"--shard {text!r}: expected I/N with 1 <= I <= N, e.g. 2/4")
    return int(index) - 1, int(count)


def words(text: str) -> tuple[str, ...]:
    """Return the parts of a list with commas.

    >>> words("defence, attack")
    ('defence', 'attack')
    """
    return tuple(part.strip() for part in text.split(",") if part.strip())


def read_filters(filters: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the admitted values by column of COLUMN=VALUE texts; commas part values, and a column may come twice.

    >>> read_filters(["attack=badnets,blended", "seed=0"])
    {'attack': ('badnets', 'blended'), 'seed': ('0',)}
    """
    admitted: dict[str, tuple[str, ...]] = {}
    for text in filters:
        column, equals, values = text.partition("=")
        if not (equals and words(values)):
            raise UsageError(f"--where {text!r}: expected COLUMN=VALUE, e.g. attack=badnets")
        admitted[column.strip()] = (*admitted.get(column.strip(), ()), *words(values))
    return admitted


def remaining(left: int, seconds: float, unknown: int) -> str:
    """Return an estimate as words.

    >>> remaining(12, 3725, 2)
    'about 1 h 02 min for 10 of 12 cells; 2 have no precedent in the store'
    """
    if not left:
        return "nothing is left to do"
    if unknown == left:
        return f"unknown; none of the {left} cells has a precedent in the store"
    hours, minutes = divmod(max(round(seconds / 60), 1), 60)
    text = f"about {hours} h {minutes:02d} min" if hours else f"about {minutes} min"
    return f"{text} for {left - unknown} of {left} cells; {unknown} have no precedent in the store" if unknown else text


def absolute(url: str) -> str:
    """Return a local path as an absolute one, and any other URL as it is: workers may have another current folder."""
    return url if "://" in url else str(Path(url).expanduser().resolve())
