"""A network that filters its features by what it says first: what the class-conditional neural polarizer (CNPD) leaves behind.

Only the tensors of ``ClassPolarizers`` are new; those of the network inside are as they were given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lustral.vision.models.architecture import CONDITIONED
from lustral.vision.models.outputs import logits_in


def require_filterable(network: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    """Return the layer of that name.

    Raises:
        ValueError: there is none, or it is no convolution without groups and no linear layer.
    """
    layer = dict(network.named_modules()).get(name)
    if not isinstance(layer, nn.Conv2d | nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups > 1):
        what = f"there is no {name!r}" if layer is None else f"{name} is {layer}"
        raise ValueError(
            f"a polarizer goes before a linear layer or a convolution without groups; {what}: name another layer"
        )
    return layer


class ClassPolarizers(nn.Module):
    """One linear map of channels and one normalisation for each class; at birth all of them change nothing.

    Attributes:
        weight: (K, C, C), identities at birth.
        scale: (K, C), of the normalisation.
        shift: (K, C), likewise.
        mean: (C,), of what the maps return at birth; a buffer.
        deviation: (C,), likewise.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, num_classes: int, channels: int, *, last: bool, device: torch.device | str | None = None
    ) -> None:
        """Build them for K classes and C channels; ``last``: channels are the last axis (tokens) and not the second (maps)."""
        super().__init__()
        self.last = last
        self.weight = nn.Parameter(torch.eye(channels, device=device).repeat(num_classes, 1, 1))
        self.scale = nn.Parameter(torch.ones(num_classes, channels, device=device))
        self.shift = nn.Parameter(torch.zeros(num_classes, channels, device=device))
        self.register_buffer("mean", torch.zeros(channels, device=device))
        self.register_buffer("deviation", torch.ones(channels, device=device))

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, deviation: Tensor, *, identity: bool) -> None:
        """Set the statistics, (C,) each; ``identity``: and scales and shifts so that nothing changes yet."""
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)
        self.scale.copy_(deviation if identity else torch.ones_like(deviation))
        self.shift.copy_(mean if identity else torch.zeros_like(mean))

    def forward(self, features: Tensor, classes: Tensor) -> Tensor:
        """Return features of the same shape, (B, C, H, W) or (B, ..., C), each image's filtered for its class, (B,) int64.

        Raises:
            ValueError: there are not as many features as classes, as in layers that look at windows of an image.
        """
        if len(features) != len(classes):
            raise ValueError(
                f"expected the features of {len(classes)} images; got {len(features)}: name a layer that sees them whole"
            )
        if features.is_meta:
            return torch.empty_like(features)  # the division among classes would need numbers
        gain = self.scale / self.deviation  # (K, C)
        matrices, offsets = gain[:, :, None] * self.weight, self.shift - gain * self.mean
        order = classes.argsort()
        counts = classes.bincount(minlength=len(matrices)).tolist()
        filtered = [
            F.linear(chunk, matrices[k], offsets[k])
            if self.last
            else F.conv2d(chunk, matrices[k][:, :, None, None], offsets[k])
            for k, chunk in enumerate(torch.split(features[order], counts))
            if len(chunk)
        ]
        return torch.cat(filtered)[order.argsort()]


class Conditioned(nn.Module):
    """A network and a polarizer for each class in front of one of its layers: the one for the class that the network says.

    ``routed`` changes for a while what decides. As an image is looked at twice, an answer takes twice the time.
    """

    version: ClassVar[int] = 1

    def __init__(
        self, network: nn.Module, layer: str, num_classes: int, *, device: torch.device | str | None = None
    ) -> None:
        """Wrap ``network``, which maps images (B, C, H, W) to logits (B, K), and filter what enters ``layer``.

        ``device`` is where the polarizers go; None: where the layer is.

        Raises:
            ValueError: there is no such layer, or it is no convolution without groups and no linear layer.
        """
        super().__init__()
        found = require_filterable(network, layer)
        self.network, self.layer = network, layer
        channels = found.in_channels if isinstance(found, nn.Conv2d) else found.in_features
        self.polarizers = ClassPolarizers(
            num_classes, channels, last=isinstance(found, nn.Linear), device=device or found.weight.device
        )
        self._classes: Tensor | None = None
        self._decides = True
        found.register_forward_pre_hook(self._filter)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K)."""
        if not self._decides:
            return self._logits(images)
        with torch.no_grad(), self.routed(None):
            said = self._logits(images).argmax(1)
        with self.routed(said):
            return self._logits(images)

    def _logits(self, images: Tensor) -> Tensor:
        return logits_in(self.network(images), len(images), len(self.polarizers.weight))

    @contextmanager
    def routed(self, classes: Tensor | None) -> Iterator[None]:
        """Within the block, filter the i-th image of a batch for ``classes[i]``, (B,) int64; None: do not filter at all."""
        before = self._classes, self._decides
        self._classes, self._decides = classes, False
        try:
            yield
        finally:
            self._classes, self._decides = before

    def _filter(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._classes is None:
            return None
        features, *rest = inputs
        return self.polarizers(features, self._classes), *rest


def arch_of(network: nn.Module, base: str) -> str:
    """Return the name of the architecture of ``network``, which is ``base`` or was made from it.

    >>> arch_of(Conditioned(nn.Sequential(nn.Linear(2, 2)), "0", 2), "mine"), arch_of(nn.Linear(2, 2), "mine")
    ('conditioned:0@mine', 'mine')
    """
    if not isinstance(network, Conditioned):
        return base
    return f"{CONDITIONED}:{network.layer}@{arch_of(network.network, base)}"
