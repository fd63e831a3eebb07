"""Data sets of a benchmark, each opened once."""

from __future__ import annotations

from dataclasses import dataclass, field

from lustral.bench.trust import Trust
from lustral.protocols import ImageSet
from lustral.sources import DataSource, load_source


@dataclass
class Sources:
    """Opens data sets and keeps them.

    Attributes:
        trust: what may be opened besides known names.
    """

    trust: Trust = field(default_factory=Trust)
    _open: dict[tuple[str, int | None], DataSource] = field(default_factory=dict)
    _train: dict[tuple[str, int | None], ImageSet] = field(default_factory=dict)

    def open(self, name: str, image_size: int | None) -> DataSource:
        """Return a data set; see ``Trust.require_data`` and ``load_source`` for the errors."""
        self.trust.require_data(name)
        if (name, image_size) not in self._open:
            self._open[name, image_size] = load_source(name, image_size=image_size)
        return self._open[name, image_size]

    def training_set(self, name: str, image_size: int | None) -> ImageSet:
        """Return the attacker's part of a data set."""
        if (name, image_size) not in self._train:
            self._train[name, image_size] = self.open(name, image_size).training_split()[0]
        return self._train[name, image_size]
