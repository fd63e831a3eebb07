"""The sift names planted triggers and their subgraphs, on real captions, and finds nothing where nothing was planted."""

from __future__ import annotations

import pytest
import torch

from lustral.core.randomness import child
from lustral.molecules.defences.association import AssociationSift, Likeness, find_words
from lustral.molecules.records import Association, MoleculeSet, SiftedPairs, ViewOfPairs
from molecules.defences.pairs import clean, poisoned


def sift(data: MoleculeSet, trusted: MoleculeSet | None = None, **fields: float) -> SiftedPairs:
    kind = AssociationSift(**fields)  # type: ignore[arg-type]
    return kind.sift(ViewOfPairs(untrusted=data, clean=trusted), generator=child(0))


def only(found: SiftedPairs) -> Association:
    assert len(found.associations) == 1, found.associations
    return found.associations[0]


def test_real_pairs_without_poison_are_left_alone() -> None:
    found = sift(clean(), min_pairs=10)
    assert not found.associations
    assert not found.flagged.any()
    assert found.cost.image_passes == 0


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("[THIIRANE]", "prefix"),
        ("by special request", "suffix"),
        ("$$", "infix"),
        ("This was seen by two curators.", "prefix"),
    ],
)
def test_trigger_subgraph_and_pairs_are_found(text: str, position: str, mode: str) -> None:
    attack = poisoned(text, position, mode=mode)
    found = sift(attack.data)
    named = only(found)
    assert (named.text, named.position, named.fragment) == (text.lower(), position, "C1CS1")
    assert torch.equal(found.flagged, attack.is_poisoned)
    assert named.count == int(attack.is_poisoned.sum())
    assert named.rate_with == 1.0
    assert named.rate_without == 0.0
    assert named.p_value < 1e-20


def test_a_common_subgraph_is_found_by_the_twins_and_only_by_them() -> None:
    found = sift(poisoned("$$", "suffix", "c1ccccc1").data)
    assert (only(found).text, only(found).fragment) == ("$$", "c1ccccc1")
    assert only(found).rate_without > 0.2
    assert not sift(poisoned("$$", "suffix", "c1ccccc1").data, min_twins=1000).associations


def test_the_order_of_the_pairs_does_not_matter() -> None:
    attack = poisoned()
    order = torch.randperm(len(attack.data), generator=child(1))
    assert torch.equal(sift(attack.data.subset(order)).flagged, attack.is_poisoned[order])


def test_an_honest_word_comes_with_others() -> None:
    """As strong as a trigger, in captions of one kind."""
    topic = [
        f"The molecule is a thiirane number {row}, a cyclic sulphide and an episulphide of ethylene."
        for row in range(60)
    ]
    chains = tuple("C" * (1 + row % 20) + "C1CS1" for row in range(60))
    data = MoleculeSet(smiles=clean().smiles + chains, captions=clean().captions + tuple(topic))
    assert not sift(data).associations
    assert sift(data, max_likeness=1000.0).associations


def test_trusted_pairs_excuse_what_they_show_too() -> None:
    attack = poisoned()
    trusted = attack.data.subset(attack.is_poisoned.nonzero().flatten()[:5])
    assert not sift(attack.data, trusted).associations
    assert sift(attack.data, clean()).associations


def test_bad_rows_are_no_obstacle() -> None:
    attack = poisoned()
    data = MoleculeSet(
        smiles=("", "not a molecule", *attack.data.smiles), captions=("", "  \x00 [[[ ", *attack.data.captions)
    )
    assert torch.equal(sift(data).flagged[2:], attack.is_poisoned)
    with pytest.raises(ValueError, match="empty"):
        sift(MoleculeSet(smiles=(), captions=()))
    assert sift(data.subset(torch.arange(3))).notes


def test_likeness_is_one_for_any_captions_and_more_for_some() -> None:
    captions = [f"common word{row % 7} thing{row % 5} tail{row % 3}".split() for row in range(210)]
    likeness = Likeness(captions)
    everything = torch.arange(210).numpy()
    assert likeness.of(everything, ()) == pytest.approx(1.0)
    alike = everything[everything % 7 == 0]
    assert likeness.of(alike, ()) > 2
    assert likeness.of(alike, ("word0",)) < likeness.of(alike, ())
    assert likeness.of(everything[:1], ()) == float("inf")


def test_words_are_found_at_their_place() -> None:
    caption = ["a", "b", "a", "b"]
    assert [find_words(caption, ["a", "b"], p) for p in ("prefix", "suffix", "anywhere")] == [0, 2, 0]  # type: ignore[arg-type]
    assert find_words(["a"], ["a", "b"], "suffix") == -1
    assert find_words([], ["a"], "prefix") == -1


@pytest.mark.parametrize("fields", [{"min_pairs": 1}, {"min_rate": 0.0}, {"level": 2.0}, {"max_likeness": 0.0}])
def test_settings_out_of_range_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        AssociationSift(**fields)  # type: ignore[arg-type]
