"""Clean classifiers that an attacker trains for himself, to compute perturbations and patterns with.

A surrogate belongs to its data set and its recipe, not to one attack: it is trained once and kept among the assets.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lustral.core.randomness import child
from lustral.core.records import Assets, OnProgress
from lustral.core.versions import versions_of
from lustral.training import Augment, Trainer
from lustral.vision.images import channel_statistics, require_usable
from lustral.vision.models import Classifier, build_classifier
from lustral.vision.models.architecture import as_architecture
from lustral.vision.records import ImageSet

SMALL_SIDE = 16  # images with a shorter side than this get the small network
LEAST_STEPS = 200  # a small set is passed over more often, until there are so many steps


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """How to train the attacker's own clean classifier.

    The defaults suit the ``cpu`` setting. BackdoorBench uses classifiers trained for 100 epochs at width 64.

    Attributes:
        arch: as ``lustral.vision.models.build_classifier`` takes it; None: ``preact_resnet18:width=16``, and ``small_cnn`` for
            images with a side below 16 pixels.
        epochs: passes over the data; sets of less than about ``LEAST_STEPS`` batches are passed over more often.
        batch_size: images per step, at most a quarter of the set.
        learning_rate: peak of the one-cycle schedule.
        crop_padding: pixels of the random crops; at most an eighth of the image's shorter side is used.
        flip: mirror images left-right; not for digits or traffic signs.
        seed: of the starting weights, the order of the images and the augmentation.
    """

    version: ClassVar[int] = 2  # 1: its default network normalised after the last block

    arch: str | None = None
    epochs: int = 5
    batch_size: int = 128
    learning_rate: float = 0.1
    crop_padding: int = 2
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges, and that the architecture has a name that could be built."""
        if self.arch is not None:
            as_architecture(self.arch)
        if self.epochs < 1 or self.batch_size < 1 or self.learning_rate <= 0 or self.crop_padding < 0:
            raise ValueError(
                "expected epochs >= 1, batch_size >= 1, learning_rate > 0 and crop_padding >= 0; got "
                f"{self.epochs}, {self.batch_size}, {self.learning_rate} and {self.crop_padding}"
            )

    def arch_for(self, image_shape: tuple[int, int, int]) -> str:
        """Return the architecture for images of (C, H, W).

        >>> Surrogate().arch_for((3, 32, 32)), Surrogate().arch_for((1, 8, 8))
        ('preact_resnet18:width=16', 'small_cnn')
        """
        if self.arch is not None:
            return self.arch
        return "small_cnn" if min(image_shape[1:]) < SMALL_SIDE else "preact_resnet18:width=16"

    def trainer_for(self, clean: ImageSet) -> Trainer:
        """Return the training recipe for a set, with more passes over a small one."""
        padding = min(self.crop_padding, min(clean.image_shape[1:]) // 8)
        trainer = Trainer(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            augment=Augment(crop_padding=padding, flip=self.flip),
        )
        return trainer.fitted_to_size(num_images=len(clean), least_steps=LEAST_STEPS)


def data_fingerprint(clean: ImageSet) -> str:
    """Return the SHA-256 of a set: shapes, number of classes, labels and every pixel; 64 hexadecimal digits.

    Class names do not count. 50,000 images of 32x32 pixels take a fraction of a second.
    """
    digest = hashlib.sha256(repr((tuple(clean.images.shape), clean.num_classes)).encode())
    for tensor in (clean.labels, *torch.split(clean.images, 4096)):
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def surrogate_spec(clean: ImageSet, recipe: Surrogate) -> dict[str, Any]:
    """Return plain data that says everything a surrogate's weights depend on, for ``Assets.get``."""
    resolved = dataclasses.replace(recipe, arch=recipe.arch_for(clean.image_shape))
    network = _untrained(clean, recipe)
    return {
        "asset": "clean classifier",
        "data": data_fingerprint(clean),
        "recipe": dataclasses.asdict(resolved),
        "versions": versions_of(recipe, recipe.trainer_for(clean), *network.modules()),
    }


def _untrained(clean: ImageSet, recipe: Surrogate) -> Classifier:
    mean, std = channel_statistics(clean)
    return build_classifier(
        recipe.arch_for(clean.image_shape),
        num_classes=clean.num_classes,
        image_shape=clean.image_shape,
        mean=mean,
        std=std,
        generator=child(recipe.seed, "surrogate", "weights"),
    ).to(clean.device)


def stored(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state as tensors that can be written to a file: on the CPU, contiguous, by themselves."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}


def require_like(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` unless tensors have the names, shapes and types of those expected, and only finite numbers."""
    if tensors.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise ValueError(f"expected the tensors {', '.join(sorted(expected))}; missing {missing}, not known {extra}")
    for name, value in tensors.items():
        wanted = expected[name]
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            raise ValueError(
                f"expected {name} of shape {tuple(wanted.shape)} and {wanted.dtype}; got {tuple(value.shape)} {value.dtype}"
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"expected finite numbers in {name}")


def clean_classifier(
    clean: ImageSet, recipe: Surrogate, *, assets: Assets, on_progress: OnProgress | None = None
) -> nn.Module:
    """Return a classifier of the clean set, trained once per set and recipe.

    Args:
        clean: the attacker's training images.
        recipe: how to train.
        assets: keeps the weights; the same weights come back whether they were built just now or read.
        on_progress: called a few times a second while training.

    Returns:
        Float32 (B, C, H, W) in [0, 1] to logits (B, K); on the set's device, in evaluation mode, and its parameters
        take no gradient (its input does).

    Raises:
        ValueError: the architecture is unknown or does not take such images; the set is empty or of a single class.
    """
    require_usable(clean, least=2)
    classifier = _untrained(clean, recipe)

    def train() -> Mapping[str, Tensor]:
        trained = recipe.trainer_for(clean).fit(
            classifier,
            clean,
            generator=child(recipe.seed, "surrogate", "training"),
            on_progress=on_progress,
            stage="training a surrogate",
        )
        assert isinstance(trained, Classifier)
        return stored(trained.network)

    classifier.network.load_state_dict(dict(assets.get(surrogate_spec(clean, recipe), train)))
    classifier.to(memory_format=torch.channels_last)
    return classifier.eval().requires_grad_(False)
