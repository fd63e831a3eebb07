"""Data sets of a benchmark: sizes as plans and records write them."""

from __future__ import annotations

import pytest
import torch

from lustral.bench.plan import DataTable
from lustral.bench.sources import Sources
from lustral.vision.sources import SourceError


def test_a_plan_names_height_and_width() -> None:
    table, sources = DataTable.model_validate({"name": "digits", "image_size": [8, 12]}), Sources()
    source = sources.open(table.name, table.image_size)
    assert source.train.image_shape == (3, 8, 12)
    assert sources.open("digits", [8, 12]) is source  # as a record has it
    assert sources.training_set("digits", [8, 12]).image_shape == (3, 8, 12)


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_a_part_of_the_training_images_has_every_class_in_proportion_and_none_of_the_reserve() -> None:
    sources = Sources()
    source, whole, part = sources.open("digits", None), sources.training_set("digits", None), None
    part = sources.training_set("digits", None, 300)
    assert sources.training_set("digits", None, 300) is part
    assert len(part) == 300
    shares = torch.bincount(whole.labels, minlength=10) * 300 / len(whole)
    assert bool(((torch.bincount(part.labels, minlength=10) - shares).abs() < 1).all())
    assert rows(part.images) <= rows(whole.images)
    assert not rows(part.images) & rows(source.defender_pool().images)
    again = Sources().training_set("digits", None, 300)
    assert torch.equal(again.images, part.images)
    assert torch.equal(again.labels, part.labels)
    most = sources.training_set("digits", None, len(whole))
    assert torch.equal(most.images, whole.images)  # in the source's order


@pytest.mark.parametrize("images", [9, 10_000])
def test_a_part_that_cannot_be_taken_is_refused_with_what_can(images: int) -> None:
    sources = Sources()
    whole = len(sources.training_set("digits", None))
    with pytest.raises(SourceError, match=f"images = 10 to {whole}"):
        sources.training_set("digits", None, images)
