from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bench.synthetic import synthetic_store
from lustral.tables.comparison import Comparison, compare
from lustral.tables.rows import ROW_SCHEMA, load_cells
from lustral.tables.summary import QueryError


def cell(defence: str, seed: int = 0, *, attack: str = "badnets", **columns: Any) -> dict[str, Any]:
    return {
        "status": "done",
        "data": "digits",
        "arch": "small_cnn",
        "attack": attack,
        "attack_method": attack,
        "poison_rate": 0.1,
        "defence": defence,
        "clean_images": 100,
        "seed": seed,
        "defence_seed": 0,
        "victim_key": f"{attack} {seed}",
        "asr0": 1.0,
        **columns,
    }


def table_of(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([dict(row) for row in rows], schema=ROW_SCHEMA)


def pairs(first: Iterable[float], second: Iterable[float], metric: str = "der") -> pa.Table:
    both = enumerate(zip(first, second, strict=True))
    return table_of(
        {**cell(name, seed), metric: value}
        for seed, values in both
        for name, value in zip(("a", "b"), values, strict=True)
    )


def test_the_difference_is_taken_within_each_victim() -> None:
    found = compare(pairs([0.9, 0.5, 0.8, 0.9, 0.6, 0.7], [0.8, 0.4, 0.7, 0.8, 0.5, 0.6]), "a", "b")
    assert found.difference == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))  # though the victims differ by 0.4
    assert (found.wins, found.ties, found.losses, found.verdict) == (6, 0, 0, "first")
    assert (found.pairs, found.cells, found.attacks, found.unpaired, found.note) == (6, 6, 1, 0, "")
    assert (found.mean_first, found.mean_second) == pytest.approx((4.4 / 6, 3.8 / 6))


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    gaps = np.array([0.02, -0.01, 0.05, 0.03, -0.02, 0.04, 0.01, 0.02])
    found = compare(pairs(0.5 + gaps, [0.5] * 8), "a", "b", resamples=40_000)
    stream = np.random.default_rng(99)
    means = [gaps[stream.integers(8, size=8)].mean() for _ in range(20_000)]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-3)
    assert (found.wins, found.losses) == (6, 2)


def test_a_large_set_is_drawn_in_blocks_of_the_same_interval() -> None:
    gaps = np.random.default_rng(0).normal(0.1, 1.0, 1500)
    found = compare(pairs(gaps, np.zeros(1500), "acc_loss"), "a", "b", "acc_loss", resamples=4_000)
    assert found.low is not None
    assert found.high is not None
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * gaps.std() / np.sqrt(1500), rel=0.1)


def test_an_interval_that_holds_nothing_is_a_tie() -> None:
    found = compare(pairs([0.6, 0.4, 0.5, 0.6, 0.4, 0.5], [0.5] * 6), "a", "b")
    assert found.verdict == "tie"
    assert (found.wins, found.ties, found.losses) == (2, 2, 2)
    assert compare(pairs([0.5] * 6, [0.5] * 6), "a", "b").verdict == "tie"


def test_less_is_better_for_attack_success() -> None:
    cells = pairs([0.1] * 6, [0.5] * 6, "asr")
    found = compare(cells, "a", "b", "asr")
    assert found.difference == pytest.approx(-0.4)
    assert (found.wins, found.losses, found.verdict) == (6, 0, "first")
    assert compare(cells, "b", "a", "asr").verdict == "second"


def test_cells_of_one_victim_are_one_pair() -> None:
    cells = [
        cell(name, seed, der=0.5 + gap, defence_seed=draw)
        for name, gap in (("a", 0.1), ("b", 0.0))
        for seed in range(3)
        for draw in range(4)
    ]
    found = compare(table_of(cells), "a", "b")
    assert (found.pairs, found.cells) == (3, 12)


def test_only_equal_budgets_and_defence_seeds_are_paired() -> None:
    cells = [
        cell("a", der=0.9, clean_images=100),
        cell("b", der=0.7, clean_images=100),
        cell("b", der=0.1, clean_images=500),
        cell("a", der=0.2, defence_seed=1),
        cell("a", seed=1, der=0.2),
        cell("b", seed=2, der=0.2),
    ]
    found = compare(table_of(cells), "a", "b")
    assert found.difference == pytest.approx(0.2)
    assert (found.pairs, found.unpaired) == (1, 4)


def test_one_victim_decides_nothing() -> None:
    found = compare(pairs([0.9], [0.1]), "a", "b")
    assert (found.low, found.high, found.verdict) == (None, None, "unknown")
    assert found.note == "Fewer than 6 victims (1): an interval from so few is too narrow."


