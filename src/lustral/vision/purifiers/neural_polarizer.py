"""Neural Polarizer: one linear layer before a late convolution filters the trigger out of the features (Zhu, Wei, Zha, Wu,
"Neural Polarizer: A Lightweight and Effective Backdoor Defense via Purifying Poisoned Features", NeurIPS 2023,
arXiv 2306.16697; NPD).

The network F is frozen but for the polarizer, a 1x1 convolution with batch normalisation. For each batch, t is the runner-up
class and x~ = clip(x + d) with ||d||_2 <= radius, aimed at t. Then the polarizer minimises

    w_clean CE(F(x), y) + w_restore CE(F(x~), yhat) - w_margin log(1 - s_m) - w_target log(1 - s_t),      s = softmax F(x~)

with yhat = argmax F(x) and m the most probable class of x~ but y.

Both the polarizer and the convolution behind it are linear, so the filtered network has the given architecture again: the
product of the two is one convolution. The paper pads what the polarizer returns; here it is applied to the padded features, so
that the product is exact at the borders too. A bias that the convolution has no room for goes into the running mean of the
normalisation that follows; where none follows, the polarizer has no offset.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.records import Batch, OnProgress
from lustral.training import Trainer, frozen
from lustral.vision.images import check_holdout
from lustral.vision.models.conditioned import require_filterable
from lustral.vision.models.wiring import Wiring, trace
from lustral.vision.records import DefenderView, Purified
from lustral.vision.repair.perturbation import project
from lustral.vision.repair.polarizing import (
    Start,
    avoidance_loss,
    begin,
    check_polarizing,
    feature_statistics,
    polarizer_layer,
    runner_up,
)
from lustral.vision.repair.rates import RateChoice
from lustral.vision.repair.run import PurifyRun


class Polarizer(nn.Module):
    """A linear map of channels and a normalisation, the identity at birth: (B, C, H, W) or (..., C) to the same."""

    def __init__(self, channels: int, *, last: bool, offset: bool = True) -> None:
        """Build it for C channels.

        Args:
            channels: C.
            last: channels are the last axis (tokens) and not the second (maps).
            offset: the normalisation shifts; False: it scales only.
        """
        super().__init__()
        self.last, self.offset = last, offset
        self.weight = nn.Parameter(torch.eye(channels))
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, features: Tensor) -> Tensor:
        """Return A h + b for every place, with what ``affine`` says."""
        matrix, offset = self.affine()
        if self.last:
            return F.linear(features, matrix, offset)
        return F.conv2d(features, matrix[:, :, None, None], offset)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return A (C, C) and b (C,): the normalisation with its running statistics after the linear map; 0 without offset."""
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        offset = norm.bias - scale * norm.running_mean
        return scale[:, None] * self.weight, offset if self.offset else torch.zeros_like(offset)

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, variance: Tensor, *, identity: bool) -> None:
        """Set the running statistics, (C,) each; ``identity``: and weight and bias so that they change nothing yet."""
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(variance)
        if identity:
            self.norm.weight.copy_((variance + self.norm.eps).sqrt())
            self.norm.bias.copy_(mean)


class Polarized(nn.Module):
    """A convolution or linear layer with a polarizer in front of it."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, *, offset: bool) -> None:
        """Take the layer, whose weights stay as they are; see ``Polarizer`` for ``offset``."""
        super().__init__()
        self.layer = layer
        channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        self.polarizer = Polarizer(channels, last=isinstance(layer, nn.Linear), offset=offset).to(layer.weight.device)

    def forward(self, features: Tensor) -> Tensor:
        """Return layer(polarizer(pad(h))), the padding before the polarizer."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            out: Tensor = layer(self.polarizer(features))
            return out
        padded = self.polarizer(pad_for(layer, features))
        return F.conv2d(padded, layer.weight, layer.bias, layer.stride, 0, layer.dilation)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the one layer that does the same: W' = W A, bias' = bias + W b summed over the kernel."""
        matrix, offset = self.polarizer.affine()
        weight = self.layer.weight
        bias = weight.new_zeros(len(weight)) if self.layer.bias is None else self.layer.bias
        kernel = weight[..., None, None] if weight.ndim == 2 else weight
        product = torch.einsum("ochw,cd->odhw", kernel, matrix)
        return product.reshape(weight.shape), bias + torch.einsum("ochw,c->o", kernel, offset)


def pad_for(layer: nn.Conv2d, features: Tensor) -> Tensor:
    """Return features padded as a convolution pads them."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(features, layer._reversed_padding_repeated_twice, mode=mode)


