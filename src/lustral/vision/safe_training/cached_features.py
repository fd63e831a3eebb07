"""Features of a finished extractor, kept so that a head can be trained on them in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from lustral.core.randomness import on_device
from lustral.core.records import Augmentation, Batch, OnProgress, Progress
from lustral.training import autocast, frozen
from lustral.vision.models.features import BATCH, Penultimate
from lustral.vision.records import LabelledImages

MOST_NUMBERS = 2**28  # 1 GiB: of more images than fit fewer views are kept


@dataclass(frozen=True, kw_only=True)
class CachedFeatures:
    """Features of V views of each of M images; a pass over them takes one view of every image, drawn anew.

    Attributes:
        features: (V, M, D) float32.
        labels: (M,) int64.
        num_classes: K.
    """

    features: Tensor
    labels: Tensor
    num_classes: int

    def __len__(self) -> int:
        """Return M."""
        return len(self.labels)

    def batches(
        self, batch_size: int, *, generator: Generator | None = None, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Yield batches of features; see ``TrainingSet``. Without a generator: of the first views, in order."""
        order, view = torch.arange(len(self)), torch.zeros(len(self), dtype=torch.int64)
        if generator is not None:
            order = torch.randperm(len(self), generator=generator)
            view = torch.randint(len(self.features), (len(self),), generator=generator)
        order, view = order.to(self.labels.device), view.to(self.labels.device)
        stop = len(self) - len(self) % batch_size if drop_last else len(self)
        for start in range(0, stop, batch_size):
            index = order[start : start + batch_size]
            yield Batch(self.features[view[index], index], self.labels[index], index)


@torch.no_grad()
def cache(
    data: LabelledImages,
    classifier: nn.Module,
    head: str,
    augment: Augmentation,
    *,
    most_views: int,
    generator: Generator,
    on_progress: OnProgress | None = None,
) -> CachedFeatures:
    """Return the features of augmented views of each image, in evaluation mode, on the classifier's device.

    Args:
        data: the images.
        classifier: float32 (B, C, H, W) in [0, 1] to logits.
        head: name of its last layer, whose inputs are the features.
        augment: makes a view.
        most_views: V, or fewer where they would take more than ``MOST_NUMBERS``, but one.
        generator: stream of the views.
        on_progress: called on the way.
    """
    device, layer = next(classifier.parameters()).device, classifier.get_submodule(head)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"expected the name of a linear layer; {head!r} is {layer}")
    num_views = max(min(most_views, MOST_NUMBERS // (len(data) * layer.in_features)), 1)
    found = torch.empty(num_views, len(data), layer.in_features, device=device)
    drawing, done = on_device(generator, device), 0
    with frozen(classifier), Penultimate.at(classifier, head) as tap, autocast(device):
        for batch in data.batches(BATCH):
            images, stop = batch.inputs.to(device), done + len(batch.labels)
            for each in found:
                views = augment(images, generator=drawing).contiguous(memory_format=torch.channels_last)
                each[done:stop], _ = tap(views)
            done = stop
            if on_progress is not None:
                on_progress(Progress(stage="keeping features", done=done, total=len(data)))
    return CachedFeatures(features=found, labels=data.labels.to(device), num_classes=data.num_classes)
