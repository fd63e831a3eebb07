"""What a source of images hands over: its splits, and what one must know to divide and augment them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Generator, Tensor

from lustral.core.randomness import child
from lustral.vision.images import shuffled, stratified_indices
from lustral.vision.records import ImageSet

if TYPE_CHECKING:
    from lustral.vision.sources.folder_stream import FolderStream


class SourceError(ValueError):
    """A data source cannot be used; the message says what was expected, what was found and what to do."""


@dataclass(frozen=True)
class UnreadablePicture:
    """A picture that was left out: its file, its label, and why it cannot be used."""

    file: str
    label: int
    problem: str


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A labelled data set with its official splits.

    Attributes:
        name: short name for provenance, e.g. "cifar10".
        train: training images; a ``FolderStream`` when a folder was opened with ``stream=True``.
        test: test images, or None for a plain set without a test split.
        flip: whether a horizontal flip keeps an image's meaning (objects do, digits and traffic signs do not).
        groups: (N,) int64 group of each training image, or None. Images of one group are near-duplicates, so a group
            never straddles a split.
        reserve_fraction: share of ``train`` that attackers never see, kept as the defenders' pool.
        files: N paths of the training pictures, where each is a file of its own; else empty.
        folder: what the names of these files are told relative to.
        unreadable: training pictures that were left out, where that was asked for.
    """

    version: ClassVar[int] = 2

    name: str
    train: ImageSet | FolderStream
    test: ImageSet | None
    flip: bool
    groups: Tensor | None = None
    reserve_fraction: float = 0.05
    files: tuple[str, ...] = ()
    folder: str = ""
    unreadable: tuple[UnreadablePicture, ...] = ()

    def __post_init__(self) -> None:
        """Check the fields that splits rely on."""
        if not 0 < self.reserve_fraction < 1:
            raise SourceError(f"expected a reserve_fraction in (0, 1); got {self.reserve_fraction}")
        if self.test is not None and (self.test.image_shape, self.test.num_classes) != (
            self.train.image_shape,
            self.train.num_classes,
        ):
            raise SourceError(
                f"{self.name}: expected test images like the training images, {self.train.image_shape} in "
                f"{self.train.num_classes} classes; got {self.test.image_shape} in {self.test.num_classes}"
            )
        if self.groups is not None and self.groups.shape != self.train.labels.shape:
            raise SourceError(
                f"expected one group per training image, shape ({len(self.train)},); got {tuple(self.groups.shape)}"
            )

    def split_indices(self) -> tuple[Tensor, Tensor]:
        """Return the int64 indices into ``train`` of (the attacker's images, sorted; the defenders' reserve, shuffled).

        Every call gives the same division: stratified by class, whole groups where the source has groups.
        """
        count = round(self.reserve_fraction * len(self.train))
        reserve, rest = stratified_indices(
            self.train.labels,
            self.train.num_classes,
            count,
            generator=child(0, "reserve", self.name),
            groups=self.groups,
        )
        return rest.sort().values, reserve

    def training_split(self) -> tuple[ImageSet, ImageSet]:
        """Divide ``train`` into (training images for the attacker, reserve for the defender).

        Raises:
            SourceError: ``train`` is streamed; poisoning works on images in memory.
        """
        if not isinstance(self.train, ImageSet):
            raise SourceError(
                f"{self.name}: a streamed training set cannot be divided in memory; open the source without "
                "stream=True, or take subsets of the stream with split_indices()"
            )
        rest, reserve = self.split_indices()
        return self.train.subset(rest), self.train.subset(reserve)

    def defender_indices(self) -> Tensor:
        """Return the int64 indices into ``train`` of the images a defender may draw on, in random but fixed order.

        The reserve of a source with a test split; all images of a plain set, which is the user's own trusted set.
        """
        if self.test is None:
            return shuffled(torch.arange(len(self.train)), generator=child(0, "pool", self.name))
        return self.split_indices()[1]

    def defender_pool(self) -> ImageSet:
        """Return all images at ``defender_indices()``, in memory."""
        return self._load(self.defender_indices())

    def draw_clean(self, count: int, *, generator: Generator) -> ImageSet:
        """Draw ``count`` of the images a defender may have, classes in proportion, in random order.

        Of a streamed source only these are decoded.

        Raises:
            ValueError: there are not so many.
        """
        return self._load(self._divided_pool(count, generator)[0])

    def not_drawn(self, count: int, *, generator: Generator) -> ImageSet:
        """Return the images a defender may have that ``draw_clean`` leaves with these arguments, in memory."""
        return self._load(self._divided_pool(count, generator)[1])

    def _divided_pool(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return the indices into ``train`` of the defender's images (that are drawn, that are left)."""
        pool = self.defender_indices()
        chosen, rest = stratified_indices(
            self.train.labels[pool.to(self.train.labels.device)], self.train.num_classes, count, generator=generator
        )
        return pool[chosen], pool[rest]

    def _load(self, indices: Tensor) -> ImageSet:
        part = self.train.subset(indices)
        return part if isinstance(part, ImageSet) else part.load()
