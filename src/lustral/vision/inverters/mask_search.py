"""The smallest mask and pattern that send every image to a label, searched for all labels in one batch.

For a candidate label c: minimise CE(f(x'), c) + weight_c * size over mask m and pattern v, with x' = (1 - m) x + m v, the weight
steered so that the success rate stays near a target. The size is one of two:

    penalty "area":    ||m||_1                 (Wang et al., "Neural Cleanse", IEEE S&P 2019, section 4.1: finds patches)
    penalty "energy":  ||x' - x||_2^2 / C      (finds what is faint and wide: added perturbations, blended pictures)

Two departures make it quick: all labels share each forward and backward pass, and successive rejection drops the labels that
need most (Jamieson & Talwalkar, AISTATS 2016). Published searches run label after label. And one makes it steady: every label is
searched from several random starts, of which the best goes on, because a single one ends in a poor place now and then.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.cost import Deadline
from lustral.core.records import OnProgress, Progress
from lustral.training import Precision, autocast, frozen
from lustral.vision.inverters.sampling import SampleImages
from lustral.vision.records import ImageSet

Penalty = Literal["area", "energy"]

MEMORY = 0.9  # of running means, per step
OPENING_WEIGHT = {"area": 1e-3, "energy": 1e-2}  # of the size, per pixel; steered from here ...
LARGEST_WEIGHT = {"area": 1.0, "energy": 100.0}  # ... up to here
LEAST_WEIGHT = 1e-5
LEAST_IN_TIME = 5  # labels that a deadline leaves: fewer cannot be compared with each other
PACED_STEPS = 5  # before which no pace is known
HOPELESS = 1.5  # times what is left, that so few labels need: then the time is left to others


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
        energies: (K,) running mean of ||x' - x||_2^2 / C over the search images at the end, in pixels of full contrast.
        success: (K,) running success rate on the search images at the end.
        steps: (K,) steps each label received; fewer than the most means that screening dropped it.
        left_out: labels among them that a deadline left out, whatever they need.
        population: how many labels those searched to the end are the smallest of; None: as many as were asked for. A deadline
            takes its share of the labels that screening had dropped as well.
    """

    labels: tuple[int, ...]
    masks: Tensor
    patterns: Tensor
    areas: Tensor
    energies: Tensor
    success: Tensor
    steps: Tensor
    left_out: tuple[int, ...] = ()
    population: int | None = None

    def of(self, labels: Sequence[int]) -> FoundMasks:
        """Return the rows of some of the labels, in the order given."""
        index = torch.tensor([self.labels.index(label) for label in labels], dtype=torch.int64)
        own = index.to(self.masks.device)
        return FoundMasks(
            labels=tuple(labels),
            masks=self.masks[own],
            patterns=self.patterns[own],
            areas=self.areas[own],
            energies=self.energies[own],
            success=self.success[own],
            steps=self.steps[index],
        )


