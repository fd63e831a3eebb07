"""Purifications: a purifier erases a victim's backdoor, and the new model is measured with the true trigger."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lustral.bench.cells import Cell, Need, Outcome, make_cell
from lustral.bench.columns import defence_columns
from lustral.bench.recording import as_json, evidence, recovered_picture, without_per_class
from lustral.catalog import PURIFIERS
from lustral.core.records import OnProgress
from lustral.core.settings import build
from lustral.core.versions import versions_of
from lustral.store.store import DETAIL_FILE, MODEL_FILE, RECOVERED_PICTURE, Kind
from lustral.vision.evaluation import Evaluation, compare_evaluations
from lustral.vision.models import Classifier, arch_of, save_model
from lustral.vision.records import DefenderView, ImageSet, Purified
from lustral.vision.sources import DataSource

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
            yield make_cell(
                self, purification_spec(meeting), attack=meeting.victim.attack, defence=meeting.defence.entry.label
            )

    def needs(self, spec: Mapping[str, Any]) -> tuple[Need, ...]:
        """Return the victim."""
        return (Need(kind="victims", spec=spec["victim"]),)

    def columns(self, spec: Mapping[str, Any], *, attack: str | None, defence: str | None) -> dict[str, Any]:
        """Return what tables group by; see ``CellKind.columns``."""
        return defence_columns(spec, attack=attack, defence=defence)

    def do(self, cell: Cell, bench: Workbench, on_progress: OnProgress | None) -> Outcome:
        """Purify the victim and measure what came of it; see ``CellKind.do``."""
        spec = cell.spec
        assert cell.victim_key is not None
        victim = bench.victim(cell.victim_key)
        view = DefenderView(model=victim.model, clean=bench.clean_images(spec))
        purifier: Any = build(PURIFIERS[spec["defence"]["method"]], spec["defence"]["settings"])
        purified: Purified = purifier.purify(view, generator=bench.stream(spec, "erase"), on_progress=on_progress)
        evaluation = bench.evaluate(victim, purified.model, spec["victim"])
        before, per_class_before = without_per_class(victim.metrics)
        after, per_class_after = without_per_class(evaluation.to_dict())
        detail = {
            "per_class": {"before": per_class_before, "after": per_class_after},
            "history": list(purified.history),
            "selected": purified.selected,
            "notes": list(purified.notes),
            "audit": None if purified.audit is None else evidence(purified.audit),
        }
        files: dict[str, bytes] = {}
        if bench.keep_models and isinstance(purified.model, Classifier):
            files[MODEL_FILE] = weights_of(purified.model, spec["victim"], view.clean)
        if purified.verdict is not None:
            detail["verdict"] = evidence(purified.verdict)
            if purified.verdict.triggers:
                files[RECOVERED_PICTURE] = recovered_picture(purified.verdict, view.clean)
        files[DETAIL_FILE] = as_json(detail)
        compared = compare_evaluations(Evaluation.from_dict(victim.metrics), evaluation)
        record = {
            "metrics": {"before": before, "after": after, "compare": compared},
            "cost": dataclasses.asdict(purified.cost),
            "class_names": list(view.clean.class_names),
        }
        return Outcome(record=record, files=files)


def purification_spec(meeting: Meeting) -> dict[str, Any]:
    """Return the specification of a purification."""
    return {
        "kind": "purification",
        "victim": meeting.victim.spec,
        "defence": {"method": meeting.defence.entry.method, "settings": meeting.defence.settings},
        "clean_images": meeting.clean_images,
        "seed": meeting.seed,
        "versions": {**meeting.defence.versions, **versions_of(DataSource, Evaluation)},
    }


def weights_of(model: Classifier, victim: Mapping[str, Any], clean: ImageSet) -> bytes:
    """Return a purified model's file; ``victim`` is the specification of the victim it was made of."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / MODEL_FILE
        save_model(path, model, arch=arch_of(model.network, victim["arch"]), image_shape=clean.image_shape)
        return path.read_bytes()
