"""One search over all labels, and what each label needs: what a detector that rests on sizes is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Generator

from lustral.core.cost import Deadline
from lustral.core.records import OnProgress
from lustral.vision.detectors.weighing import (
    LEAST_LABELS,
    SearchedLabel,
    median_size,
    searched_to_the_end,
    usable_labels,
    weigh_labels,
)
from lustral.vision.images import check_holdout
from lustral.vision.inverters.mask_search import FoundMasks
from lustral.vision.inverters.max_entropy import MaxEntropy
from lustral.vision.records import DefenderView, ImageSet


@dataclass(frozen=True, kw_only=True)
class SizeSearch:
    """Search the least change that sends images to each label, and weigh the labels against each other.

    Attributes:
        inverter: searches the masks, and spreads out the triggers of the suspect labels.
        least_success: success on held-out images below which a search counts as failed.
        suspect_ratio: a suspect's size is at most this share of the typical one; a statistical oddity alone is no backdoor.
        doubt_ratio: an odd size between ``suspect_ratio`` and this share is a doubt; above it, nothing.
        small_share: share of the image; when the median label's mask needs less, every label is suspiciously easy to reach.
        holdout: share of the clean images kept from the search to measure success on.
    """

    version: ClassVar[int] = 1

    inverter: MaxEntropy = field(default_factory=MaxEntropy)
    least_success: float = 0.75
    suspect_ratio: float = 0.4
    doubt_ratio: float = 0.6
    small_share: float = 0.006
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_holdout(self.holdout)

    def weigh(
        self,
        view: DefenderView,
        search_set: ImageSet,
        held_out: ImageSet,
        *,
        generator: Generator,
        protected: Sequence[int] = (),
        order: Sequence[int] = (),
        deadline: Deadline | None = None,
        on_progress: OnProgress | None,
    ) -> tuple[FoundMasks, list[SearchedLabel]]:
        """Search every label, those in ``protected`` to the end, and weigh what was found on held-out images.

        With a deadline, the labels that are last in ``order`` are left out where the time is short; see ``MaskSearch.run``.
        """
        found = self.inverter.search.run(
            view.model,
            search_set,
            range(view.clean.num_classes),
            generator=generator,
            protected=protected,
            order=order,
            deadline=deadline,
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
