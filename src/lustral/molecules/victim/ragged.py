"""Rows of different lengths in one tensor, and a training set that is only row numbers, batched by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lustral.core.records import Batch

BATCHES_PER_SORT = 16  # batches of one length are cut from so many batches of shuffled rows


@dataclass(frozen=True)
class RaggedRows:
    """Rows of whole numbers, end to end.

    Attributes:
        values: (T,) int64.
        starts: (N + 1,) int64; row i is ``values[starts[i] : starts[i + 1]]``.
    """

    values: Tensor
    starts: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> RaggedRows:
        """Return rows as one tensor.

        >>> RaggedRows.of([[1, 2], [3]]).padded(torch.tensor([1, 0]), fill=0).tolist()
        [[3, 0], [1, 2]]
        """
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        return cls(torch.tensor([value for row in rows for value in row], dtype=torch.int64), starts)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.starts) - 1

    @property
    def lengths(self) -> Tensor:
        """Return (N,) int64."""
        return self.starts[1:] - self.starts[:-1]

    def places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the values of some rows are, and which of these rows each belongs to: two (M,) int64 tensors."""
        starts, lengths = self.starts[rows], self.lengths[rows]
        owner = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), lengths)
        offsets = lengths.cumsum(0) - lengths
        return torch.arange(len(owner), device=rows.device) - offsets[owner] + starts[owner], owner

    def padded(self, rows: Tensor, *, fill: int) -> Tensor:
        """Return (B, longest) int64: some rows, filled up with ``fill``."""
        lengths = self.lengths[rows]
        columns = torch.arange(int(lengths.max()) if len(rows) else 0, device=rows.device)
        if not len(self.values):
            return torch.full((len(rows), len(columns)), fill, device=rows.device)
        places = (self.starts[rows][:, None] + columns).clamp_max(len(self.values) - 1)
        return torch.where(columns < lengths[:, None], self.values[places], fill)

    def to(self, device: torch.device) -> RaggedRows:
        """Return the rows on a device."""
        return RaggedRows(self.values.to(device), self.starts.to(device))


@dataclass(frozen=True)
class RowNumbers:
    """A training set of row numbers, for an objective that holds the rows.

    Attributes:
        lengths: (N,) how much work each row is; rows of a batch have similar lengths.
    """

    lengths: Tensor

    @property
    def num_classes(self) -> int:
        """Return 1: rows have no labels."""
        return 1

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    def batches(
        self, batch_size: int, *, generator: Generator | None = None, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Yield every row once: in order, or shuffled and then bucketed by length."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        if drop_last:
            order = order[: len(order) // batch_size * batch_size]
        if generator is None:
            parts = list(torch.split(order, batch_size))
        else:
            blocks = torch.split(order, batch_size * BATCHES_PER_SORT)
            parts = [part for block in blocks for part in torch.split(block[self.lengths[block].argsort()], batch_size)]
            parts = [parts[place] for place in torch.randperm(len(parts), generator=generator).tolist()]
        for rows in parts:
            yield Batch(inputs=rows, labels=torch.zeros_like(rows), index=rows)


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield the places of all rows, those of similar length together, for work that trains nothing."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
