"""Is the smallest area too small, when only the smaller areas of all labels are known?

The null: the logarithms of the areas of K labels are draws from one normal distribution. A search that screens labels sees
only the k smallest of them; the others are larger, and that is all that is known of them (type II censoring). Mean and
spread are estimated from the order statistics that were seen (Gupta, Biometrika 1952, the simplified linear estimates),
and the area in question is compared with the rest through

    P(x <= mean - t spread) = E over spread of Phi((intercept + (slope - t) spread) / sqrt(1 + variance)),

with the joint law of both estimates matched to their simulated moments, spread as a scaled chi. With every area seen these
are the usual mean and standard deviation, and the formula is Student's prediction interval exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

Array = NDArray[np.float64]

LEAST_SPREAD = 0.15  # of log areas: two searches for one label differ by about this much
MOST_SPREAD = 0.6  # of log areas: benign models measured 0.2 (CIFAR-10) to 0.45 (digits); labels that are hard to reach
# make a long right tail, which says nothing about a small area and must not hide it
LEAST_LARGER = 3  # larger areas to compare with
SIMULATED = 8192  # samples behind the moments; their error moves a p-value of 1 % by a few per cent of itself


@dataclass(frozen=True, kw_only=True)
class EstimateLaw:
    """How mean and spread, estimated from the smallest of a standard normal sample, are distributed.

    Attributes:
        dof: degrees of freedom of the chi that the spread is like.
        scale: the spread is ``scale`` times sqrt(chi-square / dof).
        intercept, slope, variance: mean = intercept + slope * spread + an independent normal error of this variance.
        known_variance: of the mean where the true spread is known.
    """

    dof: float
    scale: float
    intercept: float
    slope: float
    variance: float
    known_variance: float


def normal_scores(seen: int, total: int) -> Array:
    """Return about the expected values of the ``seen`` smallest of ``total`` standard normal draws (Blom 1958), (seen,)."""
    scores: Array = ndtri((np.arange(1, seen + 1) - 0.375) / (total + 0.25))
    return scores


def estimates(ordered: Array, total: int) -> tuple[Array, Array]:
    """Return (mean of those seen, spread of all) from the n smallest of ``total`` values.

    Args:
        ordered: (..., n) sorted upwards along the last axis, n >= 2.
        total: number of values, those not seen included.
    """
    seen = ordered.shape[-1]
    mean = ordered.mean(-1)
    if seen == total:
        return mean, ordered.std(-1, ddof=1)
    centred = normal_scores(seen, total)
    centred = centred - centred.mean()
    return mean, ordered @ (centred / (centred @ centred))


@lru_cache(maxsize=512)
def estimate_law(seen: int, total: int) -> EstimateLaw:
    """Return the law of the estimates from the ``seen`` smallest of ``total`` values; exact where all are seen."""
    if seen == total:
        return EstimateLaw(
            dof=seen - 1, scale=1.0, intercept=0.0, slope=0.0, variance=1 / seen, known_variance=1 / seen
        )
    stream = np.random.default_rng(0)
    # order statistics of a uniform sample are partial sums of exponential draws, so that nothing is sorted
    sums = stream.standard_exponential((SIMULATED, seen)).cumsum(1)
    rest = stream.standard_gamma(total + 1 - seen, (SIMULATED, 1))
    means, spread = estimates(ndtri(sums / (sums[:, -1:] + rest)), total)
    mean = means - spread * normal_scores(seen, total).mean()
    relative = float(spread.var() / spread.mean() ** 2)
    dof = 1 / (2 * relative) + 0.25  # of the chi with this relative variance, up to terms of 1 / dof
    slope = float(np.cov(mean, spread)[0, 1] / spread.var(ddof=1))
    return EstimateLaw(
        dof=dof,
        scale=float(np.sqrt((spread**2).mean())),
        intercept=float((mean - slope * spread).mean()),
        slope=slope,
        variance=float((mean - slope * spread).var()),
        known_variance=float(means.var()),
    )


def below(distance: Array, law: EstimateLaw) -> Array:
    """Return the probability that one more draw lies ``distance`` estimated spreads below the estimated mean, or further."""
    width = 1 / math.sqrt(2 * law.dof)  # of the logarithm of the spread; far below it, the density falls as a power
    logs = np.linspace(-60 / law.dof - 8 * width, 10 * width, 400)
    density = law.dof * (logs - np.expm1(2 * logs) / 2)
    weights = np.exp(density - density.max())
    spread = law.scale * np.exp(logs)
    reach = (law.intercept + (law.slope - distance[..., None]) * spread) / math.sqrt(1 + law.variance)
    chance: Array = ndtr(reach) @ (weights / weights.sum())
    return chance


def smallness(log_areas: Array, rank: int, labels: int) -> tuple[Array, Array]:
    """Test whether the ``rank``-th smallest of ``labels`` log areas is too small to belong with the larger ones.

    The spread is estimated, and bounded: an estimate above ``MOST_SPREAD`` counts as that, and with ``LEAST_SPREAD`` known
    the area must be unlikely too.

    Args:
        log_areas: (..., k) finite, sorted upwards along the last axis; any number of models at once.
        rank: 0 is the smallest.
        labels: K >= k; the labels not seen need larger areas.

    Returns:
        (anomaly, p): (...) each. The distance below the mean of the larger ones in their spreads; and the one-sided
        probability of that under the null, corrected for K labels and rank + 1 ranks looked at.
    """
    larger, value = log_areas[..., rank + 1 :], log_areas[..., rank]
    seen, total = larger.shape[-1], labels - rank - 1
    if total < seen:
        raise ValueError(f"expected at least as many labels as areas; got {labels} and {log_areas.shape[-1]}")
    if seen < LEAST_LARGER:
        return np.zeros(value.shape), np.ones(value.shape)
    middle = 0.0 if seen == total else float(normal_scores(seen, total).mean())
    mean, spread = estimates(larger, total)
    spread = np.maximum(spread, 1e-9)

    def distance(size: Array | float) -> Array:
        return (mean - value) / size - middle

    trials = labels * (rank + 1)
    chance = np.ones(value.shape)
    far = np.maximum(distance(spread), distance(MOST_SPREAD))
    unlikely = (
        trials * ndtr(-far) < 1
    )  # estimating the spread only makes tails heavier: what is likely without needs no closer look
    if unlikely.any():
        law = estimate_law(seen, total)
        narrow = ndtr(-distance(LEAST_SPREAD)[unlikely] / math.sqrt(1 + law.known_variance))
        chance[unlikely] = np.minimum(trials * np.maximum(narrow, below(far[unlikely], law)), 1)
    return distance(spread.clip(LEAST_SPREAD, MOST_SPREAD)), chance


def smallest_tested(seen: int) -> int:
    """Return how many of the smallest of ``seen`` areas are tested: a third, for more can be no exception."""
    return max(seen // 3, 1)


def p_values(log_areas: Array, labels: int) -> tuple[Array, Array]:
    """Test each of the smallest areas against the larger ones; see ``smallness``.

    Returns:
        (anomalies, p), (..., k) each; 0 and 1 for those that are not tested.
    """
    anomalies, chances = np.zeros(log_areas.shape), np.ones(log_areas.shape)
    for rank in range(min(smallest_tested(log_areas.shape[-1]), log_areas.shape[-1])):
        anomalies[..., rank], chances[..., rank] = smallness(log_areas, rank, labels)
    return anomalies, chances


def log_area(area: float) -> float:
    """Return the logarithm of an area in pixels; below a thousandth of a pixel all are alike."""
    return math.log(max(area, 1e-3))


def ordinary_area(areas: Sequence[float], rate: float, labels: int | None = None) -> float:
    """Return the area below which one more label of a benign model falls with probability ``rate``, under the null.

    Args:
        areas: finite areas of at least two ordinary labels, pixels.
        rate: probability in (0, 0.5].
        labels: number of ordinary labels; those whose areas are missing need larger ones. None: none is missing.
    """
    if len(areas) < 2:
        raise ValueError(f"expected the areas of at least two labels to compare with; got {len(areas)}")
    seen, total = len(areas), len(areas) if labels is None else labels
    mean, spread = estimates(np.sort([log_area(area) for area in areas]), total)
    bounded = float(spread.clip(LEAST_SPREAD, MOST_SPREAD))
    middle = 0.0 if seen == total else float(normal_scores(seen, total).mean())
    law = estimate_law(seen, total)
    reach = brentq(lambda t: float(below(np.array(t), law)) - rate, -10.0, 1e4)
    return math.exp(float(mean) - bounded * (middle + float(reach)))
