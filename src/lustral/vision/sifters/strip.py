"""STRIP: a trigger decides whatever is laid over the image (Gao, Xu, Wang, Chen, Ranasinghe, Nepal, "STRIP: A Defence Against
Trojan Attacks on Deep Neural Networks", ACSAC 2019, arXiv 1902.06531).

    H(x) = (1 / n) sum_n  - sum_i y_i log2 y_i,      y = softmax(model(x + a o_n)), o_n one of n overlays     (equations 3 and 4)

Low entropy is suspicious. The paper asks this of inputs of a deployed model; here of training images too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from lustral.core.randomness import fork
from lustral.core.records import OnProgress, Progress
from lustral.training import Trainer, autocast, frozen
from lustral.vision.models.features import BATCH
from lustral.vision.records import DefenderView, LabelledImages, Sifted, TrainingView
from lustral.vision.suspicion.looking import counted_model
from lustral.vision.suspicion.scores import Scores
from lustral.vision.suspicion.scoring_model import estimated_passes

PRIME = 2**31 - 1


def overlay_indices(data: LabelledImages, count: int, *, generator: Generator) -> Tensor:
    """Choose images to lay over others: at most ``count``, by their content, so that the order of the set does not matter.

    Each image gets a number, a random combination of its pixels modulo a prime, and the smallest numbers win. One pass over the
    images, none through a model.

    Returns:
        (min(count, N),) int64 indices.
    """
    weights = torch.randint(1, PRIME, data.image_shape, generator=generator)
    numbers = []
    for batch in data.batches(BATCH):
        pixels = batch.inputs.mul(255).round_().long()
        numbers.append((pixels * weights.to(pixels.device)).flatten(1).sum(1).remainder(PRIME).cpu())
    return torch.cat(numbers).argsort()[:count]


def mean_entropy(model: nn.Module, images: Tensor, overlays: Tensor, weight: float) -> Tensor:
    """Return the entropy of a model's answers, in bits, averaged over overlays.

    Args:
        model: classifier, in evaluation mode.
        images: (B, C, H, W) float32 in [0, 1].
        overlays: (n, C, H, W) likewise, on the same device.
        weight: of the overlays; sums are clipped to [0, 1], as a camera would.

    Returns:
        (B,) float32 in [0, log2 K].
    """
    mixed = (images[:, None] + weight * overlays).clamp_(0, 1).flatten(0, 1)
    with autocast(images.device):
        logits = model(mixed.contiguous(memory_format=torch.channels_last))
    logs: Tensor = logits.float().log_softmax(1)
    entropy: Tensor = -(logs.exp() * logs).sum(1) / math.log(2)
    return entropy.view(len(images), len(overlays)).mean(1)


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Score images by the certainty of a model's answers with other images laid over them; a ``Sifter`` and ``InputDetector``.

    Attributes:
        num_overlays: n; each costs a forward pass of every image. 100 in the paper, 64 in public code.
        weight: a, of the overlays; 1 in the paper, which adds pixels.
        trainer: trains the model to look at, where the view has none; None is the recipe for a set of that size.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing; clean images are laid over the others and draw the line, where there are some"
    cost_passes: ClassVar[float] = 5.4

    num_overlays: int = 10
    weight: float = 1.0
    trainer: Trainer | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.num_overlays < 1 or self.weight <= 0:
            raise ValueError(f"expected at least 1 overlay and a weight > 0; got {self.num_overlays} and {self.weight}")

    def estimated_passes(self, num_images: int) -> float:
        """Return how many passes a set of so many images takes, where a model has to be trained."""
        return estimated_passes(num_images, trainer=self.trainer, looks=self.num_overlays)

    def sift(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Sifted:
        """Return a score for each image of ``view.untrusted``; see ``Sifter``.

        The overlays are clean images, where there are some, else untrusted ones. They are the same for all images, so that one
        with a trigger lowers every entropy alike.
        """
        with counted_model(view, generator=generator, trainer=self.trainer, on_progress=on_progress) as (model, meter):
            has_clean = view.clean is not None and len(view.clean) > 0
            source = view.clean if has_clean and view.clean is not None else view.untrusted
            chosen = overlay_indices(source, self.num_overlays, generator=fork(generator, "overlays"))
            overlays = next(iter(source.subset(chosen).batches(len(chosen)))).inputs
            untrusted = self._certainty(
                model, view.untrusted, overlays, "laying images over untrusted ones", on_progress
            )
            clean = None
            if has_clean and view.clean is not None:
                is_left = torch.ones(len(view.clean), dtype=torch.bool)
                is_left[chosen] = False
                rest = view.clean.subset(is_left)
                clean = self._certainty(model, rest, overlays, "laying images over clean ones", on_progress)
        scores = Scores(
            untrusted=untrusted,
            clean=clean,
            basis=f"A score is minus the entropy of the answers, in bits, with {len(overlays)} other images laid over the image.",
        )
        return scores.sifted(meter.cost)

    def score(
        self, view: DefenderView, images: Tensor, *, generator: Generator, on_progress: OnProgress | None = None
    ) -> Tensor:
        """Score inputs of a model; see ``InputDetector``. The overlays are images of ``view.clean``.

        Raises:
            ValueError: there are no clean images.
        """
        if len(view.clean) == 0:
            raise ValueError("STRIP lays clean images over inputs, and the clean set is empty: give a few clean images")
        chosen = overlay_indices(view.clean, self.num_overlays, generator=fork(generator, "overlays"))
        overlays = next(iter(view.clean.subset(chosen).batches(len(chosen)))).inputs
        step = max(BATCH // len(overlays), 1)
        chunks = (images[start : start + step] for start in range(0, len(images), step))
        report = _reporting(on_progress, "laying images over inputs", len(images))
        return _certainties(view.model, chunks, overlays, self.weight, report)

    def _certainty(
        self, model: nn.Module, data: LabelledImages, overlays: Tensor, stage: str, on_progress: OnProgress | None
    ) -> Tensor:
        chunks = (batch.inputs for batch in data.batches(max(BATCH // len(overlays), 1)))
        return _certainties(model, chunks, overlays, self.weight, _reporting(on_progress, stage, len(data)))


def _reporting(on_progress: OnProgress | None, stage: str, total: int) -> Callable[[int], None]:
    """Return what reports how many images are done."""
    return lambda done: None if on_progress is None else on_progress(Progress(stage=stage, done=done, total=total))


def _certainties(
    model: nn.Module, chunks: Iterable[Tensor], overlays: Tensor, weight: float, report: Callable[[int], None]
) -> Tensor:
    """Return minus the mean entropy of all images of some chunks, on the CPU."""
    device = next(model.parameters()).device
    overlays, found, done = overlays.to(device), [torch.empty(0)], 0
    with frozen(model), torch.no_grad():
        for images in chunks:
            found.append(-mean_entropy(model, images.to(device), overlays, weight).cpu())
            done += len(images)
            report(done)
    return torch.cat(found)
