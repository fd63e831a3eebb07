"""What data-poisoning attacks share: which images are poisoned, what they are called, and how they are stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import fork
from lustral.core.records import Augmentation
from lustral.vision.images import as_float, as_uint8
from lustral.vision.records import ImageSet, PoisonedSet, Trigger

LabelMode = Literal["all_to_one", "all_to_all"]


def check_rate(poison_rate: float) -> None:
    """Raise ``ValueError`` unless the poison rate is a fraction in (0, 1]."""
    if not 0 < poison_rate <= 1:
        raise ValueError(f"expected a poison rate in (0, 1], as a fraction of the training set; got {poison_rate}")


def check_second_rate(name: str, rate: float, poison_rate: float) -> None:
    """Raise ``ValueError`` unless the share of images that carry a trigger and keep their labels fits beside the poison."""
    if not 0 <= rate <= 1 - poison_rate:
        raise ValueError(
            f"expected a {name} rate in [0, {1 - poison_rate:g}], what a poison rate of {poison_rate} leaves; got {rate}"
        )


def check_choices(**choices: tuple[str, object]) -> None:
    """Raise ``ValueError`` for any ``name=(value, Literal)`` whose value is not one of the literal's."""
    for name, (value, literal) in choices.items():
        if value not in get_args(literal):
            raise ValueError(f"expected {name} to be one of {', '.join(get_args(literal))}; got {value!r}")


def dirty_labels(labels: Tensor, num_classes: int, *, mode: LabelMode, target_label: int) -> Tensor:
    """Return the attacker's labels: the target label, or each class's successor.

    >>> dirty_labels(torch.tensor([0, 9]), 10, mode="all_to_all", target_label=0).tolist()
    [1, 0]
    """
    if mode == "all_to_all":
        return (labels + 1) % num_classes
    if not 0 <= target_label < num_classes:
        raise ValueError(f"expected a target label in 0 .. {num_classes - 1}; got {target_label}")
    return torch.full_like(labels, target_label)


def require_images(rate: float, num_images: int) -> None:
    """Raise ``ValueError`` if a share of a set rounds to no image."""
    if round(rate * num_images) < 1:
        raise ValueError(
            f"a poison rate of {rate} of {num_images} images poisons none; expected at least {1 / max(num_images, 1):.2g}"
        )


def require_dirty_label(
    clean: ImageSet,
    relabel: Callable[[Tensor, int], Tensor],
    image_trigger: Callable[[tuple[int, int, int]], object],
    rate: float,
) -> None:
    """Check what every dirty-label attack needs: some image to poison, a target that exists, a trigger that fits."""
    require_images(rate, len(clean))
    relabel(clean.labels[:1], clean.num_classes)
    image_trigger(clean.image_shape)


def require_clean_label(labels: Tensor, num_classes: int, *, target_label: int, poison_rate: float) -> None:
    """Check that a clean-label attack has enough images of the target class.

    Raises:
        ValueError: the class does not exist, or ``round(poison_rate * N)`` is more than it has; names the largest rate.
    """
    if not 0 <= target_label < num_classes:
        raise ValueError(f"expected a target label in 0 .. {num_classes - 1}; got {target_label}")
    require_images(poison_rate, len(labels))
    wanted, available = round(poison_rate * len(labels)), int((labels == target_label).sum())
    if wanted > available:
        largest = math.floor(available / len(labels) * 10_000) / 10_000
        raise ValueError(
            f"a clean-label attack poisons images of its target class only: class {target_label} has {available} of "
            f"{len(labels)} images, and a poison rate of {poison_rate} asks for {wanted}; "
            f"the largest possible rate is {largest:g}"
        )


def draw_indices(candidates: Tensor, count: int, *, generator: Generator) -> Tensor:
    """Draw ``count`` of the (M,) int64 candidate indices without replacement; sorted."""
    order = torch.randperm(len(candidates), generator=generator)[:count].to(candidates.device)
    return candidates[order].sort().values


def shares_of_batch(size: int, poison_rate: float, second_rate: float, generator: Generator) -> tuple[int, int]:
    """Return where the poisoned images of a batch end, and behind them those that carry a trigger and keep their labels.

    Right on average, also where a rate is below one image a batch.
    """
    chance = torch.rand((), generator=generator)
    return int(poison_rate * size + chance), int((poison_rate + second_rate) * size + chance)


