"""Purifications: a purifier erases a victim's backdoor, and the new model is measured with the true trigger.

One that starts from a scan needs a cell of the kind "scans": its verdict is read from the store, its cost is added.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lustral.bench.cells import Cell, Need, Outcome, make_cell
from lustral.bench.columns import defence_columns
from lustral.bench.kinds.scans import scan_spec
from lustral.bench.recording import as_json, evidence, recovered_picture, without_per_class
from lustral.catalog import DETECTORS, PURIFIERS
from lustral.core.records import OnProgress
from lustral.core.settings import build
from lustral.core.versions import versions_of
from lustral.store.store import DETAIL_FILE, MODEL_FILE, RECOVERED_PICTURE, Kind
from lustral.vision.erasing import TAKEN_OVER, erase, scan_method, takes_untrusted
from lustral.vision.evaluation import Evaluation, compare_evaluations
from lustral.vision.models import Classifier, arch_of, save_model
from lustral.vision.records import DefenderView, Verdict
from lustral.vision.sources import DataSource
from lustral.vision.verdict_files import read_verdict

if TYPE_CHECKING:
    from lustral.bench.expansion import Expansion, Meeting
    from lustral.bench.workbench import Workbench


@dataclass(frozen=True)
class Purifications:
    """The kind of cell that purifies a victim."""

    name: Kind = "purifications"
    noun: str = "purification"
    title: str = "{defence} against {attack} on {data}, seed {seed}"
    rates: tuple[str, ...] = ("before", "after")

    def expand(self, expansion: Expansion) -> Iterator[Cell]:
        """Yield a purification for every victim of the plan, purifier, clean budget and defence seed."""
        for meeting in expansion.meetings(PURIFIERS):
            cell = make_cell(
                self,
                purification_spec(meeting),
                attack=meeting.victim.attack,
                defence=meeting.defence.entry.label,
                data=meeting.victim.data,
            )
            if not takes_untrusted(PURIFIERS[meeting.defence.entry.method]) or expansion.has_training_set(cell):
                yield cell

    def needs(self, spec: Mapping[str, Any]) -> tuple[Need, ...]:
        """Return the victim, and the scan that the purifier starts from."""
        victim = Need(kind="victims", spec=spec["victim"])
        return (victim, Need(kind="scans", spec=spec["scan"])) if "scan" in spec else (victim,)

    def columns(self, spec: Mapping[str, Any], *, attack: str | None, defence: str | None) -> dict[str, Any]:
        """Return what tables group by; see ``CellKind.columns``."""
        return defence_columns(spec, attack=attack, defence=defence)

    def do(self, cell: Cell, bench: Workbench, on_progress: OnProgress | None) -> Outcome:
        """Purify the victim and measure what came of it; see ``CellKind.do``."""
        spec = cell.spec
        assert cell.victim_key is not None
        victim = bench.victim(cell.victim_key)
        view = DefenderView(model=victim.model, clean=bench.clean_images(spec))
        detector: Any = None
        if "scan" in spec:
            detector = build(DETECTORS[spec["scan"]["defence"]["method"]], spec["scan"]["defence"]["settings"])
            view = replace(view, verdict=stored_verdict(cell.needs[1].key, view, bench))
        purifier: Any = build(PURIFIERS[spec["defence"]["method"]], spec["defence"]["settings"])
        if takes_untrusted(purifier):
            view = replace(view, untrusted=bench.poisoned_set(cell.victim_key, spec["victim"]).data)
        purified = erase(
            purifier,
            view,
            detector=detector,
            generator=bench.stream(spec, "erase"),
            audit=spec["defence"].get("audit", False),
            on_progress=on_progress,
        )
        cost = purified.cost if view.verdict is None else view.verdict.cost + purified.cost
        evaluation = bench.evaluate(victim, purified.model, spec["victim"])
        before, per_class_before = without_per_class(victim.metrics)
        after, per_class_after = without_per_class(evaluation.to_dict())
        detail = {
            "per_class": {"before": per_class_before, "after": per_class_after},
            "history": [entry.to_dict() for entry in purified.history],
            "selected": purified.selected,
            "notes": [note for note in purified.notes if note != TAKEN_OVER],  # the scan is in the cost
            "audit": None if purified.audit is None else evidence(purified.audit),
        }
        files: dict[str, bytes] = {}
        if bench.keep_models and isinstance(purified.model, Classifier):
            files[MODEL_FILE] = weights_of(purified.model, spec["victim"], view.clean.image_shape)
        if purified.verdict is not None:
            detail["verdict"] = evidence(purified.verdict)
            if purified.verdict.triggers:
                files[RECOVERED_PICTURE] = recovered_picture(purified.verdict, view.clean)
        files[DETAIL_FILE] = as_json(detail)
        compared = compare_evaluations(Evaluation.from_dict(victim.metrics), evaluation)
        record = {
            "metrics": {"before": before, "after": after, "compare": compared},
            "cost": dataclasses.asdict(cost),
            "class_names": list(view.clean.class_names),
        }
        return Outcome(record=record, files=files)


def purification_spec(meeting: Meeting) -> dict[str, Any]:
    """Return the specification of a purification; where it starts from a scan, that and whether the result is scanned too."""
    defence, victim, scan = meeting.defence, meeting.victim.spec, dict[str, Any]()
    own: dict[str, Any] = {"method": defence.entry.method, "settings": defence.settings}
    if defence.scan is not None:
        own["audit"] = defence.entry.audit
        scan["scan"] = scan_spec(
            victim,
            scan_method(PURIFIERS[defence.entry.method]),
            defence.scan,
            meeting.clean_images,
            meeting.seed,
            defence.scan_versions,
        )
    return {
        "kind": "purification",
        "victim": victim,
        "defence": own,
        **scan,
        "clean_images": meeting.clean_images,
        "seed": meeting.seed,
        "versions": {**defence.versions, **versions_of(DataSource, Evaluation)},
    }


def stored_verdict(key: str, view: DefenderView, bench: Workbench) -> Verdict:
    """Return the verdict of a scan in the store, which must be of the view's model.

    Raises:
        CellError: there is no such scan.
        VerdictError: it is of another model, or of another version.
    """
    with bench.store.as_folder(bench.record("scans", key)) as folder:
        return read_verdict(folder, view)


def weights_of(model: Classifier, victim: Mapping[str, Any], image_shape: tuple[int, int, int]) -> bytes:
    """Return a new model's file; ``victim`` is the specification of the victim that it stands beside."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / MODEL_FILE
        save_model(path, model, arch=arch_of(model.network, victim["arch"]), image_shape=image_shape)
        return path.read_bytes()
