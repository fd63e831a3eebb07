"""The smallest mask and pattern that send every image to a label, searched for all labels in one batch.

For a candidate label c: minimise CE(f((1 - m) x + m v), c) + weight_c * ||m||_1 over mask m and pattern v (Wang et al.,
"Neural Cleanse", IEEE S&P 2019, section 4.1), the weight steered so that the success rate stays near a target. Two
departures make it quick: all labels share each forward and backward pass, and successive rejection drops the labels that
need the largest masks (Jamieson & Talwalkar, AISTATS 2016). Published searches run label after label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.records import OnProgress, Progress
from lustral.training import Precision, autocast, frozen
from lustral.vision.inverters.sampling import SampleImages
from lustral.vision.records import ImageSet

SUCCESS_MEMORY = 0.9  # of the running success rate, per step
OPENING_WEIGHT = 1e-3  # of the mask's area, per pixel; steered from here


@torch.no_grad()
def answers(model: nn.Module, images: ImageSet, precision: Precision, batch_size: int = 256) -> Tensor:
    """Return what a model calls each image, (N,) int64 on the images' device."""
    with frozen(model), autocast(images.device, precision):
        return torch.cat(
            [model(x.contiguous(memory_format=torch.channels_last)).argmax(1) for x, *_ in images.batches(batch_size)]
        )


@dataclass(frozen=True, kw_only=True)
class FoundMasks:
    """Where a search ended, one row per label asked for.

    Attributes:
        labels: the candidate labels.
        masks: (K, 1, H, W) float32 in [0, 1].
        patterns: (K, C, H, W) float32 in [0, 1].
        areas: (K,) pixels of mask.
        success: (K,) running success rate on the search images at the end.
        steps: (K,) steps each label received; fewer than the most means that screening dropped it.
    """

    labels: tuple[int, ...]
    masks: Tensor
    patterns: Tensor
    areas: Tensor
    success: Tensor
    steps: Tensor


