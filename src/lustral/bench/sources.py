"""Data sets of a benchmark, each opened once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lustral.bench.trust import Trust
from lustral.vision.records import ImageSet
from lustral.vision.sources import DataSource, load_source

Size = int | tuple[int, ...] | None  # side, (height, width), or as it comes


@dataclass
class Sources:
    """Opens data sets and keeps them.

    Attributes:
        trust: what may be opened besides known names.
    """

    trust: Trust = field(default_factory=Trust)
    _open: dict[tuple[str, Size], DataSource] = field(default_factory=dict)
    _train: dict[tuple[str, Size], ImageSet] = field(default_factory=dict)

    def open(self, name: str, image_size: int | Sequence[int] | None) -> DataSource:
        """Return a data set; see ``Trust.require_data`` and ``load_source`` for the errors."""
        self.trust.require_data(name)
        key = name, _hashable(image_size)
        if key not in self._open:
            self._open[key] = load_source(name, image_size=image_size)
        return self._open[key]

    def training_set(self, name: str, image_size: int | Sequence[int] | None) -> ImageSet:
        """Return the attacker's part of a data set."""
        key = name, _hashable(image_size)
        if key not in self._train:
            self._train[key] = self.open(name, image_size).training_split()[0]
        return self._train[key]


def _hashable(image_size: int | Sequence[int] | None) -> Size:
    """Return a size as it is in a plan; a record's (height, width) is a list."""
    return tuple(image_size) if isinstance(image_size, Sequence) else image_size