@dataclass(frozen=True, kw_only=True)
class MaskSearch:
    """Search masks for many labels at once.

    Attributes:
        penalty: the size that is made small, "area" or "energy", see above.
        starts: random starts of each label; the best of them after a sixth of the steps, with half batches, goes on.
        steps: optimisation steps for labels that stay to the end.
        batch_size: images per label and step.
        learning_rate: of Adam on the logits of mask and pattern.
        target_success: success rate that the weight is steered to; 0.99 in Neural Cleanse.
        screening: drop the worst third of the labels at 1/4, 1/2 and 3/4 of the steps.
        finalists: labels that are never screened away.
        most_images: images in one pass; more labels than fit take turns, so that memory does not grow with their number.
        precision: "auto" takes bfloat16 where the hardware has it.
    """

    version: ClassVar[int] = 2

    penalty: Penalty = "area"
    starts: int = 3
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
        if min(self.steps, self.batch_size, self.finalists, self.starts) < 1 or self.learning_rate <= 0:
            raise ValueError(f"expected positive starts, steps, batch_size, finalists and learning_rate; got {self}")
        if not 0 < self.target_success < 1:
            raise ValueError(f"expected a target success rate in (0, 1); got {self.target_success}")

    def run(
        self,
        model: nn.Module,
        images: ImageSet,
        labels: Sequence[int],
        *,
        generator: Generator,
        protected: Sequence[int] = (),
        order: Sequence[int] = (),
        deadline: Deadline | None = None,
        on_progress: OnProgress | None = None,
    ) -> FoundMasks:
        """Search a mask and a pattern for each label.

        With a deadline, labels are left out as soon as the pace of the steps so far says that not all of them will be searched
        in time: the last in order first. Where not even ``LEAST_IN_TIME`` labels can be, or the deadline passes before the last
        step, every label is left out.

        Args:
            model: classifier, unchanged afterwards.
            images: clean images on the model's device; those of the candidate label itself, or called it anyway, are left out.
            labels: candidate target labels.
            generator: CPU stream.
            protected: labels among them that are never screened away, whatever they need.
            order: labels among them by how soon they matter; those not named come last, as they are in ``labels``. It must not
                depend on what a search finds: then those left out say nothing about the sizes of the others.
            deadline: when to end; None: after the last step.
            on_progress: called after each step.
        """
        count, device = len(labels), images.device
        state = _Candidates(self, model, images, labels, generator)
        taken = torch.zeros(count, dtype=torch.int64)
        alive = torch.arange(count * self.starts, device=device)  # candidates, start by start of each label
        kept = alive[:: self.starts]  # of each label
        spared = torch.tensor(list(protected), dtype=torch.int64, device=device)
        work, opening = count * self.steps, self._opening
        ration = None if deadline is None else _Ration(self, deadline, labels, order)
        with frozen(model):
            for step in range(1, self.steps + 1):
                batch = self.batch_size if step > opening else max(self.batch_size // 2, 1)
                for rows in torch.split(alive, max(self.most_images // batch, 1)):
                    state.step(rows, step, batch)
                taken[torch.unique(alive // self.starts).cpu()] += 1
                if ration is not None:
                    ration.count(len(alive) * batch)
                if step == opening:
                    kept = kept + state.need.view(count, -1).argmin(1)
                    alive = kept if ration is None else kept[ration.is_in.to(device)[kept // self.starts]]
                if step in self._rungs and len(alive) > self.finalists:
                    need = state.need.masked_fill(torch.isin(state.targets, spared), 0.0)[alive]
                    alive = alive[need.argsort(stable=True)[: self._kept(len(alive))]].sort().values
                    work = int(taken.sum()) + len(alive) * (self.steps - step)
                if ration is not None and len(fitting := ration.cut(alive, step)) < len(alive):
                    alive = fitting
                    work = int(taken.sum()) + len(torch.unique(alive // self.starts)) * (self.steps - step)
                if on_progress is not None:
                    on_progress(Progress(stage="searching triggers", done=int(taken.sum()), total=work))
                if not len(alive):
                    break
        found = state.found(labels, kept, taken)
        return found if ration is None else replace(found, left_out=ration.left_out, population=ration.population)

    @property
    def _opening(self) -> int:
        """The step after which the best start of each label goes on alone; 0 with a single start."""
        return max(self.steps // 6, 1) if self.starts > 1 else 0

    @property
    def _rungs(self) -> set[int]:
        """The steps after which labels are screened."""
        return {max(part * self.steps // 4, 1) for part in (1, 2, 3)} if self.screening else set()

    def _kept(self, count: int) -> int:
        """Return how many of ``count`` labels one screening keeps."""
        return min(max(math.ceil(2 * count / 3), self.finalists), count)

    def _images_left(self, count: int, step: int) -> int:
        """Return how many images the steps after this one take of ``count`` labels, those dropped on the way included."""
        total, half = 0, max(self.batch_size // 2, 1)
        for later in range(step + 1, self.steps + 1):
            total += count * (self.starts * half if later <= self._opening else self.batch_size)
            if later in self._rungs and count > self.finalists:
                count = self._kept(count)
        return total

    def survivors(self, count: int) -> int:
        """Return how many of ``count`` labels are searched to the end.

        >>> [MaskSearch().survivors(count) for count in (10, 43, 200)]
        [10, 14, 60]
        """
        return self._kept(self._kept(self._kept(count))) if self.screening else count


class _Ration:
    """Leaves labels out, the last in order first, so that a search ends in time."""

    def __init__(self, search: MaskSearch, deadline: Deadline, labels: Sequence[int], order: Sequence[int]) -> None:
        places = {label: place for place, label in enumerate(order)}
        self.search, self.deadline, self.labels = search, deadline, tuple(labels)
        self.places = [places.get(label, len(places) + row) for row, label in enumerate(labels)]
        self.is_in = torch.ones(len(labels), dtype=torch.bool)  # not left out
        self.share = 1.0  # of the labels that screening dropped, that count beside those still searched
        self.images, self.since = 0, math.nan

    def count(self, images: int) -> None:
        """Note the images of a step that has been taken; the first one warms up and sets the clock."""
        if math.isnan(self.since):
            self.since = self.deadline.clock()
        else:
            self.images += images

    def cut(self, alive: Tensor, step: int) -> Tensor:
        """Return the candidates that can be searched to the end in time; none once the deadline has passed."""
        now = self.deadline.clock()
        left = self.deadline.at - now
        if step == self.search.steps or (left > 0 and step < PACED_STEPS):
            return alive
        pace = (now - self.since) / max(self.images, 1)
        rows = torch.unique(alive // self.search.starts).tolist()

        def seconds(count: int) -> float:
            return pace * self.search._images_left(count, step)

        least = min(LEAST_IN_TIME, len(rows))
        if left <= 0 or seconds(least) > HOPELESS * left:
            self.is_in[:] = False
            return alive[:0]
        stay = max(bisect_right(range(1, len(rows) + 1), left, key=seconds), least)
        if stay == len(rows):
            return alive
        self.share *= stay / len(rows)
        leaving = sorted(rows, key=lambda row: self.places[row])[stay:]
        self.is_in[leaving] = False
        return alive[self.is_in.to(alive.device)[alive // self.search.starts]]

    @property
    def left_out(self) -> tuple[int, ...]:
        """The labels that were left out."""
        return tuple(label for label, stays in zip(self.labels, self.is_in.tolist(), strict=True) if not stays)

    @property
    def population(self) -> int:
        """How many labels those searched to the end are the smallest of."""
        return max(round(self.share * len(self.labels)), 0)


class _Candidates:
    """The masks and patterns of a search on their way: a row for each start of each label."""

    def __init__(
        self, search: MaskSearch, model: nn.Module, images: ImageSet, labels: Sequence[int], generator: Generator
    ) -> None:
        channels, height, width = images.image_shape
        count, device = len(labels) * search.starts, images.device
        self.search, self.model = search, model
        self.targets = torch.tensor(labels, device=device).repeat_interleave(search.starts)
        called = answers(model, images, search.precision)
        self.feed = SampleImages(images, self.targets, generator=generator, called=called)
        self.masks = torch.full((count, 1, height, width), -1.0, device=device)  # logits, as the patterns
        self.masks += 0.1 * torch.randn(self.masks.shape, generator=generator).to(device)
        self.patterns = 0.5 * torch.randn((count, channels, height, width), generator=generator).to(device)
        self.moments = [torch.zeros_like(t) for t in (self.masks, self.masks, self.patterns, self.patterns)]
        self.weight = torch.full((count,), OPENING_WEIGHT[search.penalty] * 1024 / (height * width), device=device)
        self.success, self.energies = torch.zeros(count, device=device), torch.zeros(count, device=device)

    @property
    def need(self) -> Tensor:
        """How much each candidate needs, (K * starts,); one that does not succeed yet counts as needing more."""
        size = self.energies if self.search.penalty == "energy" else self.masks.sigmoid().sum((1, 2, 3))
        return size / self.success.clamp_min(0.05)

    def step(self, rows: Tensor, step: int, batch: int) -> None:
        """Take one step on some candidates, with so many images each."""
        search, device = self.search, rows.device
        m, v = self.masks[rows].requires_grad_(), self.patterns[rows].requires_grad_()
        x = self.feed.draw(rows, batch)
        mask, pattern = m.sigmoid(), v.sigmoid()
        change = mask[:, None] * (pattern[:, None] - x)
        with autocast(device, search.precision):
            logits = self.model((x + change).flatten(0, 1).contiguous(memory_format=torch.channels_last)).float()
        goal = self.targets[rows].repeat_interleave(batch)
        hit = (logits.detach().argmax(1) == goal).view(len(rows), -1).float().mean(1)
        error = F.cross_entropy(logits, goal, reduction="none").view(len(rows), -1).mean(1)
        energy = change.square().mean(2).sum((2, 3)).mean(1)
        size = energy if search.penalty == "energy" else mask.sum((1, 2, 3))
        (error + self.weight[rows] * size).sum().backward()  # type: ignore[no-untyped-call]
        assert m.grad is not None
        assert v.grad is not None
        rate = search.learning_rate * min(1.0, 2 * (1 - (step - 1) / search.steps))  # constant, then down to 0
        self.masks[rows] = _adam(m, m.grad, self.moments[0], self.moments[1], rows, step, rate)
        self.patterns[rows] = _adam(v, v.grad, self.moments[2], self.moments[3], rows, step, rate)
        memory = min(MEMORY, 1 - 1 / step)
        self.success[rows] = memory * self.success[rows] + (1 - memory) * hit
        self.energies[rows] = memory * self.energies[rows] + (1 - memory) * energy.detach()
        steer = torch.where(self.success[rows] > search.target_success, 1.1, 1 / 1.15)
        self.weight[rows] = (self.weight[rows] * steer).clamp(LEAST_WEIGHT, LARGEST_WEIGHT[search.penalty])

    def found(self, labels: Sequence[int], kept: Tensor, taken: Tensor) -> FoundMasks:
        """Return where the candidates that were kept, (K,), ended."""
        masks, patterns = self.masks[kept].sigmoid(), self.patterns[kept].sigmoid()
        return FoundMasks(
            labels=tuple(labels),
            masks=masks,
            patterns=patterns,
            areas=masks.sum((1, 2, 3)),
            energies=self.energies[kept],
            success=self.success[kept],
            steps=taken,
        )


def _adam(value: Tensor, grad: Tensor, first: Tensor, second: Tensor, rows: Tensor, step: int, rate: float) -> Tensor:
    """Take one Adam step (betas 0.5, 0.9, as Neural Cleanse) on the rows that are still searched."""
    first[rows] = 0.5 * first[rows] + 0.5 * grad
    second[rows] = 0.9 * second[rows] + 0.1 * grad.square()
    mean, spread = first[rows] / (1 - 0.5**step), second[rows] / (1 - 0.9**step)
    return value.detach() - rate * mean / (spread.sqrt() + 1e-12)
