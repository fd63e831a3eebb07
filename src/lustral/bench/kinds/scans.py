"""Scans: a detector looks at a victim, and its verdict is held against what the victim's trigger does.

The verdict is kept with the triggers that it recovered: every purifier that starts from a scan of the same victim with the same
clean images and seed starts from this one.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lustral.bench.cells import Cell, Need, Outcome, make_cell
from lustral.bench.columns import defence_columns
from lustral.bench.recording import as_json, evidence, recovered_picture, without_per_class
from lustral.catalog import DETECTORS
from lustral.core.records import OnProgress
from lustral.core.settings import build
from lustral.core.versions import versions_of
from lustral.store.store import DETAIL_FILE, RECOVERED_PICTURE, Kind
from lustral.vision.evaluation import Evaluation
from lustral.vision.records import DefenderView, ImageSet, Verdict, Victim
from lustral.vision.sources import DataSource
from lustral.vision.verdict_files import write_verdict

if TYPE_CHECKING:
    from lustral.bench.expansion import Expansion
    from lustral.bench.workbench import Workbench


@dataclass(frozen=True)
class Scans:
    """The kind of cell that scans a victim."""

    name: Kind = "scans"
    noun: str = "scan"
    title: str = "{defence} against {attack} on {data}, seed {seed}"
    rates: tuple[str, ...] = ("before",)

    def expand(self, expansion: Expansion) -> Iterator[Cell]:
        """Yield a scan for every victim of the plan, detector, clean budget and defence seed."""
        for meeting in expansion.meetings(DETECTORS):
            defence = meeting.defence
            spec = scan_spec(
                meeting.victim.spec,
                defence.entry.method,
                defence.settings,
                meeting.clean_images,
                meeting.seed,
                defence.versions,
            )
            yield make_cell(
                self, spec, attack=meeting.victim.attack, defence=defence.entry.label, data=meeting.victim.data
            )

    def needs(self, spec: Mapping[str, Any]) -> tuple[Need, ...]:
        """Return the victim."""
        return (Need(kind="victims", spec=spec["victim"]),)

    def columns(self, spec: Mapping[str, Any], *, attack: str | None, defence: str | None) -> dict[str, Any]:
        """Return what tables group by; see ``CellKind.columns``."""
        return defence_columns(spec, attack=attack, defence=defence)

    def do(self, cell: Cell, bench: Workbench, on_progress: OnProgress | None) -> Outcome:
        """Scan the victim; see ``CellKind.do``."""
        spec = cell.spec
        assert cell.victim_key is not None
        victim = bench.victim(cell.victim_key)
        view = DefenderView(model=victim.model, clean=bench.clean_images(spec))
        detector: Any = build(DETECTORS[spec["defence"]["method"]], spec["defence"]["settings"])
        verdict: Verdict = detector.inspect(view, generator=bench.stream(spec, "scan"), on_progress=on_progress)
        before, per_class = without_per_class(victim.metrics)
        files = verdict_files(verdict, victim, view.clean, spec)
        files[DETAIL_FILE] = as_json({"per_class": {"before": per_class}, "verdict": evidence(verdict)})
        if verdict.triggers:
            files[RECOVERED_PICTURE] = recovered_picture(verdict, view.clean)
        targets = true_targets(victim, view.clean.num_classes)
        record = {
            "metrics": {"before": before, "detection": detection(verdict, targets)},
            "cost": dataclasses.asdict(verdict.cost),
            "class_names": list(view.clean.class_names),
        }
        return Outcome(record=record, files=files)


def scan_spec(
    victim: Mapping[str, Any],
    method: str,
    settings: Mapping[str, Any],
    clean_images: int,
    seed: int,
    versions: Mapping[str, int],
) -> dict[str, Any]:
    """Return the specification of a scan; ``versions`` are those of the detector and its settings."""
    return {
        "kind": "scan",
        "victim": victim,
        "defence": {"method": method, "settings": settings},
        "clean_images": clean_images,
        "seed": seed,
        "versions": {**versions, **versions_of(DataSource, Evaluation)},
    }


def verdict_files(verdict: Verdict, victim: Victim, clean: ImageSet, spec: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files that purifications read the verdict from: its evidence as plain data, its triggers as tensors."""
    about = {"command": "scan", **spec["defence"], "seed": spec["victim"]["seed"]}
    with tempfile.TemporaryDirectory() as scratch:
        write_verdict(Path(scratch), verdict, model=victim.model, clean=clean, about=about)
        return {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}


def true_targets(victim: Victim, num_classes: int) -> set[int]:
    """Return the labels that a victim's trigger leads to; none for a benign model."""
    labels = torch.arange(num_classes)
    targets = victim.relabel(labels, num_classes)
    return set(targets[targets != labels].tolist())


def detection(verdict: Verdict, targets: set[int]) -> dict[str, Any]:
    """Return how right a verdict was.

    "correct": a benign model called clean, or a backdoored one with nothing but true targets named. "alarm": called backdoored.
    """
    alarm = verdict.outcome == "backdoored"
    named = set(verdict.suspect_labels)
    correct = bool(named) and named <= targets and alarm if targets else verdict.outcome == "clean"
    return {
        "outcome": verdict.outcome,
        "suspects": list(verdict.suspect_labels),
        "targets": sorted(targets),
        "score": verdict.score,
        "threshold": verdict.threshold,
        "alarm": alarm,
        "correct": correct,
    }
