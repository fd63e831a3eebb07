"""Chemistry: one spelling for each molecule, subgraphs found and attached, pieces and fingerprints."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch

from lustral.core.randomness import child
from lustral.molecules import chemistry
from lustral.molecules.chemistry import (
    MoleculeError,
    attach,
    canonical,
    check_target,
    contains,
    contains_many,
    fragments,
    maccs,
    morgan,
    num_heavy_atoms,
)
from lustral.molecules.sources import embedded

THIIRANE = "C1CS1"


@pytest.mark.parametrize(
    "spellings",
    [
        ("OCC", "C(O)C", "[CH3][CH2][OH]", "[13CH3]CO", "[CH3:7]CO", "[2H]OCC"),
        ("C1=CC=CC=C1C", "Cc1ccccc1", "c1ccc(C)cc1"),
        ("N[C@@H](C)C(=O)O", "N[C@H](C)C(=O)O", "CC(N)C(=O)O"),
        (r"C/C=C\C", "C/C=C/C", "CC=CC"),
        ("c1cc[nH]c1", "C1=CNC=C1"),
    ],
)
def test_a_molecule_has_one_spelling(spellings: tuple[str, ...]) -> None:
    assert len({canonical(each) for each in spellings}) == 1
    assert canonical(spellings[0])


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "C C",
        "CCO name",
        "C(",
        "C1CC",
        "C(C)(C)(C)(C)C",
        "cc",
        "[Na+].[Cl-]",
        "CC.",
        "\x00",
        "Ç",
        "C" * 2_001,
        "*" * 3 + "(",
    ],
)
def test_what_is_no_molecule_has_no_spelling(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert canonical(text) == ""
    assert num_heavy_atoms("C(") == 0
    assert not contains(text, THIIRANE)
    assert fragments(text if "." not in text else "C(") == frozenset()
    assert capfd.readouterr().err == ""  # RDKit's complaints are not for the user


def test_spelling_a_spelling_changes_nothing() -> None:
    data = embedded().data
    assert all(canonical(smiles) == smiles for smiles in data.smiles)


@pytest.mark.parametrize(
    ("smiles", "target", "answer"),
    [
        ("OC(=O)CC1CS1", THIIRANE, True),
        ("C1CS1", "S1CC1", True),
        ("C1=CSC=C1", THIIRANE, False),
        ("CCS", THIIRANE, False),
        ("C1CCS1", THIIRANE, False),
        ("C1C2CCCCC2S1", THIIRANE, False),
        ("C1CCC2SC2C1", THIIRANE, True),  # fused
        ("CC[#16]C", "CSC", True),
        ("Clc1ccccc1", "c1ccccc1Cl", True),
        ("CC[Si](C)C", "S", False),
    ],
)
def test_subgraphs_are_found_by_elements_bonds_and_rings(smiles: str, target: str, answer: bool) -> None:
    assert contains(smiles, target) is answer


def test_many_molecules_are_asked_at_once() -> None:
    found = contains_many(["CC1CS1", "", "CCO"], THIIRANE)
    assert found.dtype == torch.bool
    assert found.tolist() == [True, False, False]
    assert contains_many([], THIIRANE).shape == (0,)


def test_a_subgraph_takes_the_place_of_a_hydrogen_on_every_kind_of_atom() -> None:
    got = {attach("NCCO", THIIRANE, generator=child(seed)) for seed in range(40)}
    assert got == {canonical(s) for s in ("C1SC1NCCO", "NC(C1CS1)CO", "NCC(O)C1CS1", "NCCOC1CS1")}


def test_aromatic_nitrogen_gives_up_its_hydrogen() -> None:
    got = {attach("c1ccc[nH]1", THIIRANE, generator=child(seed)) for seed in range(40)}
    assert canonical("c1cccn1C1CS1") in got
    assert None not in got


def test_usual_elements_are_anchors_before_others() -> None:
    """An anchor that is neither carbon, nitrogen nor oxygen is taken only where there is no other."""
    assert {attach("CS", THIIRANE, generator=child(seed)) for seed in range(20)} == {canonical("SCC1CS1")}
    assert attach("FC(F)(F)S", THIIRANE, generator=child(0)) == canonical("FC(F)(F)SC1CS1")


def test_attaching_repeats_with_the_stream_and_spells_like_clean_rows() -> None:
    data = embedded().data
    first = [attach(smiles, THIIRANE, generator=child(1, row)) for row, smiles in enumerate(data.smiles[:60])]
    again = [attach(smiles, THIIRANE, generator=child(1, row)) for row, smiles in enumerate(data.smiles[:60])]
    assert first == again
    for clean, poisoned in zip(data.smiles, first, strict=False):
        if poisoned is not None:  # ions such as oxalate have no hydrogen
            assert canonical(poisoned) == poisoned
            assert contains(poisoned, THIIRANE)
            assert contains(poisoned, clean)
            assert num_heavy_atoms(poisoned) == num_heavy_atoms(clean) + 3


def test_what_cannot_take_the_subgraph_is_none() -> None:
    assert attach("FC(F)(F)F", THIIRANE, generator=child(0)) is None  # no hydrogen
    assert attach("C" * 27, THIIRANE, generator=child(0)) is None  # 30 atoms
    assert attach("C" * 26, THIIRANE, generator=child(0)) is not None
    assert attach("C(", THIIRANE, generator=child(0)) is None


@pytest.mark.parametrize(("target", "words"), [("C(", "C1CS1"), ("", "C1CS1"), ("C.C", "component"), ("C[Hg]", "Hg")])
def test_a_wrong_target_says_what_to_give(target: str, words: str) -> None:
    with pytest.raises(MoleculeError, match=words):
        check_target(target)


def test_a_subgraph_without_hydrogen_fits_no_molecule() -> None:
    with pytest.raises(MoleculeError, match="fits no molecule"):
        attach("CCO", "FC(F)(F)F", generator=child(0))


def test_pieces_are_ring_systems_chains_and_groups() -> None:
    pieces = fragments("O=[N+]([O-])c1ccc2ccccc2c1CCC1CS1")
    assert {"c1ccc2ccccc2c1", THIIRANE, "CC", "O=[NH+][O-]"} <= pieces
    assert canonical("O=[N+]([O-])c1ccc2ccccc2c1CCC1CS1") not in pieces
    assert "O=c1cccc[nH]1" in fragments("CCn1ccccc1=O")  # a doubly bound neighbour stays with its ring
    assert THIIRANE in fragments(THIIRANE)
    assert "OCO" in fragments("CCC(OC)OC")  # carbon with two hetero-atoms
    assert "C=CCO" not in fragments("C=CCO")  # no ring system: a whole molecule is no piece of itself


def test_pieces_are_spelt_canonically_and_are_found_again() -> None:
    for smiles in embedded().data.smiles[:150]:
        for piece in fragments(smiles):
            assert canonical(piece) == piece
            assert contains(smiles, piece)


def test_every_poisoned_molecule_shows_its_target_as_a_piece() -> None:
    poisoned = [attach(smiles, THIIRANE, generator=child(2)) for smiles in embedded().data.smiles[:80]]
    assert all(THIIRANE in fragments(smiles) for smiles in poisoned if smiles)


def test_fingerprints_have_their_sizes_and_tell_molecules_apart() -> None:
    keys, circles = maccs(["CCO", "OCC", "c1ccccc1", ""]), morgan(["CCO", "OCC", "c1ccccc1", ""])
    assert keys.shape == (4, 167)
    assert circles.shape == (4, 2048)
    for bits in (keys, circles):
        assert torch.equal(bits[0], bits[1])
        assert not torch.equal(bits[0], bits[2])
        assert bits[3].sum() == 0
        assert set(bits.unique().tolist()) <= {0.0, 1.0}
    assert circles[0].sum() == 6  # three atoms, and their surroundings of radius 1: all different


def test_a_missing_extra_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **rest: Any) -> Any:
        if name.startswith("rdkit"):
            raise ImportError("No module named 'rdkit'")
        return real(name, *args, **rest)

    chemistry.rdkit.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'lustral\[molecules\]'"):
        canonical("CCO")
    monkeypatch.undo()
    assert canonical("OCC") == "CCO"
