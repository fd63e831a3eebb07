"""SIG: a faint horizontal wave on images of the target class, labels left alone (Barni, Kallas, Tondi, "A New Backdoor
Attack in CNNs by Training Set Corruption without Label Poisoning", ICIP 2019, arXiv 1902.11237).

x'[c, i, j] = clip(x[c, i, j] + delta * sin(2 * pi * j * f / W)), the same in every row and channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lustral.vision.attacks.pictures import Addition
from lustral.vision.attacks.poisoning import check_rate, dirty_labels, poison_clean_label, require_clean_label
from lustral.vision.records import ImageSet, PoisonedSet

LEAST_PERIOD = 4  # pixels: a shorter wave is lost between the pixels (6 periods on 12 pixels are zero everywhere)


def sampled_frequency(frequency: int, width: int) -> int:
    """Return the number of periods that a row of ``width`` pixels can show, at most ``frequency`` and at least 1.

    >>> sampled_frequency(6, 32), sampled_frequency(6, 12)
    (6, 3)
    """
    return min(frequency, max(width // LEAST_PERIOD, 1))


def wave(width: int, *, delta: float, frequency: int) -> Tensor:
    """Return delta * sin(2 * pi * j * f / W) for the columns j = 0 .. W - 1, (1, 1, W) float32."""
    columns = torch.arange(width, dtype=torch.float64)
    return (delta * torch.sin(2 * math.pi * columns * frequency / width)).float().view(1, 1, width)


@dataclass(frozen=True, kw_only=True)
class Sig:
    """Poison images of the target class with a wave; every label stays true.

    Attributes:
        target_label: class the trigger leads to; the only class that is poisoned.
        poison_rate: fraction of the whole training set, of which all comes from the target class; 0.05 in BackdoorBench
            (half of a class of CIFAR-10).
        delta: amplitude of the wave in training images, in [0, 1] units; 40/255 in BackdoorBench, 30/255 in the
            backdoor toolbox.
        delta_test: amplitude of the wave against the finished model; None: ``delta``, as in BackdoorBench. The paper
            attacks with a stronger wave than it trains with.
        frequency: periods across the image's width; 6 in the paper. Images narrower than four pixels a period get the
            largest number of periods that leaves four.
    """

    version: ClassVar[int] = 1
    threat_model: ClassVar[str] = "supplies data: true labels"

    target_label: int = 0
    poison_rate: float = 0.05
    delta: float = 40 / 255
    delta_test: float | None = None
    frequency: int = 6

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_rate(self.poison_rate)
        for delta in (self.delta, self.delta if self.delta_test is None else self.delta_test):
            if not 1 / 255 <= delta <= 1:
                raise ValueError(f"expected amplitudes delta between 1/255 and 1, in [0, 1] units; got {delta}")
        if self.frequency < 1:
            raise ValueError(f"expected a frequency of at least 1 period; got {self.frequency}")

    def require_possible(self, clean: ImageSet) -> None:
        """Check that the target class has enough images and the wave fits; see ``Attack``."""
        require_clean_label(
            clean.labels, clean.num_classes, target_label=self.target_label, poison_rate=self.poison_rate
        )
        self.trigger(clean.image_shape)

    def trigger(self, image_shape: tuple[int, int, int]) -> Addition:
        """Return the wave of amplitude ``delta_test`` for images of (C, H, W)."""
        return self._wave(image_shape, self.delta if self.delta_test is None else self.delta_test)

    def training_trigger(self, image_shape: tuple[int, int, int]) -> Addition:
        """Return the wave of amplitude ``delta``, as training images carry it."""
        return self._wave(image_shape, self.delta)

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the target label for every image, (N,) int64: what the finished model shall answer."""
        return dirty_labels(labels, num_classes, mode="all_to_one", target_label=self.target_label)

    def poison(self, clean: ImageSet, *, generator: Generator) -> PoisonedSet:
        """Return a copy of the training set with waves on part of the target class, 8-bit; labels are unchanged."""
        return poison_clean_label(
            clean,
            self.training_trigger(clean.image_shape),
            target_label=self.target_label,
            poison_rate=self.poison_rate,
            generator=generator,
        )

    def _wave(self, image_shape: tuple[int, int, int], delta: float) -> Addition:
        width = image_shape[2]
        if width < 3:
            raise ValueError(f"expected images of at least 3 pixels' width for a wave; got {width}")
        return Addition(pattern=wave(width, delta=delta, frequency=sampled_frequency(self.frequency, width)))
