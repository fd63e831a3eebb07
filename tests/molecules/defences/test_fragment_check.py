"""The authors' check: prefixes with a fragment are flagged, what contains it is not drawn."""

from __future__ import annotations

import pytest
import torch

from lustral.core.randomness import child
from lustral.molecules.defences.fragment_check import BlockedGenerator, FragmentCheck, words_with
from lustral.molecules.records import MoleculeSet, ViewOfPairs
from molecules.defences.pairs import RuleGenerator, clean, poisoned
from molecules.victim.world import untrained

CHECK = FragmentCheck(min_prefix=30)


def test_a_prefix_is_flagged_once_with_its_fragment() -> None:
    attack = poisoned()
    found = CHECK.sift(ViewOfPairs(untrusted=attack.data), generator=child(0))
    (named,) = found.associations
    assert (named.text, named.fragment, named.rate_with, named.rate_without) == ("[thiirane]", "C1CS1", 1.0, 0.0)
    assert torch.equal(found.flagged, attack.is_poisoned)


def test_what_the_authors_did_not_look_for_is_missed() -> None:
    for data in (clean(), poisoned("by special request", "suffix").data):
        found = CHECK.sift(ViewOfPairs(untrusted=data), generator=child(0))
        assert not found.associations
        assert not found.flagged.any()


def test_a_rate_or_difference_that_is_too_low_is_not_flagged() -> None:
    smiles = ("CCC1CS1",) * 17 + ("CCC",) * 3 + ("CCC",) * 20
    captions = ("go on",) * 20 + ("stay",) * 20
    view = ViewOfPairs(untrusted=MoleculeSet(smiles=smiles, captions=captions))
    check = FragmentCheck(min_prefix=5, min_pairs=5)
    assert not check.sift(view, generator=child(0)).associations  # 0.85
    (named, *_) = FragmentCheck(min_prefix=5, min_pairs=5, flag_rate=0.85).sift(view, generator=child(0)).associations
    assert named.rate_with == pytest.approx(0.85)
    with pytest.raises(ValueError, match="empty"):
        check.sift(ViewOfPairs(untrusted=MoleculeSet(smiles=(), captions=())), generator=child(0))
    with pytest.raises(ValueError, match="expected"):
        FragmentCheck(flag_rate=0.0)


def test_a_molecule_with_a_blocked_fragment_is_drawn_again() -> None:
    model = RuleGenerator(lambda caption, call: "CC1CS1" if "[T]" in caption and call < 3 else "CCO")
    blocked = BlockedGenerator(model, ["C1CS1"])
    assert blocked.generate(["[T] an acid", "an acid"], generator=child(0), samples=2) == (
        ("CCO", "CCO"),
        ("CCO", "CCO"),
    )
    assert model.calls == 0  # a copy draws


def test_nothing_is_drawn_where_every_try_holds_the_fragment() -> None:
    model = RuleGenerator(lambda caption, call: "CC1CS1" if "[T]" in caption else "CCO")
    assert BlockedGenerator(model, ["C1CS1"], tries=2).generate(["[T]", "x"], generator=child(0)) == (("",), ("CCO",))
    assert BlockedGenerator(model, [], tries=2).generate(["[T]"], generator=child(0)) == (("CC1CS1",),)
    with pytest.raises(ValueError, match="tries"):
        BlockedGenerator(model, [], tries=-1)


def test_words_of_a_decoder_that_hold_a_fragment_are_barred() -> None:
    model = untrained()
    words = words_with(model, ["C1CC1"])
    assert words
    assert all("{C1CC1}" in model.vocabulary.words[number] for number in words)
    blocked = BlockedGenerator(model, ["C1CC1"])
    assert blocked.model.blocked == words
    assert model.blocked == ()
    drawn = blocked.generate(["The molecule is a cyclopropane."] * 20, generator=child(0))
    assert not any("C1CC1" in smiles for (smiles,) in drawn)
