"""Keeping a store honest and small: checks, measuring again, cleaning up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lustral.bench.cells import Workbench, without_per_class
from lustral.bench.grid import Cell, Grid
from lustral.bench.runner import threads
from lustral.bench.sources import Sources
from lustral.bench.trust import Trust
from lustral.core.randomness import child
from lustral.core.rates import Rate
from lustral.core.records import OnProgress
from lustral.core.settings import shortened
from lustral.store.store import KINDS, MODEL_FILE, Kind, Store, StoreError, content_key
from lustral.tables.rows import age_of
from lustral.vision.evaluation import Evaluation, compare_evaluations

UNREADABLE = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    IndexError,
    AssertionError,
    RecursionError,
)
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
    report, good = Report(), {}
    for kind in KINDS:
        keys = sorted(store.keys(kind))
        report.records[kind] = len(keys)
        for number, key in enumerate(keys, 1):
            if on_step is not None:
                on_step(f"checking {kind}", number, len(keys))
            record = _check(store, kind, key, report)
            if record is not None:
                good[kind, key] = record
    for (kind, key), record in good.items():
        if kind == "audits" and ("results", record["result_key"]) not in good:
            report.faults.append(f"audits/{key[:12]} ({record['title']}): its result is missing or damaged")
        needed = record["victim_key"] if kind in ("victims", "results") else None
        if needed is None:
            continue
        victim, name = good.get(("victims", needed)), f"{kind}/{key[:12]} ({record['title']})"
        if victim is None:
            report.faults.append(f"{name}: its victim {needed[:12]} is missing or damaged")
        elif kind == "results" and record["metrics"]["before"] != victim["metrics"]["before"]:
            report.faults.append(f"{name}: its rates before the defence are not those of its victim {needed[:12]}")
    if grid is not None:
        for cell in grid.cells:
            if (cell.kind, cell.key) not in good:
                failed = ("failures", cell.key) in good
                (report.failed if failed else report.missing).append(cell.title)
    _measure_sample(
        store,
        [r for (kind, _), r in good.items() if kind in ("victims", "results")],
        report,
        sample,
        seed,
        device,
        trust,
        on_step,
    )
    return report


def _check(store: Store, kind: Kind, key: str, report: Report) -> dict[str, Any] | None:
    """Check one record; returns it if nothing is wrong with it."""
    name = f"{kind}/{key[:12]}"
    try:
        record = store.read(kind, key)
        if kind == "audits" and not isinstance(record["result_key"], str):
            raise TypeError("expected the name of a result")
        if kind != "assets" and not isinstance(record["title"], str):
            raise TypeError("expected a title")
        if record["key"] != key or content_key(record["spec"]) != key:
            raise StoreError(f"{name}: its specification has another name than its file")
        for file in record["files"]:
            store.file(record, file)
            report.files += 1
        if kind in ("victims", "results"):
            cell = Cell.of(record["spec"], attack=record["facts"]["attack"], defence=record["facts"].get("defence"))
            if (cell.kind, cell.victim_key) != (kind, record["victim_key"]):
                raise StoreError(f"{name}: it is filed as another kind, or names another victim, than it specifies")
            faults = [f"{name} ({record['title']}): {line}" for line in inconsistencies(record["metrics"])]
            report.faults += faults
            return None if faults else record
    except (StoreError, OSError) as error:
        report.faults.append(str(error))
    except UNREADABLE as error:
        report.faults.append(f"{name}: its record is not complete ({shortened(error)})")
    else:
        return record
    return None


def inconsistencies(metrics: Mapping[str, Any]) -> list[str]:
    """Return which numbers of a record do not follow from its counts of images; raises one of ``UNREADABLE`` without any."""
    measured = ("before", "after") if "after" in metrics else ("before",)
    whole = {when: Evaluation.from_dict({**metrics[when], "per_class": []}) for when in measured}
    again: dict[str, Any] = {when: without_per_class(evaluation.to_dict())[0] for when, evaluation in whole.items()}
    if len(whole) == 2:
        again["compare"] = compare_evaluations(whole["before"], whole["after"])
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
                again = bench.measure_again(record)
            assert again is not None
            found = differences(record["metrics"]["before" if record["kind"] == "victim" else "after"], again)
        except (*UNREADABLE, OSError, RuntimeError) as error:
            report.faults.append(
                f"{record['title']} ({record['key'][:12]}) cannot be measured again: {shortened(error)}"
            )
            continue
        report.faults += [f"{record['title']} ({record['key'][:12]}): {line}" for line in found]
        report.measured.append(record["title"])


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


@dataclass
class Waste:
    """What a clean-up removes.

    Attributes:
        leftovers: files and folders that killed processes left.
        records: (kind, key, title) of records that no plan names, or that failed.
    """

    leftovers: list[str] = field(default_factory=list)
    records: list[tuple[Kind, str, str]] = field(default_factory=list)


def find_waste(
    store: Store,
    *,
    keep: Sequence[Grid] = (),
    failures: bool = False,
    old: bool = False,
    grace_seconds: float = 3600.0,
) -> Waste:
    """Return what can go.

    Args:
        store: where to look.
        keep: plans whose cells stay, of whatever versions; none: all cells stay.
        failures: whether failed cells go too, so that the next run tries them again.
        old: whether what older versions made goes too.
        grace_seconds: younger leftovers may be in use and stay.
    """
    waste = Waste(leftovers=store.leftovers(grace_seconds=grace_seconds))
    named = {content_key(versionless(cell.spec)) for grid in keep for cell in grid.cells}
    for kind in KINDS:
        if kind == "assets":  # attacks of other plans may need them again, and they are dear
            continue
        for record in store.records(kind):
            try:
                spec = record["spec"]["result"] if kind == "audits" else record["spec"]
                is_stranger = bool(keep) and content_key(versionless(spec)) not in named
                is_old = old and age_of(spec) is not None
            except UNREADABLE as error:
                raise StoreError(
                    f"{kind}/{record['key'][:12]} is not a readable record ({shortened(error)})"
                ) from error
            if is_stranger or (failures and kind == "failures") or is_old:
                waste.records.append((kind, record["key"], str(record.get("title"))))
    return waste


def versionless(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a specification as any version of its methods has it."""
    return {
        name: versionless(value) if isinstance(value, Mapping) else value
        for name, value in spec.items()
        if name != "versions"
    }


