"""Siftings: a sifter looks for the poisoned images of a victim's training set, and its list is held against the attacker's.

The training set is poisoned again as it was for the victim. The sifter gets the victim's model too, which was trained plainly on
that set, so it need not train one; the setting ``own_model`` keeps it away.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, nn

from lustral.bench.cells import Cell, Outcome
from lustral.bench.kinds.untrusted import UntrustedKind
from lustral.bench.recording import as_json, without_per_class
from lustral.catalog import SIFTERS
from lustral.core.records import OnProgress
from lustral.core.settings import build
from lustral.store.store import DETAIL_FILE, Kind
from lustral.vision.evaluation import SiftingRates, score_histogram, sifting_rates
from lustral.vision.models import parse_architecture
from lustral.vision.records import ImageSet, PoisonedSet, Sifted, TrainingView
from lustral.vision.untrusted import find_overlap, sift
from lustral.vision.victims import untrained_classifier

if TYPE_CHECKING:
    from lustral.bench.workbench import Workbench


@dataclass(frozen=True)
class Siftings(UntrustedKind):
    """The kind of cell that sifts a victim's training set."""

    methods: ClassVar[Mapping[str, Any]] = SIFTERS

    name: Kind = "siftings"
    noun: str = "sifting"
    title: str = "{defence} against {attack} on {data}, seed {seed}"
    rates: tuple[str, ...] = ("before",)

    def do(self, cell: Cell, bench: Workbench, on_progress: OnProgress | None) -> Outcome:
        """Sift the training set; see ``CellKind.do``."""
        spec, key = cell.spec, cell.victim_key
        assert key is not None
        victim = bench.victim(key)
        poisoned = bench.poisoned_set(key, spec["victim"])
        model = None if spec["defence"].get("own_model", False) else victim.model
        view, notes = training_view(spec, poisoned.data, bench, model=model)
        sifter: Any = build(SIFTERS[spec["defence"]["method"]], spec["defence"]["settings"])
        found = sift(sifter, view, generator=bench.stream(spec, "sift"), on_progress=on_progress)
        before, per_class = without_per_class(victim.metrics)
        detail = {
            "per_class": {"before": per_class},
            "sifting": sifting_detail(found, poisoned),
            "notes": [*notes, *found.notes],
        }
        parts = {name: rates_of(part, poisoned).to_dict() for name, part in found.parts.items()}
        record = {
            "metrics": {
                "before": before,
                "sifting": rates_of(found, poisoned).to_dict(),
                **({"parts": parts} if parts else {}),
            },
            "cost": dataclasses.asdict(found.cost),
            "class_names": list(poisoned.data.class_names),
        }
        return Outcome(record=record, files={DETAIL_FILE: as_json(detail)})


def training_view(
    spec: Mapping[str, Any], untrusted: ImageSet, bench: Workbench, *, model: nn.Module | None = None
) -> tuple[TrainingView, tuple[str, ...]]:
    """Return what a sifter or a safe trainer may look at, and what is to be said of it.

    Args:
        spec: of the cell.
        untrusted: the victim's training set.
        bench: draws the clean images. Some sources hold a picture twice, so those that are in ``untrusted`` too are left out.
        model: trained plainly on ``untrusted``; None: there is none.
    """
    data = spec["victim"]["data"]
    arch = parse_architecture(spec["victim"]["arch"], allow_code=bench.sources.trust.code)
    notes: tuple[str, ...] = ()
    clean = bench.clean_images(spec) if spec["clean_images"] else None
    if clean is not None and (copies := find_overlap(clean, untrusted)):
        keep = torch.ones(len(clean), dtype=torch.bool)
        keep[copies] = False
        clean = clean.subset(keep)
        notes = (f"{len(copies):,} of the clean images are in the training set too and were left out.",)

    def build_model(generator: Generator) -> nn.Module:
        return untrained_classifier(arch, untrusted, generator=generator)

    view = TrainingView(
        untrusted=untrusted,
        build_model=build_model,
        clean=clean,
        flip=bench.sources.open(data["name"], data["image_size"]).flip,
        model=model,
    )
    return view, notes


def rates_of(found: Sifted, poisoned: PoisonedSet) -> SiftingRates:
    """Hold what a sifter found against the attacker's list."""
    return sifting_rates(found.scores, found.flagged, poisoned.is_poisoned, poisoned.is_cover)


def sifting_detail(found: Sifted, poisoned: PoisonedSet) -> dict[str, Any]:
    """Return the line that was drawn and the histogram of the scores as plain data, with those of the parts."""
    return {
        "threshold": found.threshold if math.isfinite(found.threshold) else None,
        "basis": found.basis,
        "histogram": score_histogram(found.scores, poisoned.is_poisoned, poisoned.is_cover),
        "parts": {name: sifting_detail(part, poisoned) for name, part in found.parts.items()},
    }
