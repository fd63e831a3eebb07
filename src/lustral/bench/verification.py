"""Checking a store against itself, its plan and its models; doing a cell again to compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lustral.bench.cells import Cell
from lustral.bench.grid import Grid
from lustral.bench.kinds import KINDS, cell_of
from lustral.bench.recording import without_per_class
from lustral.bench.runner import threads
from lustral.bench.sources import Sources
from lustral.bench.trust import Trust
from lustral.bench.workbench import Workbench
from lustral.core.files import json_ready
from lustral.core.randomness import child
from lustral.core.rates import Rate
from lustral.core.records import OnProgress
from lustral.core.settings import shortened
from lustral.store.former import is_former
from lustral.store.store import KINDS as FOLDERS
from lustral.store.store import MODEL_FILE, Kind, Store, StoreError, content_key
from lustral.store.waste import UNREADABLE, age_of
from lustral.vision.evaluation import Evaluation, SiftingRates, compare_evaluations

MOST_THREADS = 256  # a stranger's record shall not start a million
TOLERANCE = 0.002  # of a rate: other hardware rounds differently, and a few images change sides


@dataclass
class Report:
    """What a check found.

    Attributes:
        faults: one sentence each; none if all is well.
        records: number of records looked at, by kind.
        files: number of files whose checksums were compared.
        measured: titles of the cells that were measured again.
        missing: cells of the plan that the store does not have (not a fault by itself: the run may not be over).
        failed: cells of the plan that failed.
    """

    faults: list[str] = field(default_factory=list)
    records: dict[str, int] = field(default_factory=dict)
    files: int = 0
    measured: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def verify(
    store: Store,
    *,
    grid: Grid | None = None,
    sample: int = 3,
    seed: int = 0,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    trust: Trust = Trust(),  # noqa: B008
    on_step: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Check a store: checksums, names, references, counts against a plan, and a sample of cells measured again.

    Args:
        store: what to check.
        grid: the plan's cells, to count.
        sample: how many cells with kept weights to measure again.
        seed: draws the sample.
        device: where to measure.
        trust: what the store may ask for.
        on_step: called with (what, done, total).

    Raises:
        TrustError: models are to be measured again, and a record with kept weights asks for code that is not allowed.
    """
    if sample < 0:
        raise ValueError(f"expected a sample of 0 models or more; got {sample}")
    report = Report()
    good = _check_all(store, report, on_step)
    for (kind, key), record in good.items():
        if kind in KINDS:
            report.faults += _missing_needs(f"{kind}/{key[:12]} ({record['title']})", kind, record, good)
    if grid is not None:
        for cell in grid.cells:
            if (cell.kind, cell.key) not in good:
                failed = ("failures", cell.key) in good
                (report.failed if failed else report.missing).append(cell.title)
    _measure_sample(
        store,
        [record for (kind, _), record in good.items() if kind in KINDS],
        report,
        sample,
        seed,
        device,
        trust,
        on_step,
    )
    return report


_Good = dict[tuple[Kind, str], dict[str, Any]]  # records with which nothing is wrong


def _check_all(store: Store, report: Report, on_step: Callable[[str, int, int], None] | None) -> _Good:
    """Check every record by itself; those of the first layout are left out."""
    good: _Good = {}
    for kind in FOLDERS:
        keys = sorted(store.keys(kind))
        report.records[kind] = len(keys)
        for number, key in enumerate(keys, 1):
            if on_step is not None:
                on_step(f"checking {kind}", number, len(keys))
            record = _check(store, kind, key, report)
            if record is None:
                continue
            if is_former(record):
                report.records[kind] -= 1
            else:
                good[kind, key] = record
    return good


def _check(store: Store, kind: Kind, key: str, report: Report) -> dict[str, Any] | None:
    """Check one record; returns it if nothing is wrong with it."""
    name = f"{kind}/{key[:12]}"
    try:
        record = store.read(kind, key)
        if kind != "assets" and not isinstance(record["title"], str):
            raise TypeError("expected a title")
        if record["key"] != key or content_key(record["spec"]) != key:
            raise StoreError(f"{name}: its specification has another name than its file")
        for file in record["files"]:
            store.file(record, file)
            report.files += 1
        if kind in KINDS and not is_former(record):
            cell = cell_of(record["spec"], attack=record["facts"]["attack"], defence=record["facts"].get("defence"))
            if (cell.kind, cell.victim_key) != (kind, record["victim_key"]):
                raise StoreError(f"{name}: it is filed as another kind, or names another victim, than it specifies")
            lines = inconsistencies(record["metrics"], KINDS[kind].rates)
            report.faults += [f"{name} ({record['title']}): {line}" for line in lines]
            return None if lines else record
    except (StoreError, OSError) as error:
        report.faults.append(str(error))
    except UNREADABLE as error:
        report.faults.append(f"{name}: its record is not complete ({shortened(error)})")
    else:
        return record
    return None


def _missing_needs(name: str, kind: Kind, record: Mapping[str, Any], good: _Good) -> list[str]:
    """Return what is wrong between a record and those that it needs."""
    faults = []
    for need in KINDS[kind].needs(record["spec"]):
        needed = good.get((need.kind, need.key))
        if needed is None:
            faults.append(f"{name}: its {need.noun} {need.key[:12]} is missing or damaged")
        elif (
            kind != "victims"  # one that was fine-tuned has its own
            and "before" in KINDS[kind].rates
            and need.kind == "victims"
            and record["metrics"]["before"] != needed["metrics"]["before"]
        ):
            faults.append(f"{name}: its rates before the defence are not those of its victim {need.key[:12]}")
    return faults


