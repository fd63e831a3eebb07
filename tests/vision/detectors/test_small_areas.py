"""The test of small areas: by hand, beside Student's, and its false-alarm rate on simulated models."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lustral.vision.detectors.small_areas import (
    LEAST_SPREAD,
    MOST_SPREAD,
    below,
    estimate_law,
    estimates,
    log_area,
    ordinary_area,
    p_values,
    smallness,
)
from lustral.vision.inverters.mask_search import MaskSearch

SEEN = MaskSearch().survivors(43) - 1  # of 42 labels that a small one is compared with
MODELS = 40_000  # simulated per case: the standard error of a rate of 1 % is 5 % of it


def areas(*logs: float) -> np.ndarray:
    return np.array(logs)


def benign(labels: int, seed: int, models: int = MODELS) -> np.ndarray:
    """Return the log areas that a scan of benign models ends with: standard normal, the largest screened away."""
    stream = np.random.default_rng(seed)
    return np.sort(stream.standard_normal((models, labels)), 1)[:, : MaskSearch().survivors(labels)]


def with_a_tenth(labels: int, spread: float, models: int = 4000) -> np.ndarray:
    """The same with one label whose area is a tenth of the typical one."""
    kept = MaskSearch().survivors(labels) - 1
    others = spread * np.sort(np.random.default_rng(7).standard_normal((models, labels - 1)), 1)[:, :kept]
    return np.sort(np.concatenate([np.full((models, 1), -math.log(10)), others], 1), 1)


def test_smallness_by_hand() -> None:
    # larger ones 3, 3.2, ... 3.8: mean 3.4, variance 0.1; the smallest lies 1 below; corrected for six labels
    anomaly, p = smallness(areas(2.4, 3.0, 3.2, 3.4, 3.6, 3.8), 0, 6)
    assert float(anomaly) == pytest.approx(math.sqrt(10))
    assert float(p) == pytest.approx(6 * float(stats.t.sf(math.sqrt(10) / math.sqrt(6 / 5), df=4)))


def test_smallness_of_a_later_rank_leaves_the_smaller_ones_out() -> None:
    anomaly, p = smallness(areas(-9.0, 1.5, 3.0, 3.5, 4.0), 1, 5)
    alone = smallness(areas(1.5, 3.0, 3.5, 4.0), 0, 4)
    assert float(anomaly) == pytest.approx(float(alone[0]))
    assert float(p) == pytest.approx(5 * 2 / 4 * float(alone[1]))  # five labels and two ranks, not four and one


def test_smallness_has_a_least_spread_and_needs_three_others() -> None:
    anomaly, p = smallness(areas(0.0, 1.0, 1.0, 1.0), 0, 4)
    assert float(anomaly) == pytest.approx(1 / LEAST_SPREAD)
    assert float(p) == pytest.approx(4 * float(stats.norm.sf(1 / LEAST_SPREAD / math.sqrt(4 / 3))))
    assert [float(v) for v in smallness(areas(0.0, 5.0, 5.0), 0, 3)] == [0.0, 1.0]
    with pytest.raises(ValueError, match="at least as many labels as areas; got 3 and 4"):
        smallness(areas(0.0, 1.0, 1.0, 1.0), 0, 3)


def test_labels_that_are_hard_to_reach_do_not_hide_a_small_area() -> None:
    tail = np.log([0.6, 16.4, 25.1, 37.7, 75.6, 113.3, 168.0, 207.3])
    anomaly, p = smallness(tail, 0, 8)
    assert float(anomaly) == pytest.approx((tail[1:].mean() - tail[0]) / MOST_SPREAD)
    assert float(p) < 0.002


@pytest.mark.parametrize("seen", [3, 9, 400])
def test_with_every_area_seen_it_is_students_interval(seen: int) -> None:
    distances = np.array([0.0, 1.0, 3.0, 6.0])
    expected = stats.t.sf(distances / math.sqrt(1 + 1 / seen), df=seen - 1)
    assert below(distances, estimate_law(seen, seen)) == pytest.approx(expected, rel=1e-6)


def test_missing_larger_areas_are_accounted_for() -> None:
    stream = np.random.default_rng(2)
    whole = np.sort(5 + 0.4 * stream.standard_normal((20_000, 42)), 1)
    mean, spread = estimates(whole[:, :SEEN], 42)
    assert float(spread.mean()) == pytest.approx(0.4, rel=0.02)
    assert float(whole[:, :SEEN].std(1).mean()) < 0.2  # of those seen alone
    law = estimate_law(SEEN, 42)
    one_more = 5 + 0.4 * stream.standard_normal(20_000)
    centre = mean - spread * float(np.mean(stats.norm.ppf((np.arange(1, SEEN + 1) - 0.375) / 42.25)))
    for distance in (1.0, 2.0, 2.5):
        assert np.mean(one_more < centre - distance * spread) == pytest.approx(
            float(below(np.array(distance), law)), rel=0.15
        )


@pytest.mark.parametrize("labels", [10, 43, 200])
def test_benign_models_are_accused_at_the_stated_rate(labels: int) -> None:
    sample = benign(labels, seed=1)
    for spread in (0.2, 0.3, 0.45, 0.6):
        least = p_values(spread * sample, labels)[1].min(1)
        for rate in (0.01, 0.05):
            found = float((least <= rate).mean())
            assert 0.5 * rate <= found <= 1.5 * rate, (labels, spread, rate, found)


@pytest.mark.parametrize("labels", [10, 43, 200])
def test_a_tenth_of_the_typical_area_is_found(labels: int) -> None:
    least = p_values(with_a_tenth(labels, 0.3), labels)[1].min(1)
    assert float((least <= 0.01).mean()) >= 0.95


def test_a_screening_that_ranks_badly_accuses_no_more() -> None:
    # the areas at half time are only like those at the end: which labels are dropped is then partly chance
    stream = np.random.default_rng(5)
    final = stream.standard_normal((20_000, 43))
    for noise in (0.5, 1.0, 3.0):
        order = (final + noise * stream.standard_normal(final.shape)).argsort(1)
        kept = np.take_along_axis(final, order[:, : MaskSearch().survivors(43)], 1)
        for spread in (0.2, 0.45):
            least = p_values(spread * np.sort(kept, 1), 43)[1].min(1)
            assert float((least <= 0.01).mean()) <= 0.015


def test_only_the_smallest_third_is_tested() -> None:
    anomalies, chances = p_values(areas(*np.linspace(0, 3, 9)), 9)
    assert (chances[3:] == 1).all()
    assert (anomalies[3:] == 0).all()
    assert [v.shape for v in p_values(areas(), 4)] == [(0,), (0,)]


def test_an_ordinary_area_by_hand() -> None:
    # log areas 3, 3.5, 4: mean 3.5, deviation 0.5
    known = [math.exp(v) for v in (3.0, 3.5, 4.0)]
    bound = ordinary_area(known, 0.05)
    assert math.log(bound) == pytest.approx(3.5 - 0.5 * float(stats.t.isf(0.05, df=2)) * math.sqrt(4 / 3))
    assert ordinary_area(known, 0.5) == pytest.approx(math.exp(3.5))
    with pytest.raises(ValueError, match="at least two labels to compare with; got 1"):
        ordinary_area([3.0], 0.05)


def test_an_ordinary_area_knows_of_the_labels_that_are_missing() -> None:
    sample = 0.3 * np.sort(np.random.default_rng(3).standard_normal((400, 42)), 1)[:, :SEEN]
    bounds = [math.log(ordinary_area(np.exp(row).tolist(), 0.05, 42)) for row in sample]
    below_it = float(stats.norm.cdf(np.array(bounds) / 0.3).mean())
    assert below_it == pytest.approx(0.05, abs=0.01)
    taken_for_all = [math.log(ordinary_area(np.exp(row).tolist(), 0.05)) for row in sample]
    assert float(stats.norm.cdf(np.array(taken_for_all) / 0.3).mean()) == pytest.approx(0.02, abs=0.01)  # not 0.05


def test_no_area_is_too_small_for_a_logarithm() -> None:
    assert log_area(0.0) == math.log(1e-3)
