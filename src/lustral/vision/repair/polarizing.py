"""What the neural polarizers share: the features that they filter, how they start, and the terms of their losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from lustral.training import Precision, Trainer, autocast, frozen
from lustral.vision.models.wiring import Wiring, late_layer
from lustral.vision.records import ImageSet
from lustral.vision.repair.run import PurifyRun
from lustral.vision.repair.selection import held_out_accuracy

LEAST_VARIANCE = (
    0.1  # share of the mean one: a feature that clean images hardly excite must not be blown up by standardising it
)
MIN_ACCURACY_KEPT = 0.8  # share of the held-out accuracy that standardised features must leave to start from them
IDENTITY_RATE_FACTOR = 0.1  # factor of the rate where they do not: all that the network sees goes through the polarizer
ALMOST_ONE = 1.0001  # of the authors' code: keeps log(1 - s) finite

Start = Literal["auto", "identity", "standardised"]


def check_polarizing(radius: float, step_size: float, steps: int, *weights: float) -> None:
    """Raise ``ValueError`` unless a perturbation can be made so and no term of the loss is turned round."""
    if radius <= 0 or step_size <= 0 or steps < 1:
        raise ValueError(f"expected radius > 0, step_size > 0 and steps >= 1; got {radius}, {step_size} and {steps}")
    if min(weights) < 0:
        raise ValueError("expected weights of at least 0")


def polarizer_layer(model: nn.Module, wiring: Wiring, layer: str | None) -> str:
    """Return the name of the layer to filter for: ``layer``, or of None the one that ``late_layer`` finds.

    Raises:
        ValueError: images meet no such layer before the head.
    """
    name = late_layer(model, wiring) if layer is None else layer
    if name not in wiring.layers:
        raise ValueError(f"no layer {name!r} before the head; the last ones are {', '.join(wiring.layers[-5:])}")
    return name


def start_of(kept: float, before: float) -> tuple[Start, str]:
    """Return what "auto" chooses, and a note that says so.

    Args:
        kept: held-out accuracy on standardised features.
        before: that of the given model.

    >>> start_of(0.86, 0.9)[0], start_of(0.3, 0.9)[1]
    ('standardised', 'It started as the identity: standardised features leave 30.0 of 90.0 % held-out accuracy.')
    """
    start: Start = "standardised" if kept >= MIN_ACCURACY_KEPT * before else "identity"
    how = "from standardised features: they" if start == "standardised" else "as the identity: standardised features"
    return start, f"It started {how} leave {100 * kept:.1f} of {100 * before:.1f} % held-out accuracy."


def begin(
    run: PurifyRun, model: nn.Module, initial: Start, set_statistics: Callable[[bool], None], trainer: Trainer
) -> tuple[Trainer, str]:
    """Give a polarizer what it starts from; return the recipe for that start, and a note where "auto" chose it.

    Args:
        run: the run, whose held-out images choose.
        model: the network with its polarizer.
        initial: as the settings have it.
        set_statistics: sets the polarizer's statistics, as the identity if its argument is true.
        trainer: the recipe; from the identity its rate is ``IDENTITY_RATE_FACTOR`` times as high.
    """
    set_statistics(initial == "identity")
    if initial != "auto":
        return trainer, ""
    start, note = start_of(held_out_accuracy(model, run.held_out), run.before)
    if start == "identity":
        set_statistics(True)
        trainer = replace(trainer, learning_rate=IDENTITY_RATE_FACTOR * trainer.learning_rate)
    return trainer, note


@torch.no_grad()
def feature_statistics(
    model: nn.Module, name: str, data: ImageSet, batch_size: int, precision: Precision = "auto"
) -> tuple[Tensor, Tensor]:
    """Return mean and variance, (C,) each, of what enters a layer on clean images; ``precision`` as in ``Trainer``."""
    layer = model.get_submodule(name)
    sums: list[tuple[Tensor, Tensor, int]] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features = inputs[0].float()
        flat = features.flatten(0, -2) if isinstance(layer, nn.Linear) else features.transpose(0, 1).flatten(1).T
        sums.append((flat.sum(0), flat.square().sum(0), len(flat)))

    handle = layer.register_forward_pre_hook(note)
    try:
        with frozen(model):
            for x, *_ in data.batches(batch_size):
                with autocast(x.device, precision):
                    model(x.contiguous(memory_format=torch.channels_last))
    finally:
        handle.remove()
    count = sum(n for _, _, n in sums)
    mean = torch.stack([s for s, _, _ in sums]).sum(0) / count
    variance = (torch.stack([q for _, q, _ in sums]).sum(0) / count - mean.square()).clamp_min(0)
    return mean, variance.clamp_min(LEAST_VARIANCE * float(variance.mean()))


def runner_up(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each image's most probable class other than its label, (B,) int64."""
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


def avoidance_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of -log(1 - probability of the label), which asks that it be small; (B, K) and (B,) int64."""
    return -(ALMOST_ONE - probabilities.gather(1, labels[:, None])).log().mean()
