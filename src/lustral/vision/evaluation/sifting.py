"""How well a sifter finds the poisoned images of a training set; needs the attacker's list of them, so only an evaluator can.

A positive is a poisoned image. Covers carry the trigger with their true label: they are neither positives nor negatives, and
counted apart. A rate of nothing is NaN, never 0 or 1.

Reference:
    Fawcett, An introduction to ROC analysis, Pattern Recognition Letters 2006 (AUROC with ties); Davis and Goadrich, The
    relationship between precision-recall and ROC curves, ICML 2006 (why not to join points of that curve by lines).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lustral.core.rates import Rate
from lustral.vision.evaluation.metrics import json_number

BINS = 60  # of a histogram
RATES = ("tpr", "fpr", "precision", "listed", "covers_listed")


def auroc(scores: Tensor, is_poisoned: Tensor) -> float:
    """Return the chance that a poisoned image scores higher than a clean one, ties counted half; NaN if either kind is missing.

    Args:
        scores: (N,) float; higher is more suspicious, a number that is not finite is the most suspicious of all.
        is_poisoned: (N,) bool.

    >>> auroc(torch.tensor([3.0, 1.0, 1.0, 0.0]), torch.tensor([True, True, False, False]))
    0.875
    """
    scores, is_poisoned = _checked(scores, is_poisoned)
    positives, negatives = scores[is_poisoned], scores[~is_poisoned].sort().values
    if not len(positives) or not len(negatives):
        return math.nan
    below = torch.searchsorted(negatives, positives, right=False)
    not_above = torch.searchsorted(negatives, positives, right=True)
    return float((below + not_above).double().sum() / (2 * len(positives) * len(negatives)))


def auprc(scores: Tensor, is_poisoned: Tensor) -> float:
    """Return the average precision: the precision at each score at which positives are found, weighted by their number.

    Images of one score are listed together. NaN where nothing is poisoned.

    Args:
        scores: as for ``auroc``.
        is_poisoned: (N,) bool.

    >>> round(auprc(torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([True, False, True, False])), 4)
    0.8333
    """
    scores, is_poisoned = _checked(scores, is_poisoned)
    if not bool(is_poisoned.any()):
        return math.nan
    order = scores.argsort(descending=True)
    found = is_poisoned[order].cumsum(0).double()
    ends = torch.ones(len(scores), dtype=torch.bool)  # of runs of one score
    ends[:-1] = scores[order][1:] != scores[order][:-1]
    listed = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    precision, recalled = (found / listed)[ends], found[ends] / found[-1]
    return float((precision * recalled.diff(prepend=torch.zeros(1, dtype=torch.float64))).sum())


@dataclass(frozen=True, kw_only=True)
class SiftingRates:
    """What a list of suspicious images is worth.

    Attributes:
        auroc, auprc: of the scores; NaN where nothing is poisoned.
        tpr: poisoned images that are listed.
        fpr: clean images that are listed.
        precision: listed images that are poisoned; of those that are poisoned or clean.
        listed: all images that are listed, covers too.
        covers_listed: covers that are listed; of nothing where the attack has none.
    """

    version: ClassVar[int] = 1

    auroc: float
    auprc: float
    tpr: Rate
    fpr: Rate
    precision: Rate
    listed: Rate
    covers_listed: Rate

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and TPR; 0 where poisoned images exist and none is listed, NaN where none exists."""
        if not self.tpr.total:
            return math.nan
        return 2 * self.tpr.hits / (self.tpr.hits + self.precision.total + self.tpr.total - self.tpr.hits)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; NaN becomes None."""
        numbers = {"auroc": json_number(self.auroc), "auprc": json_number(self.auprc), "f1": json_number(self.f1)}
        return numbers | {name: getattr(self, name).to_dict() for name in RATES}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> SiftingRates:
        """Return the rates that ``to_dict`` described."""
        area, under = (math.nan if record[name] is None else float(record[name]) for name in ("auroc", "auprc"))
        rates = {name: Rate(hits=record[name]["hits"], total=record[name]["n"]) for name in RATES}
        return cls(auroc=area, auprc=under, **rates)


def sifting_rates(scores: Tensor, flagged: Tensor, is_poisoned: Tensor, is_cover: Tensor | None = None) -> SiftingRates:
    """Hold scores and flags against the attacker's list.

    Args:
        scores: (N,) float; higher is more suspicious.
        flagged: (N,) bool: the images that the sifter lists.
        is_poisoned: (N,) bool.
        is_cover: (N,) bool; None where the attack has no covers.

    Raises:
        ValueError: lengths or dtypes differ.
    """
    scores, is_poisoned = _checked(scores, is_poisoned)
    flagged = _flags(flagged, len(scores))
    covers = torch.zeros_like(is_poisoned) if is_cover is None else _flags(is_cover, len(scores)) & ~is_poisoned
    plain = ~covers
    return SiftingRates(
        auroc=auroc(scores[plain], is_poisoned[plain]),
        auprc=auprc(scores[plain], is_poisoned[plain]),
        tpr=_rate(flagged, is_poisoned),
        fpr=_rate(flagged, plain & ~is_poisoned),
        precision=_rate(is_poisoned, flagged & plain),
        listed=_rate(flagged, torch.ones_like(flagged)),
        covers_listed=_rate(flagged, covers),
    )


def score_histogram(
    scores: Tensor, is_poisoned: Tensor, is_cover: Tensor | None = None, *, bins: int = BINS
) -> dict[str, list[float] | list[int]]:
    """Count the images of each kind in equal parts of the scores' range.

    Returns:
        "edges" (``bins`` + 1 scores), and the counts "clean", "poisoned" and "cover" of each part; "not_finite" has the
        numbers of images of the three kinds whose score is no number.
    """
    scores, is_poisoned = _checked(scores, is_poisoned)
    covers = torch.zeros_like(is_poisoned) if is_cover is None else _flags(is_cover, len(scores)) & ~is_poisoned
    finite = scores.isfinite()
    low, high = (float(scores[finite].min()), float(scores[finite].max())) if bool(finite.any()) else (0.0, 1.0)
    kinds = {"clean": ~is_poisoned & ~covers, "poisoned": is_poisoned, "cover": covers}
    width = (high - low) or 1.0
    places = ((scores - low) / width * bins).nan_to_num(0.0, 0.0, 0.0).long().clamp(0, bins - 1)
    found: dict[str, list[float] | list[int]] = {"edges": [low + width * edge / bins for edge in range(bins + 1)]}
    for name, kind in kinds.items():
        found[name] = torch.bincount(places[kind & finite], minlength=bins).tolist()
    return found | {"not_finite": [int((kind & ~finite).sum()) for kind in kinds.values()]}


def _rate(hits: Tensor, among: Tensor) -> Rate:
    return Rate(hits=int((hits & among).sum()), total=int(among.sum()))


def _flags(flags: Tensor, count: int) -> Tensor:
    if flags.shape != (count,) or flags.dtype != torch.bool:
        raise ValueError(f"expected one bool per score, shape ({count},); got {tuple(flags.shape)} {flags.dtype}")
    return flags.detach().cpu()


def _checked(scores: Tensor, is_poisoned: Tensor) -> tuple[Tensor, Tensor]:
    """Return (scores as float64 on the CPU, what is not finite as infinity; positives)."""
    if scores.ndim != 1:
        raise ValueError(f"expected one score per image, shape (N,); got {tuple(scores.shape)}")
    scores = scores.detach().cpu().double()
    return torch.where(scores.isfinite(), scores, math.inf), _flags(is_poisoned, len(scores))
