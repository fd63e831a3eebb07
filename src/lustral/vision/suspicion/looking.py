"""One pass over a set that serves every score of a trained classifier: its features, logits and batch-norm likelihoods."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lustral.core.cost import CostMeter
from lustral.core.randomness import child, fork
from lustral.core.records import OnProgress, Progress
from lustral.training import Trainer, autocast, frozen
from lustral.vision.models.features import BATCH, Penultimate
from lustral.vision.records import LabelledImages, TrainingView
from lustral.vision.suspicion.scoring_model import plain_model

MOST_DIMENSIONS = (
    1024  # of the features that are kept: 4 KiB an image, and a covariance that has its eigenvectors in a second
)
LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, kw_only=True)
class NormStatistics:
    """The mean and standard deviation of each channel that goes into a batch normalisation; both (C,) float32."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What a classifier made of each image of a set, in the set's order, on the CPU.

    Attributes:
        labels: (N,) int64, as given.
        num_classes: number of classes K of the task.
        features: (N, D) float32 inputs of the last linear layer; more than ``MOST_DIMENSIONS`` are projected on that many
            random directions, which nearly keeps distances.
        logits: (N, K) float32.
        likelihoods: (N, L) float32, for each batch normalisation the least log-likelihood of the numbers that go into it; L is 0
            without any. See ``least_log_likelihood``.
        statistics: of the normal distributions behind ``likelihoods``, by the layer's name, first layer first.
    """

    labels: Tensor
    num_classes: int
    features: Tensor
    logits: Tensor
    likelihoods: Tensor
    statistics: Mapping[str, NormStatistics]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @property
    def is_right(self) -> Tensor:
        """(N,) bool: the classifier answers with the label."""
        return self.logits.argmax(1) == self.labels

    def subset(self, indices: Tensor) -> Looked:
        """Return what was seen of the images at ``indices`` ((M,) int64, or (N,) bool mask), in that order."""
        return replace(
            self,
            labels=self.labels[indices],
            features=self.features[indices],
            logits=self.logits[indices],
            likelihoods=self.likelihoods[indices],
        )


def least_log_likelihood(inputs: Tensor, statistics: NormStatistics) -> Tensor:
    """Return the least log-density, over channels and places, of an image's numbers under their channel's normal distribution.

    With numbers standardised, so that all layers have one scale: min over c, h, w of log N((x - mean_c) / std_c; 0, 1).

    Args:
        inputs: (B, C, ...) float; what goes into a batch normalisation.
        statistics: of its C channels.

    Returns:
        (B,) float32, at most -log(2 pi) / 2.

    >>> two = torch.tensor([[1.0, -3.0], [0.0, 0.0]])
    >>> unit = NormStatistics(mean=torch.zeros(2), std=torch.ones(2))
    >>> (least_log_likelihood(two, unit) + LOG_2PI / 2).tolist()
    [-4.5, 0.0]
    """
    places = tuple(range(2, inputs.ndim))
    high, low = (inputs.amax(places), inputs.amin(places)) if places else (inputs, inputs)
    mean, std = statistics.mean, statistics.std
    farthest = torch.maximum(high.float() - mean, mean - low.float()).div_(std).amax(1)
    return farthest.square().add_(LOG_2PI).mul_(-0.5)


def look(
    model: nn.Module,
    data: LabelledImages,
    *,
    statistics: Mapping[str, NormStatistics] | None = None,
    batch_size: int = BATCH,
    on_progress: OnProgress | None = None,
    stage: str = "looking at images",
) -> Looked:
    """Look at all images of a set once, in evaluation mode; twice where a batch normalisation has no running statistics.

    Args:
        model: classifier.
        data: at least one image.
        statistics: of another set, for the likelihoods; None: the running statistics, and those of ``data`` where a batch
            normalisation has none.
        batch_size: images at a time.
        on_progress: called after each batch.
        stage: name in progress reports.

    Raises:
        ValueError: the set is empty, or what the model makes of it is not finite.
    """
    if len(data) == 0:
        raise ValueError("expected at least one image to look at; the set is empty")
    device = next(model.parameters()).device
    first = next(iter(data.subset(torch.tensor([0])).batches(1))).inputs.to(device)
    features, logits, least, done = list[Tensor](), list[Tensor](), list[Tensor](), 0
    with frozen(model), torch.no_grad():
        norms = _norms_used(model, first)
        if statistics is None:
            statistics = _statistics(model, norms, data, batch_size)
        with Penultimate.of(model, first) as tap, _least_of(norms, statistics) as found:
            for batch in data.batches(batch_size):
                with autocast(device):
                    inner, answer = tap(batch.inputs.to(device, memory_format=torch.channels_last))
                features.append(_at_most_dimensions(inner).cpu())
                logits.append(answer.cpu())
                least.append(torch.stack(list(found.values()), 1).cpu() if norms else torch.empty(len(answer), 0))
                found.clear()
                done += len(batch.labels)
                if on_progress is not None:
                    on_progress(Progress(stage=stage, done=done, total=len(data)))
    looked = Looked(
        labels=data.labels.cpu(),
        num_classes=data.num_classes,
        features=torch.cat(features),
        logits=torch.cat(logits),
        likelihoods=torch.cat(least),
        statistics=statistics,
    )
    if not all(bool(torch.isfinite(part).all()) for part in (looked.features, looked.logits, looked.likelihoods)):
        raise ValueError("the model's features are not all finite: train it again, at a lower learning rate")
    return looked


def look_at_both(
    model: nn.Module, view: TrainingView, *, on_progress: OnProgress | None = None
) -> tuple[Looked, Looked | None]:
    """Look at a view's untrusted images, and at its clean ones, where there are any, by the same statistics."""
    untrusted = look(model, view.untrusted, on_progress=on_progress, stage="looking at untrusted images")
    if view.clean is None or len(view.clean) == 0:
        return untrusted, None
    return untrusted, look(
        model, view.clean, statistics=untrusted.statistics, on_progress=on_progress, stage="looking at clean images"
    )