def insert(model: nn.Module, name: str, wiring: Wiring) -> Polarized:
    """Put a polarizer in front of a layer of ``model``, in place, and return the pair.

    It has an offset where that can be multiplied in: where the layer has a bias or a batch normalisation takes its output.

    Raises:
        ValueError: the layer is no convolution without groups and no linear layer.
    """
    layer = require_filterable(model, name)
    polarized = Polarized(layer, offset=layer.bias is not None or norm_behind(model, name, wiring) is not None)
    replace_module(model, name, polarized)
    return polarized


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a dotted name, in place."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def norm_behind(model: nn.Module, name: str, wiring: Wiring) -> nn.modules.batchnorm._BatchNorm | None:
    """Return the batch normalisation with running statistics that takes a layer's output, or None."""
    norm = model.get_submodule(wiring.normed[name]) if name in wiring.normed else None
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
        return norm
    return None


@torch.no_grad()
def fold(model: nn.Module, name: str, wiring: Wiring) -> None:
    """Multiply the polarizer at ``name`` into its layer, in place; the network computes the same, with the keys it had before."""
    polarized = model.get_submodule(name)
    assert isinstance(polarized, Polarized)
    layer, (weight, bias) = polarized.layer, polarized.folded()
    layer.weight.copy_(weight)
    replace_module(model, name, layer)
    if layer.bias is not None:
        layer.bias.copy_(bias)
    elif (norm := norm_behind(model, name, wiring)) is not None and norm.running_mean is not None:
        norm.running_mean.sub_(bias)


