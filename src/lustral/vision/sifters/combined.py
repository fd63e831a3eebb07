"""Combined: the default of ``lustral sift``. One briefly trained model is looked at in three ways; their scores are put together.

    z_m = (score of way m - median) / spread      among all images, the spread that of the lower half
    score = (sum_m -log P(Z > z_m))^(1/3)

That is Fisher's combination of p-values (Statistical Methods for Research Workers, 1925): no way has to have a scale, and one
that is sure outweighs two that are not. Without poison the sum is near a gamma variable, and its cube root near a normal one.
Ranks in place of z were tried: where many images are poisoned, no rank is surprising.

The ways are Activation Clustering, the batch-norm likelihood, and the distance of FCT with a mirror in place of turns and shifts,
on the same model: how far the features move when an image is mirrored. The choice of ways and of the training is ours, by
measurement (docs/methods/combined.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from lustral.core.records import Batch, OnProgress
from lustral.training import Trainer
from lustral.vision.records import LabelledImages, Sifted, TrainingView
from lustral.vision.sifters.activation_clustering import ActivationClustering
from lustral.vision.sifters.bn_likelihood import SMALLEST_SPREAD, BNLikelihood, lower_half
from lustral.vision.sifters.bn_likelihood import combined as together
from lustral.vision.sifters.fct import logarithm
from lustral.vision.suspicion.lines import IN_POISONED_CLASSES, enough_clean, line_by_clean, poisoned_classes
from lustral.vision.suspicion.looking import Looked, counted_model, look, look_at_both
from lustral.vision.suspicion.scores import Scores
from lustral.vision.suspicion.scoring_model import estimated_passes

AGREEING = 2  # ways that list an image, without clean images to draw the line


@dataclass(frozen=True)
class Mirrored:
    """A set whose images are mirrored left to right; otherwise the set itself."""

    data: LabelledImages

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return self.data.labels

    @property
    def num_classes(self) -> int:
        """Number of classes of the task."""
        return self.data.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, or empty."""
        return self.data.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self.data.image_shape

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.data)

    def subset(self, indices: Tensor) -> Mirrored:
        """Return the mirrored images at ``indices``."""
        return Mirrored(self.data.subset(indices))

    def batches(
        self, batch_size: int, *, generator: Generator | None = None, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Yield mirrored batches; see ``LabelledImages.batches``."""
        for batch in self.data.batches(batch_size, generator=generator, drop_last=drop_last):
            yield batch._replace(inputs=batch.inputs.flip(3))


def mirror_scores(
    model: nn.Module, view: TrainingView, untrusted: Looked, clean: Looked | None, *, on_progress: OnProgress | None
) -> Scores:
    """Return the logarithm of the mean squared distance between the features of each image and of its mirror image."""

    def distances(data: LabelledImages, seen: Looked, stage: str) -> Tensor:
        there = look(model, Mirrored(data), statistics=seen.statistics, on_progress=on_progress, stage=stage)
        return logarithm((there.features - seen.features).square().mean(1))

    of_clean = None
    if clean is not None and view.clean is not None:
        of_clean = distances(view.clean, clean, "mirroring clean images")[clean.is_right]
    return Scores(
        untrusted=distances(view.untrusted, untrusted, "mirroring untrusted images"),
        clean=of_clean,
        basis="A score is the logarithm of the distance between the features of an image and of its mirror image.",
    )


def combine(parts: Mapping[str, Tensor], among: Mapping[str, Tensor]) -> Tensor:
    """Combine scores (M,) of several ways by how far they lie above the bulk of other scores (N,) of each.

    >>> bulk = {"a": torch.arange(9.0), "b": torch.arange(9.0)}
    >>> combine({"a": torch.tensor([30.0, 4.0]), "b": torch.tensor([4.0, 4.0])}, bulk) > 2
    tensor([ True, False])
    """
    bulk = torch.stack([among[name] for name in parts], 1)
    median, spread = lower_half(bulk)
    return together((torch.stack(list(parts.values()), 1) - median) / spread.clamp_min(SMALLEST_SPREAD))


@dataclass(frozen=True, kw_only=True)
class Combined:
    """Look at one briefly trained model in three ways, and combine what they say.

    Attributes:
        activation_clustering: the first way.
        bn_likelihood: the second; left out for a network without batch normalisation. The third has no settings.
        trainer: trains the model to look at, where the view has none; None is the recipe for a set of that size.
    """

    version: ClassVar[int] = 2
    needs: ClassVar[str] = "nothing; clean images draw the line, where there are some"
    cost_passes: ClassVar[float] = 2.8

    activation_clustering: ActivationClustering = field(default_factory=ActivationClustering)
    bn_likelihood: BNLikelihood = field(default_factory=BNLikelihood)
    trainer: Trainer | None = None

    def estimated_passes(self, num_images: int) -> float:
        """Return how many passes a set of so many images takes, where a model has to be trained."""
        return estimated_passes(num_images, trainer=self.trainer, looks=2)

    def sift(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Sifted:
        """Return a score for each image of ``view.untrusted``; see ``Sifter``."""
        with counted_model(view, generator=generator, trainer=self.trainer, on_progress=on_progress) as (model, meter):
            untrusted, clean = look_at_both(model, view, on_progress=on_progress)
            scores = self.score_parts(untrusted, clean)
            scores["mirror"] = mirror_scores(model, view, untrusted, clean, on_progress=on_progress)
            among = {name: part.untrusted for name, part in scores.items()}
            of_clean = {name: part.clean for name, part in scores.items() if part.clean is not None}
            whole = Scores(
                untrusted=combine(among, among),
                clean=combine(of_clean, among) if len(of_clean) == len(scores) else None,
                basis=f"A score combines how far an image lies above the bulk by {', '.join(scores)}.",
                notes=tuple(dict.fromkeys(note for part in scores.values() for note in part.notes)),
            )
        parts = {name: part.sifted(meter.cost) for name, part in scores.items()}
        votes = torch.stack([part.flagged for part in parts.values()]).sum(0)
        found = only_agreed(whole.sifted(meter.cost), votes, by_clean=enough_clean(whole.clean), ways=len(parts))
        found = lowered(found, whole.clean, view.untrusted.labels, view.untrusted.class_names)
        return replace(found, parts=parts, notes=(*found.notes, *agreement(found, parts)))

    def score_parts(self, untrusted: Looked, clean: Looked | None) -> dict[str, Scores]:
        """Return what each published method says of images that a model has looked at, by its name in the catalog."""
        scores = {"activation_clustering": self.activation_clustering.score(untrusted, clean)}
        if untrusted.likelihoods.shape[1]:
            scores["bn_likelihood"] = self.bn_likelihood.score(untrusted, clean)
        return scores


def only_agreed(found: Sifted, votes: Tensor, *, by_clean: bool, ways: int) -> Sifted:
    """Take back what too few ways list by themselves.

    Without clean images a class that falls into two natural groups is one way's false alarm: 1.5 % of 10,000 clean images of
    CIFAR-10 were listed, all by Activation Clustering alone. A trigger shows itself to more than one way.

    Args:
        found: by the sum.
        votes: (N,) int64, how many ways list an image by themselves.
        by_clean: whether clean images drew the line. Then it is right for the sum as it is, and only a list that no way shares an
            image of is taken back.
        ways: how many there are; where there are several, two have to agree.
    """
    least = 1 if by_clean else min(AGREEING, ways)
    agreed = votes >= least
    if not found.flagged.any() or (by_clean and bool(agreed.any())):
        return found
    who = "no way lists" if least == 1 else "no two ways list"
    if not (agreed & found.flagged).any():
        basis = f"{found.basis} But {who} one of these images, so none is listed."
        return replace(found, flagged=torch.zeros_like(found.flagged), threshold=math.inf, basis=basis)
    scores = torch.where(agreed, found.scores, found.scores.clamp_max(found.threshold))
    basis = f"{found.basis} An image that {who} counts as one on the line."
    return replace(found, scores=scores, flagged=found.flagged & agreed, basis=basis)


def lowered(found: Sifted, clean: Tensor | None, labels: Tensor, names: Sequence[str]) -> Sifted:
    """Draw a lower line in the classes that the first one shows to be poisoned.

    The first line has to spare clean sets. Where many images of a class lie above it, the class is poisoned, and what counts
    is to leave none of the poison. An image of another class between the two lines counts as one on the lower.

    Args:
        found: by the first line.
        clean: (M,) scores of clean images, or None; too few draw no second line.
        labels: (N,) int64.
        names: of the classes, or empty.
    """
    classes = poisoned_classes(found.flagged, labels)
    if clean is None or not enough_clean(clean) or not len(classes):
        return found
    line = line_by_clean(clean, IN_POISONED_CLASSES)
    if line >= found.threshold:
        return found
    may_be_listed = found.flagged | torch.isin(labels, classes)
    scores = torch.where(may_be_listed, found.scores, found.scores.clamp_max(line))
    who = ", ".join(str(names[label]) if names else str(label) for label in classes.tolist())
    basis = (
        f"{found.basis} Class {who} is shown to be poisoned by that: there the line is the one that "
        f"{100 * IN_POISONED_CLASSES:g} % of clean images lie above."
    )
    return replace(found, scores=scores, flagged=scores > line, threshold=line, basis=basis)


def agreement(found: Sifted, parts: Mapping[str, Sifted]) -> tuple[str, ...]:
    """Say how many of the listed images each way lists by itself; nothing where none is listed."""
    listed = int(found.flagged.sum())
    if not listed:
        return ()
    shares = [f"{name} {int((part.flagged & found.flagged).sum()):,}" for name, part in parts.items()]
    return (f"Of the {listed:,} images listed, each way lists by itself: {', '.join(shares)}.",)