def augmented_loss(
    model: nn.Module, images: Tensor, labels: Tensor, augment: Augmentation | None, generator: Generator
) -> Tensor:
    """Return the mean cross-entropy of a stamped batch, augmented after stamping as a victim's own training would."""
    if augment is not None:
        images = augment(images, generator=generator)
    return F.cross_entropy(model(images).float(), labels)


def pair_offset(count: int, generator: Generator | None) -> int:
    """Return a distance in 1 .. count - 1: image i of a batch is paired with image i + distance, never with itself."""
    if count < 2:
        return 0
    if generator is None:
        return count // 2
    return int(torch.randint(1, count, (), generator=generator, device=generator.device))


def stamp_at(
    images: Tensor, indices: Tensor, trigger: Trigger, *, generator: Generator, batch_size: int = 1024
) -> None:
    """Stamp the uint8 images at ``indices`` in place and round them to 8 bits, as they would reach a victim in files."""
    for part in torch.split(indices, batch_size):
        images[part] = as_uint8(trigger(as_float(images[part]), generator=generator))


def poisoned_set(
    clean: ImageSet, images: Tensor, labels: Tensor, poisoned: Tensor, cover: Tensor | None = None
) -> PoisonedSet:
    """Return the record of a poisoned set from its images, labels and the indices of poisoned and cover images."""

    def marked(indices: Tensor) -> Tensor:
        mark = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
        mark[indices] = True
        return mark

    data = ImageSet(images=images, labels=labels, num_classes=clean.num_classes, class_names=clean.class_names)
    return PoisonedSet(data=data, is_poisoned=marked(poisoned), is_cover=None if cover is None else marked(cover))


def poison_dirty_label(
    clean: ImageSet,
    trigger: Trigger,
    relabel: Callable[[Tensor, int], Tensor],
    *,
    poison_rate: float,
    generator: Generator,
) -> PoisonedSet:
    """Stamp and relabel ``round(poison_rate * N)`` images drawn uniformly over the whole set, target class included.

    Raises:
        ValueError: the rate leaves no image to poison, or the target label does not exist.
    """
    require_images(poison_rate, len(clean))
    relabelled = relabel(clean.labels, clean.num_classes)
    everything = torch.arange(len(clean), device=clean.device)
    chosen = draw_indices(everything, round(poison_rate * len(clean)), generator=fork(generator, "which"))
    images = clean.images.clone()
    stamp_at(images, chosen, trigger, generator=fork(generator, "stamp"))
    labels = clean.labels.clone()
    labels[chosen] = relabelled[chosen]
    return poisoned_set(clean, images, labels, chosen)


def with_cover(
    poisoned: PoisonedSet, trigger: Trigger, *, cover_rate: float, which: Generator, stamp: Generator
) -> PoisonedSet:
    """Stamp ``round(cover_rate * N)`` of the images that are not poisoned, in place, labels kept.

    Args:
        poisoned: the poisoned set.
        trigger: what cover images carry.
        cover_rate: fraction of the whole set.
        which: stream that draws the images.
        stamp: stream of the trigger.
    """
    data = poisoned.data
    chosen, others = poisoned.is_poisoned.nonzero()[:, 0], (~poisoned.is_poisoned).nonzero()[:, 0]
    cover = draw_indices(others, round(cover_rate * len(data)), generator=which)
    stamp_at(data.images, cover, trigger, generator=stamp)
    return poisoned_set(data, data.images, data.labels, chosen, cover)


def poison_clean_label(
    clean: ImageSet, trigger: Trigger, *, target_label: int, poison_rate: float, generator: Generator
) -> PoisonedSet:
    """Stamp ``round(poison_rate * N)`` images of the target class; every label stays true.

    Raises:
        ValueError: the class has not so many images; names the largest possible rate.
    """
    require_clean_label(clean.labels, clean.num_classes, target_label=target_label, poison_rate=poison_rate)
    candidates = (clean.labels == target_label).nonzero()[:, 0]
    chosen = draw_indices(candidates, round(poison_rate * len(clean)), generator=fork(generator, "which"))
    images = clean.images.clone()
    stamp_at(images, chosen, trigger, generator=fork(generator, "stamp"))
    return poisoned_set(clean, images, clean.labels, chosen)
