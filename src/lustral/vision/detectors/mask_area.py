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
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Generator

from lustral.core.cost import CostMeter
from lustral.core.randomness import fork
from lustral.core.records import OnProgress
from lustral.vision.detectors.size_search import SizeSearch
from lustral.vision.detectors.weighing import (
    LEAST_LABELS,
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
from lustral.vision.records import Answer, DefenderView, ImageSet, Verdict


@dataclass(frozen=True, kw_only=True)
class MaskArea(SizeSearch):
    """Decide by the areas of the smallest masks.

    Attributes:
        false_alarm_rate: probability, under the null, that a benign model is called backdoored.
        doubt_rate: above ``false_alarm_rate`` and up to here the answer is "cannot tell".
    """

    version: ClassVar[int] = 3

    false_alarm_rate: float = 0.01
    doubt_rate: float = 0.05

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not 0 < self.false_alarm_rate <= self.doubt_rate < 1:
            raise ValueError(
                f"expected 0 < false_alarm_rate <= doubt_rate < 1; got {self.false_alarm_rate} and {self.doubt_rate}"
            )

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
