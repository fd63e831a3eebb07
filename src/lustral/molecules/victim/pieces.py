"""The words that molecules are written in: atoms, whole ring systems, places on a ring, and ring closures.

A molecule is a tree of ring systems and chain atoms, and the words of a molecule are its tree in depth-first order::

    .C/2            an atom that starts the molecule and has two children
    =O/0            an atom at the end of a double bond, without children
    -N+1/1          a charged atom
    -{C1CS1}        a ring system without children, attached at the first atom of its SMILES
    -{C1CCNCC1}+    one with children: places and children follow, then the end of the ring
    @3  @           the next child sits at atom 3 of the ring; no more children
    ~=4             a ring closure, by a double bond, to the atom four places up the chain

So a ring system of the vocabulary is one word that says where the chain goes on, as in the motif decoder of HierVAE; one that is
not in the vocabulary is written as atoms with ring closures. Numbers of children make an end-of-text word needless.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

from lustral.molecules.chemistry import rdkit

BOND_MARKS = ".-=#"  # by order; 0 starts a molecule
MAX_RING_ATOMS = 30
MAX_RING_CHARACTERS = 200
_ATOM = re.compile(r"([.\-=#])([A-Z][a-z]?)([+-][1-9])?/([0-9])")
_RING = re.compile(r"([.\-=#])\{([^{}]{3,200})\}(\+?)")
_SITE = re.compile(r"@([0-9]{0,2})")
_CLOSURE = re.compile(r"~([\-=#])([1-9][0-9]?)")


class WordError(ValueError):
    """A word of a vocabulary has no meaning."""


@dataclass(frozen=True, kw_only=True)
class AtomWord:
    """An atom of a chain, or of a ring that the vocabulary lacks.

    Attributes:
        bond: order of the bond to its parent, 0 to 3.
        element: symbol.
        charge: formal charge.
        children: number of words that hang on it.
    """

    bond: int
    element: str
    charge: int
    children: int

    def __str__(self) -> str:
        """Return the word as vocabularies store it."""
        charge = f"{self.charge:+d}" if self.charge else ""
        return f"{BOND_MARKS[self.bond]}{self.element}{charge}/{self.children}"


@dataclass(frozen=True, kw_only=True)
class RingWord:
    """A ring system, attached at the first atom of its SMILES.

    Attributes:
        bond: order of the bond to its parent, 0 to 3.
        smiles: the ring system alone, hydrogens in the place of what hangs on it.
        has_children: whether places and children follow.
    """

    bond: int
    smiles: str
    has_children: bool

    def __str__(self) -> str:
        """Return the word as vocabularies store it."""
        return f"{BOND_MARKS[self.bond]}{{{self.smiles}}}{'+' if self.has_children else ''}"


@dataclass(frozen=True, kw_only=True)
class SiteWord:
    """The atom of the ring that the next child hangs on; None ends the ring."""

    site: int | None

    def __str__(self) -> str:
        """Return the word as vocabularies store it."""
        return "@" if self.site is None else f"@{self.site}"


@dataclass(frozen=True, kw_only=True)
class ClosureWord:
    """A bond to an atom further up the chain.

    Attributes:
        bond: its order, 1 to 3.
        distance: places up, at least 2: the parent is at 1.
    """

    bond: int
    distance: int

    def __str__(self) -> str:
        """Return the word as vocabularies store it."""
        return f"~{BOND_MARKS[self.bond]}{self.distance}"


Word = AtomWord | RingWord | SiteWord | ClosureWord


def read_word(text: str) -> Word:
    """Return the meaning of a word.

    >>> read_word("-N+1/1")
    AtomWord(bond=1, element='N', charge=1, children=1)
    >>> str(read_word("-{C1CS1}+"))
    '-{C1CS1}+'

    Raises:
        WordError: it has none.
    """
    if match := _ATOM.fullmatch(text):
        bond, element, charge, children = match.groups()
        atom = AtomWord(bond=BOND_MARKS.index(bond), element=element, charge=int(charge or 0), children=int(children))
        if atom.bond + atom.children <= capacity(element, atom.charge):
            return atom
    elif match := _RING.fullmatch(text):
        bond, smiles, plus = match.groups()
        ring = RingWord(bond=BOND_MARKS.index(bond), smiles=smiles, has_children=bool(plus))
        if template(smiles).free[0] >= ring.bond:
            return ring
    elif match := _SITE.fullmatch(text):
        return SiteWord(site=int(match[1]) if match[1] else None)
    elif (match := _CLOSURE.fullmatch(text)) and int(match[2]) > 1:
        return ClosureWord(bond=BOND_MARKS.index(match[1]), distance=int(match[2]))
    raise WordError(f"{text[:40]!r} is no word of a molecule: expected an atom, a ring system, a place or a closure")


@dataclass(frozen=True)
class Template:
    """A ring system that molecules are built from, in one Kekule form.

    Attributes:
        atoms: element and charge of each atom.
        free: hydrogens of each atom, each of which may give its place to a bond.
        bonds: (first atom, second atom, order).
        all_symmetries: renumberings of the atoms that change nothing.
    """

    atoms: tuple[tuple[str, int], ...]
    free: tuple[int, ...]
    bonds: tuple[tuple[int, int, int], ...]
    all_symmetries: tuple[tuple[int, ...], ...]

    @cached_property
    def symmetries(self) -> tuple[tuple[int, ...], ...]:
        """Return the renumberings of the atoms that change nothing and keep atom 0."""
        return tuple(match for match in self.all_symmetries if match[0] == 0)


@lru_cache(maxsize=20_000)
def template(smiles: str) -> Template:
    """Return the ring system of a SMILES.

    Raises:
        WordError: it cannot be read, or is too large.
    """
    chem = rdkit().Chem
    with rdkit().BlockLogs():
        mol = chem.MolFromSmiles(smiles) if len(smiles) <= MAX_RING_CHARACTERS and "." not in smiles else None
    if mol is None or not 3 <= mol.GetNumAtoms() <= MAX_RING_ATOMS:
        raise WordError(f"{smiles[:40]!r} is no ring system of 3 to {MAX_RING_ATOMS} atoms")
    kinds = [(atom.GetSymbol(), atom.GetFormalCharge(), atom.GetTotalNumHs()) for atom in mol.GetAtoms()]
    matches = mol.GetSubstructMatches(mol, uniquify=False, maxMatches=64)
    symmetries = {match for match in matches if all(kinds[at] == kinds[to] for at, to in enumerate(match))}
    try:
        chem.Kekulize(mol, clearAromaticFlags=True)
    except (ValueError, RuntimeError) as error:
        raise WordError(f"{smiles[:40]!r} has no Kekule form") from error
    bonds = tuple((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), int(bond.GetBondType())) for bond in mol.GetBonds())
    if any(order > 3 for _, _, order in bonds):
        raise WordError(f"{smiles[:40]!r} has a bond of an order above 3")
    return Template(
        atoms=tuple((element, charge) for element, charge, _ in kinds),
        free=tuple(hydrogens for _, _, hydrogens in kinds),
        bonds=bonds,
        all_symmetries=tuple(sorted(symmetries | {tuple(range(len(kinds)))})),
    )


@cache
def capacity(element: str, charge: int) -> int:
    """Return the most bonds, counted by order, that an atom may have; 0 for an unknown element.

    >>> capacity("C", 0), capacity("N", 1), capacity("S", 0), capacity("Xx", 0)
    (4, 4, 6, 0)
    """
    kit, chem = rdkit(), rdkit().Chem
    for bonds in range(8, 0, -1):
        mol = chem.RWMol()
        try:
            atom = chem.Atom(element)
        except RuntimeError:
            return 0
        atom.SetFormalCharge(charge)
        mol.AddAtom(atom)
        for place in range(1, bonds + 1):
            mol.AddAtom(chem.Atom("C"))
            mol.AddBond(0, place, chem.BondType.SINGLE)
        with kit.BlockLogs():
            if not chem.SanitizeMol(mol, catchErrors=True):
                return bonds
    return 0
