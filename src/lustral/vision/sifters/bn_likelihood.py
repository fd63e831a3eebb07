"""Batch-norm likelihood: a trigger drives some channel, in some layer, where no ordinary image drives it.

The feature is that of FLARE (Hou, Luo, Hua, Chen, Zhang, Li, "FLARE: Toward Universal Dataset Purification against Backdoor
Attacks", IEEE TIFS 2025, arXiv 2411.19479): for each batch normalisation the least log-likelihood of what goes into it
(``lustral.vision.suspicion.looking.least_log_likelihood``). FLARE then embeds and clusters all images, which takes time and a
hundred poisoned images at least. The score made of the feature here is our own, in linear time:

    d_l = sqrt(-2 log p_l - log 2 pi)          the largest distance of layer l, in standard deviations of its channel
    z_l = (log d_l - median) / spread          among all images, the spread that of the lower half
    score = (sum_l -log P(Z > z_l))^(1/3)      Fisher's combination: one layer that is far out counts, several count more

The sum of a clean image is near a gamma variable, however much layers depend on each other, and its cube root near a normal one
(Wilson and Hilferty, PNAS 1931): what the line by the bulk of the scores asks for.

Labels take no part, so that poisoned images may be spread over all classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lustral.core.records import OnProgress
from lustral.training import Trainer
from lustral.vision.records import Sifted, TrainingView
from lustral.vision.suspicion.lines import NORMAL_QUARTILE
from lustral.vision.suspicion.looking import LOG_2PI, Looked, counted_model, look_at_both
from lustral.vision.suspicion.scores import Scores

SMALLEST_SPREAD = 1e-6  # a layer whose lower half is constant: what lies above is far out
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
    """Combine deviations (N, L) that are near normal into one score each (N,), near normal too: higher is further out.

    >>> combined(torch.tensor([[0.0, 0.0], [4.0, 0.0]])) > 1.5
    tensor([False,  True])
    """
    surprise: Tensor = -torch.special.log_ndtr(-deviations).sum(1)
    return surprise.pow(1 / 3)


@dataclass(frozen=True, kw_only=True)
class BNLikelihood:
    """Score images by how unlikely their least likely numbers are, over all batch normalisations together.

    Attributes:
        trainer: trains the model to look at, where the view has none; None is the recipe for a set of that size.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "batch normalisation; clean images draw the line, where there are some"
    cost_passes: ClassVar[float] = 12.4

    trainer: Trainer | None = None

    def sift(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Sifted:
        """Return a score for each image of ``view.untrusted``; see ``Sifter``."""
        with counted_model(view, generator=generator, trainer=self.trainer, on_progress=on_progress) as (model, meter):
            scores = self.score(*look_at_both(model, view, on_progress=on_progress))
        return scores.sifted(meter.cost)

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

        def measure(others: Tensor) -> Tensor:
            return combined((others - median) / spread.clamp_min(SMALLEST_SPREAD))

        return Scores(
            untrusted=measure(distances),
            clean=None if clean is None else measure(log_distances(clean.likelihoods[clean.is_right])),
            basis="A score says how far from its channel's mean an image drives the network, over all batch normalisations.",
        )
