"""Where the line between suspicious and other images is drawn, without knowing how many are poisoned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

FALSE_ALARMS = 0.005  # share of clean images above the line
IN_POISONED_CLASSES = 0.02  # the same of a class that is shown to be poisoned
POISONED_CLASS = (
    0.05  # share of a class above the line from which that is shown: ten times what clean images would have there
)
LEAST_CLEAN = 100  # clean images from which a line is drawn by them
NORMAL_QUARTILE = NormalDist().inv_cdf(0.75)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line and what it lists.

    Attributes:
        threshold: the score from which an image is listed; infinite where none is.
        flagged: (N,) bool.
        sentence: which rule drew it, with its rate of false alarms.
    """

    threshold: float
    flagged: Tensor
    sentence: str


def draw_line(scores: Tensor, clean_scores: Tensor | None = None, *, false_alarms: float = FALSE_ALARMS) -> Line:
    """Draw the line by clean images where there are enough, else by the bulk of the scores.

    Above it lie ``false_alarms`` of a clean set. Where less than twice that many images of the untrusted set do, chance explains
    them: none is listed, so that a clean set comes out as clean.

    Args:
        scores: (N,) float32 of the untrusted images; higher is more suspicious.
        clean_scores: (M,) float32 of trusted images, which the score was not fitted to; None: there are none.
        false_alarms: share of clean images above the line.
    """
    if not 0 < false_alarms < 0.5:
        raise ValueError(f"expected a rate of false alarms in (0, 0.5); got {false_alarms}")
    if clean_scores is not None and enough_clean(clean_scores):
        threshold, rule = line_by_clean(clean_scores, false_alarms), f"{len(clean_scores):,} clean images"
    else:
        threshold, rule = line_by_bulk(scores, false_alarms), "the lower half of the scores, mirrored"
    above = scores > threshold
    share = float(above.float().mean()) if len(scores) else 0.0
    said = f"The line was drawn by {rule}: {100 * false_alarms:g} % of clean images lie above it."
    if share <= 2 * false_alarms:
        none = torch.zeros_like(above)
        return Line(
            threshold=math.inf,
            flagged=none,
            sentence=f"{said} Of these {100 * share:.2f} % do, which chance explains: none is listed.",
        )
    return Line(threshold=threshold, flagged=above, sentence=said)


def enough_clean(clean_scores: Tensor | None) -> bool:
    """Say whether there are enough scores of clean images to draw a line by."""
    return clean_scores is not None and len(clean_scores) >= LEAST_CLEAN


def line_by_clean(clean_scores: Tensor, false_alarms: float) -> float:
    """Return the score that a new clean image exceeds with a probability of at most ``false_alarms``, if M allows.

    The conformal rank: the ceil((M + 1)(1 - rate))-th smallest of M scores; the largest where M is too small for the rate.

    >>> line_by_clean(torch.arange(1.0, 200.0), 0.01)
    198.0
    """
    rank = min(math.ceil((len(clean_scores) + 1) * (1 - false_alarms)), len(clean_scores))
    return float(clean_scores.sort().values[rank - 1])


def line_by_bulk(scores: Tensor, false_alarms: float) -> float:
    """Return the normal quantile of a bulk whose spread is that of the scores' lower half.

    The median and the lower quartile move little while most images are clean, however many of the rest are poisoned.
    Scores should be near symmetric without poison: take the logarithm of distances.
    """
    median, quartile = (float(torch.quantile(scores.float(), q)) for q in (0.5, 0.25))
    return median + NormalDist().inv_cdf(1 - false_alarms) * (median - quartile) / NORMAL_QUARTILE


def poisoned_classes(flagged: Tensor, labels: Tensor) -> Tensor:
    """Return the classes, ascending, of which more than ``POISONED_CLASS`` of the images are listed.

    >>> poisoned_classes(torch.tensor([True, False, False, False]), torch.tensor([2, 2, 0, 0]))
    tensor([2])
    """
    sizes = torch.bincount(labels)
    listed = torch.bincount(labels, weights=flagged.double(), minlength=len(sizes))
    return (listed > POISONED_CLASS * sizes).nonzero().flatten()
