"""Data sets of a benchmark: sizes as plans and records write them."""

from __future__ import annotations

from lustral.bench.plan import DataTable
from lustral.bench.sources import Sources


def test_a_plan_names_height_and_width() -> None:
    table, sources = DataTable.model_validate({"name": "digits", "image_size": [8, 12]}), Sources()
    source = sources.open(table.name, table.image_size)
    assert source.train.image_shape == (3, 8, 12)
    assert sources.open("digits", [8, 12]) is source  # as a record has it
    assert sources.training_set("digits", [8, 12]).image_shape == (3, 8, 12)
