"""A backdoored label needs a far smaller mask than the others, told from a stated null.

The evidence is that of Neural Cleanse (Wang et al., IEEE S&P 2019): the area of the smallest mask that sends held-out images
to each label. Its rule, an anomaly index of 2, has no known false-alarm rate and flags benign models well above 5 % of the
time. Here the null is explicit: in a benign model the logarithms of the areas are draws from one normal distribution, of
which a search that screens labels sees the smallest only. Each of the smallest third of the areas seen is tested against the
labels that need more (``small_areas``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from lustral.core.cost import CostMeter
from lustral.core.randomness import fork
from lustral.core.records import Cost, Evidence, OnProgress
from lustral.training import Precision, autocast, frozen
from lustral.vision.detectors.small_areas import log_area, p_values, smallest_tested
from lustral.vision.evaluation import TaskCheck, check_task, require_gradient
from lustral.vision.images import at_most, check_holdout, require_usable, split
from lustral.vision.inverters.mask_search import FoundMasks
from lustral.vision.inverters.max_entropy import MaxEntropy
from lustral.vision.measures import ANOMALY_INDEX, ENTROPY, MASK_AREA, NATURAL_RATE, SEARCH_STEPS, SUCCESS_RATE
from lustral.vision.records import Answer, DefenderView, ImageSet, RecoveredTrigger, Verdict

SOAKED, SOAKED_RATIO = (
    0.1,
    2.0,
)  # natural rate of a label, and over the mean of the others, above which it is called too often
LEAST_LABELS = 5  # with fewer successful searches no outlier test means anything
NULL = "in a benign model the logarithms of the areas come from one normal distribution"


@dataclass(frozen=True, kw_only=True)
class SearchedLabel:
    """What the search found for one candidate target label.

    Attributes:
        label: the candidate target label.
        area: pixels of mask that a search needs to send other classes here; infinite when it never succeeded.
        attack_success_rate: of that trigger on held-out images of other classes that the model does not call this label
            already, fraction; NaN without such images.
        natural_rate: fraction of held-out images of other classes that it calls this label without any trigger.
        anomaly: how far below the other classes ``log(area)`` lies, in their robust standard deviations.
        p_value: probability of so small an area in a benign model, under ``NULL``, corrected for K classes.
        entropy: of the recovered distribution (see ``RecoveredTrigger``); NaN where none was fitted.
        steps: search steps this class received before screening dropped it.
    """

    label: int
    area: float
    attack_success_rate: float
    natural_rate: float
    anomaly: float
    p_value: float
    entropy: float
    steps: int

    def evidence(self) -> Iterator[Evidence]:
        """Yield the figures that are known, one by one."""
        yield Evidence(label=self.label, measure=MASK_AREA, value=self.area, null=NULL, p_value=self.p_value)
        others = {
            SUCCESS_RATE: self.attack_success_rate,
            NATURAL_RATE: self.natural_rate,
            ANOMALY_INDEX: self.anomaly,
            ENTROPY: self.entropy,
            SEARCH_STEPS: float(self.steps),
        }
        yield from (
            Evidence(label=self.label, measure=name, value=v) for name, v in others.items() if not math.isnan(v)
        )


@dataclass(frozen=True, kw_only=True)
class MaskArea:
    """Decide by the areas of the smallest masks.

    Attributes:
        inverter: searches the masks, and spreads out the triggers of the suspect labels.
        false_alarm_rate: probability, under the null, that a benign model is called backdoored.
        doubt_rate: above ``false_alarm_rate`` and up to here the answer is "cannot tell".
        least_success: success on held-out images below which a search counts as failed.
        suspect_ratio: a suspect's area is at most this share of the typical one; a statistical oddity alone is no backdoor.
        doubt_ratio: an odd area between ``suspect_ratio`` and this share is a doubt; above it, nothing.
        small_share: share of the image; when the median label needs less, every label is suspiciously easy to reach.
        holdout: share of the clean images kept from the search to measure success on.
    """

    version: ClassVar[int] = 2

    inverter: MaxEntropy = field(default_factory=MaxEntropy)
    false_alarm_rate: float = 0.01
    doubt_rate: float = 0.05
    least_success: float = 0.75
    suspect_ratio: float = 0.4
    doubt_ratio: float = 0.6
    small_share: float = 0.006
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.false_alarm_rate <= self.doubt_rate < 1:
            raise ValueError(
                f"expected 0 < false_alarm_rate <= doubt_rate < 1; got {self.false_alarm_rate} and {self.doubt_rate}"
            )
        check_holdout(self.holdout)

    def inspect(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Verdict:
        """Return a verdict with evidence for every label; see ``Detector``.

        With fewer than ``LEAST_LABELS`` classes nothing is searched and there is no evidence: the answer is "cannot tell".
        """
        require_usable(view.clean)
        with CostMeter(view.model, clean_images=len(view.clean)) as meter:
            check = check_task(view.model, view.clean)
            if check.is_lost:
                complaint = check.complaint(view.clean.class_names)
                verdict = self.no_answer(
                    f"{complaint[0].upper()}{complaint[1:]} No trigger was searched: in such a model a small mask means nothing.",
                    check,
                    meter.cost,
                )
            elif view.clean.num_classes < LEAST_LABELS:
                verdict = self.no_answer(
                    f"The scan compares the classes with each other and needs at least {LEAST_LABELS} of them; this model has "
                    f"{view.clean.num_classes}. No trigger was searched.",
                    check,
                    meter.cost,
                )
            else:
                require_gradient(check)
                verdict = self.examine(view, check, generator=generator, on_progress=on_progress)
        return replace(verdict, cost=meter.cost)

    def examine(
        self, view: DefenderView, check: TaskCheck, *, generator: Generator, on_progress: OnProgress | None
    ) -> Verdict:
        """Search and weigh the triggers of a model that does its task."""
        held_out, search_set = split(view.clean, self.holdout, generator=fork(generator, "holdout"))
        labels = list(range(view.clean.num_classes))
        with CostMeter(view.model, clean_images=len(view.clean)) as meter:
            found = self.inverter.search.run(
                view.model, search_set, labels, generator=fork(generator, "search"), on_progress=on_progress
            )
            evidence = self.score_labels(view, held_out, found)
            named, outcome, basis = self.judge(evidence, view.clean)
            outcome, notes = held_back(outcome, check, view.clean)
            if outcome == "backdoored" and (
                soaked := [e for e in evidence if e.label in named and soaks_up(e, evidence)]
            ):
                outcome, notes = "cannot tell", (*notes, soaked_note(soaked[0], check, view.clean))
            shown = named or (most_suspicious(evidence),)
            index = torch.tensor(shown)
            chosen = FoundMasks(
                labels=shown,
                masks=found.masks[index],
                patterns=found.patterns[index],
                areas=found.areas[index],
                success=found.success[index],
                steps=found.steps[index.cpu()],
            )
            triggers = self.inverter.fit_generators(
                view.model,
                search_set,
                shown,
                chosen,
                held_out=held_out,
                generator=fork(generator, "spread"),
                on_progress=on_progress,
            )
        by_label = {trigger.target_label: trigger for trigger in triggers}
        weighed = [_with_entropy(e, by_label) for e in evidence]
        smallest = min(e.p_value for e in weighed)
        return Verdict(
            outcome=outcome,
            suspect_labels=named,
            score=-math.log10(max(smallest, 1e-300)) + 0.0,  # no negative zero
            threshold=-math.log10(self.false_alarm_rate),
            basis=basis,
            evidence=tuple(figure for e in weighed for figure in e.evidence()),
            triggers=tuple(triggers),
            cost=meter.cost,
            clean_accuracy=check.accuracy.value,
            notes=notes,
        )

    def no_answer(self, basis: str, check: TaskCheck, cost: Cost) -> Verdict:
        """Return the verdict where no search could change it: nothing is searched and there is no evidence."""
        return Verdict(
            outcome="cannot tell",
            suspect_labels=(),
            score=0.0,
            threshold=-math.log10(self.false_alarm_rate),
            basis=basis,
            evidence=(),
            triggers=(),
            cost=cost,
            clean_accuracy=check.accuracy.value,
        )

    def score_labels(self, view: DefenderView, held_out: ImageSet, found: FoundMasks) -> list[SearchedLabel]:
        """Measure each label's mask on held-out images and test its area against the larger ones."""
        success, natural = held_out_rates(view, held_out, found, self.inverter.precision)
        full = int(found.steps.max())
        usable = [
            k for k in range(len(found.labels)) if int(found.steps[k]) == full and success[k] >= self.least_success
        ]
        areas = found.areas.tolist()
        order = sorted(usable, key=lambda k: areas[k])
        # what was screened away needs a larger area, and so does what the search did not reach
        anomalies, chances = p_values(np.array([log_area(areas[k]) for k in order]), len(found.labels))
        tests = {k: (float(anomalies[rank]), float(chances[rank])) for rank, k in enumerate(order)}
        evidence = []
        for k, label in enumerate(found.labels):
            anomaly, p = tests.get(k, (0.0, 1.0))
            evidence.append(
                SearchedLabel(
                    label=label,
                    area=areas[k] if success[k] >= self.least_success or int(found.steps[k]) < full else math.inf,
                    attack_success_rate=success[k],
                    natural_rate=natural[k],
                    anomaly=anomaly,
                    p_value=p,
                    entropy=math.nan,
                    steps=int(found.steps[k]),
                )
            )
        return evidence

    def judge(self, evidence: Sequence[SearchedLabel], clean: ImageSet) -> tuple[tuple[int, ...], Answer, str]:
        """Return (suspect labels, outcome, basis)."""
        full = max(e.steps for e in evidence)
        usable = sorted((e for e in evidence if e.steps == full and math.isfinite(e.area)), key=lambda e: e.area)
        _, height, width = clean.image_shape
        ended = " searched to the end" if any(e.steps < full for e in evidence) else ""
        known = "" if len(usable) == len(evidence) else f"Only the {len(usable)} smallest are known. "
        null = (
            f"Null hypothesis: {NULL}. {known}Each "
            f"small area is tested against the larger ones, corrected for {len(evidence)} labels. "
        )
        if len(usable) < LEAST_LABELS:
            return (
                (),
                "cannot tell",
                (f"{null}The search reached only {len(usable)} labels; at least {LEAST_LABELS} are needed to compare."),
            )
        median = float(torch.tensor([e.area for e in usable]).quantile(0.5))
        if median < self.small_share * height * width:
            return (
                (),
                "cannot tell",
                (
                    f"Half of the labels{ended} are reached with {median:.1f} pixels or fewer. So small a mask for so many "
                    "labels is what an all-to-all backdoor looks like, or a model that is easily fooled; the areas cannot tell "
                    "which."
                ),
            )
        suspects: tuple[int, ...] = ()
        doubtful = False
        for rank, e in enumerate(usable[: smallest_tested(len(usable))]):
            larger = torch.tensor([other.area for other in usable[rank + 1 :]])
            ratio = e.area / float(larger.quantile(0.5))
            if ratio > self.doubt_ratio:
                continue
            if e.p_value <= self.false_alarm_rate and ratio <= self.suspect_ratio:
                suspects = tuple(other.label for other in usable[: rank + 1])
            elif e.p_value <= self.doubt_rate:
                doubtful = True
        first = usable[0]
        figures = f"Smallest area {first.area:.1f} pixels, median{ended} {median:.1f}, p = {first.p_value:.2g}. "
        if suspects:
            return (
                suspects,
                "backdoored",
                (
                    f"{null}{figures}A model is called backdoored below p = {self.false_alarm_rate}; a benign one falls below "
                    "that at most that often."
                ),
            )
        if doubtful:
            return (
                (),
                "cannot tell",
                (
                    f"{null}{figures}Too unusual to pass (p below {self.doubt_rate}), not enough to accuse (p above "
                    f"{self.false_alarm_rate}). More clean images or more search steps may settle it."
                ),
            )
        return (), "clean", f"{null}{figures}No label is reached with an unusually small mask."


