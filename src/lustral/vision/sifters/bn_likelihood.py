"""Batch-norm likelihood: a trigger drives some channel, in some layer, where no ordinary image drives it.

The feature is that of FLARE (Hou, Luo, Hua, Chen, Zhang, Li, "FLARE: Toward Universal Dataset Purification against Backdoor
Attacks", IEEE TIFS 2025, arXiv 2411.19479): for each batch normalisation the least log-likelihood of what goes into it
(``lustral.vision.suspicion.looking.least_log_likelihood``). FLARE then embeds and clusters all images, which takes time and a
hundred poisoned images at least. The score made of the feature here is our own, in linear time:

    d_l = sqrt(-2 log p_l - log 2 pi)          the largest distance of layer l, in standard deviations of its channel
    z_l = (log d_l - median) / spread          among all images, the spread that of the lower half
    s   = sum_l -log P(Z > z_l)                Fisher's combination: one layer that is far out counts, several count more
    v   = C^-1 (mean z of the top - mean z of the others)      the top: the largest s; C the covariance of the others

    score = sign(v.z) |v.z|^0.85               v.z in standard deviations of the lower half, from its median

The last two steps are a clustering in linear time: what most of the top images have in common becomes the direction to look
in, once from s and once more from v.z. Fisher's discriminant weighs the layers, which depend on each other.

Labels take no part, so that poisoned images may be spread over all classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lustral.training import Trainer
from lustral.vision.suspicion.lines import NORMAL_QUARTILE
from lustral.vision.suspicion.looking import LOG_2PI, Looked
from lustral.vision.suspicion.one_look import OneLook
from lustral.vision.suspicion.scores import Scores, standardise

MOST_DEVIATION = 30.0  # of a layer, so that one whose lower half is constant does not drown the others
SMALLEST_SPREAD = 1e-6
TOP, ROUNDS = (
    0.05,
    2,
)  # share of the images that the direction is drawn to; CIFAR-10 with BadNets: AUROC 0.91 without, 0.96 with
RIDGE = 0.1  # of the mean variance
POWER = 0.85  # clean scores have heavier tails than a normal variable: 1.0 lists 1 % and more of a clean CIFAR-10 by the bulk
SMALLEST_DISTANCE = 1e-3  # in standard deviations; keeps the logarithm finite where all channels are constant


def log_distances(likelihoods: Tensor) -> Tensor:
    """Return the logarithm of the largest distance from the mean, in standard deviations, from least log-likelihoods (N, L)."""
    return (-2 * likelihoods - LOG_2PI).clamp_min(SMALLEST_DISTANCE**2).log() / 2


def lower_half(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the median and the standard deviation of the lower half of each column (N, L), both (L,)."""
    ordered = values.sort(0).values
    median, quartile = (ordered[int(share * (len(values) - 1))] for share in (0.5, 0.25))
    return median, (median - quartile) / NORMAL_QUARTILE


def combined(deviations: Tensor) -> Tensor:
    """Combine deviations (N, L) by Fisher's method: minus the logarithms of the upper tails of a normal variable, summed, (N,).

    >>> combined(torch.tensor([[0.0, 0.0], [4.0, 0.0]])) > 3
    tensor([False,  True])
    """
    surprise: Tensor = -torch.special.log_ndtr(-deviations).sum(1)
    return surprise


def discriminant(deviations: Tensor, scores: Tensor) -> Tensor:
    """Return the direction (L,) that tells the images of the largest scores from the others best; zero where all scores tie.

    Args:
        deviations: (N, L) float64.
        scores: (N,), of which the largest ``TOP`` are told apart; no tie is broken, so that the order does not matter.
    """
    count = max(int(TOP * len(scores)), 1)
    is_top = scores > scores.sort().values[max(len(scores) - count - 1, 0)]
    if not bool(is_top.any()):
        return torch.zeros_like(deviations[0])
    others = deviations[~is_top]
    covariance = torch.cov(others.T, correction=0).reshape(deviations.shape[1], -1)
    ridge = RIDGE * covariance.diagonal().mean() + SMALLEST_SPREAD
    within = covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype)
    direction: Tensor = torch.linalg.solve(within, deviations[is_top].mean(0) - others.mean(0))
    return direction


@dataclass(frozen=True, kw_only=True)
class BNLikelihood(OneLook):
    """Score images by how unlikely their least likely numbers are, over all batch normalisations together.

    Attributes:
        trainer: trains the model to look at, where the view has none; None is the recipe for a set of that size.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "batch normalisation; clean images draw the line, where there are some"
    cost_passes: ClassVar[float] = 2.4

    trainer: Trainer | None = None

    def score(self, untrusted: Looked, clean: Looked | None = None) -> Scores:
        """Score images that a model has looked at.

        Raises:
            ValueError: the model has no batch normalisation.
        """
        if untrusted.likelihoods.shape[1] == 0:
            raise ValueError(
                "the batch-norm likelihood needs a network with batch normalisation, and this one has none: "
                "take another sifter, e.g. spectral, or another architecture"
            )
        distances = log_distances(untrusted.likelihoods)
        median, spread = lower_half(distances)

        def deviations(others: Tensor) -> Tensor:
            return ((others - median) / spread.clamp_min(SMALLEST_SPREAD)).clamp_max(MOST_DEVIATION).double()

        seen = deviations(distances)
        places = combined(seen)
        for _ in range(ROUNDS):
            direction = discriminant(seen, places)
            places = seen @ direction
        middle, width = (part[0] for part in lower_half(places[:, None]))

        def measure(others: Tensor) -> Tensor:
            z = standardise(others @ direction, middle, width).float()
            return z.sign() * z.abs().pow(POWER)

        return Scores(
            untrusted=measure(seen),
            clean=None if clean is None else measure(deviations(log_distances(clean.likelihoods[clean.is_right]))),
            basis="A score says how far from its channel's mean an image drives the network, over all batch normalisations.",
        )
