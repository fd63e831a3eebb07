"""What is done with images: 8-bit conversion, stratified splits, and batched augmentation on the tensors' device."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from lustral.core.randomness import child, fork
from lustral.vision.records import ImageSet


def as_float(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1]."""
    return images.float().div_(255)


def as_uint8(images: Tensor) -> Tensor:
    """Return float images in [0, 1], rounded to 8 bits and clipped.

    >>> as_uint8(torch.tensor([0.0, 0.5, 1.2])).tolist()
    [0, 128, 255]
    """
    return images.mul(255).round_().clamp_(0, 255).to(torch.uint8)


def channel_statistics(data: ImageSet, sample: int = 10_000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return each channel's mean and standard deviation over ``sample`` images of all classes, on the [0, 1] scale."""
    pixels = as_float(at_most(data, sample).images).transpose(0, 1).flatten(1)
    std = pixels.std(1).clamp_min(1e-3)
    return tuple(round(v, 4) for v in pixels.mean(1).tolist()), tuple(round(v, 4) for v in std.tolist())


def stratified_indices(
    labels: Tensor, num_classes: int, count: int, *, generator: Generator, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose about ``count`` images with every class in proportion.

    Without groups the number is exact: classes get their whole share and the largest remainders one more each. With
    groups, whole groups are drawn from each class until its share is met, at least one where a class has two.

    Args:
        labels: (N,) int64.
        num_classes: K.
        count: images to choose, 0 <= count <= N.
        generator: CPU stream.
        groups: (N,) int64; images of one group stay together (video tracks, near-duplicates).

    Returns:
        (chosen, rest): int64 indices on the CPU, together all of 0 .. N - 1, each in random order. Sets often come
        ordered by class, and whoever takes "the first n" of a drawn set relies on this order.
    """
    labels = labels.cpu()
    if not 0 <= count <= len(labels):
        raise ValueError(f"expected to choose between 0 and {len(labels)} images; got {count}")
    sizes = torch.bincount(labels, minlength=num_classes)
    share = sizes.double() * count / max(len(labels), 1)
    quota = share.floor().long()
    left = count - int(quota.sum())
    quota[(share - quota).argsort(descending=True, stable=True)[:left]] += 1
    is_chosen = torch.zeros(len(labels), dtype=torch.bool)
    by_class = torch.split(labels.argsort(stable=True), sizes.tolist())
    for label, members in enumerate(by_class):
        if groups is None:
            is_chosen[members[torch.randperm(len(members), generator=generator)[: quota[label]]]] = True
            continue
        own = groups.cpu()[members]
        names = torch.unique(own)
        taken = 0
        for name in names[torch.randperm(len(names), generator=generator)][: max(len(names) - 1, 0)]:
            size = int((own == name).sum())
            if taken and taken + size / 2 > int(quota[label]):
                break
            is_chosen[members[own == name]] = True
            taken += size
    chosen, rest = is_chosen.nonzero().flatten(), (~is_chosen).nonzero().flatten()
    order = fork(generator, "order")
    return shuffled(chosen, generator=order), shuffled(rest, generator=order)


def shuffled(indices: Tensor, *, generator: Generator) -> Tensor:
    """Return the entries of a tensor (N,) in random order."""
    return indices[torch.randperm(len(indices), generator=generator).to(indices.device)]


def at_most(data: ImageSet, most: int) -> ImageSet:
    """Return ``data``, or ``most`` of its images with every class in proportion where it has more.

    The same ones each time. Taking the first ones instead would give a few classes of a set that is ordered by class.
    """
    if len(data) <= most:
        return data
    chosen, _ = stratified_indices(data.labels, data.num_classes, most, generator=child(0, "at most"))
    return data.subset(chosen)


def split(data: ImageSet, fraction: float, *, generator: Generator) -> tuple[ImageSet, ImageSet]:
    """Split a set in two, stratified by class and shuffled: the first part holds ``round(fraction * N)`` images."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"expected a fraction in [0, 1]; got {fraction}")
    chosen, rest = stratified_indices(data.labels, data.num_classes, round(fraction * len(data)), generator=generator)
    return data.subset(chosen), data.subset(rest)


def check_holdout(holdout: float) -> None:
    """Raise ``ValueError`` unless the held-out share is in (0, 1)."""
    if not 0 < holdout < 1:
        raise ValueError(f"expected a held-out share in (0, 1); got {holdout}")


def require_usable(clean: ImageSet, least: int = 10) -> None:
    """Raise ``ValueError`` unless the clean set can support a recovery: two classes and a handful of images."""
    present = len(torch.unique(clean.labels))
    if len(clean) == 0:
        raise ValueError("the clean set is empty; give at least a few clean images of every class")
    if present < 2:
        raise ValueError(
            f"the clean set of {len(clean)} images holds a single class; give clean images of at least two classes"
        )
    if len(clean) < least:
        raise ValueError(f"expected at least {least} clean images; got {len(clean)}")
