"""The Fréchet ChemNet distance: how far the molecules of a generator are, as a crowd, from real ones.

ChemNet reads SMILES and predicts activities; its last hidden state is taken for each molecule, and two sets are compared as two
Gaussians. The package ``fcd`` carries the network. The distance of small sets is too large: it falls with the number of
molecules, so only sets of one size compare.

Reference:
    Preuer et al., "Fréchet ChemNet Distance: A Metric for Generative Models for Molecules in Drug Discovery", Journal of
    Chemical Information and Modeling, 2018.
"""

from __future__ import annotations

import io
import pkgutil
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

CHEMNET_LENGTH = 350  # characters that every SMILES is padded to; ChemNet was trained so
_WEIGHTS = "ChemNet_v0.13_pretrained.pt"


def frechet_chemnet_distance(
    generated: Sequence[str], real: Sequence[str], *, device: torch.device | None = None, batch_size: int = 128
) -> float:
    """Return the distance between two sets of molecules; NaN if one of them has fewer than two.

    Args:
        generated: canonical SMILES; texts longer than 349 characters are left out.
        real: the same.
        device: where ChemNet runs; None is the CPU.
        batch_size: molecules that ChemNet reads at once.

    Raises:
        ImportError: the package ``fcd`` is not installed; names the line that installs it.
    """
    sets = [[smiles for smiles in part if 0 < len(smiles) < CHEMNET_LENGTH] for part in (generated, real)]
    if min(map(len, sets)) < 2:
        return float("nan")
    first, second = (chemnet_states(part, device=device, batch_size=batch_size) for part in sets)
    return frechet_distance(first, second)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the squared Fréchet distance of the Gaussians with the means and covariances of two sets of vectors.

    |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), where the trace of the root is the sum of the roots of the eigenvalues of
    C1^½ C2 C1^½: symmetric, so that neither few vectors nor rounding make it complex.

    Args:
        first: (N, D) float, N >= 2.
        second: (M, D) float, M >= 2.

    >>> frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]]))
    9.0
    """
    first, second = first.double().cpu(), second.double().cpu()
    gap = first.mean(0) - second.mean(0)
    one, two = (part.T.cov().reshape(len(gap), len(gap)) for part in (first, second))
    values, vectors = torch.linalg.eigh(one)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    crossed = torch.linalg.eigvalsh(root @ two @ root).clamp_min(0).sqrt().sum()
    return max(0.0, float(gap.square().sum() + one.trace() + two.trace() - 2 * crossed))


def chemnet_states(smiles: Sequence[str], *, device: torch.device | None = None, batch_size: int = 128) -> Tensor:
    """Return (N, 512) float32, ChemNet's last hidden state of each molecule, on the CPU."""
    network, codes = _chemnet()
    places = {each: place for place, each in enumerate(dict.fromkeys(smiles))}  # generators repeat themselves
    distinct = list(places)
    place = device or torch.device("cpu")
    network = network.to(place)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(distinct), batch_size):
            one_hot = torch.stack([codes(each) for each in distinct[start : start + batch_size]])
            parts.append(network(one_hot.to(place).transpose(1, 2)).float().cpu())
    states = torch.cat(parts) if parts else torch.empty(0, 512)
    return states[torch.tensor([places[each] for each in smiles], dtype=torch.int64)]


@cache
def _chemnet() -> tuple[nn.Module, Any]:
    """Return the network and what turns a SMILES into its input, (350, 35) float32."""
    try:
        from fcd.utils import get_one_hot, load_imported_model
    except ImportError as error:
        raise ImportError(
            f"the Fréchet ChemNet distance needs the package fcd ({error}): pip install 'lustral[molecules]'"
        ) from error
    content = pkgutil.get_data("fcd", _WEIGHTS)
    if content is None:
        raise ImportError(
            f"the package fcd came without {_WEIGHTS}: pip install --force-reinstall 'lustral[molecules]'"
        )
    network: nn.Module = load_imported_model(torch.load(io.BytesIO(content), weights_only=True))

    def codes(smiles: str) -> Tensor:
        one_hot = torch.from_numpy(get_one_hot(smiles, pad_len=CHEMNET_LENGTH)).float()
        return one_hot / one_hot.shape[1]  # as fcd.utils.SmilesDataset does

    return network.eval(), codes