@dataclass(frozen=True, kw_only=True)
class NeuralPolarizer:
    """Train one linear layer before a late convolution, and multiply it in.

    Attributes:
        initial: "identity" leaves the network as it is at first; "standardised" feeds it standardised features, as after the
            authors' warm-up, from which a network without a shortcut around the polarizer hardly recovers. "auto" is
            "standardised" where that keeps 0.8 of the held-out accuracy; elsewhere "identity", at ``IDENTITY_RATE_FACTOR`` times
            the rate.
        layer: name of the layer that the polarizer goes before; None: the first layer with weights of the last block
            (``lustral.vision.models.wiring.late_layer``), which is the published place in a PreAct-ResNet18.
        clean_weight: 1 in the paper.
        restore_weight: 0.4 on CIFAR-10 in the authors' code.
        margin_weight: 0.4 likewise.
        target_weight: 0.4 likewise.
        enough: share of a batch that is called t after which no further step is taken; 0.6 in the authors' code.
        radius: largest L2 norm of the perturbation at 3x32x32 pixels on the [0, 1] scale, in proportion to the root of
            their number elsewhere; 3 on CIFAR-10, 5 on GTSRB in the authors' code.
        step_size: of a signed step; 0.1 there, after which one step reaches the ball's surface.
        steps: most steps; 2 there.
        trainer: SGD at 0.01, constant, for 50 epochs with batches of 128 in the authors' code, after five epochs of warm-up
            whose one effect is that the normalisation knows its features: here these statistics are computed.
        rate: "given": the trainer's; "found": the largest near it that a short range test on the held-out images bears
            (``lustral.vision.repair.rates``), for networks unlike the one that it was chosen on.
        least_steps: small clean sets get more epochs, until there are this many steps.
        holdout: share of the clean images kept to watch the accuracy; the last weights are returned.
    """

    version: ClassVar[int] = 2  # 2: the statistics have the trainer's precision
    needs: ClassVar[str] = "a convolution or linear layer before the head"
    cost_passes: ClassVar[float] = 95

    initial: Start = "auto"
    layer: str | None = None
    clean_weight: float = 1.0
    restore_weight: float = 0.4
    margin_weight: float = 0.4
    target_weight: float = 0.4
    enough: float = 0.6
    radius: float = 3.0
    step_size: float = 0.1
    steps: int = 2
    trainer: Trainer = field(
        default_factory=lambda: Trainer(epochs=30, batch_size=128, learning_rate=0.01, schedule="constant")
    )
    rate: RateChoice = "given"
    least_steps: int = 300
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_holdout(self.holdout)
        weights = (self.clean_weight, self.restore_weight, self.margin_weight, self.target_weight)
        check_polarizing(self.radius, self.step_size, self.steps, *weights)
        if not 0 <= self.enough <= 1:
            raise ValueError(f"expected a share in [0, 1] for enough; got {self.enough}")

    def published(self) -> NeuralPolarizer:
        """Return the published budget: 50 epochs at 0.01 with plain momentum in float32, from standardised features."""
        trainer = dataclasses.replace(self.trainer, epochs=50, optimizer="heavy_ball", precision="float32")
        return dataclasses.replace(self, initial="standardised", trainer=trainer, rate="given", least_steps=0)

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return the model with a polarizer multiplied in; see ``Purifier``."""
        with PurifyRun(view=view, holdout=self.holdout, generator=generator, on_progress=on_progress) as repair:
            model = repair.copy()
            needed = [parameter.requires_grad for parameter in model.parameters()]
            wiring = trace(model, next(repair.fit.batches(1)).inputs)
            name = polarizer_layer(model, wiring, self.layer)
            recipe = self.trainer
            statistics = feature_statistics(model, name, repair.fit, recipe.batch_size, recipe.precision)
            model.requires_grad_(False)
            polarizer = insert(model, name, wiring).polarizer
            trainer, started = begin(
                repair,
                model,
                self.initial,
                lambda identity: polarizer.set_statistics(*statistics, identity=identity),
                self.trainer.fitted_to_size(len(repair.fit), self.least_steps),
            )
            trainer, told = repair.with_rate(self.rate, trainer, lambda: self.objective, model=model)
            trained = repair.train(model, trainer, objective=self.objective, stage="polarizing")
            fold(trained, name, wiring)
            for parameter, need in zip(trained.parameters(), needed, strict=False):
                parameter.requires_grad_(need)
        note = f"A polarizer before {name} was multiplied into it."
        if not polarizer.offset:
            note += f" It has no offset: {name} has no bias, and no batch normalisation that keeps statistics follows."
        return repair.result(trained, *filter(None, (note, started)), *told)

    def objective(self, model: nn.Module, batch: Batch, generator: Generator) -> Tensor:
        """Return the loss of a batch; the network stays in evaluation mode."""
        x, y = batch.inputs, batch.labels
        model.eval()
        moved, own, target = self.aim(model, x, y)
        clean, fooled = model(torch.cat([x, moved])).float().split(len(x))
        s = fooled.softmax(1)
        rival = runner_up(fooled.detach(), y)
        loss = self.clean_weight * F.cross_entropy(clean, y) + self.restore_weight * F.cross_entropy(fooled, own)
        for weight, label in ((self.margin_weight, rival), (self.target_weight, target)):
            loss = loss + weight * avoidance_loss(s, label)
        return loss

    def aim(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (x~, own prediction on x, target): a perturbation of each image towards its runner-up class.

        The pass over the clean images gives prediction, target and the first slope at once.
        """
        radius = self.radius * (x[0].numel() / (3 * 32 * 32)) ** 0.5
        moved = x
        own = target = y
        with frozen(model), torch.enable_grad():
            for step in range(self.steps):
                moved = moved.detach().requires_grad_(True)
                logits = model(moved).float()
                if step == 0:
                    own, target = logits.detach().argmax(1), runner_up(logits.detach(), y)
                elif float((logits.detach().argmax(1) == target).float().mean()) > self.enough:
                    break
                (slope,) = torch.autograd.grad(F.cross_entropy(logits, target), moved)
                delta = project(moved.detach() - self.step_size * slope.sign() - x, "l2", radius)
                moved = (x + delta).clamp(0, 1)
        return moved.detach(), own, target
