"""Batches as the references take them: the same ones in the same order in every epoch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Batches = Sequence[tuple[Tensor, Tensor]]