def test_few_victims_are_warned_about() -> None:
    assert "Fewer than 6 victims (5)" in compare(pairs([0.9] * 5, [0.1] * 5), "a", "b").note


def test_victims_as_they_are_pair_with_every_budget() -> None:
    cells = [cell("a", seed, asr=0.1, clean_images=count) for seed in range(2) for count in (100, 500)]
    cells += [cell("none", seed, asr=0.9, clean_images=0, defence_seed=None) for seed in range(2)]
    found = compare(table_of(cells), "a", "none", "asr")
    assert (found.pairs, found.cells, found.unpaired) == (2, 4, 0)
    assert found.difference == pytest.approx(-0.8)


def test_weak_attacks_and_benign_models_do_not_count() -> None:
    cells = [
        *(cell(name, der=der) for name, der in (("a", 0.9), ("b", 0.8))),
        *(cell(name, attack="weak", asr0=0.5, der=der) for name, der in (("a", 0.1), ("b", 0.8))),
        *(cell(name, attack="benign", asr0=None, acc=acc) for name, acc in (("a", 0.9), ("b", 0.2))),
    ]
    assert compare(table_of(cells), "a", "b").difference == pytest.approx(0.1)
    assert compare(table_of(cells), "a", "b", least_asr=0.4).pairs == 2
    found = compare(table_of(cells), "a", "b", "acc", where={"attack": ["benign"]})
    assert found.pairs == 1
    assert found.difference == pytest.approx(0.7)


def test_failed_cells_have_no_part() -> None:
    cells = [cell("a", der=0.9), cell("b", der=0.5), cell("a", 1, status="failed"), cell("b", 1, der=0.5)]
    assert compare(table_of(cells), "a", "b").pairs == 1


def test_equal_seeds_give_equal_intervals() -> None:
    cells = pairs(np.random.default_rng(0).random(9), np.full(9, 0.5))
    assert compare(cells, "a", "b", seed=3) == compare(cells, "a", "b", seed=3)
    assert compare(cells, "a", "b", seed=3).low != compare(cells, "a", "b", seed=4).low


def test_the_order_of_the_cells_does_not_matter() -> None:
    cells = pairs(np.linspace(0.3, 0.9, 9), np.linspace(0.5, 0.6, 9)).to_pylist()
    assert compare(table_of(cells), "a", "b") == compare(table_of(reversed(cells)), "a", "b")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first": "messa"}, r"unknown defence 'messa'; did you mean 'mesa'\?"),
        ({"second": "mesa"}, "expected two different defences; got 'mesa' twice"),
        ({"metric": "derr"}, r"cannot compare 'derr': unknown metric; did you mean 'der'\?"),
        ({"metric": "max_asr"}, "cannot compare 'max_asr': unknown metric"),
        ({"metric": "alarm"}, "cannot compare 'alarm': neither more nor less of it is better"),
        ({"resamples": 10}, "expected at least 1,000 resamples; got 10"),
        ({"where": {"dat": ["digits"]}}, r"unknown column 'dat'; did you mean 'data'\?"),
        ({"where": {"data": ["digit"]}}, r"no cell has data 'digit'; did you mean 'digits'\?"),
        ({"least_asr": 50}, "expected least_asr"),
    ],
)
def test_errors_name_what_was_meant(change: dict[str, Any], words: str) -> None:
    cells = table_of([cell("mesa", der=0.9), cell("nad", der=0.5)])
    with pytest.raises(QueryError, match=words):
        compare(cells, **{"first": "mesa", "second": "nad", **change})


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(QueryError) as caught:
        compare(table_of([cell("a", der=0.9)]), "a", "b", "derr", resamples=1, where={"sede": [1]})
    assert len(str(caught.value).splitlines()) == 4


def test_no_common_victim_is_an_error_that_counts() -> None:
    cells = table_of([cell("a", 0, der=0.9), cell("a", 1, der=0.9), cell("b", 2, der=0.5), cell("b", 0)])
    with pytest.raises(QueryError, match=r"no victim has DER after both.*'a' 2 of 2, 'b' 1 of 2.*ASR above 50 %"):
        compare(cells, "a", "b")
    with pytest.raises(QueryError, match="there is no cell to compare"):
        compare(table_of([]), "a", "b")


def test_a_store_can_be_compared(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "bench", results=200, attacks=3, defences=4, seeds=3, details=False)
    found = compare(load_cells(store), "baeraser", "fine_tuning", "asr")
    assert isinstance(found, Comparison)
    assert (found.pairs, found.attacks, found.verdict) == (18, 6, "first")
