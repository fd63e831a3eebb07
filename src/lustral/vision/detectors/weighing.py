"""What searches of masks found, label by label, weighed against each other: shared by the detectors that rest on sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lustral.core.records import Cost, Evidence
from lustral.training import Precision, autocast, frozen
from lustral.vision.detectors.small_areas import log_area, p_values, smallest_tested
from lustral.vision.evaluation import TaskCheck
from lustral.vision.images import at_most
from lustral.vision.inverters.mask_search import FoundMasks, Penalty
from lustral.vision.measures import (
    ANOMALY_INDEX,
    CHANGE_ENERGY,
    ENTROPY,
    MASK_AREA,
    NATURAL_RATE,
    SEARCH_STEPS,
    SUCCESS_RATE,
)
from lustral.vision.records import Answer, DefenderView, ImageSet, RecoveredTrigger, Verdict

SOAKED, SOAKED_RATIO = (
    0.1,
    2.0,
)  # natural rate of a label, and over the mean of the others, above which it is called too often
LEAST_LABELS = 5  # with fewer successful searches no outlier test means anything
NULL = "in a benign model the logarithms of the areas come from one normal distribution"
NULLS = {"area": NULL, "energy": NULL.replace("areas", "energies")}
SIZES = {"area": MASK_AREA, "energy": CHANGE_ENERGY}


@dataclass(frozen=True, kw_only=True)
class SearchedLabel:
    """What the search found for one candidate target label.

    Attributes:
        label: the candidate target label.
        size: of the least change that a search needs to send other classes here: pixels of mask, or of energy; infinite when it
            never succeeded.
        attack_success_rate: of that trigger on held-out images of other classes that the model does not call this label
            already, fraction; NaN without such images.
        natural_rate: fraction of held-out images of other classes that it calls this label without any trigger.
        anomaly: how far below the other classes ``log(size)`` lies, in their robust standard deviations.
        p_value: probability of so small a size in a benign model, under ``NULLS``, corrected for K classes.
        entropy: of the recovered distribution (see ``RecoveredTrigger``); NaN where none was fitted.
        steps: search steps this class received before screening dropped it.
        penalty: what the search made small, "area" or "energy".
        left_out: whether the search had no time for it; its size is then of an unfinished search, and its p-value 1.
    """

    label: int
    size: float
    attack_success_rate: float
    natural_rate: float
    anomaly: float
    p_value: float
    entropy: float
    steps: int
    penalty: Penalty = "area"
    left_out: bool = False

    def evidence(self) -> Iterator[Evidence]:
        """Yield the figures that are known, one by one."""
        yield Evidence(
            label=self.label,
            measure=SIZES[self.penalty],
            value=self.size,
            null=NULLS[self.penalty],
            p_value=self.p_value,
        )
        if self.penalty == "energy":  # its other figures would be taken for those of the mask
            return
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


def weigh_labels(
    view: DefenderView,
    held_out: ImageSet,
    found: FoundMasks,
    *,
    penalty: Penalty,
    least_success: float,
    precision: Precision,
) -> list[SearchedLabel]:
    """Measure each label's mask on held-out images, and test its size against the larger ones.

    Labels for which the search had no time are no part of the sample, but of those that p-values are corrected for.
    """
    success, natural = held_out_rates(view, held_out, found, precision)
    full = int(found.steps.max())
    missing, count = set(found.left_out), len(found.labels)
    usable = [
        k
        for k, label in enumerate(found.labels)
        if int(found.steps[k]) == full and success[k] >= least_success and label not in missing
    ]
    sizes = (found.energies if penalty == "energy" else found.areas).tolist()
    order = sorted(usable, key=lambda k: sizes[k])
    # what was screened away needs a larger size, and so does what the search did not reach
    population = max(count if found.population is None else found.population, len(order), 1)
    anomalies, chances = p_values(np.array([log_area(sizes[k]) for k in order]), population)
    if population < count:  # tested beside each other are all labels
        chances = np.minimum(chances * (count / population), 1)
    tests = {k: (float(anomalies[rank]), float(chances[rank])) for rank, k in enumerate(order)}
    evidence = []
    for k, label in enumerate(found.labels):
        anomaly, p = tests.get(k, (0.0, 1.0))
        evidence.append(
            SearchedLabel(
                label=label,
                size=sizes[k]
                if success[k] >= least_success or int(found.steps[k]) < full or label in missing
                else math.inf,
                attack_success_rate=success[k],
                natural_rate=natural[k],
                anomaly=anomaly,
                p_value=p,
                entropy=math.nan,
                steps=int(found.steps[k]),
                penalty=penalty,
                left_out=label in missing,
            )
        )
    return evidence


def usable_labels(evidence: Sequence[SearchedLabel]) -> list[SearchedLabel]:
    """Return the labels that were searched to the end and reached, smallest first."""
    full = max(e.steps for e in evidence)
    return sorted(
        (e for e in evidence if e.steps == full and math.isfinite(e.size) and not e.left_out), key=lambda e: e.size
    )


def outliers(
    usable: Sequence[SearchedLabel],
    *,
    false_alarm_rate: float,
    doubt_rate: float,
    suspect_ratio: float,
    doubt_ratio: float,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (labels accused, smallest first; labels in doubt) among ``usable_labels``.

    A label is accused with all that need still less: where several are small, the smallest is judged against the others too.
    """
    suspects: tuple[int, ...] = ()
    doubtful: tuple[int, ...] = ()
    for rank, e in enumerate(usable[: smallest_tested(len(usable))]):
        larger = torch.tensor([other.size for other in usable[rank + 1 :]])
        ratio = e.size / float(larger.quantile(0.5))
        if ratio > doubt_ratio:
            continue
        if e.p_value <= false_alarm_rate and ratio <= suspect_ratio:
            suspects = tuple(other.label for other in usable[: rank + 1])
        elif e.p_value <= doubt_rate:
            doubtful = (*doubtful, e.label)
    return suspects, doubtful


