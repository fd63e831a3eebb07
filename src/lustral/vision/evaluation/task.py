"""Does a model do its task on the clean images at all? Asked before anything costly, because nothing else means much where not.

A model that is read wrongly (other normalisation, channel order, class order, scale of pixels) or shown the wrong images is right
hardly more often than by chance. Searches still find something in it: some label soaks up most images, which looks like a tiny
trigger; and training on these labels teaches it another task.

Chance is what a guesser would reach that calls each class as often as the model does: sum_k p_k q_k, with the share p_k of
class k among the labels and q_k among the answers, and never less than 1 / K. The skill is Cohen's kappa, the share of the way
from there to perfection.

Reference:
    Cohen, A Coefficient of Agreement for Nominal Scales, Educational and Psychological Measurement 1960 (kappa);
    Kuhn, The Hungarian Method for the Assignment Problem, Naval Research Logistics Quarterly 1955 (the order of classes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lustral.core.rates import Rate
from lustral.training import frozen
from lustral.vision.evaluation.metrics import NOT_FINITE, accuracy, predict
from lustral.vision.records import ImageSet

LEAST_SKILL = 0.25  # below, a model does not do its task, however many images make that more than chance
FULL_SKILL = 0.5  # below, an answer about it is held back: what is known of benign models was measured on good ones
SIGNIFICANT = (
    0.05  # chance of so many hits by guessing, above which they count as guesses: matters for a handful of images
)
LEAST_GAIN = 0.1  # in accuracy, from another order of the classes, that is worth a word
MOST_NAMES = 20  # in a sentence
DIFFERENTIABLE = "remove torch.no_grad, inference_mode, detach, changes in place and rounding from its forward pass"


class UnfitModel(ValueError):
    """The model cannot be examined or repaired with these images: it does not do its task on them, or hides how it answers."""


@dataclass(frozen=True, kw_only=True)
class TaskCheck:
    """How well a model does its task on clean images.

    Attributes:
        accuracy: of the model.
        chance: accuracy of a guesser that calls each class as often as the model does, fraction.
        num_not_finite: images whose logits are not finite; they count as wrong.
        never_trained: whether the weights look as they were drawn at birth, see ``looks_untrained``.
        has_gradient: whether the logits change with the images at all, where they can be differentiated.
        order: where another order of the classes explains the answers: the data's label of each class of the model; else None.
        ordered_accuracy: in that order, on images that it was not found on; None without one.
    """

    accuracy: Rate
    chance: float
    num_not_finite: int
    never_trained: bool = False
    has_gradient: bool = True
    order: tuple[int, ...] | None = None
    ordered_accuracy: float | None = None

    @property
    def skill(self) -> float:
        """The share of the way from chance to perfection: Cohen's kappa, at most 1."""
        return 1 - (1 - self.accuracy.value) / (1 - self.chance) if self.chance < 1 else 0.0

    @property
    def is_lost(self) -> bool:
        """Whether the model does not do its task: too few hits, or as many as guessing gives."""
        guessed = float(binom.sf(self.accuracy.hits - 1, self.accuracy.total, self.chance))
        return self.skill < LEAST_SKILL or guessed > SIGNIFICANT

    @property
    def is_weak(self) -> bool:
        """Whether it does its task too badly for a certain answer."""
        return self.is_lost or self.skill < FULL_SKILL

    @property
    def share(self) -> str:
        """The accuracy in words, with what chance would give."""
        images = f"{self.accuracy.total:,} clean images (chance: {100 * self.chance:.1f} %)"
        return f"{100 * self.accuracy.value:.1f} % of the {images}"

    def complaint(self, names: Sequence[str] = ()) -> str:
        """Return what is wrong and what to look at, in one or two sentences.

        Args:
            names: of the data's classes, to show the order that would explain the answers.
        """
        text = f"the model is right on {self.share}; wrong normalisation, class order or data?"
        if self.num_not_finite:
            text += f" Its logits are not finite on {self.num_not_finite:,} of them."
        if self.never_trained:
            text += " Its weights look as they were drawn at birth: were they ever trained?"
        return f"{text} {self.order_note(names)}".rstrip()

    def notes(self, names: Sequence[str] = ()) -> tuple[str, ...]:
        """Return what a user should read before he trusts work on this model: a sentence or two, or nothing."""
        if self.is_weak:
            return (f"Before, {self.complaint(names)}",)
        if self.order is not None:
            return (f"Before, the model was right on {self.share}. {self.order_note(names)}",)
        return ()

    def order_note(self, names: Sequence[str] = ()) -> str:
        """Return a sentence on an order of the classes that would explain the answers; empty where none does."""
        if self.order is None or self.ordered_accuracy is None:
            return ""
        listed = [names[label] if names else str(label) for label in self.order[:MOST_NAMES]]
        more = f", and {len(self.order) - MOST_NAMES} more" if len(self.order) > MOST_NAMES else ""
        return (
            f"With its classes in another order it would be right on about {100 * self.ordered_accuracy:.0f} %: "
            f"{', '.join(listed)}{more}. If they are the same classes, give their names in the model's order (--classes)."
        )


