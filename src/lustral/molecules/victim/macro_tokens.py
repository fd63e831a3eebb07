"""The tokeniser of molecules: a vocabulary counted on training molecules, and molecules as rows of numbers.

The paper's victim writes molecules as trees of motifs (HierVAE); here the commonest ring systems, with the atom they are
attached at, are words of their own, and everything else is spelled atom by atom (see ``pieces``).

Reference:
    Jin, Barzilay, Jaakkola, "Hierarchical Generation of Molecular Graphs using Structural Motifs", ICML 2020.
    Krenn et al., "Self-referencing embedded strings (SELFIES)", Machine Learning: Science and Technology, 2020.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from lustral.molecules.chemistry import rdkit, read
from lustral.molecules.victim.derivation import Derivation, Grammar
from lustral.molecules.victim.pieces import (
    BOND_MARKS,
    MAX_RING_ATOMS,
    AtomWord,
    RingWord,
    SiteWord,
    Word,
    WordError,
    read_word,
    template,
)

MOST_WORDS = 20_000  # of a vocabulary
ALWAYS = ("-C/0", ".C/1", "@", *(f"@{site}" for site in range(MAX_RING_ATOMS)))  # so that every derivation can go on


class MoleculeTree:
    """A molecule cut into ring systems and chain atoms; all bonds between these make a tree.

    The root is the smallest ring system, of equals the one that RDKit ranks first, so that a rare small ring is decided on with
    the first word; without rings, the atom that RDKit ranks first.
    """

    def __init__(self, smiles: str) -> None:
        """Read and cut a molecule.

        Raises:
            WordError: it cannot be read or has several components.
        """
        chem, mol = rdkit().Chem, read(smiles)
        if mol is None or "." in smiles:
            raise WordError(f"{smiles[:60]!r} is not a molecule of one component")
        self.ranks = list(chem.CanonicalRankAtoms(mol))
        chem.Kekulize(mol, clearAromaticFlags=True)
        self.atoms = [(atom.GetSymbol(), atom.GetFormalCharge(), atom.GetTotalNumHs()) for atom in mol.GetAtoms()]
        self.neighbours: list[dict[int, int]] = [{} for _ in self.atoms]
        self.system = list(range(len(self.atoms)))  # number of the ring system or chain atom
        for bond in mol.GetBonds():
            first, second, order = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), int(bond.GetBondType())
            self.neighbours[first][second] = self.neighbours[second][first] = order
            if bond.IsInRing() and self.system[first] != self.system[second]:
                old, kept = self.system[first], self.system[second]
                self.system = [kept if number == old else number for number in self.system]
        self._alone: dict[tuple[tuple[int, ...], int | None], tuple[str, list[int]]] = {}
        self.members: dict[int, list[int]] = {}
        for atom, number in enumerate(self.system):
            self.members.setdefault(number, []).append(atom)

    def root(self) -> int:
        """Return the atom to start from."""
        rings = [atoms for atoms in self.members.values() if len(atoms) > 1]
        atoms = min(rings, key=lambda ring: (len(ring), min(self.ranks[atom] for atom in ring)), default=None)
        return min(atoms if atoms is not None else range(len(self.atoms)), key=self.ranks.__getitem__)

    def hangs_on(self, atom: int) -> list[tuple[int, int]]:
        """Return (atom, order) of what is bonded to an atom outside its ring system."""
        return [(to, order) for to, order in self.neighbours[atom].items() if self.system[to] != self.system[atom]]

    def alone(self, atoms: Sequence[int], entry: int | None) -> tuple[str, list[int]]:
        """Return a ring system by itself, hydrogens in the place of the rest.

        Args:
            atoms: of the ring system.
            entry: the one that its SMILES starts at, or None for the canonical start.

        Returns:
            The SMILES, and its atoms in the order of the SMILES. Without a SMILES that can be used: "".
        """
        if (tuple(atoms), entry) in self._alone:
            return self._alone[tuple(atoms), entry]
        kit, chem = rdkit(), rdkit().Chem
        part, number = chem.RWMol(), {atom: place for place, atom in enumerate(atoms)}
        for at in atoms:
            element, charge, hydrogens = self.atoms[at]
            atom = chem.Atom(element)
            atom.SetFormalCharge(charge)
            atom.SetNoImplicit(True)
            atom.SetNumExplicitHs(hydrogens + sum(bond for _, bond in self.hangs_on(at)))
            part.AddAtom(atom)
        for at in atoms:
            for to, bond in self.neighbours[at].items():
                if at < to and to in number:
                    part.AddBond(number[at], number[to], chem.BondType.values[bond])
        smiles, order = "", list[int]()
        with kit.BlockLogs():
            failed = chem.SanitizeMol(part, catchErrors=True)
        if not failed:
            smiles = str(chem.MolToSmiles(part, rootedAtAtom=-1 if entry is None else number[entry]))
            order = [atoms[place] for place in part.GetPropsAsDict(True, True)["_smilesAtomOutputOrder"]]
        self._alone[tuple(atoms), entry] = smiles, order
        return smiles, order


@dataclass(frozen=True)
class Vocabulary:
    """The words that molecules are written in.

    Attributes:
        words: their spellings; number 0 is the first.
        max_length: most words of a molecule.
    """

    words: tuple[str, ...]
    max_length: int = 80
    grammar: Grammar = field(init=False, repr=False, compare=False)
    numbers: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check every word; what a file holds may be anything."""
        if not 1 <= len(self.words) <= MOST_WORDS or len(set(self.words)) != len(self.words):
            raise WordError(f"expected 1 to {MOST_WORDS:,} different words; got {len(self.words):,}")
        if missing := set(ALWAYS) - set(self.words):
            raise WordError(f"a vocabulary of molecules needs the words {', '.join(sorted(missing)[:5])}")
        meanings = [read_word(word) for word in self.words]
        object.__setattr__(self, "grammar", Grammar(meanings, max_length=self.max_length))
        object.__setattr__(self, "numbers", {word: number for number, word in enumerate(self.words)})

    def __len__(self) -> int:
        """Return the number of words."""
        return len(self.words)

    @property
    def rings(self) -> frozenset[str]:
        """Return the spellings of the words that are ring systems."""
        return frozenset(word for word in self.words if "{" in word)

    def encode(self, smiles: str) -> tuple[int, ...] | None:
        """Return the numbers of a molecule's words; None if it needs other words, is too long, or would read back differently."""
        try:
            words = written(smiles, self.rings)
        except WordError:
            return None
        if len(words) > self.max_length or any(word not in self.numbers for word in words):
            return None
        numbers = tuple(self.numbers[word] for word in words)
        return numbers if self.decode(numbers) == smiles else None

    def decode(self, numbers: Iterable[int]) -> str:
        """Return the canonical SMILES of a text; "" if it is not finished or breaks a rule."""
        derivation = Derivation()
        try:
            for number in numbers:
                if derivation.is_complete:
                    return ""
                derivation.push(self.grammar.words[number])
        except (WordError, IndexError):
            return ""
        return derivation.smiles()


