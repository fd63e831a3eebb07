"""The one loop: every attack, purifier and safe trainer trains through ``Trainer.fit``.

What differs between them goes in as an ``objective``; what they watch comes out through ``on_epoch``. The loop runs on
one device, that of the model.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.cost import CostMeter
from lustral.core.randomness import fork, on_device
from lustral.core.records import ImageStream, Objective, OnProgress, Progress
from lustral.training.augmentation import Augment
from lustral.training.modes import Precision, autocast, set_training_mode


class TrainingDiverged(ArithmeticError):
    """The loss became infinite or not a number."""


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """What one epoch did.

    Attributes:
        epoch: number of finished epochs, from 1.
        epochs: epochs in all.
        loss: mean objective over the epoch.
        images_per_second: training rate of this epoch, data pipeline included.
        model: the model as it is now, in training mode; look, copy, but do not change it.
    """

    epoch: int
    epochs: int
    loss: float
    images_per_second: float
    model: nn.Module


def adam_step_ratio(model: nn.Module) -> float:
    """Return how far a step of Adam can move the units of a model: their change over what they compute, per learning rate.

    Adam moves every weight by up to the learning rate, however small its gradient, and the weights of a unit move together. Over
    inputs of one size that changes the unit's sum by the rate times its number of inputs n, where weights of root mean square w
    that point anywhere give a sum of w sqrt(n): the ratio is sqrt(n) / w per unit of the rate. It grows with the width of a
    network, in proportion if the starting weights shrink as usual, which is why the best rate of Adam falls in inverse
    proportion (Yang et al., "Tensor Programs V", NeurIPS 2021, arXiv 2203.03466).

    Returns:
        The mean over the weights of all kernels and matrices, 0 without any. What is all zero, as a pruned layer, has no size to
        compare with and is left out; so is what has one row, as the tokens of a transformer.
    """
    total, count = 0.0, 0
    for parameter in model.parameters():
        weight = parameter.detach().float()
        if weight.ndim > 1 and len(weight) > 1 and (size := float(weight.square().mean().sqrt())) > 0:
            total += weight.numel() * math.sqrt(weight[0].numel()) / size
            count += weight.numel()
    return total / max(count, 1)


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
    """Return the plain objective: mean cross-entropy of the labels."""
    return F.cross_entropy(model(images).float(), labels)


def learning_rate_factor(progress: float, schedule: str, warmup: float) -> float:
    """Return the learning rate at ``progress`` in [0, 1] of training, as a share of its peak.

    >>> learning_rate_factor(0.1, "one_cycle", 0.2), learning_rate_factor(1.0, "one_cycle", 0.2)
    (0.5, 0.0)
    """
    if schedule == "constant":
        return 1.0
    if progress < warmup:
        return progress / warmup
    after = (progress - warmup) / (1 - warmup)
    return 1 - after if schedule == "one_cycle" else (1 + math.cos(math.pi * after)) / 2


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Trains or fine-tunes a copy of a model.

    Attributes:
        epochs: passes over the data.
        batch_size: images per step; a last batch that is not full is dropped when there are full ones.
        optimizer: "sgd" (Nesterov's momentum), "heavy_ball" (SGD with Polyak's, as most published code has it), "adam", "amsgrad"
            (Adam by the largest second moment so far) or "adamw".
        learning_rate: peak learning rate.
        momentum: of SGD; first beta of Adam and its kin.
        weight_decay: L2 for SGD and Adam, decoupled for AdamW; matrices and kernels only, not biases or norms.
        schedule: "one_cycle" (linear up, linear down to 0), "cosine" (after the same warm-up), or "constant".
        warmup: share of the steps in which the rate climbs from 0; no use with "constant".
        label_smoothing: of the default objective.
        augment: batched augmentation, or None.
        precision: "auto" takes bfloat16 autocast where the hardware has it.
        channels_last: NHWC memory layout.
        compile: run the model through torch.compile.
        batch_norm: "train", or "frozen" to keep the running statistics and normalise with them.
        clip_norm: largest gradient norm, or None.
    """

    version: ClassVar[int] = 1

    epochs: int = 12
    batch_size: int = 128
    optimizer: Literal["sgd", "heavy_ball", "adam", "amsgrad", "adamw"] = "sgd"
    learning_rate: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    warmup: float = 0.2
    label_smoothing: float = 0.0
    augment: Augment | None = None
    precision: Precision = "auto"
    channels_last: bool = True
    compile: bool = False
    batch_norm: Literal["train", "frozen"] = "train"
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.epochs < 0 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ValueError(
                "expected epochs >= 0, batch_size >= 1 and learning_rate > 0; got "
                f"{self.epochs}, {self.batch_size} and {self.learning_rate}"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"expected a warm-up share in [0, 1); got {self.warmup}")

    def fitted_to_size(self, num_images: int, least_steps: int) -> Trainer:
        """Return this recipe for a small set: batches of at most a quarter of it, epochs for at least ``least_steps``.

        >>> small = Trainer(epochs=6, batch_size=128).fitted_to_size(num_images=100, least_steps=40)
        >>> small.batch_size, small.epochs
        (25, 10)
        """
        batch_size = min(self.batch_size, max(num_images // 4, 2))
        epochs = max(self.epochs, math.ceil(least_steps / max(num_images // batch_size, 1)))
        return replace(self, batch_size=batch_size, epochs=epochs)

    def with_rate_cap(self, model: nn.Module, relative_rate: float | None) -> Trainer:
        """Return this recipe with a learning rate of at most ``relative_rate / reach(model)``, so that it serves any width.

        Args:
            model: the one to train.
            relative_rate: largest change of a unit in a step of Adam, over what it computes; None leaves the recipe as it is.
        """
        if relative_rate is None or not (step := adam_step_ratio(model)):
            return self
        return replace(self, learning_rate=min(self.learning_rate, relative_rate / step))

    def fit(
        self,
        model: nn.Module,
        data: ImageStream,
        *,
        generator: Generator,
        objective: Objective | None = None,
        companions: Sequence[torch.optim.Optimizer] = (),
        on_epoch: Callable[[EpochReport], bool | None] | None = None,
        on_progress: OnProgress | None = None,
        stage: str = "training",
    ) -> nn.Module:
        """Return a trained copy of ``model``, in evaluation mode; the one given is not changed.

        Equal seeds give equal weights on one device.

        Args:
            model: classifier from float32 (B, C, H, W) in [0, 1] to logits (B, K), on the device of ``data``.
            data: training images.
            generator: CPU stream; order, augmentation, the objective and dropout each get a stream of their own.
            objective: maps (model, images, labels, generator) to a scalar loss; None is cross-entropy.
            companions: optimizers of networks that the objective trains along; cleared and stepped with the model's, each
                group at the same share of its own learning rate.
            on_epoch: called after each epoch; training ends with the epoch after which it returns True.
            on_progress: called a few times a second.
            stage: name of this training in progress reports.

        Raises:
            TrainingDiverged: the loss is not finite; the message says at which step and what to change.
            ValueError: the data set is empty.
        """
        if len(data) == 0:
            raise ValueError("expected at least one training image; the set is empty")
        original, model = model, copy.deepcopy(model)
        CostMeter.follow(original, model)
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if objective is None:
            objective = self._plain_objective
        order, dropout_seed = fork(generator, "order"), int(torch.randint(2**31, (), generator=generator))
        device = next(model.parameters()).device
        augmenting, extra = on_device(fork(generator, "augment"), device), fork(generator, "objective")
        optimizer = self.optimizer_for(model)
        groups = [(group, group["lr"]) for each in (optimizer, *companions) for group in each.param_groups]
        forward: nn.Module = torch.compile(model) if self.compile else model  # type: ignore[assignment]
        steps = max(len(data) // self.batch_size, 1)
        drop_last = len(data) >= self.batch_size
        done, last_report, first = 0, 0.0, True
        set_training_mode(model, self.batch_norm)
        fork_devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(fork_devices):
            torch.manual_seed(dropout_seed)
            for epoch in range(self.epochs):
                started, total, seen = time.perf_counter(), torch.zeros((), device=device), 0
                for images, labels in data.batches(self.batch_size, generator=order, drop_last=drop_last):
                    factor = learning_rate_factor((done + 1) / (steps * self.epochs), self.schedule, self.warmup)
                    for group, peak in groups:
                        group["lr"] = peak * factor
                    images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                    if self.augment is not None:
                        images = self.augment(images, generator=augmenting)
                    if self.channels_last:
                        images = images.contiguous(memory_format=torch.channels_last)
                    with autocast(device, self.precision):
                        loss = objective(forward, images, labels, extra)
                    for each in (optimizer, *companions):
                        each.zero_grad(set_to_none=True)
                    loss.backward()  # type: ignore[no-untyped-call]
                    if self.clip_norm is not None:
                        nn.utils.clip_grad_norm_(model.parameters(), self.clip_norm)
                    for each in (optimizer, *companions):
                        each.step()
                    total += loss.detach()
                    done, seen = done + 1, seen + len(images)
                    now = time.perf_counter()
                    if first or now - last_report > 0.25:
                        self._check(loss, done)
                        first, last_report = False, now
                        if on_progress is not None:
                            rate = {"images_per_second": seen / (now - started), "loss": loss.item()}
                            on_progress(Progress(stage=stage, done=done, total=steps * self.epochs, values=rate))
                self._check(total, done)
                if on_epoch is not None:
                    mean = total.item() / steps
                    rate_now = seen / (time.perf_counter() - started)
                    enough = on_epoch(
                        EpochReport(
                            epoch=epoch + 1, epochs=self.epochs, loss=mean, images_per_second=rate_now, model=model
                        )
                    )
                    if enough:
                        break
                    set_training_mode(model, self.batch_norm)
        if on_progress is not None:
            on_progress(Progress(stage=stage, done=done, total=done))
        optimizer.zero_grad(set_to_none=True)  # gradients are no part of the result
        return model.eval()

    def _plain_objective(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        return F.cross_entropy(model(images).float(), labels, label_smoothing=self.label_smoothing)

    def _check(self, loss: Tensor, step: int) -> None:
        if not bool(torch.isfinite(loss)):
            raise TrainingDiverged(
                f"the loss became {loss.item()} at step {step}: lower the learning rate (now {self.learning_rate}), "
                "or check the images and the starting weights for NaN"
            )

    def optimizer_for(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer over a model's trainable parameters, in one fused update."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if self.optimizer in ("sgd", "heavy_ball"):
            nesterov = self.optimizer == "sgd" and self.momentum > 0
            return torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum, nesterov=nesterov, fused=True)
        adam = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        betas, amsgrad = (self.momentum, 0.999), self.optimizer == "amsgrad"
        return adam(groups, lr=self.learning_rate, betas=betas, amsgrad=amsgrad, fused=True)
