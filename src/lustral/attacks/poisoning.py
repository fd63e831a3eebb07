"""What data-poisoning attacks share: which images are poisoned, what they are called, and how they are stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from lustral.images import as_float, as_uint8
from lustral.protocols import ImageSet, PoisonedSet, Trigger
from lustral.randomness import fork

LabelMode = Literal["all_to_one", "all_to_all"]


def check_rate(poison_rate: float) -> None:
    """Raise ``ValueError`` unless the poison rate is a fraction in (0, 1]."""
    if not 0 < poison_rate <= 1:
        raise ValueError(f"expected a poison rate in (0, 1], as a fraction of the training set; got {poison_rate}")


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


def poison_dirty_label(
    clean: ImageSet,
    trigger: Trigger,
    relabel: Callable[[Tensor, int], Tensor],
    *,
    poison_rate: float,
    generator: Generator,
    batch_size: int = 1024,
) -> PoisonedSet:
    """Stamp and relabel ``round(poison_rate * N)`` images drawn uniformly over the whole set, target class included.

    Stamped images are rounded to 8 bits, as they would reach a victim in files.

    Raises:
        ValueError: the rate leaves no image to poison, or the target label does not exist.
    """
    count = round(poison_rate * len(clean))
    if count < 1:
        raise ValueError(
            f"a poison rate of {poison_rate} of {len(clean)} images poisons none; expected at least "
            f"{1 / max(len(clean), 1):.2g}"
        )
    relabelled = relabel(clean.labels, clean.num_classes)
    chosen = torch.randperm(len(clean), generator=fork(generator, "which"))[:count].sort().values.to(clean.device)
    images, stream = clean.images.clone(), fork(generator, "stamp")
    for part in torch.split(chosen, batch_size):
        images[part] = as_uint8(trigger(as_float(images[part]), generator=stream))
    is_poisoned = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
    is_poisoned[chosen] = True
    data = ImageSet(
        images=images,
        labels=torch.where(is_poisoned, relabelled, clean.labels),
        num_classes=clean.num_classes,
        class_names=clean.class_names,
    )
    return PoisonedSet(data=data, is_poisoned=is_poisoned)