def median_size(usable: Sequence[SearchedLabel]) -> float:
    """Return the median size of labels that were reached."""
    return float(torch.tensor([e.size for e in usable]).quantile(0.5))


def searched_to_the_end(evidence: Sequence[SearchedLabel]) -> str:
    """Return the words that limit a statement to the labels that screening left; none where it left all."""
    return " searched to the end" if any(e.steps < max(o.steps for o in evidence) for e in evidence) else ""


def smallest_of(evidence: Sequence[SearchedLabel]) -> str:
    """Return the smallest size and the median in words; at least one label was reached."""
    usable, noun = usable_labels(evidence), evidence[0].penalty
    digits = 1 if noun == "area" else 2
    return (
        f"Smallest {noun} {usable[0].size:.{digits}f} pixels, median{searched_to_the_end(evidence)} "
        f"{median_size(usable):.{digits}f}"
    )


def unsearched(check: TaskCheck, clean: ImageSet, cost: Cost, threshold: float) -> Verdict | None:
    """Return the verdict, without evidence, on a model where no search could change it; None where one could."""
    if check.is_lost:
        complaint = check.complaint(clean.class_names)
        basis = f"{complaint[0].upper()}{complaint[1:]} No trigger was searched: in such a model a small mask means nothing."
    elif clean.num_classes < LEAST_LABELS:
        basis = (
            f"The scan compares the classes with each other and needs at least {LEAST_LABELS} of them; this model has "
            f"{clean.num_classes}. No trigger was searched."
        )
    else:
        return None
    return Verdict(
        outcome="cannot tell",
        suspect_labels=(),
        score=0.0,
        threshold=threshold,
        basis=basis,
        evidence=(),
        triggers=(),
        cost=cost,
        clean_accuracy=check.accuracy.value,
    )


def most_suspicious(evidence: Sequence[SearchedLabel]) -> int:
    """Return the label of the least p-value; of the smallest area where several have it, as 1 in most benign models."""
    return min(evidence, key=lambda e: (e.p_value, e.size)).label


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


def with_entropy(evidence: SearchedLabel, triggers: dict[int, RecoveredTrigger]) -> SearchedLabel:
    """Return what is known of a label with the entropy of its recovered trigger, where there is one."""
    if evidence.label not in triggers:
        return evidence
    return replace(evidence, entropy=triggers[evidence.label].entropy)