@contextmanager
def counted_model(
    view: TrainingView, *, generator: Generator, trainer: Trainer | None, on_progress: OnProgress | None
) -> Iterator[tuple[nn.Module, CostMeter]]:
    """Give the plainly trained model to look at, and a meter that counts its training and all its passes in the block."""
    start = view.build_model(fork(generator, "start")) if view.model is None else view.model
    with CostMeter(start, clean_images=0 if view.clean is None else len(view.clean)) as meter:
        same = replace(view, build_model=lambda _: start)
        model = plain_model(same, generator=generator, trainer=trainer, on_progress=on_progress)
        yield model, meter


def _norms_used(model: nn.Module, images: Tensor) -> dict[str, _BatchNorm]:
    """Return the batch normalisations that images meet, by name, first met first."""
    met: dict[str, _BatchNorm] = {}

    def noting(name: str, norm: _BatchNorm) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, inputs: met.update({name: norm})

    norms = ((name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm))
    handles = [module.register_forward_pre_hook(noting(name, module)) for name, module in norms]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return met


@contextmanager
def _watching(norms: Mapping[str, _BatchNorm], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand over what goes into batch normalisations, by name, inside the block."""

    def seeing(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, inputs: see(name, inputs[0])

    handles = [norm.register_forward_pre_hook(seeing(name)) for name, norm in norms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _least_of(norms: Mapping[str, _BatchNorm], statistics: Mapping[str, NormStatistics]) -> Iterator[dict[str, Tensor]]:
    """Give the least log-likelihoods of the latest pass, (B,) by the layer's name; the caller clears them."""
    found: dict[str, Tensor] = {}

    def see(name: str, inputs: Tensor) -> None:
        least = least_log_likelihood(inputs, statistics[name])
        found[name] = torch.minimum(found[name], least) if name in found else least  # a layer may be used twice

    with _watching(norms, see):
        yield found


def _statistics(
    model: nn.Module, norms: Mapping[str, _BatchNorm], data: LabelledImages, batch_size: int
) -> dict[str, NormStatistics]:
    """Return the running statistics, and those of ``data`` where there are none."""
    lacking = {name: norm for name, norm in norms.items() if norm.running_mean is None or norm.running_var is None}
    own = _statistics_of(model, lacking, data, batch_size) if lacking else {}
    known: dict[str, NormStatistics] = {}
    for name, norm in norms.items():
        if name in own:
            known[name] = own[name]
            continue
        assert norm.running_mean is not None
        assert norm.running_var is not None
        known[name] = NormStatistics(
            mean=norm.running_mean.detach().float().clone(), std=(norm.running_var.detach().float() + norm.eps).sqrt()
        )
    return known


def _statistics_of(
    model: nn.Module, norms: Mapping[str, _BatchNorm], data: LabelledImages, batch_size: int
) -> dict[str, NormStatistics]:
    """Return the statistics over a set, by running sums."""
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}

    def see(name: str, inputs: Tensor) -> None:
        numbers = inputs.double().transpose(0, 1).flatten(1)
        total, squares, count = sums.get(name, (torch.zeros((), device=inputs.device),) * 2 + (0,))
        sums[name] = total + numbers.sum(1), squares + numbers.square().sum(1), count + numbers.shape[1]

    device = next(model.parameters()).device
    with _watching(norms, see):
        for batch in data.batches(batch_size):
            with autocast(device):
                model(batch.inputs.to(device, memory_format=torch.channels_last))
    known = {}
    for name, (total, squares, count) in sums.items():
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        known[name] = NormStatistics(mean=mean.float(), std=(variance + norms[name].eps).sqrt().float())
    return known


def _at_most_dimensions(features: Tensor) -> Tensor:
    """Project features (B, D) on ``MOST_DIMENSIONS`` directions, the same ones each time; fewer are returned as they are."""
    width = features.shape[1]
    if width <= MOST_DIMENSIONS:
        return features
    directions = torch.randn(width, MOST_DIMENSIONS, generator=child(0, "directions")) / math.sqrt(MOST_DIMENSIONS)
    return features @ directions.to(features.device)
