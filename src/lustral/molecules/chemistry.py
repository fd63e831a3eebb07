"""What the room asks of RDKit: one spelling for each molecule, subgraphs found and attached, pieces and fingerprints.

Every molecule is handled as its canonical SMILES: one component, no stereo marks, isotopes or atom numbers, aromatic form.
Clean and poisoned rows go through the same function, so spelling never tells them apart. RDKit is imported by the first
function that needs it.

Reference:
    Ye, Chen, Dai, "BadGraph", arXiv 2510.20792, and the authors' code (how a subgraph is attached).
    Ertl, "An algorithm to identify functional groups in organic molecules", Journal of Cheminformatics, 2017.
    Degen et al., "On the art of compiling and using 'drug-like' chemical fragment spaces" (BRICS), ChemMedChem, 2008.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Generator, Tensor

ALLOWED_ELEMENTS = frozenset(("B", "Br", "C", "Cl", "F", "I", "N", "O", "P", "S", "Se", "Si"))  # of 3M-Diffusion
LEAST_ATOMS, MOST_ATOMS = 3, 29  # heavy atoms; the victim drops molecules with 30 or more
LONGEST_SMILES = 2_000  # characters; a molecule of 29 heavy atoms needs about 100
MORGAN_RADIUS, MORGAN_BITS, MACCS_BITS = 3, 2048, 167
_FIRST_ANCHORS = ("C", "N", "O")  # tried before other elements, as the authors do
_KEPT = 1_024  # queries, and molecules that were read last
_KEPT_PIECES = 65_536
_RING_TO_OUTSIDE = "[R]-;!@[*]"  # SMARTS of the single bonds from a ring to what is outside of it
_GROUP = "$([!#6;!a]),$([#6;!a](~[!#6])~[!#6]),$(*=,#*)"  # the atoms of functional groups
_GROUP_TO_REST = f"[{_GROUP}]~[!{_GROUP.replace(',$(', ';!$(')}]"


class MoleculeError(ValueError):
    """A molecule or subgraph cannot be used as it is."""


def canonical(smiles: str) -> str:
    """Return the one spelling of a molecule, or "" where there is none.

    Args:
        smiles: any SMILES.

    Returns:
        Canonical SMILES without stereo marks, isotopes and atom numbers; "" if the text cannot be read, breaks a valence, has
        no atoms, is longer than ``LONGEST_SMILES`` or has several components.

    >>> canonical("C1=CC=CC=C1[C@H](O)C"), canonical("c1ccccc1C(C)O"), canonical("not a molecule"), canonical("[Na+].[Cl-]")
    ('CC(O)c1ccccc1', 'CC(O)c1ccccc1', '', '')
    """
    if "." in smiles:
        return ""
    molecule = read(smiles)
    return "" if molecule is None else spelling(molecule)


def read(smiles: str) -> Any | None:
    """Return RDKit's molecule without stereo marks, isotopes and atom numbers, or None if the text is not a molecule."""
    if not isinstance(smiles, str) or not 0 < len(smiles) <= LONGEST_SMILES or not smiles.isascii() or " " in smiles:
        return None  # RDKit takes what follows a blank as a name
    kit = rdkit()
    with kit.BlockLogs():
        molecule = kit.Chem.MolFromSmiles(smiles)
        if molecule is None or not molecule.GetNumAtoms():
            return None
        if "@" in smiles or "/" in smiles or "\\" in smiles:
            kit.Chem.RemoveStereochemistry(molecule)
        if re.search(r"\[\d|:\d", smiles):
            for atom in molecule.GetAtoms():
                atom.SetIsotope(0)
                atom.SetAtomMapNum(0)
            molecule = kit.Chem.RemoveHs(molecule)  # deuterium is hydrogen now
    return molecule


def spelling(molecule: Any) -> str:
    """Return the canonical SMILES of RDKit's molecule."""
    return str(rdkit().Chem.MolToSmiles(molecule))


def num_heavy_atoms(smiles: str) -> int:
    """Return how many atoms a molecule has besides hydrogen; 0 if it cannot be read.

    >>> num_heavy_atoms("CCO"), num_heavy_atoms("?")
    (3, 0)
    """
    molecule = read(smiles)
    return 0 if molecule is None else int(molecule.GetNumHeavyAtoms())


def elements(smiles: str) -> frozenset[str]:
    """Return the symbols of a molecule's elements, implicit hydrogen aside; empty if it cannot be read.

    >>> sorted(elements("C1CS1"))
    ['C', 'S']
    """
    molecule = read(smiles)
    return frozenset() if molecule is None else frozenset(atom.GetSymbol() for atom in molecule.GetAtoms())


