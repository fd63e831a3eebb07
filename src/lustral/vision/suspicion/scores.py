"""The scores of one method, and what methods that look at one class at a time share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lustral.core.records import Cost
from lustral.vision.records import Sifted
from lustral.vision.suspicion.lines import FALSE_ALARMS, NORMAL_QUARTILE, draw_line
from lustral.vision.suspicion.looking import Looked

LEAST_OF_CLASS = 10  # images from which a class has a shape of its own

Measure = Callable[[Tensor], Tensor]
"""Features (n, D) -> scores (n,), both float32."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one method says of each image.

    Attributes:
        untrusted: (N,) float32, one per untrusted image in the set's order; higher is more suspicious.
        clean: (M,) float32 of the trusted images that the line may be drawn by, or None. Of those the model has learnt: an image
            that it gets wrong looks like no image that it was trained on.
        basis: a sentence: what the scores measure.
        notes: sentences the user should read.
    """

    untrusted: Tensor
    clean: Tensor | None
    basis: str
    notes: tuple[str, ...] = ()

    def sifted(self, cost: Cost, *, false_alarms: float = FALSE_ALARMS) -> Sifted:
        """Draw the line and return the record."""
        line = draw_line(self.untrusted, self.clean, false_alarms=false_alarms)
        return Sifted(
            scores=self.untrusted,
            flagged=line.flagged,
            threshold=line.threshold,
            basis=f"{self.basis} {line.sentence}",
            cost=cost,
            notes=self.notes,
        )


def shortest_half(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centre and the standard deviation of the bulk: the middle and the length of the shortest half of the values.

    Unlike the median it stays with the larger of two clusters, whatever the smaller one holds. The length is scaled so that
    normal values give their standard deviation. (Rousseeuw and Leroy, "A robust scale estimator based on the shortest half",
    Statistica Neerlandica 1988.)

    Args:
        values: (n,) float, n >= 1.

    Returns:
        Two scalars; the second is at least a millionth of the largest distance from the first, and 0 for constant values.

    >>> centre, spread = shortest_half(torch.tensor([0.0, 1.0, 2.0, 3.0, 90.0, 95.0]))
    >>> float(centre)
    1.5
    """
    ordered = values.sort().values
    count = (len(values) + 1) // 2 + (len(values) > 2)
    count = min(count, len(values))
    lengths = ordered[count - 1 :] - ordered[: len(values) - count + 1]
    shortest = lengths.min()
    # several halves may be as short: the mean of their middles does not hang on which one comes first
    middles = (ordered[count - 1 :] + ordered[: len(values) - count + 1]) / 2
    centre = middles[lengths == shortest].mean()
    spread = shortest / (2 * NORMAL_QUARTILE)
    return centre, torch.maximum(spread, 1e-6 * (values - centre).abs().max())


def standardise(values: Tensor, centre: Tensor, spread: Tensor) -> Tensor:
    """Return distances from the centre in standard deviations, signed; 0 where there is no spread."""
    return (values - centre) / spread if float(spread) > 0 else torch.zeros_like(values)


def score_by_class(
    untrusted: Looked, clean: Looked | None, fit: Callable[[Tensor], Measure]
) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    """Score images by a measure that is fitted to the untrusted images of their class.

    Args:
        untrusted: what the measures are fitted to.
        clean: trusted images, seen by the same model, or None.
        fit: makes a measure from the features of one class; the scores of all classes should have one scale.

    Returns:
        ((N,) scores, scores of the clean images that the model gets right and whose class was measured, notes). Images of a
        class of fewer than ``LEAST_OF_CLASS`` get the median of all others.
    """
    scores = torch.full((len(untrusted),), torch.nan)
    of_clean = None if clean is None else torch.full((len(clean),), torch.nan)
    small = 0
    for label in range(untrusted.num_classes):
        members = (untrusted.labels == label).nonzero().flatten()
        if len(members) < LEAST_OF_CLASS:
            small += len(members)
            continue
        features = untrusted.features[members]
        measure = fit(features)
        scores[members] = measure(features)
        if clean is not None and of_clean is not None:
            own = ((clean.labels == label) & clean.is_right).nonzero().flatten()
            of_clean[own] = measure(clean.features[own])
    known = scores[~scores.isnan()]
    neutral = float(known.median()) if len(known) else 0.0
    scores = torch.where(scores.isnan(), torch.tensor(neutral), scores)
    few = f"{small} images are in classes of fewer than {LEAST_OF_CLASS}: this method says nothing of them."
    return scores, None if of_clean is None else of_clean[~of_clean.isnan()], (few,) if small else ()
