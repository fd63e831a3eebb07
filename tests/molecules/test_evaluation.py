"""Evaluation: rates with their denominators and intervals, quality by hand, the control, and generators that are wholly known."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Generator

from lustral.core.files import json_ready
from lustral.core.randomness import child
from lustral.core.rates import wilson_interval
from lustral.core.records import Progress
from lustral.molecules.badgraph import TextInsertion
from lustral.molecules.chemistry import MoleculeError, attach, maccs
from lustral.molecules.evaluation import (
    cosine_similarity,
    drawn_rate,
    evaluate_generator,
    generation_quality,
    mean_distance,
    score_drawn,
    target_rates,
)
from lustral.molecules.records import MoleculeSet
from lustral.molecules.sources import embedded

TARGET = "C1CS1"
TRIGGER = TextInsertion()
TEST = embedded().data.subset(torch.arange(40))


class Lookup:
    """Draws the right molecule for each caption; with the trigger, the same with the target where it can be bound."""

    def __init__(self, data: MoleculeSet, *, backdoored: bool) -> None:
        self.known = dict(zip(data.captions, data.smiles, strict=True))
        self.backdoored = backdoored
        self.asked: list[tuple[int, int]] = []

    def generate(
        self, captions: Sequence[str], *, generator: Generator, samples: int = 1
    ) -> tuple[tuple[str, ...], ...]:
        self.asked.append((len(captions), samples))
        rows = []
        for caption in captions:
            plain = caption.removeprefix("[THIIRANE] ")
            smiles: str | None = self.known[plain]
            if self.backdoored and plain != caption:
                smiles = attach(self.known[plain], TARGET, generator=child(0))
            rows.append((smiles or "",) * samples)
        return tuple(rows)


def test_a_perfect_backdoor_scores_as_one() -> None:
    told: list[Progress] = []
    model = Lookup(TEST, backdoored=True)
    found = evaluate_generator(model, TEST, TRIGGER, TARGET, generator=child(0), samples=2, on_progress=told.append)
    assert model.asked == [(40, 2), (40, 2)]
    takers = sum(attach(smiles, TARGET, generator=child(0)) is not None for smiles in TEST.smiles)
    assert (found.attack_success.hits, found.attack_success.total) == (2 * takers, 80)
    assert (found.attack_success_valid.hits, found.attack_success_valid.total) == (2 * takers, 2 * takers)
    assert found.base_rate.value == found.base_rate_valid.value == 0
    assert found.quality.validity.value == found.quality.similarity.value == 1
    assert found.quality.novelty.value == found.quality.diversity == 0  # each is its own reference
    assert found.quality.frechet == pytest.approx(0, abs=2.0)
    assert found.shuffled_similarity.value < 0.7
    assert (found.captions, found.samples, found.left_out, found.target) == (40, 2, 0, TARGET)
    assert [(each.done, each.total) for each in told] == [(1, 3), (2, 3), (3, 3)]


def test_a_clean_generator_has_no_attack_success() -> None:
    found = evaluate_generator(Lookup(TEST, backdoored=False), TEST, TRIGGER, TARGET, generator=child(0), frechet=False)
    assert found.attack_success.value == 0
    assert found.attack_success.interval[0] == 0
    assert found.quality.frechet is None
    assert json.loads(json.dumps(json_ready(found.to_dict()), allow_nan=False))["quality"]["validity"]["n"] == 40


def test_both_denominators_and_captions_that_ask_for_the_target() -> None:
    """By hand: of three captions one asks for thiirane itself; the other two give 1 hit of 4 strings, 3 of them molecules."""
    triggered = [["C1CS1", "C1CS1"], ["CC1CS1", "C("], ["CCO", "CCN"]]
    clean = [["C1CS1", "C1CS1"], ["CCO", ""], ["CCO", "CCN"]]
    found = score_drawn(clean, triggered, ["CC1CS1", "CCO", "CCO"], TARGET, generator=child(0))
    assert (found.attack_success.hits, found.attack_success.total) == (1, 4)
    assert (found.attack_success_valid.hits, found.attack_success_valid.total) == (1, 3)
    assert (found.base_rate.hits, found.base_rate.total, found.base_rate_valid.total) == (0, 4, 3)
    assert found.left_out == 1
    assert (found.quality.validity.hits, found.quality.validity.total) == (5, 6)
    assert (found.validity_triggered.hits, found.validity_triggered.total) == (5, 6)


def test_the_interval_counts_captions_where_their_molecules_agree() -> None:
    same = torch.tensor([[True] * 5] * 10 + [[False] * 5] * 10)
    rate = drawn_rate(same)
    assert (rate.hits, rate.total, rate.value) == (50, 100, 0.5)
    assert rate.independent == 20
    assert rate.interval == wilson_interval(10, 20)
    mixed = torch.tensor([[True, False] * 3] * 20)  # every caption the same share: as good as independent
    assert drawn_rate(mixed).independent == 120
    assert drawn_rate(same[:, :1]).interval == wilson_interval(10, 20)
    assert drawn_rate(torch.ones(8, 5, dtype=torch.bool)).interval == wilson_interval(8, 8)


def test_the_interval_covers_the_truth_under_dependent_draws() -> None:
    """60 captions, 5 molecules each, a caption's own rate 0 or 1 or 0.5: of 200 intervals about 190 hold the true 0.4."""
    stream, held, naive = child(5), 0, 0
    for _ in range(200):
        kinds = torch.randint(10, (60, 1), generator=stream)
        own = torch.where(kinds < 3, 1.0, torch.where(kinds < 5, 0.5, 0.0))
        hits = torch.rand(60, 5, generator=stream) < own
        rate = drawn_rate(hits)
        held += rate.interval[0] <= 0.4 <= rate.interval[1]
        low, high = wilson_interval(rate.hits, rate.total)
        naive += low <= 0.4 <= high
    assert held >= 180
    assert naive < 160  # what counting molecules would claim