def check_target(target: str) -> str:
    """Return the canonical SMILES of a subgraph that an attack or a metric may use.

    Raises:
        MoleculeError: it cannot be read, has several components, or holds elements that the victim drops.
    """
    written = canonical(target)
    if not written:
        raise MoleculeError(f"expected a target subgraph as SMILES of one component, such as C1CS1; got {target!r}")
    if foreign := elements(written) - ALLOWED_ELEMENTS:
        raise MoleculeError(
            f"the target subgraph {target} has {', '.join(sorted(foreign))}; expected only {', '.join(sorted(ALLOWED_ELEMENTS))}"
        )
    return written


def contains(smiles: str, target: str) -> bool:
    """Say whether a molecule holds a subgraph; a text that is no molecule holds nothing.

    Args:
        smiles: a molecule.
        target: SMILES of the subgraph; elements, bonds and rings must match.

    Raises:
        MoleculeError: the target is no subgraph.

    >>> contains("OC(=O)CC1CS1", "C1CS1"), contains("CCSC", "C1CS1"), contains("", "C1CS1")
    (True, False, False)
    """
    query, symbols = _query(target)
    if not _may_hold(smiles, symbols):
        return False
    molecule = read(smiles)
    return molecule is not None and bool(molecule.HasSubstructMatch(query))


def contains_many(smiles: Sequence[str], target: str) -> Tensor:
    """Return (N,) bool: which of N molecules hold the subgraph; see ``contains``."""
    return torch.tensor([contains(each, target) for each in smiles], dtype=torch.bool)


@lru_cache(maxsize=_KEPT)
def _query(target: str) -> tuple[Any, frozenset[str]]:
    """Return RDKit's query of a subgraph, and the symbols that the SMILES of every molecule with it must show."""
    written = canonical(target)
    if not written:
        raise MoleculeError(f"expected a subgraph as SMILES of one component, such as C1CS1; got {target!r}")
    return read(written), elements(written) - {"C"}


def _may_hold(smiles: str, symbols: frozenset[str]) -> bool:
    """Rule out by the letters of the text what reading the molecule would only confirm."""
    return "#" in smiles or all(symbol in smiles or symbol.lower() in smiles for symbol in symbols)  # [#16] is sulphur


def attach(smiles: str, subgraph: str, *, generator: Generator, most_atoms: int = MOST_ATOMS) -> str | None:
    """Bind a subgraph to a molecule by a single bond that takes the place of two hydrogens.

    The anchor is drawn among the atoms that bear a hydrogen: carbon, nitrogen and oxygen first, other elements after them, as in
    the authors' code. Of the subgraph the first atom of its SMILES that bears a hydrogen takes part. The authors also try anchors
    without a hydrogen: where RDKit lets those pass, they raise the valence of sulphur or phosphorus, so they are left out here.

    Args:
        smiles: the molecule.
        subgraph: SMILES of the subgraph.
        generator: stream that draws the anchor.
        most_atoms: heavy atoms that the result may have.

    Returns:
        Canonical SMILES that contains the subgraph, or None if the molecule cannot take it.

    Raises:
        MoleculeError: the subgraph is no molecule, or none of its atoms bears a hydrogen.

    >>> attach("CO", "C1CS1", generator=torch.Generator().manual_seed(0)) in ("COC1CS1", "OCC1CS1")
    True
    """
    addition, first = _addition(subgraph)
    molecule = read(smiles)
    if molecule is None or molecule.GetNumHeavyAtoms() + addition.GetNumHeavyAtoms() > most_atoms:
        return None
    atoms = molecule.GetNumAtoms()
    for anchor in _anchors(molecule, generator):
        joined = _joined(molecule, anchor, addition, first + atoms)
        if joined and contains(joined, subgraph):
            return joined
    return None


@lru_cache(maxsize=_KEPT)
def _addition(subgraph: str) -> tuple[Any, int]:
    """Return RDKit's molecule of a subgraph and the atom that binds."""
    molecule = None if "." in subgraph else read(subgraph)  # as written: its first atom binds
    if molecule is None:
        raise MoleculeError(f"expected a subgraph as SMILES of one component, such as C1CS1; got {subgraph!r}")
    for atom in molecule.GetAtoms():
        if atom.GetTotalNumHs():
            return molecule, atom.GetIdx()
    raise MoleculeError(
        f"the subgraph {subgraph} fits no molecule: none of its atoms bears a hydrogen that a bond could replace"
    )


def _anchors(molecule: Any, generator: Generator) -> Iterator[int]:
    """Yield the atoms that bear a hydrogen: carbon, nitrogen and oxygen in random order, then the others in random order."""
    free = [atom for atom in molecule.GetAtoms() if atom.GetTotalNumHs()]
    order = torch.randperm(len(free), generator=generator).tolist()
    usual = [place for place in order if free[place].GetSymbol() in _FIRST_ANCHORS]
    for place in [*usual, *(place for place in order if free[place].GetSymbol() not in _FIRST_ANCHORS)]:
        yield free[place].GetIdx()