@dataclass(frozen=True, kw_only=True)
class MaskSearch:
    """Search masks for many labels at once.

    Attributes:
        steps: optimisation steps for labels that stay to the end.
        batch_size: images per label and step.
        learning_rate: of Adam on the logits of mask and pattern.
        target_success: success rate that the area weight is steered to; 0.99 in Neural Cleanse.
        screening: drop the worst third of the labels at 1/2 and again at 3/4 of the steps; before that, masks have hardly
            shrunk and their areas rank nothing.
        finalists: labels that are never screened away.
        most_images: images in one pass; more labels than fit take turns, so that memory does not grow with their number.
        precision: "auto" takes bfloat16 where the hardware has it.
    """

    version: ClassVar[int] = 1

    steps: int = 200
    batch_size: int = 24
    learning_rate: float = 0.2
    target_success: float = 0.95
    screening: bool = True
    finalists: int = 12
    most_images: int = 1024
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.steps < 1 or self.batch_size < 1 or self.finalists < 1 or self.learning_rate <= 0:
            raise ValueError(f"expected positive steps, batch_size, finalists and learning_rate; got {self}")
        if not 0 < self.target_success < 1:
            raise ValueError(f"expected a target success rate in (0, 1); got {self.target_success}")

    def run(
        self,
        model: nn.Module,
        images: ImageSet,
        labels: Sequence[int],
        *,
        generator: Generator,
        on_progress: OnProgress | None = None,
    ) -> FoundMasks:
        """Search a mask and a pattern for each label.

        Args:
            model: classifier, unchanged afterwards.
            images: clean images on the model's device; those of the candidate label itself, or called it anyway, are left out.
            labels: candidate target labels.
            generator: CPU stream.
            on_progress: called after each step.
        """
        channels, height, width = images.image_shape
        count, device = len(labels), images.device
        targets = torch.tensor(labels, device=device)
        called = answers(model, images, self.precision)
        feed = SampleImages(images, targets, generator=generator, called=called)
        mask_logits = torch.full((count, 1, height, width), -1.0, device=device)
        mask_logits += 0.1 * torch.randn(mask_logits.shape, generator=generator).to(device)
        pattern_logits = 0.5 * torch.randn((count, channels, height, width), generator=generator).to(device)
        state = [torch.zeros_like(t) for t in (mask_logits, mask_logits, pattern_logits, pattern_logits)]
        weight = torch.full((count,), OPENING_WEIGHT * 1024 / (height * width), device=device)
        success = torch.zeros(count, device=device)
        taken = torch.zeros(count, dtype=torch.int64)
        alive = torch.arange(count, device=device)
        work = count * self.steps
        with frozen(model):
            for step in range(1, self.steps + 1):
                for rows in torch.split(alive, max(self.most_images // self.batch_size, 1)):
                    m, v = mask_logits[rows].requires_grad_(), pattern_logits[rows].requires_grad_()
                    x = feed.draw(rows, self.batch_size)
                    mask, pattern = m.sigmoid(), v.sigmoid()
                    stamped = x + mask[:, None] * (pattern[:, None] - x)
                    with autocast(device, self.precision):
                        logits = model(stamped.flatten(0, 1).contiguous(memory_format=torch.channels_last)).float()
                    goal = targets[rows].repeat_interleave(self.batch_size)
                    hit = (logits.detach().argmax(1) == goal).view(len(rows), -1).float().mean(1)
                    error = F.cross_entropy(logits, goal, reduction="none").view(len(rows), -1).mean(1)
                    (error + weight[rows] * mask.sum((1, 2, 3))).sum().backward()  # type: ignore[no-untyped-call]
                    assert m.grad is not None
                    assert v.grad is not None
                    rate = self.learning_rate * min(1.0, 2 * (1 - (step - 1) / self.steps))  # constant, then down to 0
                    mask_logits[rows] = self._adam(m, m.grad, state[0], state[1], rows, step, rate)
                    pattern_logits[rows] = self._adam(v, v.grad, state[2], state[3], rows, step, rate)
                    memory = min(SUCCESS_MEMORY, 1 - 1 / step)
                    success[rows] = memory * success[rows] + (1 - memory) * hit
                    steer = torch.where(success[rows] > self.target_success, 1.1, 1 / 1.15)
                    weight[rows] = (weight[rows] * steer).clamp(1e-5, 1.0)
                    taken[rows.cpu()] += 1
                if step in self._rungs and len(alive) > self.finalists:
                    alive = self._screen(mask_logits, success, alive)
                    work = int(taken.sum()) + len(alive) * (self.steps - step)
                if on_progress is not None:
                    on_progress(Progress(stage="searching triggers", done=int(taken.sum()), total=work))
        masks, patterns = mask_logits.sigmoid(), pattern_logits.sigmoid()
        return FoundMasks(
            labels=tuple(labels),
            masks=masks,
            patterns=patterns,
            areas=masks.sum((1, 2, 3)),
            success=success,
            steps=taken,
        )

    @property
    def _rungs(self) -> set[int]:
        """The steps after which labels are screened."""
        return {max(self.steps // 2, 1), max(3 * self.steps // 4, 1)} if self.screening else set()

    def _screen(self, mask_logits: Tensor, success: Tensor, alive: Tensor) -> Tensor:
        """Keep the two thirds that need the smallest masks; a search that does not succeed yet counts as a larger mask."""
        need = mask_logits[alive].sigmoid().sum((1, 2, 3)) / success[alive].clamp_min(0.05)
        return alive[need.argsort(stable=True)[: self._kept(len(alive))]].sort().values

    def _kept(self, count: int) -> int:
        """Return how many of ``count`` labels one screening keeps."""
        return min(max(math.ceil(2 * count / 3), self.finalists), count)

    def survivors(self, count: int) -> int:
        """Return how many of ``count`` labels are searched to the end.

        >>> [MaskSearch().survivors(count) for count in (10, 43, 200)]
        [10, 20, 90]
        """
        return self._kept(self._kept(count)) if self.screening else count

    @staticmethod
    def _adam(
        value: Tensor, grad: Tensor, first: Tensor, second: Tensor, rows: Tensor, step: int, rate: float
    ) -> Tensor:
        """Take one Adam step (betas 0.5, 0.9, as Neural Cleanse) on the rows that are still searched."""
        first[rows] = 0.5 * first[rows] + 0.5 * grad
        second[rows] = 0.9 * second[rows] + 0.1 * grad.square()
        mean, spread = first[rows] / (1 - 0.5**step), second[rows] / (1 - 0.9**step)
        return value.detach() - rate * mean / (spread.sqrt() + 1e-12)
