"""Two models beside each other on the same few images: everything that a page shows of what an erasure changed inside.

Nothing here decides anything, draws a random number or changes a model. The cost is bounded: a few hundred small images, or fewer
large ones, through both models and seven between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lustral.vision.evaluation import predict
from lustral.vision.images import as_float, as_uint8, at_most
from lustral.vision.insight.feature_map import FeatureMap, feature_map
from lustral.vision.insight.grad_cam import HeatMaps, grad_cam
from lustral.vision.insight.weight_line import WeightLine, differ, has_line, weight_line
from lustral.vision.models.splitting import last_map
from lustral.vision.records import ImageSet, Trigger

MOST_IMAGES = 96  # of one kind, clean or triggered
LEAST_IMAGES = 16
MOST_PIXELS = 96 * 64 * 64  # of one kind; larger images are fewer
MOST_HEAT = 6  # images with heat maps
MOST_CHARACTERS = 300  # of a reason

NO_TRIGGER = "No trigger is known, neither a true nor a recovered one: only clean images are shown."
NO_MAP = "This network has no late layer with a map of the image, so where it looks cannot be shown (Grad-CAM)."
NO_LINE = "The new network has other tensors than the given one: there is no line between their weights."
NOT_FIRED = (
    "The trigger changes no answer of the given model on these images, so where it looks is not shown (Grad-CAM)."
)


@dataclass(frozen=True, kw_only=True)
class Insight:
    """What two models do with the same images.

    Attributes:
        num_images: clean images that were looked at.
        are_unseen: whether the eraser saw none of them.
        has_trigger: whether some carry a trigger.
        has_true_trigger: whether that is the attacker's, and not a recovered one.
        heat: where they look; None where ``left_out`` says why.
        features: what they take for alike; None likewise.
        line: the loss between their weights; None likewise.
        left_out: sentences on what is not shown.
    """

    num_images: int
    are_unseen: bool = False
    has_trigger: bool = False
    has_true_trigger: bool = False
    heat: HeatMaps | None = None
    features: FeatureMap | None = None
    line: WeightLine | None = None
    left_out: tuple[str, ...] = ()


def look_inside(
    given: nn.Module,
    new: nn.Module,
    images: ImageSet,
    *,
    trigger: Trigger | None,
    target: int | None = None,
    has_true_trigger: bool = False,
    are_unseen: bool = False,
) -> Insight | None:
    """Compare two models on a bounded number of images.

    Args:
        given: classifier before.
        new: classifier after.
        images: clean ones, best of all those that the eraser did not see.
        trigger: the attacker's or a recovered one; None where there is none.
        target: the class that it leads to; None takes what the given model calls most triggered images.
        has_true_trigger: whether ``trigger`` is the attacker's.
        are_unseen: whether the eraser saw none of the images.

    Returns:
        None where there is nothing to compare: no images, or equal models.
    """
    if not len(images) or not differ(given, new):
        return None
    clean, left_out = few(images), list[str]()
    triggered: ImageSet | None = None
    if trigger is not None:
        target, triggered = stamped(given, clean, trigger, target)
    if triggered is None or target is None:
        left_out.append(NO_TRIGGER)
    line: WeightLine | None = None
    features: FeatureMap | None = None
    heat: HeatMaps | None = None
    with saying(left_out, "The loss between the weights"):
        line = weight_line(given, new, clean, triggered) if has_line(given, new) else None
        left_out += [NO_LINE] if line is None else []
    if triggered is not None and target is not None:
        with saying(left_out, "The map of the features"):
            features = feature_map(given, new, clean, triggered, target)
        with saying(left_out, "Where the networks look"):
            heat = heat_maps(given, new, triggered)
            left_out += [NO_MAP] if heat is None else []
    return Insight(
        num_images=len(clean),
        are_unseen=are_unseen,
        has_trigger=triggered is not None,
        has_true_trigger=has_true_trigger and triggered is not None,
        heat=heat,
        features=features,
        line=line,
        left_out=tuple(left_out),
    )


@contextmanager
def saying(left_out: list[str], what: str) -> Iterator[None]:
    """Say what a network does not allow to be shown: an erased model must not be lost for a picture.

    What torch cannot do with a network, or has no memory for, is a ``RuntimeError``; what it lacks is a ``ValueError``.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0][:MOST_CHARACTERS]
        left_out.append(f"{what} cannot be shown: {reason}")


def few(images: ImageSet) -> ImageSet:
    """Return as many images, every class in proportion, as take a bounded time; the same ones each time."""
    _, height, width = images.image_shape
    return at_most(images, max(LEAST_IMAGES, min(MOST_IMAGES, MOST_PIXELS // (height * width))))


def stamped(
    given: nn.Module, clean: ImageSet, trigger: Trigger, target: int | None
) -> tuple[int | None, ImageSet | None]:
    """Return the class that a trigger leads to, and the images of other classes with it; None of nothing."""

    def stamp(images: ImageSet) -> ImageSet:
        return ImageSet(
            images=as_uint8(trigger(as_float(images.images))),
            labels=images.labels,
            num_classes=images.num_classes,
            class_names=images.class_names,
        )

    if target is None:
        answers = predict(given, stamp(clean))
        target = int(answers[answers >= 0].mode().values) if bool((answers >= 0).any()) else None
    others = clean.subset(clean.labels != target) if target is not None else clean
    return target, stamp(others) if len(others) else None


def heat_maps(given: nn.Module, new: nn.Module, triggered: ImageSet) -> HeatMaps | None:
    """Show where two models look in triggered images whose class the given model gets wrong; None without spatial maps.

    Raises:
        ValueError: there is no such image, or the networks have no gradients.
    """
    fired = (predict(given, triggered) != triggered.labels.cpu()).nonzero().flatten()
    if not len(fired):
        raise ValueError(NOT_FIRED)
    shown = triggered.subset(spread(triggered.labels.cpu()[fired], fired))
    device = next((parameter.device for parameter in given.parameters()), shown.device)
    images = as_float(shown.images.to(device))
    layers = [last_map(model, images[:1]) for model in (given, new)]
    if layers[0] is None or layers[1] is None:
        return None
    (before, was), (after, now) = grad_cam(given, layers[0], images), grad_cam(new, layers[1], images)
    return HeatMaps(
        images=shown.images.cpu(),
        before=before,
        after=after,
        answers_before=tuple(was.tolist()),
        answers_after=tuple(now.tolist()),
    )


def spread(labels: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return up to six of (N,) indices, of as many classes as there are.

    >>> spread(torch.tensor([0, 0, 1, 0, 2]), torch.tensor([10, 11, 12, 13, 14])).tolist()
    [10, 12, 14, 11, 13]
    """
    turns = (labels[:, None] == labels).tril(-1).sum(1)  # how many of its class come before each
    return indices[turns.argsort(stable=True)[:MOST_HEAT]]
