"""A backdoored label needs a far smaller mask than the others, told from a stated null.

The evidence is that of Neural Cleanse (Wang et al., IEEE S&P 2019): the area of the smallest mask that sends held-out images
to each label. Its rule, an anomaly index of 2, has no known false-alarm rate and flags benign models well above 5 % of the
time. Here the null is explicit: in a benign model the logarithms of the areas are draws from one normal distribution, of
which a search that screens labels sees the smallest only. Each of the smallest third of the areas seen is tested against the
labels that need more (``small_areas``). With ``MaskSearch(penalty="energy")`` the same is done for the energy of the change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Generator

from lustral.core.cost import CostMeter
from lustral.core.randomness import fork
from lustral.core.records import OnProgress
from lustral.vision.detectors.weighing import (
    LEAST_LABELS,
    NULLS,
    SearchedLabel,
    held_back,
    median_size,
    most_suspicious,
    outliers,
    searched_to_the_end,
    smallest_of,
    soaked_note,
    soaks_up,
    unsearched,
    usable_labels,
    weigh_labels,
    with_entropy,
)
from lustral.vision.evaluation import TaskCheck, check_task, require_gradient
from lustral.vision.images import check_holdout, require_usable, split
from lustral.vision.inverters.mask_search import FoundMasks
from lustral.vision.inverters.max_entropy import MaxEntropy
from lustral.vision.records import Answer, DefenderView, ImageSet, Verdict


@dataclass(frozen=True, kw_only=True)
class MaskArea:
    """Decide by the areas of the smallest masks.

    Attributes:
        inverter: searches the masks, and spreads out the triggers of the suspect labels.
        false_alarm_rate: probability, under the null, that a benign model is called backdoored.
        doubt_rate: above ``false_alarm_rate`` and up to here the answer is "cannot tell".
        least_success: success on held-out images below which a search counts as failed.
        suspect_ratio: a suspect's size is at most this share of the typical one; a statistical oddity alone is no backdoor.
        doubt_ratio: an odd size between ``suspect_ratio`` and this share is a doubt; above it, nothing.
        small_share: share of the image; when the median label needs less, every label is suspiciously easy to reach.
        holdout: share of the clean images kept from the search to measure success on.
    """

    version: ClassVar[int] = 3

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
            verdict = unsearched(check, view.clean, meter.cost, -math.log10(self.false_alarm_rate))
            if verdict is None:
                require_gradient(check)
                verdict = self.examine(view, check, generator=generator, on_progress=on_progress)
        return replace(verdict, cost=meter.cost)

    def examine(
        self, view: DefenderView, check: TaskCheck, *, generator: Generator, on_progress: OnProgress | None
    ) -> Verdict:
        """Search and weigh the triggers of a model that does its task."""
        held_out, search_set = split(view.clean, self.holdout, generator=fork(generator, "holdout"))
        with CostMeter(view.model, clean_images=len(view.clean)) as meter:
            found, evidence = self.weigh(
                view, search_set, held_out, generator=fork(generator, "search"), on_progress=on_progress
            )
            named, outcome, basis = self.judge(evidence, view.clean)
            outcome, notes = held_back(outcome, check, view.clean)
            if outcome == "backdoored" and (
                soaked := [e for e in evidence if e.label in named and soaks_up(e, evidence)]
            ):
                outcome, notes = "cannot tell", (*notes, soaked_note(soaked[0], check, view.clean))
            shown = named or (most_suspicious(evidence),)
            triggers = self.inverter.fit_generators(
                view.model,
                search_set,
                shown,
                found.of(shown),
                held_out=held_out,
                generator=fork(generator, "spread"),
                on_progress=on_progress,
            )
        by_label = {trigger.target_label: trigger for trigger in triggers}
        weighed = [with_entropy(e, by_label) for e in evidence]
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

    def weigh(
        self,
        view: DefenderView,
        search_set: ImageSet,
        held_out: ImageSet,
        *,
        generator: Generator,
        protected: Sequence[int] = (),
        on_progress: OnProgress | None,
    ) -> tuple[FoundMasks, list[SearchedLabel]]:
        """Search every label, those in ``protected`` to the end, and weigh what was found on held-out images."""
        found = self.inverter.search.run(
            view.model,
            search_set,
            range(view.clean.num_classes),
            generator=generator,
            protected=protected,
            on_progress=on_progress,
        )
        return found, self.score_labels(view, held_out, found)

    def score_labels(self, view: DefenderView, held_out: ImageSet, found: FoundMasks) -> list[SearchedLabel]:
        """Measure each label's mask on held-out images and test its size against the larger ones."""
        return weigh_labels(
            view,
            held_out,
            found,
            penalty=self.inverter.search.penalty,
            least_success=self.least_success,
            precision=self.inverter.precision,
        )

    def too_little(self, evidence: Sequence[SearchedLabel], clean: ImageSet) -> str | None:
        """Return why the sizes cannot be compared, as a sentence or two; None where they can."""
        usable = usable_labels(evidence)
        if len(usable) < LEAST_LABELS:
            return f"The search reached only {len(usable)} labels; at least {LEAST_LABELS} are needed to compare."
        _, height, width = clean.image_shape
        median = median_size(usable)
        if evidence[0].penalty == "area" and median < self.small_share * height * width:
            return (
                f"Half of the labels{searched_to_the_end(evidence)} are reached with {median:.1f} pixels or fewer. So small a "
                "mask for so many labels is what an all-to-all backdoor looks like, or a model that is easily fooled; the areas "
                "cannot tell which."
            )
        return None

    def judge(self, evidence: Sequence[SearchedLabel], clean: ImageSet) -> tuple[tuple[int, ...], Answer, str]:
        """Return (suspect labels, outcome, basis)."""
        usable = usable_labels(evidence)
        noun = evidence[0].penalty
        known = "" if len(usable) == len(evidence) else f"Only the {len(usable)} smallest are known. "
        null = (
            f"Null hypothesis: {NULLS[noun]}. {known}Each "
            f"small {noun} is tested against the larger ones, corrected for {len(evidence)} labels. "
        )
        if (trouble := self.too_little(evidence, clean)) is not None:
            return (), "cannot tell", trouble if len(usable) >= LEAST_LABELS else f"{null}{trouble}"
        suspects, doubtful = outliers(
            usable,
            false_alarm_rate=self.false_alarm_rate,
            doubt_rate=self.doubt_rate,
            suspect_ratio=self.suspect_ratio,
            doubt_ratio=self.doubt_ratio,
        )
        figures = f"{null}{smallest_of(evidence)}, p = {usable[0].p_value:.2g}. "
        if suspects:
            return (
                suspects,
                "backdoored",
                f"{figures}A model is called backdoored below p = {self.false_alarm_rate}; a benign one falls below that at most "
                "that often.",
            )
        if doubtful:
            return (
                (),
                "cannot tell",
                f"{figures}Too unusual to pass (p below {self.doubt_rate}), not enough to accuse (p above "
                f"{self.false_alarm_rate}). More clean images or more search steps may settle it.",
            )
        return (
            (),
            "clean",
            f"{figures}No label is reached with an unusually small {'mask' if noun == 'area' else 'change'}.",
        )
