"""Drawing images for many candidate labels at once, without those that carry the label already, by truth or by the model."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from lustral.core.randomness import on_device
from lustral.vision.images import as_float
from lustral.vision.records import ImageSet


class SampleImages:
    """Draws batches for several labels; images of a label's own class never come up for that label.

    Nor do images that the model calls that label anyway, as long as there are others: they need no trigger, and a label that
    soaks up most images would seem to be reached with none.
    """

    def __init__(
        self, images: ImageSet, targets: Tensor, *, generator: Generator, called: Tensor | None = None
    ) -> None:
        """Prepare the pools.

        Args:
            images: clean images.
            targets: (K,) int64 candidate labels on the images' device.
            generator: CPU stream.
            called: (N,) int64, what the model calls each image without a trigger; None leaves none of them out for that.

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
        if called is not None:
            left = [pool[called[pool] != target] for pool, target in zip(self._pools, targets, strict=True)]
            self._pools = [part if len(part) else pool for part, pool in zip(left, self._pools, strict=True)]

    def draw(self, rows: Tensor, count: int) -> Tensor:
        """Return (len(rows), count, C, H, W) float32 images for the labels at ``rows``, drawn with replacement."""
        picks = []
        for row in rows.tolist():
            pool = self._pools[row]
            at = torch.randint(len(pool), (count,), generator=self._stream, device=pool.device)
            picks.append(pool[at])
        chosen = torch.stack(picks)
        return as_float(self._images[chosen.flatten()]).view(*chosen.shape, *self._images.shape[1:])