def remove_waste(store: Store, waste: Waste) -> None:
    """Remove what ``find_waste`` found; what needs others goes before them."""
    order: dict[Kind, int] = {"audits": 0, "results": 1, "failures": 2, "victims": 3, "assets": 4}
    for kind, key, _ in sorted(waste.records, key=lambda entry: order[entry[0]]):
        store.remove(kind, key)
    for path in waste.leftovers:
        store.discard(path)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How long the rest of a plan may take.

    Attributes:
        done: cells in the store.
        failed: cells that failed before.
        left: cells to do.
        seconds: estimate for those with a precedent.
        unknown: cells without any precedent in the store, not in ``seconds``.
    """

    done: int
    failed: int
    left: int
    seconds: float
    unknown: int


def estimate(grid: Grid, store: Store | None) -> tuple[Estimate, dict[str, str]]:
    """Return an estimate from past costs, and the state of each cell by key: "done", "failed" or "to do".

    A cell is expected to take as long as the median of those most like it: same method, data and architecture; else the same
    data and architecture; else the same method.
    """
    past: dict[tuple[Any, ...], list[float]] = {}
    states: dict[str, str] = {}
    if store is not None:
        for kind in ("victims", "results"):
            for record in store.records(kind, check=False):
                try:
                    states[record["key"]] = "done"
                    for likeness in _likenesses(record["spec"]):
                        past.setdefault(likeness, []).append(float(record["made"]["seconds"]))
                except UNREADABLE as error:
                    raise StoreError(f"{kind}: a record is not readable ({shortened(error)})") from error
        for key in store.keys("failures"):
            states.setdefault(key, "failed")
    seconds, unknown, of_plan = 0.0, 0, {}
    for cell in grid.cells:
        of_plan[cell.key] = states.get(cell.key, "to do")
        if of_plan[cell.key] == "to do":
            precedent = next((past[likeness] for likeness in _likenesses(cell.spec) if likeness in past), None)
            if precedent is None:
                unknown += 1
            else:
                seconds += sorted(precedent)[len(precedent) // 2]
    counts = {state: list(of_plan.values()).count(state) for state in ("done", "failed", "to do")}
    whole = Estimate(
        done=counts["done"], failed=counts["failed"], left=counts["to do"], seconds=seconds, unknown=unknown
    )
    return whole, of_plan


def _likenesses(spec: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Return what a cell has in common with others, the closest first."""
    victim = spec["victim"] if spec["kind"] == "result" else spec
    place = (victim["data"]["name"], victim["arch"])
    method = spec["defence"]["method"] if spec["kind"] == "result" else victim["attack"]["method"]
    return [(spec["kind"], method, *place), (spec["kind"], "", *place), (spec["kind"], method)]


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
        if when in ("before", "after"):
            found += differences(metrics, Evaluation.from_dict({**again, "per_class": []}))
        elif when == "detection":
            found += [
                f"{name} was {metrics[name]!r}, now it is {again[name]!r}"
                for name in ("outcome", "suspects")
                if metrics[name] != again[name]
            ]
    return record, found
