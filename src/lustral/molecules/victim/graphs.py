"""Molecules as graphs, and the graph encoder (GIN).

Reference:
    Xu et al., "How Powerful are Graph Neural Networks?", ICLR 2019; Zhu et al., "3M-Diffusion", COLM 2024: 5 layers of width 300,
    bond embeddings added to the messages, the last layer's states. Here LayerNorm stands for BatchNorm, so that all stages and
    all batch sizes see one function (the published code has two paths, with and without a LayerNorm).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lustral.molecules.chemistry import rdkit, read
from lustral.molecules.victim.ragged import RaggedRows

ELEMENTS = ("C", "N", "O", "S", "P", "F", "Cl", "Br", "I", "Si", "Se", "B")
NUM_KINDS = 1 + len(ELEMENTS)  # 0: any other element
NUM_CHARGES = 7  # -3 to 3
NUM_HYDROGENS = 5
NUM_DEGREES = 8
NUM_ORDERS = 5  # single, double, triple, aromatic, any other
FEATURE_SIZES = (NUM_KINDS, NUM_CHARGES, NUM_HYDROGENS, NUM_DEGREES, 2, 2)  # then in a ring, aromatic
NUM_BONDS = 2 * NUM_ORDERS  # outside and inside rings


@dataclass(frozen=True)
class Graphs:
    """Molecules as one ragged graph.

    Attributes:
        atoms: six numbers for each atom, end to end, a row for each molecule.
        bonds: (from, to, kind) for each direction of each bond, atoms counted within their molecule.
    """

    atoms: RaggedRows
    bonds: RaggedRows

    @classmethod
    def of(cls, smiles: Sequence[str]) -> Graphs:
        """Read molecules; what is no molecule becomes a graph of one unknown atom."""
        pairs = [_features(text) for text in smiles]
        return cls(RaggedRows.of([atoms for atoms, _ in pairs]), RaggedRows.of([bonds for _, bonds in pairs]))

    def __len__(self) -> int:
        """Return the number of molecules."""
        return len(self.atoms)

    def batch(self, rows: Tensor) -> GraphBatch:
        """Return some molecules as one graph."""
        places, owner = self.atoms.places(rows)
        width = len(FEATURE_SIZES)
        features, owner = self.atoms.values[places].view(-1, width), owner[::width]
        counts = self.atoms.lengths[rows] // width
        bond_places, bond_owner = self.bonds.places(rows)
        bonds, bond_owner = self.bonds.values[bond_places].view(-1, 3), bond_owner[::3]
        first = (counts.cumsum(0) - counts)[bond_owner]
        return GraphBatch(features, owner, first + bonds[:, 0], first + bonds[:, 1], bonds[:, 2], counts)

    def to(self, device: torch.device) -> Graphs:
        """Return the graphs on a device."""
        return Graphs(self.atoms.to(device), self.bonds.to(device))


@dataclass(frozen=True)
class GraphBatch:
    """Some molecules as one graph.

    Attributes:
        features: (A, 6) int64.
        owner: (A,) int64, the molecule of each atom.
        source: (E,) int64 atoms that send.
        target: (E,) int64 atoms that receive.
        kinds: (E,) int64 of the bonds.
        counts: (B,) int64 atoms of each molecule.
    """

    features: Tensor
    owner: Tensor
    source: Tensor
    target: Tensor
    kinds: Tensor
    counts: Tensor


def _features(smiles: str) -> tuple[list[int], list[int]]:
    chem, mol = rdkit().Chem, read(smiles)
    if mol is None:
        return [0] * len(FEATURE_SIZES), []
    atoms: list[int] = []
    for atom in mol.GetAtoms():
        symbol = atom.GetSymbol()
        atoms += [
            ELEMENTS.index(symbol) + 1 if symbol in ELEMENTS else 0,
            min(max(atom.GetFormalCharge(), -3), 3) + 3,
            min(atom.GetTotalNumHs(), NUM_HYDROGENS - 1),
            min(atom.GetDegree(), NUM_DEGREES - 1),
            int(atom.IsInRing()),
            int(atom.GetIsAromatic()),
        ]
    orders = {chem.BondType.SINGLE: 0, chem.BondType.DOUBLE: 1, chem.BondType.TRIPLE: 2, chem.BondType.AROMATIC: 3}
    bonds: list[int] = []
    for bond in mol.GetBonds():
        first, second = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        kind = orders.get(bond.GetBondType(), 4) + NUM_ORDERS * int(bond.IsInRing())
        bonds += [first, second, kind, second, first, kind]
    return atoms, bonds


class GraphEncoder(nn.Module):
    """GIN: from molecules to one vector each."""

    def __init__(self, *, width: int, layers: int, out: int) -> None:
        """Build it.

        Args:
            width: of the atoms' states.
            layers: rounds of messages.
            out: size of a molecule's vector.
        """
        super().__init__()
        offsets = torch.tensor((0, *FEATURE_SIZES[:-1])).cumsum(0)
        self.register_buffer("offsets", offsets, persistent=False)
        self.atoms = nn.Embedding(sum(FEATURE_SIZES), width)
        nn.init.normal_(self.atoms.weight, std=0.5)
        self.bonds = nn.ModuleList(nn.Embedding(NUM_BONDS, width) for _ in range(layers))
        self.updates = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.LayerNorm(width))
            for _ in range(layers)
        )
        self.out = nn.Linear(2 * width, out)

    def forward(self, graphs: GraphBatch) -> Tensor:
        """Return (B, out): mean and scaled sum of the atoms' last states, projected."""
        offsets: Tensor = self.offsets  # type: ignore[assignment]
        atoms = torch.zeros(len(graphs.features), len(self.atoms.weight), device=offsets.device)
        states = atoms.scatter_(1, graphs.features + offsets, 1.0) @ self.atoms.weight  # faster than looking rows up
        kinds = F.one_hot(graphs.kinds, NUM_BONDS).to(states.dtype)
        for number, (bonds, update) in enumerate(zip(self.bonds, self.updates, strict=True)):
            messages = F.relu(states.index_select(0, graphs.source) + kinds @ bonds.get_parameter("weight"))
            new = update(states.index_add(0, graphs.target, messages))
            states = states + (F.relu(new) if number < len(self.updates) - 1 else new)
        total = states.new_zeros(len(graphs.counts), states.shape[1]).index_add(0, graphs.owner, states)
        counts = graphs.counts[:, None].to(states.dtype)
        projected: Tensor = self.out(torch.cat([total / counts, total / 16], dim=1))
        return projected