def _joined(molecule: Any, anchor: int, addition: Any, first: int) -> str:
    """Return the canonical SMILES of two molecules bound by one bond, or "" if the result is no molecule."""
    kit = rdkit()
    with kit.BlockLogs():
        both = kit.Chem.RWMol(kit.Chem.CombineMols(molecule, addition))
        both.AddBond(anchor, first, kit.Chem.BondType.SINGLE)
        for index in (anchor, first):
            atom = both.GetAtomWithIdx(index)
            if atom.GetNumExplicitHs():  # as in [nH]: the bond takes its place
                atom.SetNumExplicitHs(atom.GetNumExplicitHs() - 1)
        if kit.Chem.SanitizeMol(both, catchErrors=True) != kit.Chem.SanitizeFlags.SANITIZE_NONE:
            return ""
    return canonical(spelling(both))  # read again, as every clean row was


def fragments(smiles: str) -> frozenset[str]:
    """Return the pieces that a molecule is made of: ring systems, chains, BRICS pieces and functional groups.

    * Cutting the single bonds between rings and what hangs on them leaves ring systems (with doubly bound neighbours) and chains.
    * BRICS cuts bonds that a synthesis would make.
    * Functional groups are hetero-atoms with the carbons that share a multiple bond with them or hold two of them (Ertl, 2017).

    Cut bonds become hydrogens, so that each piece is a molecule and ``contains`` finds it again.

    Returns:
        Canonical SMILES; empty if the molecule cannot be read.

    >>> sorted(fragments("O=C(O)CC1CS1"))
    ['C1CS1', 'CC(=O)O', 'CCC', 'O=CO', 'S']
    """
    molecule = read(smiles)
    if molecule is None:
        return frozenset()
    kit = rdkit()
    with kit.BlockLogs():
        brics = spelling(kit.Chem.FragmentOnBRICSBonds(molecule)).split(".")
        texts = {*_cut(molecule, _RING_TO_OUTSIDE), *_cut(molecule, _GROUP_TO_REST), *(brics if len(brics) > 1 else [])}
        if molecule.GetRingInfo().NumRings() and not molecule.HasSubstructMatch(_pattern(_RING_TO_OUTSIDE)):
            texts.add(smiles)  # it is a ring system
        return frozenset(piece for text in texts if (piece := _tidy(text))) - {"C"}


def _cut(molecule: Any, bond: str) -> list[str]:
    """Return the SMILES of the pieces that are left when the bonds that a SMARTS describes are cut; none without such bonds."""
    bonds = [molecule.GetBondBetweenAtoms(*ends).GetIdx() for ends in molecule.GetSubstructMatches(_pattern(bond))]
    if not bonds:
        return []
    return spelling(rdkit().Chem.FragmentOnBonds(molecule, bonds, addDummies=False)).split(".")


@cache
def _pattern(smarts: str) -> Any:
    return rdkit().Chem.MolFromSmarts(smarts)


@lru_cache(maxsize=_KEPT_PIECES)
def _tidy(text: str) -> str:
    """Return the canonical SMILES of a piece without the marks that cutting left, or "" if it is no molecule."""
    return canonical(re.sub(r"\[\d*\*\]", "[H]", text))  # where BRICS cut


def maccs(smiles: Sequence[str]) -> Tensor:
    """Return (N, 167) float32 MACCS keys, 0 or 1; a row of zeros where there is no molecule."""
    return _bits(smiles, rdkit().maccs, MACCS_BITS)


def morgan(smiles: Sequence[str]) -> Tensor:
    """Return (N, 2048) float32 Morgan fingerprints of radius 3, 0 or 1; a row of zeros where there is no molecule."""
    return _bits(smiles, _morgan_generator().GetFingerprint, MORGAN_BITS)


@cache
def _morgan_generator() -> Any:
    return rdkit().fingerprints.GetMorganGenerator(radius=MORGAN_RADIUS, fpSize=MORGAN_BITS)


def _bits(smiles: Sequence[str], fingerprint: Any, size: int) -> Tensor:
    places = {text: place for place, text in enumerate(dict.fromkeys(smiles))}  # generators repeat themselves
    bits = torch.zeros(len(places), size)
    for text, place in places.items():
        molecule = read(text)
        if molecule is not None:
            bits[place, list(fingerprint(molecule).GetOnBits())] = 1
    return bits[torch.tensor([places[text] for text in smiles], dtype=torch.int64)]


@cache
def rdkit() -> Any:
    """Return what is used of RDKit.

    Raises:
        ImportError: it is not installed; names the line that installs it.
    """
    try:
        from rdkit import Chem
        from rdkit.Chem import rdFingerprintGenerator, rdMolDescriptors
        from rdkit.rdBase import BlockLogs
    except ImportError as error:
        raise ImportError(f"molecules need RDKit ({error}): pip install 'lustral[molecules]'") from error
    return SimpleNamespace(
        Chem=Chem,
        BlockLogs=BlockLogs,
        fingerprints=rdFingerprintGenerator,
        maccs=rdMolDescriptors.GetMACCSKeysFingerprint,
    )
