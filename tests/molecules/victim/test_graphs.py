"""Molecules as ragged graphs, and rows batched by length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lustral.core.randomness import child
from lustral.molecules.victim.graphs import GraphEncoder, Graphs
from lustral.molecules.victim.ragged import RaggedRows, RowNumbers

pytest.importorskip("rdkit")


def encoder() -> GraphEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GraphEncoder(width=16, layers=3, out=8).eval()


def test_ethanol_as_a_graph() -> None:
    batch = Graphs.of(["CCO", "C"]).batch(torch.tensor([1, 0]))
    assert batch.counts.tolist() == [1, 3]
    assert batch.owner.tolist() == [0, 1, 1, 1]
    assert batch.features.tolist()[0] == [1, 3, 4, 0, 0, 0]  # CH4
    assert batch.features.tolist()[3] == [3, 3, 1, 1, 0, 0]  # OH
    assert sorted(zip(batch.source.tolist(), batch.target.tolist(), strict=True)) == [(1, 2), (2, 1), (2, 3), (3, 2)]


def test_a_molecule_has_one_vector_however_it_is_written_and_with_whatever_it_is_batched() -> None:
    model, spellings = encoder(), ["OCC", "CCO", "C(O)C"]
    alone = torch.cat([model(Graphs.of([text]).batch(torch.tensor([0]))) for text in spellings])
    torch.testing.assert_close(alone, alone[:1].expand(3, -1))
    together = model(Graphs.of(["c1ccccc1", *spellings, "bad", ""]).batch(torch.tensor([0, 2, 5, 4])))
    torch.testing.assert_close(together[1], alone[0])
    assert torch.isfinite(together).all()


def test_bonds_rings_and_charges_are_seen() -> None:
    texts = ["CCCCCC", "C1CCCCC1", "c1ccccc1", "CC=CCCC", "CCCCC[NH3+]", "CCCCCN", "CC(C)CCC"]
    vectors = encoder()(Graphs.of(texts).batch(torch.arange(len(texts))))
    distances = torch.cdist(vectors, vectors) + 9 * torch.eye(len(texts))
    assert distances.min() > 1e-3


@given(st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_rows_come_back_as_they_were(rows: list[list[int]], draw: object) -> None:
    ragged = RaggedRows.of(rows)
    chosen = torch.tensor([len(rows) - 1, 0])
    padded = ragged.padded(chosen, fill=-1)
    assert [[value for value in row if value >= 0] for row in padded.tolist()] == [rows[-1], rows[0]]
    places, owner = ragged.places(chosen)
    assert ragged.values[places].tolist() == rows[-1] + rows[0]
    assert owner.tolist() == [0] * len(rows[-1]) + [1] * len(rows[0])


def test_an_epoch_has_every_row_once_in_batches_of_like_length() -> None:
    lengths = torch.randint(1, 60, (1000,), generator=child(0, "lengths"))
    batches = list(RowNumbers(lengths).batches(50, generator=child(1), drop_last=True))
    assert torch.cat([batch.inputs for batch in batches]).sort().values.tolist() == list(range(1000))
    spread = [lengths[batch.inputs].float().std().item() for batch in batches]
    assert sum(spread) / len(spread) < 5 < lengths.float().std()
    first, second = (next(iter(RowNumbers(lengths).batches(50, generator=child(seed)))).inputs for seed in (1, 2))
    assert not torch.equal(first, second)