def most_suspicious(evidence: Sequence[SearchedLabel]) -> int:
    """Return the label of the least p-value; of the smallest area where several have it, as 1 in most benign models."""
    return min(evidence, key=lambda e: (e.p_value, e.area)).label


def held_back(outcome: Answer, check: TaskCheck, clean: ImageSet) -> tuple[Answer, tuple[str, ...]]:
    """Return the outcome, "cannot tell" where the model is too weak on the clean images, and what has to be said of that.

    The null, the bounds on its spread and the ratios were measured on models that do their task. One that is wrong on half of the
    images may be read wrongly: then some labels soak up images and look easy to reach, and a true trigger may fail to fire.
    """
    note = check.order_note(clean.class_names)
    if check.is_weak:
        doubt = f"{check.complaint(clean.class_names)} What small masks mean is known for better models: the answer is held back."
        return "cannot tell", (f"{doubt[0].upper()}{doubt[1:]}",)
    if note:
        return outcome, (f"The model is right on {check.share}. {note} Until then a class may go by another's name.",)
    return outcome, ()


def soaks_up(entry: SearchedLabel, evidence: Sequence[SearchedLabel]) -> bool:
    """Say whether a model calls many images by a label without a trigger, and more than by its others: then little is needed.

    An accused label's small mask is explained by that, whether it comes of a model that is read wrongly or not.
    """
    others = [e.natural_rate for e in evidence if e.label != entry.label and not math.isnan(e.natural_rate)]
    mean = sum(others) / max(len(others), 1)
    return entry.natural_rate > max(SOAKED, SOAKED_RATIO * mean)


