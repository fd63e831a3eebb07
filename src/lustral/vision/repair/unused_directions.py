"""Directions that clean images do not use: steps along them leave the answers on clean images alone.

A linear layer maps its input a to W a; so does a convolution, with a the patch of its input that an output sees. Let A be the
mean of a a^T over clean images and n the length of a. A gradient G of W is replaced by

    G P,    P = lambda (A + lambda I)^-1,    lambda = damping tr(A) / n.

P leaves a direction alone that clean inputs do not have, and shrinks one of energy e to lambda / (lambda + e). So W changes by
little on what clean images show it, and freely on what only a trigger does. Biases and normalisation act on every input: they
keep still, and with them whatever is neither a linear layer nor a convolution.

The projector is that of orthogonal weights modification (Zeng, Chen, Cui, Yu, Nature Machine Intelligence 2019, arXiv
1810.01256), which gradient projection memory (Saha, Garg, Roy, ICLR 2021, arXiv 2103.09762) has in a hard form. There it keeps
earlier tasks while a network learns a new one; here the earlier task is the clean one, and what is learnt is to forget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lustral.training import frozen
from lustral.vision.records import ImageSet
from lustral.vision.repair.shifted_weights import gradients, trainable, with_gradients

POSITIONS = 256  # of a convolution's output that are looked at in each image, about: every s-th of a row and a column
WIDEST = 8192  # inputs of a layer; a wider one, whose projector would take more than 256 MiB, keeps still

Layer = nn.Linear | nn.Conv2d
Note = Callable[[Layer, tuple[Tensor, ...]], None]
"""Takes a layer and its inputs."""


class UnusedDirections:
    """The projectors of a network's layers, and what they make of a loss.

    Attributes:
        projectors: P, (groups, n, n), by the name of the weight that it belongs to.
        damping: lambda, as a share of the mean energy of a direction.
    """

    def __init__(self, model: nn.Module, images: ImageSet, *, damping: float) -> None:
        """Look at the inputs of all layers once.

        Args:
            model: classifier; it is not changed.
            images: clean ones.
            damping: lambda, as a share of the mean energy of a direction; above 0.

        Raises:
            ValueError: ``damping`` is not above 0.
        """
        if not damping > 0:
            raise ValueError(f"expected damping > 0; got {damping}")
        self._moments = second_moments(model, images)
        self.damping = damping
        self.projectors = {name: projector(moment, damping) for name, moment in self._moments.items()}

    def loosen(self, factor: float) -> None:
        """Multiply the damping: directions that clean images use a little are freed too."""
        self.damping *= factor
        self.projectors = {name: projector(moment, self.damping) for name, moment in self._moments.items()}

    def confine(self, loss: Tensor, model: nn.Module) -> Tensor:
        """Return a loss of the same value whose gradient has unused directions only.

        Where no layer could be looked at, the loss comes back as it is.

        Args:
            loss: (), of a copy of the network.
            model: the copy.
        """
        if not self.projectors:
            return loss
        weights = trainable(model)
        return loss.detach() + with_gradients(weights, self.projected(gradients(loss, weights)))

    def projected(self, slopes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return G P for the gradients, by name, of the weights that have a projector; zeros for the others."""
        return {name: self._projected(name, slope) for name, slope in slopes.items()}

    def _projected(self, name: str, slope: Tensor) -> Tensor:
        if name not in self.projectors:
            return torch.zeros_like(slope)
        groups = self.projectors[name].shape[0]
        rows = slope.reshape(groups, slope.shape[0] // groups, -1)
        return (rows @ self.projectors[name].to(rows)).reshape(slope.shape)


def projector(moment: Tensor, damping: float) -> Tensor:
    """Return lambda (A + lambda I)^-1 of each group's second moment A, (groups, n, n).

    >>> projector(torch.diag(torch.tensor([3.0, 1.0]))[None], damping=0.5).diagonal(dim1=1, dim2=2)  # lambda = 0.5 * 4 / 2
    tensor([[0.2500, 0.5000]])
    """
    energy = moment.double()
    identity = torch.eye(moment.shape[-1], dtype=energy.dtype, device=energy.device)
    level = damping * energy.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    level = level.clamp_min(torch.finfo(torch.float32).tiny)  # inputs that are all 0 leave every direction free
    shrunk = level * torch.cholesky_inverse(torch.linalg.cholesky(energy + level * identity))
    return shrunk.to(moment.dtype)


def second_moments(model: nn.Module, images: ImageSet) -> dict[str, Tensor]:
    """Return the mean of a a^T over clean images, (groups, n, n), by the name of the weight that maps a.

    Layers with more than ``WIDEST`` inputs are left out, and those whose weight is made of other parameters, as weight
    normalisation does. A layer that is called several times, or a weight that two layers
    share, has one moment, under the weight's first name.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def note(layer: Layer, inputs: tuple[Tensor, ...]) -> None:
        seen = rows(layer, inputs[0].float())
        name, moment = names[id(layer.weight)], seen.transpose(1, 2) @ seen
        sums[name] = sums[name] + moment if name in sums else moment
        counts[name] = counts.get(name, 0) + seen.shape[1]

    device = next(model.parameters()).device
    looked_at = [
        layer
        for layer in model.modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and id(layer.weight) in names and layer.weight[0].numel() <= WIDEST
    ]
    with torch.no_grad(), frozen(model), noted(looked_at, note):
        for batch in images.batches(64):
            model(batch.to(device).inputs)
    return {name: moment / counts[name] for name, moment in sums.items()}


@contextmanager
def noted(layers: Sequence[Layer], note: Note) -> Iterator[None]:
    """Call ``note`` before each layer while the block lasts."""
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rows(layer: Layer, x: Tensor) -> Tensor:
    """Return what a layer maps, (groups, rows, n): its inputs, or the patches of some places, in the order of its weight.

    Args:
        layer: linear, or a convolution.
        x: its input, (..., n) or (N, C, H, W).
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    elif any(layer._reversed_padding_repeated_twice):
        x = F.pad(x, layer._reversed_padding_repeated_twice)
    kernel, dilation, stride = ((int(a), int(b)) for a, b in (layer.kernel_size, layer.dilation, layer.stride))
    sizes = [
        (size - d * (k - 1) - 1) // s + 1 for size, d, k, s in zip(x.shape[2:], dilation, kernel, stride, strict=True)
    ]
    apart = math.ceil(math.sqrt(math.prod(sizes) / POSITIONS))
    patches = F.unfold(x, kernel, dilation=dilation, stride=(apart * stride[0], apart * stride[1]))
    length = patches.shape[1] // layer.groups
    return patches.reshape(len(x), layer.groups, length, -1).permute(1, 0, 3, 2).reshape(layer.groups, -1, length)
