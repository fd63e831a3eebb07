"""Trainings: a safe trainer learns from a victim's training set, and the model is measured with the victim's true trigger.

The training set is poisoned again as it was for the victim. "Before" is the victim itself, which was trained plainly on that set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lustral.bench.cells import Cell, Outcome
from lustral.bench.kinds.purifications import weights_of
from lustral.bench.kinds.siftings import rates_of, sifting_detail, training_view
from lustral.bench.kinds.untrusted import UntrustedKind
from lustral.bench.recording import as_json, without_per_class
from lustral.catalog import SAFE_TRAINERS
from lustral.core.records import OnProgress
from lustral.core.settings import build
from lustral.store.store import DETAIL_FILE, MODEL_FILE, Kind
from lustral.vision.evaluation import Evaluation, compare_evaluations
from lustral.vision.models import Classifier
from lustral.vision.untrusted import train

if TYPE_CHECKING:
    from lustral.bench.workbench import Workbench


@dataclass(frozen=True)
class Trainings(UntrustedKind):
    """The kind of cell that trains a model safely on a victim's training set."""

    methods: ClassVar[Mapping[str, Any]] = SAFE_TRAINERS

    name: Kind = "trainings"
    noun: str = "training"
    title: str = "{defence} against {attack} on {data}, seed {seed}"
    rates: tuple[str, ...] = ("before", "after")

    def do(self, cell: Cell, bench: Workbench, on_progress: OnProgress | None) -> Outcome:
        """Train on the victim's set and measure what came of it; see ``CellKind.do``."""
        spec, key = cell.spec, cell.victim_key
        assert key is not None
        victim = bench.victim(key)
        poisoned = bench.poisoned_set(key, spec["victim"])
        view, notes = training_view(spec, poisoned.data, bench)
        trainer: Any = build(SAFE_TRAINERS[spec["defence"]["method"]], spec["defence"]["settings"])
        trained = train(trainer, view, generator=bench.stream(spec, "train"), on_progress=on_progress)
        evaluation = bench.evaluate(victim, trained.model, spec["victim"])
        before, per_class_before = without_per_class(victim.metrics)
        after, per_class_after = without_per_class(evaluation.to_dict())
        compared = compare_evaluations(Evaluation.from_dict(victim.metrics), evaluation)
        metrics: dict[str, Any] = {"before": before, "after": after, "compare": compared}
        detail: dict[str, Any] = {
            "per_class": {"before": per_class_before, "after": per_class_after},
            "history": [entry.to_dict() for entry in trained.history],
            "notes": [*notes, *trained.notes],
        }
        if trained.sifted is not None:
            metrics["sifting"] = rates_of(trained.sifted, poisoned).to_dict()
            detail["sifting"] = sifting_detail(trained.sifted, poisoned)
        files = {DETAIL_FILE: as_json(detail)}
        if bench.keep_models and isinstance(trained.model, Classifier):
            files[MODEL_FILE] = weights_of(trained.model, spec["victim"], poisoned.data.image_shape)
        record = {
            "metrics": metrics,
            "cost": dataclasses.asdict(trained.cost),
            "class_names": list(poisoned.data.class_names),
        }
        return Outcome(record=record, files=files)
