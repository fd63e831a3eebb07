"""Choosing weights without an oracle: what a defender can measure on the held-out part of his clean set."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lustral.core.history import HistoryEntry, Part
from lustral.training import EpochReport, TrainingDiverged, autocast, frozen
from lustral.vision.images import as_float, at_most
from lustral.vision.inverters.max_entropy import firing_rate
from lustral.vision.records import ImageSet, LabelledImages, RecoveredTrigger, TriggerKind

SLOWER, SLOWEST = 4.0, 16.0  # what a rate that costs too much accuracy is divided by, again and again, and the most
Sought = tuple[int, TriggerKind]
"""A label, and a kind of trigger of it."""

ENERGY_IMAGES = 256  # that the energy of a trigger is measured on
SILENT = 0.02  # a recovered trigger that fires no more often on held-out images is silent
EXCESS_STEP = 0.01  # recovered triggers are counted in steps of this rate; within a step: a tie


def predictions(model: nn.Module, images: LabelledImages) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield (predicted labels, labels) batch by batch, in evaluation mode, on the model's device."""
    device = next((parameter.device for parameter in model.parameters()), images.labels.device)
    with torch.no_grad(), frozen(model):
        for batch in images.batches(256):
            x, labels, _ = batch.to(device)
            with autocast(device):
                predicted = model(x.contiguous(memory_format=torch.channels_last)).argmax(1)
            yield predicted, labels


def predicted_labels(model: nn.Module, images: ImageSet) -> Tensor:
    """Return the predicted labels (N,) in evaluation mode."""
    return torch.cat([predicted for predicted, _ in predictions(model, images)])


def held_out_accuracy(model: nn.Module, held_out: ImageSet) -> float:
    """Return the clean accuracy on held-out images."""
    return int((predicted_labels(model, held_out) == held_out.labels).sum()) / len(held_out)


def share_called(model: nn.Module, images: LabelledImages) -> float:
    """Return how often images are called by the labels that they carry, whatever these are worth."""
    return sum(int((predicted == labels).sum()) for predicted, labels in predictions(model, images)) / len(images)


def accuracy_up_to(model: nn.Module, images: ImageSet, bound: float) -> float | None:
    """Return the clean accuracy, or None as soon as it is sure to be above ``bound``: a well-fitted model is soon told."""
    correct = 0
    with closing(predictions(model, images)) as batches:
        for predicted, labels in batches:
            correct += int((predicted == labels).sum())
            if correct / len(images) > bound:
                return None
    return correct / len(images)


def newly_wrong(received: nn.Module, model: nn.Module, images: ImageSet) -> float:
    """Return the fraction of images that a received model gets right and another one wrong, whatever that one gains elsewhere."""
    was_right = predicted_labels(received, images) == images.labels
    return int((was_right & (predicted_labels(model, images) != images.labels)).sum()) / len(images)


def natural_rate(model: nn.Module, held_out: ImageSet, label: int) -> float:
    """Return the fraction of held-out images of other classes that the model calls ``label`` without any trigger."""
    is_other = held_out.labels != label
    called = predicted_labels(model, held_out) == label
    return int((called & is_other).sum()) / max(int(is_other.sum()), 1)


def accuracy_floor(model: nn.Module, held_out: ImageSet, allowed_loss: float) -> float:
    """Return the least held-out accuracy at which weights may be kept.

    ``allowed_loss`` below the received model's, and one standard error of that measurement further: a few hundred images
    must not turn down a model that lost nothing.
    """
    start = held_out_accuracy(model, held_out)
    return start - allowed_loss - math.sqrt(start * (1 - start) / len(held_out))


def needed_area(trigger: RecoveredTrigger) -> float:
    """Return the area a search needed; a trigger that does not fire needed more than it has."""
    return trigger.area / max(trigger.attack_success_rate, 0.05)


def needed_sizes(triggers: Sequence[RecoveredTrigger], images: ImageSet) -> dict[Sought, float]:
    """Return the least that triggers needed, in pixels, by label and kind: area of a patch, energy of a faint change."""
    sizes: dict[Sought, float] = {}
    for trigger in triggers:
        sought = trigger.target_label, trigger.kind
        size = needed_area(trigger) if trigger.kind == "patch" else needed_energy(trigger, images)
        sizes[sought] = min(size, sizes.get(sought, math.inf))
    return sizes


def needed_energy(trigger: RecoveredTrigger, images: ImageSet) -> float:
    """Return the mean of ||x' - x||_2^2 / C over images, in pixels; a trigger that does not fire needed more than it has."""
    x = as_float(at_most(images, ENERGY_IMAGES).images)
    energy = (trigger(x) - x).square().flatten(1).sum(1).mean() / x.shape[1]
    return float(energy) / max(trigger.attack_success_rate, 0.05)


