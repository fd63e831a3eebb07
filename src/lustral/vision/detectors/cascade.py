"""From a glance to a search: the scan that ``lustral scan`` runs, for networks of anybody's making.

Three looks at a classifier, each at what the one before leaves open:

1. the last layer (``latent_look``, about a second) orders the labels and says where the error rate is spent;
2. the smallest masks, from several starts, find patches (``mask_area``'s evidence);
3. the faintest changes, by energy, find what is spread over the image: perturbations that are added, pictures blended in. They
   are searched where the masks accuse nobody.

Each size is tested against those of the other labels under a stated null (``small_areas``). The p-value of a label is corrected
for all labels and both searches, and weighted by the first look; one below ``false_alarm_rate`` accuses the model. A label that
the first look alone finds odd, below ``ODD_RATE``, has its p-value divided by ``ODD_FACTOR``: two independent doubts are none.

With a deadline each search leaves out the labels that the first look ranks last, as many as the pace of its steps asks for. The
look knows nothing of the sizes, so that those searched are still a fair sample; p-values stay corrected for all labels. A
model of which not all was searched is never called clean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Generator, Tensor, nn

from lustral.core.cost import CostMeter, Deadline
from lustral.core.randomness import fork
from lustral.core.records import Cost, Evidence, OnProgress, Progress
from lustral.vision.detectors.latent_look import error_weights, latent_norms, oddities
from lustral.vision.detectors.size_search import SizeSearch
from lustral.vision.detectors.weighing import (
    NULLS,
    SearchedLabel,
    held_back,
    most_suspicious,
    outliers,
    smallest_of,
    soaked_note,
    soaks_up,
    unsearched,
    usable_labels,
    with_entropy,
)
from lustral.vision.evaluation import TaskCheck, check_task, require_gradient
from lustral.vision.images import require_usable, split
from lustral.vision.inverters.mask_search import FoundMasks, MaskSearch
from lustral.vision.inverters.max_entropy import MaxEntropy
from lustral.vision.measures import LATENT_NORM
from lustral.vision.records import Answer, DefenderView, ImageSet, RecoveredTrigger, Verdict

SEARCHES = 2  # that share the error rate
ODD_RATE, ODD_FACTOR = (
    0.02,
    10.0,
)  # in a benign model both doubts meet with probability 0.02 x 0.1: a fifth of the false-alarm rate
PROTECTED = 3  # labels that the first look ranks first are searched to the end
TIME_SHARES = {
    "area": 0.65,
    "energy": 0.85,
}  # of the time left, for a search; the rest is for the next, and for spreading
PLACES_TOO = 1.5  # times the passes of the steps that spread out a trigger: its places are tried as well
MOST_NAMED = 50  # classes in a sentence
SHOWN = {"area": "a patch or mark", "energy": "a faint change of the whole image"}
SOUGHT = {"area": "small masks", "energy": "faint changes"}
TWO_DOUBTS = " Dividing p by ten where two doubts meet adds up to a fifth to that rate."


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one search found: masks, and what each label needs, its p-values corrected for both searches and weighted."""

    detector: SizeSearch
    found: FoundMasks
    evidence: tuple[SearchedLabel, ...]
    suspects: tuple[int, ...]
    doubtful: tuple[int, ...]
    trouble: str | None
    odd: tuple[int, ...] = ()
    """Labels whose p-value was divided by ``ODD_FACTOR``."""

    @property
    def kind(self) -> str:
        """What was made small: "area" or "energy"."""
        return self.evidence[0].penalty


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """Decide by the smallest masks and the faintest changes, in the order of a first look at the last layer.

    Attributes:
        patches: searches patches; its ``inverter`` spreads out the triggers of suspects.
        faint: searches faint changes.
        false_alarm_rate: probability, under the nulls, that a benign model is called backdoored.
        doubt_rate: above ``false_alarm_rate`` and up to here the answer is "cannot tell".
        first_look: weigh the labels by the last layer, where that is linear.
    """

    version: ClassVar[int] = 1
    takes_deadline: ClassVar[bool] = True

    patches: SizeSearch = field(
        default_factory=lambda: SizeSearch(inverter=MaxEntropy(search=MaskSearch(steps=180, batch_size=20)))
    )
    faint: SizeSearch = field(
        default_factory=lambda: SizeSearch(
            inverter=MaxEntropy(search=MaskSearch(penalty="energy", starts=1, steps=120, batch_size=16))
        )
    )
    false_alarm_rate: float = 0.01
    doubt_rate: float = 0.1
    first_look: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.false_alarm_rate <= self.doubt_rate < 1:
            raise ValueError(
                f"expected 0 < false_alarm_rate <= doubt_rate < 1; got {self.false_alarm_rate} and {self.doubt_rate}"
            )
        for name, wanted in (("patches", "area"), ("faint", "energy")):
            if (penalty := getattr(self, name).inverter.search.penalty) != wanted:
                raise ValueError(f'expected {name} to search with penalty "{wanted}"; got "{penalty}"')

    def inspect(
        self,
        view: DefenderView,
        *,
        generator: Generator,
        deadline: Deadline | None = None,
        on_progress: OnProgress | None = None,
    ) -> Verdict:
        """Return a verdict with evidence for every label; see ``Detector``. With few classes: as ``mask_area``.

        ``deadline`` ends the searches. Triggers of accused labels are spread out only if that will probably end in time as well.
        """
        require_usable(view.clean)
        with CostMeter(view.model, clean_images=len(view.clean)) as meter:
            check = check_task(view.model, view.clean)
            verdict = unsearched(check, view.clean, meter.cost, -math.log10(self.false_alarm_rate))
            if verdict is None:
                require_gradient(check)
                verdict = self._examine(view, check, meter, generator, deadline, on_progress)
        return replace(verdict, cost=meter.cost)

    def _examine(
        self,
        view: DefenderView,
        check: TaskCheck,
        meter: CostMeter,
        generator: Generator,
        deadline: Deadline | None,
        on_progress: OnProgress | None,
    ) -> Verdict:
        """Look, search and weigh a model that does its task."""
        held_out, search_set = split(view.clean, self.patches.holdout, generator=fork(generator, "holdout"))
        norms = self._first_look(view, on_progress)
        looks: list[Look] = []
        for detector in (self.patches, self.faint):
            if looks and (looks[-1].suspects or (deadline is not None and deadline.left <= 0)):
                break
            until = None if deadline is None else deadline.part(TIME_SHARES[detector.inverter.search.penalty])
            looks.append(self._search(detector, view, search_set, held_out, norms, generator, on_progress, until))
        outcome, basis = self._judge(looks, norms is not None, view.clean)
        outcome, notes = held_back(outcome, check, view.clean)
        named = looks[-1].suspects
        soaked = [e for e in looks[-1].evidence if e.label in named and soaks_up(e, looks[-1].evidence)]
        if outcome == "backdoored" and soaked:
            outcome, notes = "cannot tell", (*notes, soaked_note(soaked[0], check, view.clean))
        is_late = deadline is not None and not may_spread(looks[-1], meter.cost, deadline)
        triggers = self._recover(view.model, looks, search_set, held_out, generator, on_progress, is_late)
        by_label = {trigger.target_label: trigger for trigger in triggers if named}
        weighed = [with_entropy(e, by_label) for look in looks for e in look.evidence]
        smallest = min(e.p_value for e in weighed)
        return Verdict(
            outcome=outcome,
            suspect_labels=named,
            score=-math.log10(max(smallest, 1e-300)) + 0.0,  # no negative zero
            threshold=-math.log10(self.false_alarm_rate),
            basis=basis,
            evidence=(*(figure for e in weighed for figure in e.evidence()), *latent_evidence(norms)),
            triggers=tuple(triggers),
            cost=meter.cost,
            clean_accuracy=check.accuracy.value,
            notes=notes,
        )

    def _first_look(self, view: DefenderView, on_progress: OnProgress | None) -> Tensor | None:
        """Return the latent norms, or None where they are not wanted or cannot be had."""
        norms = latent_norms(view.model, view.clean) if self.first_look else None
        if on_progress is not None:
            on_progress(Progress(stage="first look", done=1, total=1))
        return norms

    def _search(
        self,
        detector: SizeSearch,
        view: DefenderView,
        search_set: ImageSet,
        held_out: ImageSet,
        norms: Tensor | None,
        generator: Generator,
        on_progress: OnProgress | None,
        deadline: Deadline | None = None,
    ) -> Look:
        """Run one search, and say whom it accuses."""
        penalty = detector.inverter.search.penalty
        ranking = () if norms is None else norms.argsort(stable=True).tolist()
        found, evidence = detector.weigh(
            view,
            search_set,
            held_out,
            generator=fork(generator, penalty),
            protected=ranking[:PROTECTED],
            order=ranking,
            deadline=deadline,
            on_progress=on_progress,
        )
        weights, odd = error_weights(norms, len(evidence)), oddities(norms, len(evidence))
        corrected = tuple(
            replace(
                e,
                p_value=min(1.0, SEARCHES * e.p_value / weight) / (ODD_FACTOR if chance <= ODD_RATE else 1.0),
            )
            for e, weight, chance in zip(evidence, weights, odd, strict=True)
        )
        trouble = detector.too_little(corrected, view.clean)
        suspects, doubtful = (
            ((), ())
            if trouble is not None
            else outliers(
                usable_labels(corrected),
                false_alarm_rate=self.false_alarm_rate,
                doubt_rate=self.doubt_rate,
                suspect_ratio=detector.suspect_ratio,
                doubt_ratio=detector.doubt_ratio,
            )
        )
        return Look(
            detector=detector,
            found=found,
            evidence=corrected,
            suspects=suspects,
            doubtful=doubtful,
            trouble=trouble,
            odd=tuple(e.label for e, chance in zip(evidence, odd, strict=True) if chance <= ODD_RATE),
        )

    def _judge(self, looks: Sequence[Look], weighted: bool, clean: ImageSet) -> tuple[Answer, str]:
        """Return (outcome, basis)."""
        nulls = " and ".join(NULLS[look.kind] for look in looks)
        spent = " and weighted by a first look at the last layer" if weighted else ""
        count = len(looks[0].evidence)
        basis = (
            f"Null hypothesis: {nulls}. Each p-value is corrected for {count} labels and {SEARCHES} searches{spent}. "
        )
        basis += " ".join(
            look.trouble or f"{smallest_of(look.evidence)}, least p = {least(look).p_value:.2g}."
            for look in looks
            if not all(e.left_out for e in look.evidence)
        )
        if missing := unsearched_sentence(looks, clean):
            basis = f"{basis.rstrip()} {missing}"
        if looks[-1].suspects:
            return "backdoored", (
                f"{basis} That is {SHOWN[looks[-1].kind]}: a model is called backdoored below p = {self.false_alarm_rate}, and a "
                f"benign one falls below that at most that often.{TWO_DOUBTS if looks[-1].odd else ''}"
            )
        if any(look.doubtful for look in looks):
            return "cannot tell", (
                f"{basis} Too unusual to pass (p below {self.doubt_rate}), not enough to accuse (p above "
                f"{self.false_alarm_rate}). More clean images or more search steps may settle it."
            )
        if missing:
            return "cannot tell", f"{basis} So the model is not called clean; more time may tell."
        if any(look.trouble for look in looks):
            return "cannot tell", basis
        return "clean", f"{basis} No label is reached with an unusually small mask or faint change."

    def _recover(
        self,
        model: nn.Module,
        looks: Sequence[Look],
        search_set: ImageSet,
        held_out: ImageSet,
        generator: Generator,
        on_progress: OnProgress | None,
        is_late: bool = False,
    ) -> list[RecoveredTrigger]:
        """Return the triggers of the accused labels, spread out; of a model that is not accused, the oddest mask as it is.

        Where it is late, the masks of the accused labels are returned as they are too.
        """
        accusing = looks[-1]
        if accusing.suspects and is_late:
            return [as_found(accusing, label) for label in accusing.suspects]
        if accusing.suspects:
            return accusing.detector.inverter.fit_generators(
                model,
                search_set,
                accusing.suspects,
                accusing.found.of(accusing.suspects),
                held_out=held_out,
                generator=fork(generator, "spread"),
                on_progress=on_progress,
            )
        look = min(looks, key=lambda each: least(each).p_value)
        return [as_found(look, least(look).label)]


