"""A classifier is a network behind its own normalisation: pixels in [0, 1] in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lustral.vision.models.outputs import logits_in


class Normalise(nn.Module):
    """Subtract a mean and divide by a standard deviation, per channel.

    The two buffers are not persistent: a saved state dict holds the network's own keys and nothing else.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take one mean and one positive standard deviation per channel, on the [0, 1] scale."""
        super().__init__()
        if len(mean) != len(std) or not mean:
            raise ValueError(f"expected one mean and one std per channel; got {len(mean)} and {len(std)}")
        if min(std) <= 0:
            raise ValueError(f"expected positive standard deviations; got {tuple(std)}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return (images - mean) / std, same shape."""
        return (images - self.mean) / self.std

    def extra_repr(self) -> str:
        """Show the constants."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class Classifier(nn.Module):
    """A network with normalisation as its first layer.

    Only ``network.state_dict()`` is ever saved, so files keep the keys of whoever wrote the network.
    """

    version: ClassVar[int] = 1

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], *, num_classes: int | None = None
    ) -> None:
        """Wrap ``network``, which maps normalised float images (B, C, H, W) to what ``logits_in`` finds logits in.

        Args:
            network: the network.
            mean: per channel, on the [0, 1] scale.
            std: likewise.
            num_classes: number of classes K; tells the logits from other tensors that the network returns.
        """
        super().__init__()
        self.normalise = Normalise(mean, std)
        self.network = network
        self.num_classes = num_classes
        self.takes_channels_last = True

    def forward(self, images: Tensor) -> Tensor:
        """Map float32 images (B, C, H, W) in [0, 1] to logits (B, K)."""
        return logits_in(self._run(self.normalise(images)), len(images), self.num_classes)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As ``nn.Module.to``, but a network that cannot work in channels-last memory stays out of it."""
        if not self.takes_channels_last and kwargs.get("memory_format") is torch.channels_last:
            kwargs = {name: value for name, value in kwargs.items() if name != "memory_format"}
            if not args and not kwargs:
                return self
        return super().to(*args, **kwargs)

    def _run(self, images: Tensor) -> Any:
        """Run the network; the first time that it calls ``view`` on maps in channels-last memory, leave that memory for good.

        Many public networks flatten so (``x.view(-1, 400)``), which only works on contiguous maps.
        """
        if not self.takes_channels_last:
            return self.network(images.contiguous())
        try:
            return self.network(images)
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
        self.takes_channels_last = False
        with torch.inference_mode(False), torch.no_grad():
            self.network.to(memory_format=torch.contiguous_format)
        return self.network(images.contiguous())
