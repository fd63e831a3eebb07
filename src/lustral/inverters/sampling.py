"""Drawing images for many candidate labels at once, without those that carry the label already."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from lustral.images import as_float
from lustral.protocols import ImageSet
from lustral.randomness import on_device


class SampleImages:
    """Draws batches for several labels; images of a label's own class never come up for that label."""

    def __init__(self, images: ImageSet, targets: Tensor, *, generator: Generator) -> None:
        """Prepare the pools.

        Args:
            images: clean images.
            targets: (K,) int64 candidate labels on the images' device.
            generator: CPU stream.

        Raises:
            ValueError: some label has no image of another class.
        """
        self._images = images.images
        self._stream = on_device(generator, images.device)
        self._pools = [(images.labels != target).nonzero().flatten() for target in targets]
        if any(len(pool) == 0 for pool in self._pools):
            raise ValueError(
                "the clean set holds images of a single class, so nothing can be sent to that class; "
                "give clean images of at least two classes"
            )

    def draw(self, rows: Tensor, count: int) -> Tensor:
        """Return (len(rows), count, C, H, W) float32 images for the labels at ``rows``, drawn with replacement."""
        picks = []
        for row in rows.tolist():
            pool = self._pools[row]
            at = torch.randint(len(pool), (count,), generator=self._stream, device=pool.device)
            picks.append(pool[at])
        chosen = torch.stack(picks)
        return as_float(self._images[chosen.flatten()]).view(*chosen.shape, *self._images.shape[1:])
