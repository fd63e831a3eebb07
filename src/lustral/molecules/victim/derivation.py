"""From words to molecules: what may follow, so that every text that a decoder writes is a molecule.

A derivation keeps the places that still wait for a child, with the bonds that each can take. ``Grammar`` turns that into a mask
over the vocabulary, and near the largest length lets only words without children through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lustral.molecules.chemistry import canonical, rdkit
from lustral.molecules.victim.pieces import (
    AtomWord,
    ClosureWord,
    RingWord,
    SiteWord,
    Word,
    WordError,
    capacity,
    template,
)

MOST_MASKS = 20_000  # that a grammar remembers
MOST_ATOMS = 120  # of a molecule; past it only words without children are let through


@dataclass(slots=True)
class _Atom:
    """An atom whose children are being written."""

    place: int
    spare: int  # bonds it can still take, by order
    waiting: int  # children to come


@dataclass(slots=True)
class _Ring:
    """A ring system whose children are being written."""

    start: int
    free: list[int]
    site: int | None = None  # where the next child goes
    count: int = 0


Context = tuple[str, int, tuple[int, ...]]


@dataclass(slots=True)
class Derivation:
    """A molecule that is being written."""

    atoms: list[tuple[str, int, int]] = field(default_factory=list)  # element, charge, hydrogens or -1 for as usual
    bonds: list[tuple[int, int, int]] = field(default_factory=list)
    open: list[_Atom | _Ring] = field(default_factory=list)
    length: int = 0

    @property
    def is_complete(self) -> bool:
        """Tell whether nothing waits for a child."""
        return self.length > 0 and not self.open

    def waiting(self) -> int:
        """Return a bound on the words that complete it, if none of them has children."""
        return sum(item.waiting if isinstance(item, _Atom) else 1 + (item.site is not None) for item in self.open)

    def context(self) -> Context:
        """Return what decides on the next word: "start"; "child", its largest bond and the closures; "site" and its places."""
        if not self.open:
            return "start", 0, ()
        top = self.open[-1]
        if isinstance(top, _Atom):
            return "child", min(3, top.spare - top.waiting + 1), self._closures(top)
        if top.site is not None:
            return "child", min(3, top.free[top.site]), ()
        return "site", int(top.count > 0), tuple(site for site, free in enumerate(top.free) if free)

    def _closures(self, top: _Atom) -> tuple[int, ...]:
        """Return the largest bond of a closure to each atom up the chain, from two places up."""
        orders = []
        bonded = {second for first, second, _ in self.bonds if first == top.place}
        bonded |= {first for first, second, _ in self.bonds if second == top.place}
        limit = min(3, top.spare - top.waiting + 1)
        for item in self.open[-2::-1]:
            if not isinstance(item, _Atom):
                break
            orders.append(0 if item.place in bonded else max(0, min(limit, item.spare - item.waiting)))
        return tuple(orders[1:]) if orders else ()

    def push(self, word: Word) -> None:
        """Write a word that the context allows."""
        self.length += 1
        if isinstance(word, SiteWord):
            ring = self.open[-1]
            if not isinstance(ring, _Ring):
                raise WordError(f"{word} names a place, and no ring waits for one")
            if word.site is None:
                self.open.pop()
                self._close()
            else:
                ring.site = word.site
                ring.count += 1
        elif isinstance(word, ClosureWord):
            self._push_closure(word)
        else:
            self._push_piece(word)

    def _take(self, bond: int) -> int:
        """Give one place of the top to a child, and return the atom it is at; -1 at the start."""
        if not self.open:
            return -1
        top = self.open[-1]
        if isinstance(top, _Atom):
            top.spare -= bond
            top.waiting -= 1
            return top.place
        if top.site is None:
            raise WordError("a child came before its place on the ring")
        place, top.site = top.site, None
        top.free[place] -= bond
        element, charge, hydrogens = self.atoms[top.start + place]
        self.atoms[top.start + place] = (element, charge, hydrogens - bond)
        return top.start + place

    def _push_piece(self, word: AtomWord | RingWord) -> None:
        parent, start = self._take(word.bond), len(self.atoms)
        if parent >= 0:
            self.bonds.append((parent, start, word.bond))
        if isinstance(word, AtomWord):
            self.atoms.append((word.element, word.charge, -1))
            spare = capacity(word.element, word.charge) - word.bond
            self.open.append(_Atom(place=start, spare=spare, waiting=word.children))
        else:
            ring = template(word.smiles)
            free = list(ring.free)
            free[0] -= word.bond
            self.atoms += [
                (element, charge, hydrogens) for (element, charge), hydrogens in zip(ring.atoms, free, strict=True)
            ]
            self.bonds += [(start + first, start + second, order) for first, second, order in ring.bonds]
            if word.has_children:
                self.open.append(_Ring(start=start, free=free))
                return
        self._close()

    def _push_closure(self, word: ClosureWord) -> None:
        chain = self.open[-1 - word.distance : -1]
        if len(chain) < word.distance or not all(isinstance(item, _Atom) for item in chain):
            raise WordError(f"{word} reaches past the start of the chain")
        place, ancestor = self._take(word.bond), chain[0]
        assert isinstance(ancestor, _Atom)
        ancestor.spare -= word.bond
        self.bonds.append((place, ancestor.place, word.bond))
        self._close()

    def _close(self) -> None:
        """Leave what has all its children."""
        while self.open and isinstance(self.open[-1], _Atom) and self.open[-1].waiting == 0:
            self.open.pop()

    def smiles(self) -> str:
        """Return the canonical SMILES; "" if it is not complete or no molecule."""
        if not self.is_complete:
            return ""
        kit, chem = rdkit(), rdkit().Chem
        mol = chem.RWMol()
        for element, charge, hydrogens in self.atoms:
            atom = chem.Atom(element)
            atom.SetFormalCharge(charge)
            if hydrogens >= 0:
                atom.SetNoImplicit(True)
                atom.SetNumExplicitHs(hydrogens)
            mol.AddAtom(atom)
        for first, second, order in self.bonds:
            mol.AddBond(first, second, chem.BondType.values[order])
        with kit.BlockLogs():
            if chem.SanitizeMol(mol, catchErrors=True):
                return ""
        return canonical(chem.MolToSmiles(mol))


class Grammar:
    """What may follow in a derivation, as masks over a vocabulary."""

    def __init__(self, words: Sequence[Word], *, max_length: int) -> None:
        """Take the words of the vocabulary, in order, and the most words of a molecule."""
        self.words, self.max_length = tuple(words), max_length
        self._masks: dict[tuple[Context, bool], Tensor] = {}

    def mask(self, derivation: Derivation) -> Tensor:
        """Return (V,) bool: the words that may come next."""
        left = self.max_length - derivation.length - derivation.waiting()
        key = (derivation.context(), left <= 8 or len(derivation.atoms) > MOST_ATOMS)
        if key not in self._masks:
            if len(self._masks) >= MOST_MASKS:
                self._masks.clear()
            self._masks[key] = self._build(*key)
        return self._masks[key]

    def _build(self, context: Context, only_leaves: bool) -> Tensor:
        mask = torch.tensor([self._allows(word, context, only_leaves) for word in self.words], dtype=torch.bool)
        if only_leaves and not mask.any():  # nothing without children fits: let it grow
            mask = torch.tensor([self._allows(word, context, False) for word in self.words], dtype=torch.bool)
        return mask

    def _allows(self, word: Word, context: Context, only_leaves: bool) -> bool:
        kind, number, places = context
        if kind == "site":
            if not isinstance(word, SiteWord):
                return False
            if word.site is None:
                return number > 0 or not places
            return word.site in places and not (only_leaves and number > 0)
        if isinstance(word, AtomWord | RingWord):
            fits = word.bond == 0 if kind == "start" else 1 <= word.bond <= number
            return fits and not (only_leaves and (word.children if isinstance(word, AtomWord) else word.has_children))
        if isinstance(word, ClosureWord):
            at = word.distance - 2
            return kind == "child" and at < len(places) and word.bond <= places[at]
        return False
