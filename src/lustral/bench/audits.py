"""Audits of a plan's purified models: does the backdoor sleep? (``lustral.vision.evaluation.Reactivation``)

An audit belongs to one result whose weights were kept. It is a record of its own under "audits", named by the hash of the
result's specification, the benign model that it is compared with, and the settings of the checks; so it can be made long
after the result, and is made once.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lustral.bench.cells import RECORD_SCHEMA, Workbench, build_info
from lustral.bench.grid import Cell, Grid, table_columns
from lustral.bench.plan import PlanError
from lustral.bench.sources import Sources
from lustral.bench.trust import Trust
from lustral.catalog import PURIFIERS
from lustral.core.files import write_bytes_atomic
from lustral.core.randomness import child, fork
from lustral.core.records import OnProgress
from lustral.core.settings import describe
from lustral.core.versions import versions_of
from lustral.store.store import MODEL_FILE, Store, content_key
from lustral.vision.evaluation import Controls, Reactivation
from lustral.vision.models import load_model
from lustral.vision.sources import DataSource
from lustral.vision.victims import NO_ATTACK


@dataclass(frozen=True, kw_only=True)
class Audit:
    """One audit to make.

    Attributes:
        result: the purified model.
        benign: the benign model of the same task, architecture and seed.
        settings: of the checks.
        versions: of what makes the checks.
        key: its name in the store.
    """

    result: Cell
    benign: Cell
    settings: Mapping[str, Any]
    versions: Mapping[str, int]
    key: str = field(init=False)

    def __post_init__(self) -> None:
        """Work out the name."""
        object.__setattr__(self, "key", content_key(self.spec))

    @property
    def spec(self) -> dict[str, Any]:
        """Everything that the outcome depends on."""
        return {
            "kind": "audit",
            "result": self.result.spec,
            "benign": self.benign.spec,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }


def audits_of(grid: Grid, settings: Reactivation) -> list[Audit]:
    """Return the audits of a plan: of every purifier's result on a backdoored model.

    Raises:
        PlanError: the plan has no benign model to compare a victim with; says which.
    """
    benign = {}
    for cell in grid.cells:
        if cell.kind == "victims" and cell.spec["attack"]["method"] == NO_ATTACK:
            benign[_task(cell.spec)] = cell
    found, missing = [], dict[str, None]()
    for cell in grid.cells:
        if cell.kind != "results" or cell.spec["defence"]["method"] not in PURIFIERS:
            continue
        victim = cell.spec["victim"]
        if victim["attack"]["method"] == NO_ATTACK:
            continue
        task = _task(victim)
        if task in benign:
            found.append(
                Audit(
                    result=cell,
                    benign=benign[task],
                    settings=describe(settings),
                    versions=versions_of(settings, DataSource),
                )
            )
        else:
            missing[f"{victim['data']['name']}, {victim['arch']}, seed {victim['seed']}"] = None
    if missing:
        raise PlanError(
            "an audit compares with a benign model; the plan has none for "
            f"{'; '.join(missing)}: add an attack with method none and these seeds"
        )
    return found


def _task(victim: Mapping[str, Any]) -> str:
    """Return what a victim and the benign model beside it have in common."""
    return content_key({name: victim[name] for name in ("data", "arch", "seed")})


def run_audits(
    audits: list[Audit],
    store: Store,
    settings: Reactivation,
    *,
    device: torch.device,
    trust: Trust = Trust(),  # noqa: B008
    on_progress: Callable[[Audit], OnProgress | None] | None = None,
) -> Iterator[tuple[Audit, str, dict[str, Any] | None]]:
    """Make what is missing; yields each audit with "computed", "present", "busy" (another runner's) or "blocked" (no result).

    Args:
        audits: of ``audits_of``.
        store: where the results are and the audits go.
        settings: of the checks, as given to ``audits_of``.
        device: where to compute.
        trust: what the plan may ask for.
        on_progress: makes the callback for one audit.
    """
    bench = Workbench(store=store, device=device, sources=Sources(trust=trust))
    shared: dict[tuple[str, str], Controls] = {}
    for audit in audits:
        if store.has("audits", audit.key):
            yield audit, "present", store.read("audits", audit.key)
            continue
        if not (store.has("results", audit.result.key) and store.has("victims", audit.benign.key)):
            yield audit, "blocked", None
            continue
        result = store.read("results", audit.result.key)
        if MODEL_FILE not in result["files"]:
            yield audit, "blocked", None
            continue
        with store.claim(audit.key) as mine:
            if not mine:
                yield audit, "busy", None
                continue
            report = None if on_progress is None else on_progress(audit)
            record = make(audit, result, bench, settings, shared, report)
            store.put("audits", audit.key, record)
        yield audit, "computed", record


def make(
    audit: Audit,
    result: Mapping[str, Any],
    bench: Workbench,
    settings: Reactivation,
    shared: dict[tuple[str, str], Controls],
    on_progress: OnProgress | None,
) -> dict[str, Any]:
    """Return the record of one audit.

    ``shared`` holds the controls of the last victim, by its key and the benign model's; those of another replace them.
    """
    started, spec = time.perf_counter(), audit.result.spec["victim"]
    benign = bench.victim(audit.benign.key).model
    victim = bench.victim(result["victim_key"])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / MODEL_FILE
        write_bytes_atomic(path, bench.store.file(result, MODEL_FILE))
        purified = load_model(path, allow_code=bench.sources.trust.code).model.to(bench.device)
    source = bench.sources.open(spec["data"]["name"], spec["data"]["image_size"])
    train = bench.sources.training_set(spec["data"]["name"], spec["data"]["image_size"]).to(bench.device)
    assert source.test is not None
    test = source.test.to(bench.device)
    pair = result["victim_key"], audit.benign.key
    if pair not in shared:
        controls = settings.controls(
            victim,
            benign=benign,
            train=train,
            test=test,
            generator=fork(child(spec["seed"], "audit"), "controls"),
            on_progress=on_progress,
        )
        shared.clear()
        shared[pair] = controls
    checks = settings.audit(
        victim,
        purified,
        benign=benign,
        train=train,
        test=test,
        generator=child(spec["seed"], "audit"),
        controls=shared[pair],
        on_progress=on_progress,
    )
    return {
        "schema": RECORD_SCHEMA,
        "kind": "audit",
        "status": "done",
        "title": f"audit of {audit.result.title}",
        "facts": table_columns(audit.result),
        "spec": audit.spec,
        "victim_key": result["victim_key"],
        "result_key": result["key"],
        "metrics": checks,
        "made": build_info(time.perf_counter() - started, bench.device),
    }
