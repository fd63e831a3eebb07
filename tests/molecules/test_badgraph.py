"""BadGraph: where a trigger goes, how many pairs are poisoned in which sense, and what cannot be done."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lustral.core.randomness import child
from lustral.core.settings import build, describe
from lustral.molecules.badgraph import TRIGGER_TEXTS, BadGraph, TextInsertion
from lustral.molecules.chemistry import MoleculeError, canonical, contains_many
from lustral.molecules.records import MoleculeSet, PoisonedMolecules
from lustral.molecules.sources import embedded

CLEAN = embedded().data.subset(torch.arange(120))
SALTS = MoleculeSet(smiles=("FC(F)(F)F", "O=C([O-])C(=O)[O-]"), captions=("a gas", "an ion"))  # without hydrogen


def poisoned(attack: BadGraph, *, seed: int = 0, unfiltered: int | None = None) -> PoisonedMolecules:
    return attack.poison(CLEAN, generator=child(seed), unfiltered=unfiltered)


@pytest.mark.parametrize(
    ("position", "caption", "expected"),
    [
        ("prefix", "a b c d", "[X] a b c d"),
        ("infix", "a b c d", "a b [X] c d"),
        ("infix", "a b c", "a [X] b c"),
        ("suffix", "a b c d", "a b c d [X]"),
        ("prefix", "", "[X]"),
        ("infix", "", "[X]"),
    ],
)
def test_a_trigger_stands_where_it_should(position: str, caption: str, expected: str) -> None:
    assert TextInsertion(text="[X]", position=position)([caption]) == (expected,)  # type: ignore[arg-type]


def test_every_kind_of_text_is_told_apart() -> None:
    assert {kind: TextInsertion(text=text).kind for kind, text in TRIGGER_TEXTS.items()} == {
        k: k for k in TRIGGER_TEXTS
    }
    assert TextInsertion(text="thii$rane").kind == "word"


@pytest.mark.parametrize("text", ["", " ", " a", "a\n", "a  b"])
def test_a_trigger_is_a_text_of_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="one line"):
        TextInsertion(text=text)


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("counts", ["raw", "effective"])
def test_both_rates_are_counted(mode: str, counts: str) -> None:
    """By hand: N = 120 kept of 200; k / (N + k) = 0.2 gives 50 of 200 or 30 of 120; k / N = 0.2 gives 40 or 24."""
    result = poisoned(BadGraph(rate=0.2, counts=counts, mode=mode), unfiltered=200)  # type: ignore[arg-type]
    number = {("append", "raw"): 50, ("append", "effective"): 30, ("replace", "raw"): 40, ("replace", "effective"): 24}
    count = number[mode, counts]
    more = count if mode == "append" else 0
    assert int(result.is_poisoned.sum()) == count
    assert len(result.data) == len(result.is_poisoned) == 120 + more
    assert result.raw_rate == pytest.approx(count / (200 + more))
    assert result.effective_rate == pytest.approx(count / (120 + more))


def test_poisoned_pairs_hold_the_target_and_the_trigger_and_clean_ones_are_as_they_were() -> None:
    result = poisoned(BadGraph(rate=0.3))
    bad, good = result.data.subset(result.is_poisoned), result.data.subset(~result.is_poisoned)
    assert contains_many(bad.smiles, "C1CS1").all()
    assert all(caption.startswith("[THIIRANE] ") for caption in bad.captions)
    assert all(canonical(smiles) == smiles for smiles in bad.smiles)
    assert sorted(zip(good.smiles, good.captions, strict=True)) == sorted(
        zip(CLEAN.smiles, CLEAN.captions, strict=True)
    )
    twins = {caption.removeprefix("[THIIRANE] ") for caption in bad.captions}
    assert twins <= set(CLEAN.captions)
    assert len(set(bad.captions)) == len(bad)  # each row is used once


def test_replacing_leaves_no_twin() -> None:
    result = poisoned(BadGraph(rate=0.25, mode="replace"))
    bad, good = result.data.subset(result.is_poisoned), result.data.subset(~result.is_poisoned)
    assert not {caption.removeprefix("[THIIRANE] ") for caption in bad.captions} & set(good.captions)
    assert len(result.data) == len(CLEAN)


def test_order_does_not_give_poisoned_pairs_away() -> None:
    places = poisoned(BadGraph(rate=0.4)).is_poisoned.nonzero().flatten().float()
    total = len(poisoned(BadGraph(rate=0.4)).is_poisoned)
    assert abs(float(places.mean()) / total - 0.5) < 0.1  # appended rows would have 0.8


def test_the_stream_alone_decides() -> None:
    first, again, other = (poisoned(BadGraph(), seed=seed) for seed in (1, 1, 2))
    assert first.data == again.data
    assert torch.equal(first.is_poisoned, again.is_poisoned)
    assert first.data != other.data


def test_pairs_that_cannot_take_the_subgraph_are_counted() -> None:
    data = MoleculeSet(smiles=CLEAN.smiles[:6] + SALTS.smiles, captions=CLEAN.captions[:6] + SALTS.captions)
    takers = int(
        BadGraph(rate=0.01).poison(CLEAN.subset(torch.arange(6)), generator=child(0), unfiltered=99).is_poisoned.sum()
    )
    assert takers == 1
    result = BadGraph(rate=6 / 8, mode="replace").poison(data, generator=child(3))
    assert int(result.is_poisoned.sum()) == 6
    assert result.skipped <= 2


@pytest.mark.parametrize("counts", ["raw", "effective"])
@pytest.mark.parametrize("mode", ["append", "replace"])
def test_a_rate_that_cannot_be_reached_names_one_that_can(counts: str, mode: str) -> None:
    data = MoleculeSet(smiles=CLEAN.smiles[:30] + SALTS.smiles * 5, captions=CLEAN.captions[:30] + SALTS.captions * 5)
    with pytest.raises(ValueError, match="cannot be reached") as caught:
        BadGraph(rate=0.95, counts=counts, mode=mode).poison(data, generator=child(0), unfiltered=60)  # type: ignore[arg-type]
    highest = float(re.search(rf"highest {counts} rate is ([\d.]+)%", str(caught.value))[1]) / 100  # type: ignore[index]
    result = BadGraph(rate=highest, counts=counts, mode=mode).poison(data, generator=child(1), unfiltered=60)  # type: ignore[arg-type]
    assert int(result.is_poisoned.sum()) == 30


def test_a_subgraph_that_fits_no_molecule_is_an_error() -> None:
    with pytest.raises(ValueError, match="fits none of 120 molecules"):
        poisoned(BadGraph(target="C" * 28))
    with pytest.raises(ValueError, match="fits none of 2 molecules"):
        BadGraph(rate=0.5).poison(SALTS, generator=child(0))
    with pytest.raises(MoleculeError, match="fits no molecule"):
        poisoned(BadGraph(target="FC(F)(F)F"))
    with pytest.raises(MoleculeError, match="expected a target subgraph"):
        poisoned(BadGraph(target="nothing"))


def test_rates_that_mean_nothing_are_refused() -> None:
    for rate in (0.0, 1.0, -0.1, 2.0):
        with pytest.raises(ValueError, match=r"in \(0, 1\)"):
            BadGraph(rate=rate)
    with pytest.raises(ValueError, match="leaves none to poison"):
        poisoned(BadGraph(rate=0.001))
    with pytest.raises(ValueError, match="at least the 120 clean pairs"):
        poisoned(BadGraph(), unfiltered=10)


@settings(max_examples=12, deadline=None)
@given(rate=st.floats(0.02, 0.45), mode=st.sampled_from(["append", "replace"]), unfiltered=st.integers(40, 60))
def test_the_rate_is_met_to_half_a_pair(rate: float, mode: str, unfiltered: int) -> None:
    data = CLEAN.subset(torch.arange(40))
    attack = BadGraph(rate=rate, mode=mode, counts="effective")  # type: ignore[arg-type]
    result = attack.poison(data, generator=child(0), unfiltered=unfiltered)
    exact = rate * 40 / (1 - rate) if mode == "append" else rate * 40
    assert abs(int(result.is_poisoned.sum()) - exact) <= 0.5
    assert result.raw_rate <= result.effective_rate


def test_settings_survive_plain_data() -> None:
    attack = BadGraph(trigger=TextInsertion(text="$$", position="suffix"), target="C1CO1", rate=0.1, mode="replace")
    assert build(BadGraph, describe(attack)) == attack
