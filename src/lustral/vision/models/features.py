"""The features that a classifier decides by: the inputs of its last linear layer, gathered over a set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lustral.core.records import OnProgress, Progress
from lustral.training.modes import autocast, frozen
from lustral.vision.models.wiring import trace
from lustral.vision.records import LabelledImages

BATCH = 512


class Penultimate:
    """Calls a classifier and hands over the inputs of its head, (B, D), beside its logits, (B, K).

    >>> class Net(nn.Module):
    ...     def __init__(self) -> None:
    ...         super().__init__()
    ...         self.head = nn.Linear(3, 2)
    ...     def forward(self, images: Tensor) -> Tensor:
    ...         return self.head(images.mean((2, 3)))
    >>> with Penultimate.of(Net(), torch.zeros(1, 3, 4, 4)) as tap:
    ...     features, logits = tap(torch.rand(5, 3, 4, 4))
    >>> features.shape, logits.shape
    (torch.Size([5, 3]), torch.Size([5, 2]))
    """

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        """Watch what goes into ``head`` when ``model`` runs; use ``of``."""
        self._model = model
        self._head = head
        self._seen: Tensor | None = None

    @classmethod
    @contextmanager
    def of(cls, model: nn.Module, images: Tensor) -> Iterator[Penultimate]:
        """Watch a classifier inside the block.

        Args:
            model: classifier.
            images: (B, C, H, W) float32 in [0, 1] that it takes; one is enough.

        Raises:
            ValueError: it uses no layer with weights.
        """
        with cls.at(model, trace(model, images[:1]).head) as tap:
            yield tap

    @classmethod
    @contextmanager
    def at(cls, model: nn.Module, head: str) -> Iterator[Penultimate]:
        """Watch a classifier whose head is known by its name: cheap enough for every batch of a training."""
        tap = cls(model, model.get_submodule(head))

        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            tap._seen = inputs[0]

        handle = tap._head.register_forward_pre_hook(note)
        try:
            yield tap
        finally:
            handle.remove()

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (features (B, D) float32, logits (B, K) float32), with gradients where the caller has them on."""
        logits = self._model(images)
        assert self._seen is not None
        features, self._seen = self._seen.flatten(1).float(), None
        return features, logits.float()


def gather(
    model: nn.Module,
    data: LabelledImages,
    *,
    batch_size: int = BATCH,
    on_progress: OnProgress | None = None,
    stage: str = "features",
) -> tuple[Tensor, Tensor]:
    """Return (features (N, D), logits (N, K)), float32 on the CPU, of all images of a set in order, in evaluation mode."""
    device = next(model.parameters()).device
    features, logits, done = list[Tensor](), list[Tensor](), 0
    first = next(iter(data.subset(torch.tensor([0])).batches(1))).inputs.to(device)
    with frozen(model), torch.no_grad(), Penultimate.of(model, first) as tap:
        for batch in data.batches(batch_size):
            with autocast(device):
                found = tap(batch.inputs.to(device, memory_format=torch.channels_last))
            features.append(found[0].cpu())
            logits.append(found[1].cpu())
            done += len(batch.labels)
            if on_progress is not None:
                on_progress(Progress(stage=stage, done=done, total=len(data)))
    return torch.cat(features), torch.cat(logits)
