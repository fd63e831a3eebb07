"""The Fréchet ChemNet distance: beside the package's own, and by hand."""

from __future__ import annotations

import builtins
import math
from typing import Any

import pytest
import torch

from lustral.core.randomness import child
from lustral.molecules import frechet
from lustral.molecules.frechet import chemnet_states, frechet_chemnet_distance, frechet_distance
from lustral.molecules.sources import embedded

SMILES = embedded().data.smiles


def test_the_distance_of_gaussians_by_hand() -> None:
    """Means 0 and (3, 4), covariances diag(4, 1) and diag(9, 16): 25 + (2 - 3)² + (1 - 4)² = 35."""
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * math.sqrt(3 / 4)  # covariance: the identity
    first, second = corners * torch.tensor([2.0, 1.0]), corners * torch.tensor([3.0, 4.0]) + torch.tensor([3.0, 4.0])
    assert frechet_distance(first, second) == pytest.approx(35, rel=1e-5)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_few_vectors_of_many_dimensions_stay_real() -> None:
    first, second = (torch.randn(5, 64, generator=child(seed)) for seed in (0, 1))
    distance = frechet_distance(first, second)
    assert math.isfinite(distance)
    assert distance == pytest.approx(frechet_distance(second, first), rel=1e-6)


def test_states_and_distance_are_those_of_the_package() -> None:
    """Golden values: fcd 1.2 get_fcd of these two lists gave 10.908271 (the script that made them is in the commit's body)."""
    assert frechet_chemnet_distance(SMILES[:150], SMILES[150:300]) == pytest.approx(10.908271, abs=1e-3)


def test_batches_do_not_change_the_states() -> None:
    states = chemnet_states(SMILES[:7], batch_size=3)
    assert states.shape == (7, 512)
    assert torch.allclose(states, chemnet_states(SMILES[:7]), atol=1e-6)
    assert torch.equal(chemnet_states([SMILES[1], SMILES[0], SMILES[1]])[[0, 2]], chemnet_states(SMILES[:2])[[1, 1]])
    assert chemnet_states([]).shape == (0, 512)


def test_too_few_molecules_have_no_distance() -> None:
    assert math.isnan(frechet_chemnet_distance(["CCO"], SMILES[:3]))
    assert math.isnan(frechet_chemnet_distance(["", "", "C" * 400], SMILES[:3]))


def test_a_missing_package_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **rest: Any) -> Any:
        if name.startswith("fcd"):
            raise ImportError("No module named 'fcd'")
        return real(name, *args, **rest)

    frechet._chemnet.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'lustral\[molecules\]'"):
        chemnet_states(["CCO"])
