"""The one loop: every attack, purifier and safe trainer trains through ``Trainer.fit``.

What differs between them goes in as an ``objective``; what they watch comes out through ``on_epoch``. The loop runs on
one device, that of the model.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.cost import CostMeter
from lustral.core.randomness import fork, on_device
from lustral.core.records import Batch, Objective, OnProgress, Progress, TrainingSet
from lustral.training.augmentation import Augment
from lustral.training.modes import Precision, autocast, set_training_mode

SECONDS_BETWEEN_LOOKS = 0.25  # a look at the loss waits for the device


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


def cross_entropy(model: nn.Module, batch: Batch, generator: Generator) -> Tensor:
    """Return the plain objective: mean cross-entropy of the labels."""
    return F.cross_entropy(model(batch.inputs).float(), batch.labels)


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
            (Adam by the largest second moment so far), "adamw" or "rmsprop" (squared gradients forgotten at 0.99 a step).
        learning_rate: peak learning rate.
        momentum: of SGD and RMSprop; first beta of Adam and its kin.
        weight_decay: L2 for SGD, RMSprop and Adam, decoupled for AdamW; matrices and kernels only, not biases or norms.
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
    optimizer: Literal["sgd", "heavy_ball", "adam", "amsgrad", "adamw", "rmsprop"] = "sgd"
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
        """Return this recipe with a rate of at most ``relative_rate / adam_step_ratio(model)``, so that it serves any width.

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
        data: TrainingSet,
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
            data: training examples.
            generator: CPU stream; order, augmentation, the objective and dropout each get a stream of their own.
            objective: maps (model, batch, generator) to a scalar loss; None is cross-entropy.
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
        order, dropout_seed = fork(generator, "order"), int(torch.randint(2**31, (), generator=generator))
        device = next(model.parameters()).device
        run = _Run(
            trainer=self,
            model=model,
            objective=objective or self._plain_objective,
            optimizers=(self.optimizer_for(model), *companions),
            augmenting=on_device(fork(generator, "augment"), device),
            drawing=fork(generator, "objective"),
            steps_per_epoch=max(len(data) // self.batch_size, 1),
            on_progress=on_progress,
            stage=stage,
        )
        drop_last = len(data) >= self.batch_size
        set_training_mode(model, self.batch_norm)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(dropout_seed)
            for epoch in range(1, self.epochs + 1):
                report = run.epoch(epoch, data.batches(self.batch_size, generator=order, drop_last=drop_last))
                if on_epoch is not None:
                    if on_epoch(report):
                        break
                    set_training_mode(model, self.batch_norm)
        if on_progress is not None:
            on_progress(Progress(stage=stage, done=run.done, total=run.done))
        run.optimizers[0].zero_grad(set_to_none=True)  # gradients are no part of the result
        return model.eval()

    def _plain_objective(self, model: nn.Module, batch: Batch, generator: Generator) -> Tensor:
        return F.cross_entropy(model(batch.inputs).float(), batch.labels, label_smoothing=self.label_smoothing)

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
        if self.optimizer == "rmsprop":
            return torch.optim.RMSprop(groups, lr=self.learning_rate, alpha=0.99, momentum=self.momentum)
        adam = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        betas, amsgrad = (self.momentum, 0.999), self.optimizer == "amsgrad"
        return adam(groups, lr=self.learning_rate, betas=betas, amsgrad=amsgrad, fused=True)


@dataclass(kw_only=True, eq=False)
class _Run:
    """One training at work: what a step takes, and how many are done.

    Attributes:
        trainer: how.
        model: what is trained.
        objective: the loss of a batch.
        optimizers: the model's, then those of its companions.
        augmenting: stream of the augmentation, on the model's device.
        drawing: stream of the objective, on the CPU.
        steps_per_epoch: batches of one pass.
        on_progress: called a few times a second.
        stage: name in progress reports.
        done: steps taken.
        looked: when the loss was last looked at, in seconds of ``time.perf_counter``.
    """

    trainer: Trainer
    model: nn.Module
    objective: Objective
    optimizers: tuple[torch.optim.Optimizer, ...]
    augmenting: Generator
    drawing: Generator
    steps_per_epoch: int
    on_progress: OnProgress | None
    stage: str
    done: int = 0
    looked: float = -math.inf

    def __post_init__(self) -> None:
        """Note where the model is, and the rate that each group of weights peaks at."""
        self.device = next(self.model.parameters()).device
        self.forward: nn.Module = torch.compile(self.model) if self.trainer.compile else self.model  # type: ignore[assignment]
        self.peak_rates = [(group, group["lr"]) for each in self.optimizers for group in each.param_groups]

    def epoch(self, number: int, batches: Iterable[Batch]) -> EpochReport:
        """Take the steps of one epoch, and return what they did."""
        started, total, seen = time.perf_counter(), torch.zeros((), device=self.device), 0
        for batch in batches:
            loss = self.step(batch.to(self.device))
            total += loss
            seen += len(batch.labels)
            now = time.perf_counter()
            if now - self.looked > SECONDS_BETWEEN_LOOKS:
                self.look(loss, seen / (now - started))
                self.looked = now
        self.check(total)
        return EpochReport(
            epoch=number,
            epochs=self.trainer.epochs,
            loss=total.item() / self.steps_per_epoch,
            images_per_second=seen / (time.perf_counter() - started),
            model=self.model,
        )

    def step(self, batch: Batch) -> Tensor:
        """Take one step, and return the loss before it, detached, on the device."""
        trainer = self.trainer
        progress = (self.done + 1) / (self.steps_per_epoch * trainer.epochs)
        factor = learning_rate_factor(progress, trainer.schedule, trainer.warmup)
        for group, peak in self.peak_rates:
            group["lr"] = peak * factor
        inputs = batch.inputs
        if trainer.augment is not None:
            inputs = trainer.augment(inputs, generator=self.augmenting)
        if trainer.channels_last and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with autocast(self.device, trainer.precision):
            loss = self.objective(self.forward, batch._replace(inputs=inputs), self.drawing)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if trainer.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), trainer.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.done += 1
        return loss.detach()

    def look(self, loss: Tensor, images_per_second: float) -> None:
        """Check the loss of the last step, and report progress."""
        self.check(loss)
        if self.on_progress is not None:
            values = {"images_per_second": images_per_second, "loss": loss.item()}
            total = self.steps_per_epoch * self.trainer.epochs
            self.on_progress(Progress(stage=self.stage, done=self.done, total=total, values=values))

    def check(self, loss: Tensor) -> None:
        """Raise ``TrainingDiverged`` if the loss is not finite."""
        if not bool(torch.isfinite(loss)):
            raise TrainingDiverged(
                f"the loss became {loss.item()} at step {self.done}: lower the learning rate (now "
                f"{self.trainer.learning_rate}), or check the images and the starting weights for NaN"
            )
