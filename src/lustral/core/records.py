"""Records and interfaces that every modality shares: what a method costs, how it reports, what it may keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor, nn


class Assets(Protocol):
    """What attacks build once and use often: surrogate models, encoders, optimised patterns."""

    def get(self, spec: Mapping[str, Any], build: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Return the tensors named by ``spec`` (plain data that says everything they depend on), building them if need be."""


class Augmentation(Protocol):
    """Batched augmentation, such as ``lustral.training.Augment``."""

    def __call__(self, images: Tensor, *, generator: Generator) -> Tensor:
        """Return changed images, same shape, dtype, device and range."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a method used.

    Attributes:
        seconds: wall time.
        image_passes: images through the model; forward only counts 1/3, forward and backward 1.
        peak_memory_bytes: peak device memory on CUDA; the growth of the process's peak resident size on CPU.
        clean_images: trusted images used.
    """

    seconds: float
    image_passes: float
    peak_memory_bytes: int
    clean_images: int

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of one step after another on the same clean images.

        >>> Cost(seconds=1.0, image_passes=5.0, peak_memory_bytes=8, clean_images=9) + Cost(
        ...     seconds=0.5, image_passes=1.0, peak_memory_bytes=4, clean_images=9
        ... )
        Cost(seconds=1.5, image_passes=6.0, peak_memory_bytes=8, clean_images=9)
        """
        return Cost(
            seconds=self.seconds + other.seconds,
            image_passes=self.image_passes + other.image_passes,
            peak_memory_bytes=max(self.peak_memory_bytes, other.peak_memory_bytes),
            clean_images=max(self.clean_images, other.clean_images),
        )


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One figure that a detector's answer rests on.

    Attributes:
        label: the class it is about; None where it is about the whole model.
        measure: what was measured, e.g. "mask_area"; the names in use are in ``lustral.vision.measures``.
        value: the figure; infinite where it has no end, e.g. the area of a mask that no search found. What was not measured
            has no entry.
        null: the null hypothesis that ``p_value`` is stated under, as a clause; empty for a figure without a test.
        p_value: probability of so extreme a value under the null, in [0, 1], corrected for everything tested beside it; None
            for a figure without a test.
    """

    label: int | None
    measure: str
    value: float
    null: str = ""
    p_value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One report from a method at work; callers turn it into a bar, a log line, or nothing.

    Attributes:
        stage: what is being done, e.g. "training" or "searching triggers"; a new stage starts a new bar.
        done: units finished.
        total: units in this stage.
        values: figures of the moment, e.g. {"images_per_second": 1900.0, "loss": 0.4}.
    """

    stage: str
    done: int
    total: int
    values: Mapping[str, float] = field(default_factory=dict)


OnProgress = Callable[[Progress], None]


class Batch(NamedTuple):
    """Some examples of a set, all on one device.

    Attributes:
        inputs: (B, ...) what the model takes; of images float32 (B, C, H, W) in [0, 1].
        labels: (B,) int64.
        index: (B,) int64, the positions of the examples in the set that the batch comes from: with them a loss can weigh, count
            or remember each example across epochs.
    """

    inputs: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # the method of tuples is of no use here

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class TrainingSet(Protocol):
    """What training needs of a set of labelled examples, in memory or streamed from disk."""

    @property
    def num_classes(self) -> int:
        """Number of classes of the task."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def batches(
        self, batch_size: int, *, generator: Generator | None = None, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Yield all examples once, ``batch_size`` at a time: in order, or shuffled by ``generator``."""


Objective = Callable[[nn.Module, Batch, Generator], Tensor]
"""(model, batch, stream on the CPU) -> scalar loss."""
