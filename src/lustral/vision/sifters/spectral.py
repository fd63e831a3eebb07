"""Spectral Signatures: poisoned images of a class lie far out along the top singular direction of its features (Tran, Li,
Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018, arXiv 1811.00636, algorithm 1).

    tau_i = ((R(x_i) - mean R) . v)^2,      v the top right singular vector of the centred features of one class

The paper takes away the 1.5 eps N images of largest tau of each class and has to know the poison rate eps. Here a line is drawn
instead, over all classes at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lustral.training import Trainer
from lustral.vision.suspicion.looking import Looked
from lustral.vision.suspicion.one_look import OneLook
from lustral.vision.suspicion.scores import Measure, Scores, score_by_class, shortest_half, standardise

POWER = 0.6  # |z|^0.6 of normal z is near symmetric: its lower half, mirrored, meets the 99.5 % quantile


def top_direction(features: Tensor) -> Tensor:
    """Return the top right singular vector (D,) of centred features (n, D), up to its sign.

    From the eigenvectors of the smaller of the two products, D x D or n x n, in float64.
    """
    centred = (features - features.mean(0)).double()
    if len(centred) >= centred.shape[1]:
        right: Tensor = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
        return right.float()
    left = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -1]
    return torch.nn.functional.normalize(centred.T @ left, dim=0).float()


@dataclass(frozen=True, kw_only=True)
class SpectralSignatures(OneLook):
    """Score images by their distance from the bulk of their class along its top singular direction.

    Attributes:
        centre: distances count from the "bulk" of the class, its shortest half along the direction, in standard deviations of
            that half: then classes compare, and a third of poisoned images does not move the centre. "mean" is the paper's
            centre, the plain tau.
        trainer: trains the model to look at, where the view has none; None is the recipe for a set of that size.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing; clean images draw the line, where there are some"
    cost_passes: ClassVar[float] = 2.4

    centre: Literal["bulk", "mean"] = "bulk"
    trainer: Trainer | None = None

    def score(self, untrusted: Looked, clean: Looked | None = None) -> Scores:
        """Score images that a model has looked at."""
        found, of_clean, notes = score_by_class(untrusted, clean, self._measure)
        basis = "A score is the distance from the bulk of the class along the top singular direction of its features."
        return Scores(untrusted=found, clean=of_clean, basis=basis, notes=notes)

    def _measure(self, features: Tensor) -> Measure:
        direction = top_direction(features)
        places = features @ direction
        if self.centre == "mean":
            mean = places.mean()
            return lambda others: (others @ direction - mean).square()
        centre, spread = shortest_half(places)
        return lambda others: standardise(others @ direction, centre, spread).abs().pow(POWER)