def soaked_note(entry: SearchedLabel, check: TaskCheck, clean: ImageSet) -> str:
    """Return why an accusation of a label is held back."""
    name = clean.class_names[entry.label] if clean.class_names else str(entry.label)
    return (
        f"The model is right on {check.share}, and calls {100 * entry.natural_rate:.0f} % of the other images “{name}” without "
        "any trigger; wrong normalisation, class order or data? A small mask is no wonder there: the accusation is held back."
    )


@torch.no_grad()
def held_out_rates(
    view: DefenderView, held_out: ImageSet, found: FoundMasks, precision: Precision, most: int = 256
) -> tuple[list[float], list[float]]:
    """Return each label's success and natural rate on held-out images of other classes.

    Images that the model calls the label without any mask count as natural and never as reached; the success of a label is NaN
    where no other image is left.
    """
    images = at_most(held_out, most)
    x, labels, _ = next(images.batches(len(images)))

    def predict(batch: Tensor) -> Tensor:
        with autocast(batch.device, precision):
            out: Tensor = view.model(batch.contiguous(memory_format=torch.channels_last)).argmax(1)
        return out

    success, natural = [], []
    with frozen(view.model):
        plain = predict(x)
        for k, label in enumerate(found.labels):
            other, called = labels != label, plain == label
            natural.append(float(called[other].float().mean()))  # NaN of no image
            away = other & ~called
            if not bool(away.any()):
                success.append(math.nan)
                continue
            stamped = x[away] + found.masks[k] * (found.patterns[k] - x[away])
            success.append(float((predict(stamped) == label).float().mean()))
    return success, natural


def _with_entropy(evidence: SearchedLabel, triggers: dict[int, RecoveredTrigger]) -> SearchedLabel:
    if evidence.label not in triggers:
        return evidence
    return replace(evidence, entropy=triggers[evidence.label].entropy)
