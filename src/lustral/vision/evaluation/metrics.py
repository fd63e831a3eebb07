"""Accuracy, attack success, robust accuracy, and the scores that compare a model before and after a defence.

Hits are counted as integers and divided once. A rate over nothing is NaN, never 0 or 1. A model whose logits are not
finite is wrong on those images, does not get credit for a failed attack in silence, and is flagged.

Reference:
    Wu et al., BackdoorBench: A Comprehensive Benchmark of Backdoor Learning, NeurIPS 2022 (ASR, RA);
    Zhu et al., Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization, ICCV 2023 (DER);
    Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 1927 (interval).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from lustral.core.rates import Rate
from lustral.training import frozen
from lustral.vision.images import as_float, as_uint8
from lustral.vision.records import ImageSet, Probe, Trigger

NOT_FINITE = -1  # stands in for the predicted label where a logit is NaN or infinite


def predict(
    model: nn.Module, data: ImageSet, batch_size: int = 512, transform: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Classify a set in evaluation mode and full precision; the model's modes are restored.

    Args:
        model: classifier from float32 (B, C, H, W) in [0, 1] to logits (B, K).
        data: the images, on any device.
        batch_size: images per forward pass.
        transform: applied to each float batch on the model's device, in the set's order.

    Returns:
        (N,) int64 predicted labels on the CPU; ties go to the lowest label; -1 where any logit is not finite.
    """
    device = next((parameter.device for parameter in model.parameters()), data.device)
    predictions = [torch.empty(0, dtype=torch.int64)]
    with frozen(model), torch.inference_mode(), torch.autocast(device.type, enabled=False):
        for images, *_ in data.batches(batch_size):
            images = images.to(device)
            if transform is not None:
                images = transform(images)
            logits = model(images.contiguous(memory_format=torch.channels_last))
            _check_logits(logits, len(images), data.num_classes)
            labels = logits.argmax(1).masked_fill(~logits.isfinite().all(1), NOT_FINITE)
            predictions.append(labels.cpu())
    return torch.cat(predictions)


def _check_logits(logits: object, count: int, num_classes: int) -> None:
    """Raise ``ValueError`` unless these are float logits (B, K): a network may be anyone's."""
    if isinstance(logits, Tensor) and logits.shape == (count, num_classes) and logits.is_floating_point():
        return
    got = f"shape {tuple(logits.shape)} {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
    raise ValueError(
        f"expected float logits of shape ({count}, {num_classes}) from the network, one per class; got {got}"
    )


def accuracy(predictions: Tensor, labels: Tensor) -> Rate:
    """Return the share of (N,) predicted labels that equal the (N,) true ones."""
    if predictions.shape != labels.shape:
        raise ValueError(f"expected one prediction per label, {tuple(labels.shape)}; got {tuple(predictions.shape)}")
    return Rate(int((predictions == labels.cpu()).sum()), len(labels))


def clean_accuracy(model: nn.Module, test: ImageSet) -> Rate:
    """Return the share of a clean test set that the model classifies correctly (ACC)."""
    return accuracy(predict(model, test), test.labels)


def per_class_accuracy(predictions: Tensor, labels: Tensor, num_classes: int) -> tuple[Rate, ...]:
    """Return one accuracy per true class 0 .. K - 1; NaN with n = 0 for a class without images."""
    labels = labels.cpu()
    hits = torch.bincount(labels[predictions == labels], minlength=num_classes).tolist()
    totals = torch.bincount(labels, minlength=num_classes).tolist()
    return tuple(Rate(hit, total) for hit, total in zip(hits, totals, strict=True))


@dataclass(frozen=True, kw_only=True)
class AttackMetrics:
    """How a model behaves under a trigger, counted on the attackable set B: images whose label the attacker changes.

    Attributes:
        attack_success_rate: triggered images of B classified as the attacker's label (ASR).
        robust_accuracy: triggered images of B classified as their true label (RA).
        natural_rate: the same images without trigger classified as the attacker's label: the noise floor of ASR.
        num_non_finite: triggered images of B whose logits are not finite.
    """

    attack_success_rate: Rate
    robust_accuracy: Rate
    natural_rate: Rate
    num_non_finite: int