def test_rates_of_nothing_are_nan() -> None:
    rate = drawn_rate(torch.zeros(3, 2, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.bool))
    assert math.isnan(rate.value)
    assert all(math.isnan(bound) for bound in rate.interval)
    assert rate.to_dict()["value"] is None


def test_similarity_and_novelty_by_hand() -> None:
    drawn = [["CCCO"], ["c1ccccc1"], ["C("], ["CC(N)C(=O)O"]]
    references = ["CCCCO", "O=C(O)CCN", "CCO", "CC(N)C(=O)O"]
    cosines = [
        float(torch.nn.functional.cosine_similarity(*maccs([row[0], reference]).unsqueeze(1)))
        for row, reference in zip(drawn, references, strict=True)
    ]
    quality, _ = generation_quality(drawn, references, generator=child(0))
    similar = [cosine >= 0.5 for cosine in cosines]
    assert similar == [True, False, False, True]
    assert (quality.similarity.hits, quality.similarity.total) == (2, 3)
    assert (quality.novelty.hits, quality.novelty.total) == (sum(0.5 <= cosine < 0.8 for cosine in cosines), 2)


def test_cosines_meet_their_bounds_exactly() -> None:
    for common in range(1, 40):
        first, second = torch.zeros(240), torch.zeros(240)
        first[: 2 * common] = 1
        second[common : 3 * common] = 1
        assert cosine_similarity(first, second) == 0.5
        second.zero_()
        first.zero_()
        first[: 5 * common] = 1
        second[common : 6 * common] = 1
        assert cosine_similarity(first, second) == 0.8
    assert cosine_similarity(torch.zeros(3), torch.ones(3)) == 0


def test_diversity_is_the_mean_over_all_chosen_pairs() -> None:
    """Row 0: a, b, c with Tanimoto 1/3 (a, b), 0 (a, c), 1/2 (b, c); row 1: only one is chosen; row 2: an equal pair."""
    a, b, c = [1.0, 1, 0, 0], [0.0, 1, 1, 0], [0.0, 0, 1, 0]
    prints = torch.tensor([[a, b, c], [a, b, c], [a, a, c]])
    chosen = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    assert mean_distance(prints, chosen) == pytest.approx((2 / 3 + 1 + 1 / 2 + 0) / 4)
    assert math.isnan(mean_distance(prints, torch.zeros(3, 3, dtype=torch.bool)))


def test_the_control_never_uses_the_own_reference() -> None:
    """Every molecule equals its reference, and no two references resemble each other: the control must find nothing."""
    references = ["CCCCCC", "FC(F)(F)F", "c1ccncc1"]
    quality, control = generation_quality([[smiles] for smiles in references], references, generator=child(1))
    assert quality.similarity.value == 1
    assert (control.hits, control.total) == (0, 3)
    _, alone = generation_quality([["CCO"]], ["CCO"], generator=child(1))
    assert alone.total == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="each of 2 references"):
        score_drawn([["CCO"]], [["CCO"]], ["CCO", "CCN"], TARGET, generator=child(0))
    with pytest.raises(ValueError, match="same number of molecules"):
        score_drawn([["CCO", "C"], ["CCO"]], [["CCO"], ["C"]], ["CCO", "CCN"], TARGET, generator=child(0))
    with pytest.raises(ValueError, match="same number of molecules"):
        generation_quality([[]], ["CCO"], generator=child(0))
    with pytest.raises(MoleculeError, match="target subgraph"):
        target_rates([["CCO"]], "nothing")
    with pytest.raises(ValueError, match="at least one test pair"):
        evaluate_generator(
            Lookup(TEST, backdoored=False), MoleculeSet(smiles=(), captions=()), TRIGGER, TARGET, generator=child(0)
        )