def may_spread(look: Look, cost: Cost, deadline: Deadline) -> bool:
    """Say whether there is time to spread out the triggers of the accused labels, at the pace of the scan so far."""
    inverter, left = look.detector.inverter, deadline.left
    passes = PLACES_TOO * inverter.steps * inverter.batch_size * len(inverter.levels) * len(look.suspects)
    return left > 0 and left * cost.image_passes >= passes * cost.seconds


def as_found(look: Look, label: int) -> RecoveredTrigger:
    """Return the mask and pattern of a label as the search left them, as a trigger with one sample."""
    entry, found = next(e for e in look.evidence if e.label == label), look.found.of([label])
    return RecoveredTrigger(
        target_label=label,
        masks=found.masks,
        patterns=found.patterns,
        area=float(found.areas[0]),
        attack_success_rate=0.0 if math.isnan(entry.attack_success_rate) else entry.attack_success_rate,
        entropy=0.0,
        kind=look.detector.inverter.kind,
    )


def unsearched_sentence(looks: Sequence[Look], clean: ImageSet) -> str:
    """Name the labels for which there was no time, by search; empty where all were searched, or need not be."""
    parts = []
    for look in looks:
        labels = [e.label for e in look.evidence if e.left_out]
        if labels:
            parts.append(f"{SOUGHT[look.kind]} of {class_list(labels, clean)}")
    if len(looks) < SEARCHES and not looks[-1].suspects:
        parts.append(f"{SOUGHT['energy']} of all classes")
    if not parts:
        return ""
    return f"The time was up before everything was searched; not searched: {', and '.join(parts)}."


def class_list(labels: Sequence[int], clean: ImageSet) -> str:
    """Return the names of labels in a row, the first ``MOST_NAMED`` of them; "all classes" where they are that."""
    if len(labels) == clean.num_classes:
        return "all classes"
    names = [clean.class_names[label] if clean.class_names else str(label) for label in labels[:MOST_NAMED]]
    more = f" and {len(labels) - MOST_NAMED} more" if len(labels) > MOST_NAMED else ""
    return f"{len(labels)} classes ({', '.join(names)}{more})"


def least(look: Look) -> SearchedLabel:
    """Return the label that a search finds oddest."""
    label = most_suspicious(look.evidence)
    return next(e for e in look.evidence if e.label == label)


def latent_evidence(norms: Tensor | None) -> tuple[Evidence, ...]:
    """Return the first look's figures: each label's norm over the median one."""
    if norms is None:
        return ()
    middle = float(norms.quantile(0.5).clamp_min(1e-12))
    return tuple(Evidence(label=k, measure=LATENT_NORM, value=norm / middle) for k, norm in enumerate(norms.tolist()))