def check_task(model: nn.Module, clean: ImageSet) -> TaskCheck:
    """Measure how well a model does its task, in one pass over the clean images.

    Raises:
        UnfitModel: the network cannot be differentiated with respect to its images.
        ValueError: it does not give one float logit per class and image.
    """
    predictions, labels = predict(model, clean), clean.labels.cpu()
    has_gradient = find_gradient(model, clean)
    classes = clean.num_classes
    answered = predictions[predictions != NOT_FINITE]
    shares = torch.bincount(labels, minlength=classes).double() / max(len(labels), 1)
    calls = torch.bincount(answered, minlength=classes).double() / max(len(labels), 1)
    right = accuracy(predictions, labels)
    order, ordered = find_order(predictions, labels, classes)
    helps = order is not None and ordered >= right.value + LEAST_GAIN and ordered >= FULL_SKILL
    return TaskCheck(
        accuracy=right,
        chance=max(float(shares @ calls), 1 / classes),
        num_not_finite=int((predictions == NOT_FINITE).sum()),
        never_trained=looks_untrained(model),
        has_gradient=has_gradient,
        order=order if helps else None,
        ordered_accuracy=ordered if helps else None,
    )


def looks_untrained(model: nn.Module) -> bool:
    """Say whether a network's weights look as they were drawn at birth.

    Batch normalisations have seen no batch then. Where there are none, other normalisations have scale 1 and shift 0; and without
    any, no weight of a convolution or linear layer is larger than torch draws it, which training soon changes.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> before = looks_untrained(net)
    >>> with torch.no_grad():
    ...     _ = net[2].weight.mul_(4)
    >>> before, looks_untrained(net)
    (True, False)
    """
    modules = list(model.modules())
    running = [m for m in modules if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if running:
        return all(_is_constant(m.running_mean, 0) and _is_constant(m.running_var, 1) for m in running)
    scaled = [m for m in modules if isinstance(m, nn.LayerNorm | nn.GroupNorm | _BatchNorm) and m.weight is not None]
    if scaled:
        return all(_is_constant(m.weight, 1) and (m.bias is None or _is_constant(m.bias, 0)) for m in scaled)
    layers = [m for m in modules if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    return bool(layers) and all(
        float(tensor.detach().abs().max()) <= (1 + 1e-5) / layer.weight[0].numel() ** 0.5
        for layer in layers
        for tensor in (layer.weight, layer.bias)
        if tensor is not None and tensor.numel()
    )


def _is_constant(tensor: Tensor | None, value: float) -> bool:
    return tensor is None or bool((tensor == value).all())


def find_order(predictions: Tensor, labels: Tensor, num_classes: int) -> tuple[tuple[int, ...] | None, float]:
    """Return the one-to-one assignment of answers to labels that makes most answers right, and how right it makes them.

    Args:
        predictions: (N,) int64 answers; -1 matches nothing.
        labels: (N,) int64 labels.
        num_classes: K.

    Returns:
        (order, accuracy): the label of each answer 0 .. K - 1, None where that is the identity; and the accuracy of assignments
        found on one half of the images and measured on the other, both ways. With few images a best assignment always
        fits; one that was not found on them does not.
    """
    places = torch.zeros(len(labels), dtype=torch.int64)
    for label in range(num_classes):
        members = labels == label
        places[members] = torch.arange(int(members.sum()))
    halves = [places % 2 == 0, places % 2 == 1]
    hits = 0
    for own, other in (halves, halves[::-1]):
        found = _assign(predictions[own], labels[own], num_classes)
        answers = predictions[other]
        hits += int(((found[answers.clamp_min(0)] == labels[other]) & (answers >= 0)).sum())
    order = tuple(_assign(predictions, labels, num_classes).tolist())
    return (None if order == tuple(range(num_classes)) else order), hits / max(len(labels), 1)


def _assign(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the label of each answer, (K,) int64, by the Hungarian method."""
    known = predictions >= 0
    cells = predictions[known] * num_classes + labels[known]
    counts = torch.bincount(cells, minlength=num_classes * num_classes).view(num_classes, num_classes).double()
    counts += 1e-6 * torch.eye(num_classes)  # where nothing speaks for a change, a class keeps its place
    _, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    return torch.from_numpy(columns).long()


def require_task(model: nn.Module, clean: ImageSet) -> TaskCheck:
    """Raise ``UnfitModel`` where a model does not do its task on the clean images, or cannot be differentiated.

    Training would teach such a model whatever the labels say, and destroy what it knows. So it would one that is wrong on most
    images and right in another order of the classes. A network that was never trained knows nothing: it may pass.
    """
    check = check_task(model, clean)
    if (check.is_lost and not check.never_trained) or (check.is_weak and check.order is not None):
        raise UnfitModel(f"nothing was changed: {check.complaint(clean.class_names)}")
    require_gradient(check)
    return check


def require_gradient(check: TaskCheck) -> None:
    """Raise ``UnfitModel`` where a model that does its task has no gradient: a search would end in noise, and find nothing."""
    if not check.has_gradient:
        raise UnfitModel(f"the network's logits have no gradient with respect to its images; {DIFFERENTIABLE}")


def find_gradient(model: nn.Module, clean: ImageSet, count: int = 2) -> bool:
    """Say whether the logits of the first ``count`` images have a gradient that is not zero.

    Raises:
        UnfitModel: they cannot be differentiated with respect to the images.
    """
    images = next(clean.subset(torch.arange(min(count, len(clean)))).batches(count)).inputs.requires_grad_()
    try:
        with frozen(model), torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            logits = model(images)
            weights = torch.linspace(1, 2, logits.shape[1], device=logits.device)
            (gradient,) = torch.autograd.grad((logits * weights).sum(), images, allow_unused=True)
    except RuntimeError as error:
        if "grad" not in str(error) and "nference" not in str(
            error
        ):  # an error of the network itself, not of this question
            raise
        reason = str(error).partition("\n")[0]
        raise UnfitModel(f"the network cannot be differentiated: {reason}; {DIFFERENTIABLE}") from error
    return gradient is not None and bool(gradient.any())
