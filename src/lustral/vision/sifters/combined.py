"""Combined: the default of ``lustral sift``. Spectral Signatures, Activation Clustering and the batch-norm likelihood look at one
briefly trained model, and their ranks are put together.

    s_m = -log(share of the untrusted images that method m ranks at least as high)
    score = (sum_m s_m)^(1/3)

That is Fisher's combination of p-values (Statistical Methods for Research Workers, 1925) with ranks in their place: no method has to
have a scale, and one that is sure outweighs two that are not. Without poison the sum is near a gamma variable, and its cube root
near a normal one. The choice of methods and of the recipe is ours, by measurement (docs/methods/combined.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lustral.core.records import OnProgress
from lustral.training import Trainer
from lustral.vision.records import Sifted, TrainingView
from lustral.vision.sifters.activation_clustering import ActivationClustering
from lustral.vision.sifters.bn_likelihood import BNLikelihood
from lustral.vision.sifters.spectral import SpectralSignatures
from lustral.vision.suspicion.looking import Looked, counted_model, look_at_both
from lustral.vision.suspicion.scores import Scores


def surprise(scores: Tensor, among: Tensor) -> Tensor:
    """Return minus the logarithm of the share of ``among`` (N,) that is at least as high as each score (M,); at most log(2 N).

    >>> surprise(torch.tensor([9.0, 0.0]), torch.arange(4.0)).exp().tolist()
    [8.0, 1.0]
    """
    below = torch.searchsorted(among.sort().values, scores.contiguous())
    return -((len(among) - below).clamp_min(0.5) / len(among)).log()


def combine(parts: Mapping[str, Tensor], among: Mapping[str, Tensor]) -> Tensor:
    """Combine scores (M,) of several methods by their ranks among other scores (N,) of each."""
    return torch.stack([surprise(scores, among[name]) for name, scores in parts.items()]).sum(0).pow(1 / 3)


@dataclass(frozen=True, kw_only=True)
class Combined:
    """Look at one briefly trained model in three ways, and combine the ranks.

    Attributes:
        spectral: the first way.
        activation_clustering: the second.
        bn_likelihood: the third; left out for a network without batch normalisation.
        trainer: trains the model to look at, where the view has none; None is the recipe for a set of that size.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing; clean images draw the line, where there are some"
    cost_passes: ClassVar[float] = 2.4

    spectral: SpectralSignatures = field(default_factory=SpectralSignatures)
    activation_clustering: ActivationClustering = field(default_factory=ActivationClustering)
    bn_likelihood: BNLikelihood = field(default_factory=BNLikelihood)
    trainer: Trainer | None = None

    def sift(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Sifted:
        """Return a score for each image of ``view.untrusted``; see ``Sifter``."""
        with counted_model(view, generator=generator, trainer=self.trainer, on_progress=on_progress) as (model, meter):
            untrusted, clean = look_at_both(model, view, on_progress=on_progress)
            scores = self.score_parts(untrusted, clean)
            among = {name: part.untrusted for name, part in scores.items()}
            of_clean = {name: part.clean for name, part in scores.items() if part.clean is not None}
            whole = Scores(
                untrusted=combine(among, among),
                clean=combine(of_clean, among) if len(of_clean) == len(scores) else None,
                basis=f"A score combines the ranks that an image has by {' and '.join(scores)}.",
                notes=tuple(dict.fromkeys(note for part in scores.values() for note in part.notes)),
            )
        found = whole.sifted(meter.cost)
        parts = {name: part.sifted(meter.cost) for name, part in scores.items()}
        return replace(found, parts=parts, notes=(*found.notes, *agreement(found, parts)))

    def score_parts(self, untrusted: Looked, clean: Looked | None) -> dict[str, Scores]:
        """Return what each method says of images that a model has looked at, by its name in the catalog."""
        scores = {
            "spectral": self.spectral.score(untrusted, clean),
            "activation_clustering": self.activation_clustering.score(untrusted, clean),
        }
        if untrusted.likelihoods.shape[1]:
            scores["bn_likelihood"] = self.bn_likelihood.score(untrusted, clean)
        return scores


def agreement(found: Sifted, parts: Mapping[str, Sifted]) -> tuple[str, ...]:
    """Say how many of the listed images each method lists by itself; nothing where none is listed."""
    listed = int(found.flagged.sum())
    if not listed:
        return ()
    shares = [f"{name} {int((part.flagged & found.flagged).sum()):,}" for name, part in parts.items()]
    return (f"Of the {listed:,} images listed, each method lists by itself: {', '.join(shares)}.",)
