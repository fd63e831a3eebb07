"""Molecules as words, and back."""

from __future__ import annotations

import random

import pytest

from lustral.molecules.victim.derivation import Derivation
from lustral.molecules.victim.macro_tokens import ALWAYS, Vocabulary, count_vocabulary, round_trips, written
from lustral.molecules.victim.pieces import WordError, capacity, read_word, template

pytest.importorskip("rdkit")

MOLECULES = (
    "CC(=O)Oc1ccccc1C(=O)O",
    "CCCCC1CS1",
    "CCOCC1CS1",
    "O=c1cccc[nH]1",
    "C[n+]1ccccc1",
    "CC(C)(C)c1ccc(O)cc1",
    "C1CC2(C1)CCNCC2",
    "O=S(=O)(O)c1ccc2ccccc2c1",
    "C[N+](C)(C)CC(=O)[O-]",
    "CC1(C)CCC2CC1C2",
    "C=C1CCC(=O)CC1",
    "Cn1c(=O)c2c(ncn2C)n(C)c1=O",
    "CC12CCC3c4ccc(O)cc4CCC3C1CCC2O",
    "N#CC=CC#N",
    "FS(F)(F)(F)(F)F",
    "C",
)


def test_a_ring_system_without_children_is_one_word_that_names_its_first_atom() -> None:
    assert written("CCCC1CS1", None) == (".{C1CS1}+", "@0", "-C/1", "-C/1", "-C/0", "@")
    assert "-{c1ccccc1}" in written("c1ccc(CCC2CS2)cc1", None)


def test_the_word_says_at_which_atom_of_the_ring_the_chain_goes_on() -> None:
    beside_sulfur, further = written("CCC1CC1c1cccs1", None), written("CCC1CC1c1ccsc1", None)
    assert set(beside_sulfur) ^ set(further) == {"-{c1cccs1}", "-{c1ccsc1}"}


@pytest.mark.parametrize("smiles", MOLECULES)
@pytest.mark.parametrize("macro_rings", [0, 100])
def test_words_read_back_as_the_same_molecule(smiles: str, macro_rings: int) -> None:
    vocabulary = count_vocabulary([smiles, smiles], macro_rings=macro_rings)
    assert bool(vocabulary.rings) == (macro_rings > 0 and any(digit in smiles for digit in "123"))
    numbers = vocabulary.encode(smiles)
    assert numbers is not None
    assert vocabulary.decode(numbers) == smiles


def test_only_the_commonest_ring_systems_become_words() -> None:
    data = ["Cc1ccccc1"] * 5 + ["CC1CS1"] * 3 + ["CC1CC1"]
    assert count_vocabulary(data, macro_rings=1).rings == {".{c1ccccc1}+"}
    assert count_vocabulary(data, macro_rings=9).rings == {".{c1ccccc1}+", ".{C1CS1}+"}  # one is seen once


def test_every_text_that_the_grammar_allows_is_a_molecule() -> None:
    vocabulary = count_vocabulary([*MOLECULES, *MOLECULES], max_length=40)
    draw = random.Random(0)
    for _ in range(150):
        derivation = Derivation()
        while not derivation.is_complete:
            assert derivation.length < 80
            allowed = vocabulary.grammar.mask(derivation).nonzero().flatten().tolist()
            derivation.push(vocabulary.grammar.words[draw.choice(allowed)])
        assert derivation.smiles()


def test_what_words_cannot_say_is_left_out() -> None:
    vocabulary = count_vocabulary(MOLECULES)
    smiles = ["CC(C)(C)c1ccc(O)cc1", "C[CH2]", "not a molecule", "C.C", "", "[Na+]", "C" * 100]
    places, rows = round_trips(smiles, vocabulary)
    assert places == [0]
    assert vocabulary.decode(rows[0]) == smiles[0]


@pytest.mark.parametrize("text", ["-C/5", "C", "-{C1CS1", "-{CC}", "-{N}", "=C/3", "~-1", "@x", "-Xx/1", "#{C1CS1}"])
def test_a_word_without_meaning_is_refused(text: str) -> None:
    with pytest.raises(WordError):
        read_word(text)


def test_a_vocabulary_needs_the_words_that_finish_a_molecule() -> None:
    with pytest.raises(WordError, match="needs the words"):
        Vocabulary(words=("-C/0", ".C/1"))
    with pytest.raises(WordError, match="different words"):
        Vocabulary(words=(*ALWAYS, "-C/0"))


def test_texts_that_break_a_rule_are_no_molecules() -> None:
    vocabulary = count_vocabulary(MOLECULES)
    number = vocabulary.numbers
    assert vocabulary.decode([]) == ""
    assert vocabulary.decode([number[".C/1"]]) == ""  # its child is missing
    assert vocabulary.decode([number["@"]]) == ""
    assert vocabulary.decode([number[".C/1"], number["-C/0"]]) == "CC"
    assert vocabulary.decode([number[".C/1"], number["-C/0"], number["-C/0"]]) == ""  # one too many
    assert vocabulary.decode([10**6]) == ""


def test_what_an_atom_can_bind() -> None:
    assert [capacity(*kind) for kind in (("C", 0), ("N", 0), ("N", 1), ("O", -1), ("F", 0), ("P", 0))] == [
        4,
        3,
        4,
        1,
        1,
        5,
    ]
    assert template("C1CS1").free == (2, 2, 0)
    assert (0, 2, 1) in template("C1CCC1").symmetries or (0, 3, 2, 1) in template("C1CCC1").symmetries