@dataclass(kw_only=True)
class Selection:
    """Watches a training and keeps the weights that a defender would choose.

    Among epochs whose held-out accuracy is at least ``floor``, those on which recovered triggers fire least (images that the
    model calls that label anyway do not count: firing less often than by nature is no better); among these, with triggers to
    look at, the last, because a falling learning rate settles the weights while a few hundred images cannot rank
    accuracies half a point apart. Images of the training set that were found poisoned count as a trigger does: by how often the
    model still calls them by their labels. Without either, or without an epoch above the floor, the most accurate.

    Attributes:
        held_out: clean images that the training does not see.
        triggers: recovered triggers, or none to choose by accuracy alone.
        floor: least held-out accuracy.
        suspects: images that were found poisoned, with the labels that they came with; None: there are none to look at.
        parts: of every history entry, e.g. the round.
        history: one entry per epoch seen.
    """

    held_out: ImageSet
    triggers: Sequence[RecoveredTrigger]
    floor: float
    suspects: LabelledImages | None = None
    parts: dict[Part, float] = field(default_factory=dict)
    history: list[HistoryEntry] = field(default_factory=list)
    best: tuple[float, ...] | None = None
    best_index: int = -1
    best_model: nn.Module | None = None

    def watch(self, report: EpochReport) -> None:
        """Measure an epoch (an ``on_epoch`` callback)."""
        self.measure(report.model, HistoryEntry(count=report.epoch, loss=report.loss))

    def note_given(self, model: nn.Module) -> None:
        """Measure the given model as epoch 0, for comparison only: it is not among those to choose from."""
        self.measure(model, HistoryEntry(count=0))
        self.best = None

    def measure(self, model: nn.Module, entry: HistoryEntry) -> None:
        """Complete a history entry with what is measured of a model, and keep a copy if it is the best so far."""
        accuracy = held_out_accuracy(model, self.held_out)
        excess = natural = 0.0
        for trigger in self.triggers:
            excess = max(excess, firing_rate(model, self.held_out, trigger))
            natural = max(natural, natural_rate(model, self.held_out, trigger.target_label))
        entry = replace(entry, parts=tuple(self.parts.items()), clean_accuracy=accuracy)
        if self.triggers:
            entry = replace(entry, recovered_asr=excess, natural_rate=natural)
        if self.suspects is not None:
            called = share_called(model, self.suspects)
            entry, excess = replace(entry, suspects_called=called), max(excess, called)
        self.history.append(entry)
        key = (0.0, accuracy, -excess)
        if accuracy >= self.floor:
            key = (
                1.0,
                -float(round(excess / EXCESS_STEP)),
                float(len(self.history)) if self.triggers or self.suspects is not None else accuracy,
            )
        if self.best is None or key > self.best:
            self.best, self.best_index = key, len(self.history) - 1
            self.best_model = copy.deepcopy(model).eval()

    @property
    def silences(self) -> bool:
        """Whether the weights kept so far hold the floor with every trigger silent."""
        return self.admissible and (self.history[self.best_index].recovered_asr or 0.0) <= SILENT

    @property
    def admissible(self) -> bool:
        """Whether the weights kept so far hold the floor."""
        return self.best is not None and self.best[0] > 0


def retry_at_lower_rates(selection: Selection, train: Callable[[float], None], divisor: float = 1.0) -> float:
    """Train, and again from the start at a quarter of the rate as long as no epoch holds the floor, down to a sixteenth.

    What a wide network loses at a rate that a narrow one bears, 2,000 images do not give back. A training that diverges is a
    try like any other.

    Args:
        selection: watches the training; ``parts["rate_divisor"]`` tells the tries apart in its history.
        train: trains once, at the rate divided by its argument.
        divisor: of the first try.

    Returns:
        The divisor of the last try.

    Raises:
        TrainingDiverged: the slowest training did.
    """
    while True:
        if divisor > 1:
            selection.parts["rate_divisor"] = divisor
        try:
            train(divisor)
        except TrainingDiverged:
            if divisor >= SLOWEST:
                raise
        if selection.admissible or divisor >= SLOWEST:
            return divisor
        divisor *= SLOWER


def retry_notes(selection: Selection, divisor: float, accuracy_loss: float) -> tuple[str, ...]:
    """Return notes on a rate that ``retry_at_lower_rates`` lowered, and on a loss of accuracy that it did not prevent."""
    notes = []
    if divisor > 1:
        notes.append(
            f"The learning rate was divided by {divisor:g}: at higher ones no epoch held the clean accuracy, as happens on wide "
            "networks."
        )
    if not selection.admissible:
        notes.append(
            f"Held-out accuracy fell by more than {100 * accuracy_loss:g} points and a standard error: measure it on images of "
            "your own before you use this model."
        )
    return tuple(notes)