def count_vocabulary(smiles: Sequence[str], *, macro_rings: int = 600, max_length: int = 80) -> Vocabulary:
    """Return the vocabulary of a training set.

    Args:
        smiles: canonical SMILES; what cannot be read is passed over.
        macro_rings: most words that are ring systems: the commonest, of those seen at least twice.
        max_length: most words of a molecule.
    """
    rings: Counter[str] = Counter()
    for molecule in smiles:
        try:
            rings.update(word for word in written(molecule, None) if "{" in word)
        except WordError:
            continue
    kept = frozenset(word for word, count in _commonest(rings) if count > 1 or len(smiles) < 2)
    kept = frozenset([word for word, _ in _commonest(rings) if word in kept][:macro_rings])
    others: Counter[str] = Counter()
    for molecule in smiles:
        try:
            others.update(written(molecule, kept))
        except WordError:
            continue
    words = [word for word, _ in _commonest(others) if word not in ALWAYS]
    return Vocabulary(words=(*ALWAYS, *words), max_length=max_length)


def _commonest(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


@lru_cache(maxsize=16_384)
def _tree(smiles: str) -> MoleculeTree:
    return MoleculeTree(smiles)


def written(smiles: str, rings: frozenset[str] | None) -> tuple[str, ...]:
    """Return the words of a molecule.

    Args:
        smiles: canonical SMILES.
        rings: spellings of the ring systems that are words; None takes all.

    Raises:
        WordError: it is no molecule, or has something that words cannot say (a bond of another order).
    """
    tree = _tree(smiles)
    return _Writer(tree, rings).piece(tree.root(), None, 0)


@dataclass
class _Writer:
    """Writes the tree of one molecule in depth-first order; smaller children come first."""

    tree: MoleculeTree
    rings: frozenset[str] | None

    def piece(self, atom: int, parent: int | None, bond: int) -> tuple[str, ...]:
        """Return the words of what hangs at ``atom``, seen from ``parent``."""
        if bond > 3:
            raise WordError(f"a bond of order {bond} has no word")
        atoms = self.tree.members[self.tree.system[atom]]
        if 1 < len(atoms) <= MAX_RING_ATOMS and (words := self._ring(atoms, atom, parent, bond)):
            return words
        return self._chain(atom, parent, bond, [], set())

    def _children(self, atom: int, parent: int | None) -> list[tuple[str, ...]]:
        return [self.piece(to, atom, order) for to, order in self.tree.hangs_on(atom) if to != parent]

    def _ring(self, atoms: list[int], entry: int, parent: int | None, bond: int) -> tuple[str, ...]:
        """Return the words of a ring system, or none if it is not in the vocabulary."""
        smiles, order = self.tree.alone(atoms, None if parent is None else entry)
        has_children = sum(len(self.tree.hangs_on(atom)) for atom in atoms) > (parent is not None)
        word = str(RingWord(bond=bond, smiles=smiles, has_children=has_children))
        if not smiles or len(smiles) > 200 or (self.rings is not None and word not in self.rings):
            return ()
        try:
            ring = template(smiles)
        except WordError:
            return ()
        hanging = [(child, place) for place, atom in enumerate(order) for child in self._children(atom, parent)]
        hanging.sort(key=lambda item: (len(item[0]), item[0]))
        renumbered = ring.symmetries if parent is not None else ring.all_symmetries
        best = min([sym[place] for _, place in hanging] for sym in renumbered)
        words = [word]
        for (child, _), site in zip(hanging, best, strict=True):
            words += [str(SiteWord(site=site)), *child]
        return (*words, "@") if has_children else tuple(words)

    def _chain(
        self, atom: int, parent: int | None, bond: int, above: list[int], used: set[frozenset[int]]
    ) -> tuple[str, ...]:
        """Return the words of an atom, and of the rest of its ring system if that is not in the vocabulary.

        Args:
            atom: to write.
            parent: the atom before it.
            bond: order of the bond to the parent.
            above: atoms of the same ring system on the way down to it.
            used: ring bonds that are written already.
        """
        element, charge, _ = self.tree.atoms[atom]
        children = sorted(self._children(atom, parent), key=lambda words: (len(words), words))
        inside = [to for to in self.tree.neighbours[atom] if self.tree.system[to] == self.tree.system[atom]]
        for to in sorted(inside, key=self.tree.ranks.__getitem__):
            edge, order = frozenset((atom, to)), self.tree.neighbours[atom][to]
            if to == parent or edge in used:
                continue
            used.add(edge)
            if order > 3:
                raise WordError(f"a bond of order {order} has no word")
            if to in above:
                children.append((f"~{BOND_MARKS[order]}{len(above) - above.index(to)}",))
            else:
                children.append(self._chain(to, atom, order, [*above, atom], used))
        word = AtomWord(bond=bond, element=element, charge=charge, children=len(children))
        return (str(word), *(each for child in children for each in child))


def round_trips(smiles: Sequence[str], vocabulary: Vocabulary) -> tuple[list[int], list[tuple[int, ...]]]:
    """Return the places of the molecules that the vocabulary can write, and their words as numbers."""
    places, rows = [], []
    for place, molecule in enumerate(smiles):
        if (numbers := vocabulary.encode(molecule)) is not None:
            places.append(place)
            rows.append(numbers)
    return places, rows


__all__ = ["MoleculeTree", "Vocabulary", "Word", "count_vocabulary", "round_trips", "written"]