def attack_metrics(
    model: nn.Module,
    test: ImageSet,
    trigger: Trigger,
    relabel: Callable[[Tensor, int], Tensor],
    *,
    generator: Generator,
    clean_predictions: Tensor | None = None,
) -> AttackMetrics:
    """Measure a model under a trigger. Triggered images are rounded to 8 bits, as an attacker must deliver them.

    Args:
        model: classifier.
        test: clean test set.
        trigger: stamps float batches.
        relabel: maps ((N,) true labels, K) to the attacker's labels; equal labels are not attackable.
        generator: stream for triggers that draw.
        clean_predictions: (N,) labels from ``predict(model, test)``, where the caller has them already.
    """
    labels = test.labels.cpu()
    targets = relabel(labels, test.num_classes)
    if targets.shape != labels.shape:
        raise ValueError(f"expected relabel to return shape {tuple(labels.shape)}; got {tuple(targets.shape)}")
    is_attackable = targets != labels
    attackable = test.subset(is_attackable)
    labels, targets = labels[is_attackable], targets[is_attackable]

    untriggered = predict(model, attackable) if clean_predictions is None else clean_predictions[is_attackable]
    triggered = predict(
        model, attackable, transform=lambda images: as_float(as_uint8(trigger(images, generator=generator)))
    )
    success, robust = accuracy(triggered, targets), accuracy(triggered, labels)
    assert success.hits + robust.hits <= success.total, "one prediction was counted for two labels"
    return AttackMetrics(
        attack_success_rate=success,
        robust_accuracy=robust,
        natural_rate=accuracy(untriggered, targets),
        num_non_finite=int((triggered == NOT_FINITE).sum()),
    )


def probe_rate(model: nn.Module, test: ImageSet, probe: Probe, *, generator: Generator) -> Rate:
    """Return how often a model answers as a probe expects, over the test images that the probe does not leave out."""
    expected = probe.expect(test.labels.cpu(), test.num_classes)
    counted = expected >= 0
    predictions = predict(
        model,
        test.subset(counted),
        transform=lambda images: as_float(as_uint8(probe.trigger(images, generator=generator))),
    )
    return accuracy(predictions, expected[counted])


def der(acc0: float, asr0: float, acc1: float, asr1: float) -> float:
    """Return the defence effectiveness rating: (max(0, ASR⁰ − ASR¹) − max(0, ACC⁰ − ACC¹) + 1) / 2.

    0.5 means nothing gained, 1 that an attack with ASR⁰ = 1 is gone at no loss of accuracy. It cannot exceed
    (1 + ASR⁰) / 2, so it says little about attacks that hardly worked.

    Args:
        acc0: clean accuracy before the defence, fraction.
        asr0: attack success rate before.
        acc1: clean accuracy after.
        asr1: attack success rate after.

    Returns:
        A value in [0, 1], or NaN if any input is NaN.

    >>> round(der(0.9, 1.0, 0.8, 0.2), 6)
    0.85
    """
    return _rating(gain=asr0 - asr1, loss=acc0 - acc1, inputs=(acc0, asr0, acc1, asr1))


def rir(acc0: float, ra0: float, acc1: float, ra1: float) -> float:
    """Return the robust improvement rating: (max(0, RA¹ − RA⁰) − max(0, ACC⁰ − ACC¹) + 1) / 2.

    Args:
        acc0: clean accuracy before the defence, fraction.
        ra0: robust accuracy before.
        acc1: clean accuracy after.
        ra1: robust accuracy after.

    Returns:
        A value in [0, 1], or NaN if any input is NaN.
    """
    return _rating(gain=ra1 - ra0, loss=acc0 - acc1, inputs=(acc0, ra0, acc1, ra1))


def _rating(*, gain: float, loss: float, inputs: tuple[float, ...]) -> float:
    if any(not 0 <= value <= 1 for value in inputs if not math.isnan(value)):
        raise ValueError(f"expected fractions in [0, 1] (not percent) or NaN; got {inputs}")
    if any(math.isnan(value) for value in inputs):  # max(0, nan) would be 0
        return math.nan
    return (max(0.0, gain) - max(0.0, loss) + 1) / 2


def json_number(value: float) -> float | None:
    """Return a finite number as it is and anything else as None, because JSON has no NaN or infinity."""
    return value if math.isfinite(value) else None
