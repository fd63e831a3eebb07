"""Any ``nn.Module`` as a classifier of pixels in [0, 1]: its channels, its number of classes, and the normalisation it expects.

The module given is copied, so nothing that is done here or later changes it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from lustral.report.words import percent
from lustral.training import frozen
from lustral.vision.images import at_most, channel_statistics
from lustral.vision.models import Classifier, LoadedModel, Normalise
from lustral.vision.models.build import count_logits, with_normalisation
from lustral.vision.records import ImageSet
from lustral.vision.sources import DataSource, source_with_channels

GUESSED_FROM = 256  # images that usual normalisations are tried on
BATCH = 64  # of them at a time
CHANNELS = (3, 1)  # that images may have
RGB_CONSTANTS = {
    "that of ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "that of CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
GREY_CONSTANTS = {"that of MNIST": ((0.1307,), (0.3081,))}
NONE = "none (pixels in [0, 1])"


@dataclass(frozen=True, kw_only=True)
class TriedNormalisation:
    """How a network does with one normalisation in front.

    Attributes:
        name: what it is.
        mean: per channel, on the [0, 1] scale.
        std: likewise.
        hits: images that the network is right on.
        loss: mean cross-entropy; infinite where the logits are not finite.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    hits: int
    loss: float


def fit_channels(network: nn.Module, source: DataSource) -> DataSource:
    """Return a source with the channels that a network takes, grey or RGB; its own where it takes these.

    Raises:
        ValueError: the network takes neither.
    """
    _, height, width = source.train.image_shape
    own = source.train.image_shape[0]
    reasons = {}
    for channels in (own, *(other for other in CHANNELS if other != own)):
        try:
            count_logits(on_pixels(network, channels), (channels, height, width))
        except ValueError as error:
            reasons[channels] = error
        else:
            return source_with_channels(source, channels)
    raise ValueError(f"{reasons[own]}; give image_size= to resize the images") from reasons[own]


def on_pixels(network: nn.Module, channels: int) -> Classifier:
    """Return a network as a classifier that takes pixels in [0, 1] as they are; the network is shared."""
    device = next((part.device for part in network.parameters()), torch.device("cpu"))
    return Classifier(network, (0.0,) * channels, (1.0,) * channels).to(device)


def own_copy(model: nn.Module, device: torch.device | str | None) -> nn.Module:
    """Return a copy of a module, float32 and in evaluation mode, on a device or where it was."""
    try:
        copied = copy.deepcopy(model)
    except Exception as error:  # hooks and handles of others
        raise ValueError(
            f"the model cannot be copied ({type(error).__name__}: {error}), and the one given is never changed: remove its "
            "hooks, or open its weights with lustral.open_model"
        ) from error
    copied = copied.float().eval().requires_grad_(True)  # as a model from a file; erasers may train all of it
    return copied if device is None else copied.to(device)


def as_loaded(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    constants: tuple[Sequence[float] | None, Sequence[float] | None],
) -> LoadedModel:
    """Return a module of ours, which nobody else holds, as if it had been read from a file without a name.

    Args:
        model: a network, or a ``Classifier``, which keeps its normalisation.
        image_shape: (C, H, W) of the images that it takes.
        constants: mean and standard deviation per channel; None is 0 and 1.

    Raises:
        ValueError: it has a normalisation already, or does not take such images, or gives no logits.
    """
    channels = image_shape[0]
    if isinstance(model, Classifier):
        if constants != (None, None):
            raise ValueError("a Classifier has its own normalisation; expected no mean and std beside it")
        classifier = model
        num_classes = count_logits(classifier, image_shape)
    else:
        num_classes = count_logits(on_pixels(model, channels), image_shape)
        device = next((part.device for part in model.parameters()), torch.device("cpu"))
        classifier = with_normalisation(model, image_shape, *constants, num_classes=num_classes).to(device).eval()
    return LoadedModel(
        model=classifier,
        arch=module_name(classifier.network),
        num_classes=num_classes,
        image_shape=image_shape,
        key_prefix="",
        nesting=None,
        layout={name: tensor.dtype for name, tensor in classifier.network.state_dict().items()},
        metadata={},
    )


def module_name(network: nn.Module) -> str:
    """Return the name of a network's class.

    >>> module_name(nn.Flatten())
    'torch.nn.modules.flatten.Flatten'
    """
    return f"{type(network).__module__}.{type(network).__qualname__}"


def with_guessed_normalisation(loaded: LoadedModel, clean: ImageSet) -> tuple[LoadedModel, str]:
    """Try usual normalisations in front of a network on clean images.

    Args:
        loaded: a model without normalisation.
        clean: labelled images in the order of its classes.

    Returns:
        The model with the one that makes it right on most images, with the least loss among equals; and a sentence on it.
    """
    tried = try_normalisations(loaded.model.network, clean, loaded.num_classes)
    best, second = sorted(tried, key=lambda each: (-each.hits, each.loss))[:2]
    count = min(len(clean), GUESSED_FROM)
    device = loaded.model.normalise.mean.device
    model = with_normalisation(
        loaded.model.network, loaded.image_shape, best.mean, best.std, num_classes=loaded.num_classes
    )
    note = (
        f"No mean and std were given. Of {len(tried)} usual normalisations, {best.name} fits best: the model is right on "
        f"{percent(best.hits / count)} of {count:,} clean images; next is {second.name} with {percent(second.hits / count)}. "
        f"If this is wrong, give mean= and std=."
    )
    return replace(loaded, model=model.to(device).eval()), note


def try_normalisations(network: nn.Module, clean: ImageSet, num_classes: int) -> list[TriedNormalisation]:
    """Return how a network does on clean images with each usual normalisation, "none" first."""
    images = at_most(clean, GUESSED_FROM)
    channels = images.image_shape[0]
    usual = {
        NONE: ((0.0,) * channels, (1.0,) * channels),
        **(GREY_CONSTANTS if channels == 1 else RGB_CONSTANTS),
        "that to [-1, 1]": ((0.5,) * channels, (0.5,) * channels),
        "none (pixels in 0 .. 255)": ((0.0,) * channels, (1 / 255,) * channels),
        "the mean and spread of these images": channel_statistics(images.to("cpu")),
    }
    tried = []
    for name, (mean, std) in usual.items():
        hits, loss = 0, 0.0
        classifier = Classifier(network, mean, std, num_classes=num_classes)
        classifier.normalise = Normalise(mean, std).to(images.device)
        with frozen(classifier), torch.inference_mode():
            for batch in images.batches(BATCH):
                logits = classifier(batch.inputs).float()
                hits += int((logits.argmax(1) == batch.labels).sum())
                loss += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
        loss = math.inf if math.isnan(loss) else loss / len(images)
        tried.append(TriedNormalisation(name=name, mean=mean, std=std, hits=hits, loss=loss))
    return tried