def inconsistencies(metrics: Mapping[str, Any], rates: Sequence[str]) -> list[str]:
    """Return which numbers of a record do not follow from its counts of images; raises one of ``UNREADABLE`` without any.

    Args:
        metrics: of the record.
        rates: which of them are evaluations; see ``CellKind.rates``.
    """
    whole = {when: Evaluation.from_dict({**metrics[when], "per_class": []}) for when in rates}
    again: dict[str, Any] = {when: without_per_class(evaluation.to_dict())[0] for when, evaluation in whole.items()}
    if {"before", "after"} <= whole.keys():
        again["compare"] = compare_evaluations(whole["before"], whole["after"])
    if "sifting" in metrics:
        again["sifting"] = SiftingRates.from_dict(metrics["sifting"]).to_dict()
    return [
        f"{part}.{name} is {metrics[part][name]!r}, from the counts it is {value!r}"
        for part, values in again.items()
        for name, value in values.items()
        if name in metrics[part] and not _is_same(metrics[part][name], value)
    ]


def _is_same(one: Any, other: Any) -> bool:
    """Compare plain data, floats give or take rounding."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_same(one[name], other[name]) for name in one)
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
    return bool(one == other)


def _measure_sample(
    store: Store,
    records: Sequence[Mapping[str, Any]],
    report: Report,
    sample: int,
    seed: int,
    device: torch.device,
    trust: Trust,
    on_step: Callable[[str, int, int], None] | None,
) -> None:
    """Measure some models again from their weights and compare with what was written down."""
    kept = [record for record in records if MODEL_FILE in record["files"]]
    for record in kept if sample else []:
        trust.require_code(record["spec"])
    order = torch.randperm(len(kept), generator=child(seed, "verify"))[:sample].tolist()
    bench = Workbench(store=store, device=device, sources=Sources(trust=trust))
    for number, index in enumerate(order, 1):
        record = kept[index]
        if on_step is not None:
            on_step("measuring again", number, len(order))
        try:
            with threads(threads_of(record)):
                when, again = measure_again(bench, record)
            found = differences(record["metrics"][when], again)
        except (*UNREADABLE, OSError, RuntimeError) as error:
            report.faults.append(
                f"{record['title']} ({record['key'][:12]}) cannot be measured again: {shortened(error)}"
            )
            continue
        report.faults += [f"{record['title']} ({record['key'][:12]}): {line}" for line in found]
        report.measured.append(record["title"])


def measure_again(bench: Workbench, record: Mapping[str, Any]) -> tuple[str, Evaluation]:
    """Measure the model that was kept with a record; returns which of its metrics that should be, and what it is now.

    Raises:
        TrustError: the specification asks for code or data that are not allowed.
    """
    cell = cell_of(record["spec"])
    bench.sources.trust.require(cell.spec)
    when = KINDS[cell.kind].rates[-1]
    if cell.kind == "victims":
        return when, bench.evaluate(bench.victim(cell.key), None, cell.spec)
    victim = cell.needs[0]
    return when, bench.evaluate(bench.victim(victim.key), bench.model(record), victim.spec)


def threads_of(record: Mapping[str, Any]) -> int:
    """Return how many CPU threads made a record.

    Raises:
        StoreError: it names no number, or one beyond ``MOST_THREADS``.
    """
    number = record["made"]["threads"]
    if type(number) is not int or not 1 <= number <= MOST_THREADS:
        raise StoreError(
            f"{record['key'][:12]} says that {shortened(number)} threads made it; expected 1 to {MOST_THREADS}"
        )
    return number


def differences(stored: Mapping[str, Any], again: Evaluation) -> list[str]:
    """Return what an evaluation does not confirm, give or take ``TOLERANCE`` and two images."""
    found = []
    rates: dict[str, Rate] = {name: getattr(again, name) for name in ("acc", "asr", "ra", "natural_rate")}
    before = {**stored, **stored.get("probes", {})}
    for name, now in {**rates, **again.probes}.items():
        was = before[name]
        if was["n"] != now.total or abs(was["hits"] - now.hits) > max(2, TOLERANCE * now.total):
            found.append(f"{name} was {was['hits']} of {was['n']}, measured again it is {now.hits} of {now.total}")
    return found


def repeat(
    cell: Cell,
    store: Store,
    *,
    device: torch.device,
    num_threads: int,
    trust: Trust = Trust(),  # noqa: B008
    on_progress: OnProgress | None = None,
) -> tuple[Mapping[str, Any], list[str]]:
    """Do a stored cell again without writing it; returns the new record and how its rates differ from the stored one.

    Raises:
        StoreError: other versions of its method made it than this library has.
        TrustError: its specification asks for code or data that ``trust`` does not allow.
    """
    stored = store.read(cell.kind, cell.key)
    reason = age_of(stored["spec"])
    if reason is not None:
        raise StoreError(
            f"{cell.title} ({cell.key[:12]}) was made by older versions ({reason}); this one makes another cell"
        )
    with threads(num_threads):
        bench = Workbench(store=store, device=device, sources=Sources(trust=trust))
        record = bench.do(cell, on_progress).record
    found = []
    for when, metrics in stored["metrics"].items():
        again = record["metrics"].get(when, {})
        if when in KINDS[cell.kind].rates:
            found += differences(metrics, Evaluation.from_dict({**again, "per_class": []}))
        elif when == "detection":
            found += [
                f"{name} was {metrics[name]!r}, now it is {again[name]!r}"
                for name in ("outcome", "suspects")
                if metrics[name] != again[name]
            ]
        elif (when in ("sifting", "parts") or not KINDS[cell.kind].rates) and not _is_same(metrics, json_ready(again)):
            found.append(f"{when} was {shortened(metrics)}, now it is {shortened(again)}")
    return record, found
