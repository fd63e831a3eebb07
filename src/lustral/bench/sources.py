"""Data sets of a benchmark, each opened once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lustral.bench.trust import Trust
from lustral.core.randomness import child
from lustral.vision.images import stratified_indices
from lustral.vision.records import ImageSet
from lustral.vision.sources import DataSource, SourceError, load_source

Size = int | tuple[int, ...] | None  # side, (height, width), or as it comes


@dataclass
class Sources:
    """Opens data sets and keeps them.

    Attributes:
        trust: what may be opened besides known names.
    """

    trust: Trust = field(default_factory=Trust)
    _open: dict[tuple[str, Size], DataSource] = field(default_factory=dict)
    _train: dict[tuple[str, Size, int | None], ImageSet] = field(default_factory=dict)

    def open(self, name: str, image_size: int | Sequence[int] | None) -> DataSource:
        """Return a data set; see ``Trust.require_data`` and ``load_source`` for the errors."""
        self.trust.require_data(name)
        key = name, _hashable(image_size)
        if key not in self._open:
            self._open[key] = load_source(name, image_size=image_size)
        return self._open[key]

    def training_set(self, name: str, image_size: int | Sequence[int] | None, images: int | None = None) -> ImageSet:
        """Return the attacker's part of a data set, or always the same ``images`` of it: see ``part_of_training``.

        Raises:
            SourceError: it has not so many, or fewer are asked for than there are classes.
        """
        key = name, _hashable(image_size), images
        if key not in self._train:
            source = self.open(name, image_size)
            self._train[key] = source.training_split()[0] if images is None else part_of_training(source, images)
        return self._train[key]


def part_of_training(source: DataSource, images: int) -> ImageSet:
    """Return so many of the attacker's images, every class in proportion, in the order of the source; never others.

    Raises:
        SourceError: there are not so many, or fewer than one for each class.
    """
    train, (attackers, _) = source.train, source.split_indices()
    if not train.num_classes <= images <= len(attackers):
        raise SourceError(
            f"{source.name}: a part of {images:,} training images cannot be taken; the attacker has {len(attackers):,} in "
            f"{train.num_classes} classes: give images = {train.num_classes} to {len(attackers)}"
        )
    labels = train.labels[attackers.to(train.labels.device)]
    chosen, _ = stratified_indices(
        labels, train.num_classes, images, generator=child(0, "part of the training images", source.name)
    )
    part = train.subset(attackers[chosen.sort().values])
    return part if isinstance(part, ImageSet) else part.load()


def _hashable(image_size: int | Sequence[int] | None) -> Size:
    """Return a size as it is in a plan; a record's (height, width) is a list."""
    return tuple(image_size) if isinstance(image_size, Sequence) else image_size
