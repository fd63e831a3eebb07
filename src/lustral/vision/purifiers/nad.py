"""NAD: a student learns the attention maps of a fine-tuned teacher (Li, Lyu, Koren, Lyu, Li, Ma, "Neural Attention Distillation:
Erasing Backdoor Triggers from Deep Neural Networks", ICLR 2021, arXiv 2101.05930).

    L = CE(f_S(x), y) + sum_l b_l || A(F_l^T) / ||A(F_l^T)|| - A(F_l^S) / ||A(F_l^S)|| ||^2,      A(F) = sum over channels |F|^p

The teacher is the given model, fine-tuned on the clean images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.records import Batch, OnProgress
from lustral.training import Trainer, fine_tuning_recipe, frozen
from lustral.vision.images import check_holdout
from lustral.vision.records import DefenderView, Purified
from lustral.vision.repair.run import PurifyRun

NUM_GROUPS = 3  # of layers whose attention is distilled


def attention(features: Tensor, power: float) -> Tensor:
    """Return the normalised attention map of features (B, C, H, W): (B, H * W), unit L2 norm."""
    return F.normalize(features.float().abs().pow(power).sum(1).flatten(1), dim=1)


def stage_ends(model: nn.Module, images: Tensor) -> tuple[str, ...]:
    """Return the modules after which the last three sizes of feature maps are left, shallow first.

    In a ResNet these are the ends of its last three groups of blocks.

    Raises:
        ValueError: the network has no feature maps (B, C, H, W) of at least two by two pixels.
    """
    last: dict[tuple[int, ...], str] = {}

    def noter(name: str) -> Callable[[nn.Module, object, object], None]:
        def note(_: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
                last[tuple(output.shape[2:])] = name

        return note

    convolving = [
        (name, module)
        for name, module in model.named_modules()
        if name and any(isinstance(part, nn.Conv2d) for part in module.modules())
    ]
    handles = [module.register_forward_hook(noter(name)) for name, module in convolving]
    try:
        with frozen(model), torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    if not last:
        raise ValueError("NAD compares feature maps (B, C, H, W), and this network has none; use another method")
    ends = sorted(last.items(), key=lambda item: -item[0][0] * item[0][1])[-NUM_GROUPS:]
    return tuple(name for _, name in ends)


@contextmanager
def watched(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Give the outputs of modules by name, of the latest pass."""
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def keep(_: nn.Module, inputs: object, output: Tensor) -> None:
            seen[name] = output

        return keep

    handles = [model.get_submodule(name).register_forward_hook(keeper(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class NAD:
    """Fine-tune a teacher, then distil its attention into the given model.

    Attributes:
        layer_weights: b of the last three feature sizes, shallow first; 500, 1000, 1000 in BackdoorBench.
        power: p; 2 in the paper.
        teacher_trainer: 10 epochs of SGD at 0.01 there.
        trainer: 100 epochs of SGD at 0.01, cosine, in BackdoorBench; 10 epochs at 0.1 in the authors' code.
        least_steps: small clean sets get more epochs in both trainings, until there are this many steps.
        holdout: share of the clean images kept to watch the accuracy; the last weights are returned.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "feature maps"
    cost_passes: ClassVar[float] = 30

    layer_weights: tuple[float, ...] = (500.0, 1000.0, 1000.0)
    power: float = 2.0
    teacher_trainer: Trainer = field(default_factory=lambda: fine_tuning_recipe(10))
    trainer: Trainer = field(default_factory=lambda: fine_tuning_recipe(20))
    least_steps: int = 150
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_holdout(self.holdout)
        if len(self.layer_weights) != NUM_GROUPS or min(self.layer_weights) < 0 or self.power <= 0:
            raise ValueError(
                f"expected {NUM_GROUPS} weights >= 0 and a power > 0; got {self.layer_weights} and {self.power}"
            )

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return the student; see ``Purifier``."""
        with PurifyRun(view=view, holdout=self.holdout, generator=generator, on_progress=on_progress) as repair:
            names = stage_ends(view.model, next(repair.fit.batches(1)).inputs)
            weights = self.layer_weights[-len(names) :]
            recipe = self.teacher_trainer.fitted_to_size(len(repair.fit), self.least_steps)
            teacher = repair.follow(
                repair.train(view.model, recipe, stage="fine-tuning a teacher", parts=(("round", 0),))
            )

            def objective(student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
                x, y = batch.inputs, batch.labels
                with torch.no_grad(), frozen(teacher), watched(teacher, names) as shown:
                    teacher(x)
                    wanted = [attention(shown[name], self.power) for name in names]
                with watched(student, names) as own:
                    loss = F.cross_entropy(student(x).float(), y)
                    for weight, name, map_wanted in zip(weights, names, wanted, strict=True):
                        loss = loss + weight * (attention(own[name], self.power) - map_wanted).square().mean()
                return loss

            trainer = self.trainer.fitted_to_size(len(repair.fit), self.least_steps)
            model = repair.train(
                view.model, trainer, objective=objective, stage="distilling attention", parts=(("round", 1),)
            )
        return repair.result(model)
