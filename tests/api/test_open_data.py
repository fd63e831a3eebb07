"""Images in every form that a user may have them in become the same set, and what is wrong with them is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lustral.api.data import OpenedData, open_data, to_pixels
from lustral.vision.images import as_float
from lustral.vision.records import ImageSet
from lustral.vision.sources import DataSource, SourceError, load_source
from toy import toy_images

IMAGES = toy_images(14, seed=1)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PICTURES = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in IMAGES.images]
LABELS = IMAGES.labels.tolist()
NAMES = tuple(f"kind {label}" for label in range(7))


class Pictures(Dataset[Any]):
    """As torchvision's sets: pictures, and the names of the classes."""

    classes = list(NAMES)  # noqa: RUF012

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return PICTURES[index], LABELS[index]


class Rows:
    """As a data set of Hugging Face: mappings, and features that name the classes."""

    features = {"image": SimpleNamespace(), "label": SimpleNamespace(names=list(NAMES))}  # noqa: RUF012

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(LABELS):
            raise IndexError(index)
        return {"image": PICTURES[index], "label": LABELS[index]}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(PICTURES, LABELS, strict=True)


def floats() -> torch.Tensor:
    return as_float(IMAGES.images)


FORMS: dict[str, Callable[[], Any]] = {
    "set": lambda: IMAGES,
    "source": lambda: DataSource(name="mine", train=IMAGES, test=None, flip=True),
    "tensors": lambda: (IMAGES.images, IMAGES.labels),
    "floats": lambda: (floats(), LABELS),
    "channels last": lambda: [IMAGES.images.permute(0, 2, 3, 1).numpy(), IMAGES.labels.numpy()],
    "mapping": lambda: {"images": IMAGES.images.numpy(), "labels": IMAGES.labels.numpy()},
    "tensor set": lambda: TensorDataset(floats(), IMAGES.labels),
    "loader": lambda: DataLoader(TensorDataset(floats(), IMAGES.labels), batch_size=4),
    "list": lambda: list(zip(floats(), LABELS, strict=True)),
    "torchvision": Pictures,
    "hugging face": Rows,
    "stream": Stream,
    "subset": lambda: Subset(Pictures(), range(14)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_set(form: str) -> None:
    source = open_data(FORMS[form]()).source
    assert isinstance(source.train, ImageSet)
    assert torch.equal(source.train.images, IMAGES.images)
    assert torch.equal(source.train.labels, IMAGES.labels)
    assert source.train.num_classes == 7
    assert source.train.class_names == (NAMES if form in ("torchvision", "hugging face", "subset") else ())


def test_a_path_is_opened_as_the_command_line_does(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", images=IMAGES.images.numpy(), labels=IMAGES.labels.numpy())
    opened = open_data(tmp_path / "mine.npz", image_size=6).source.train
    assert isinstance(opened, ImageSet)
    expected = load_source(str(tmp_path / "mine.npz"), image_size=6).train
    assert isinstance(expected, ImageSet)
    assert torch.equal(opened.images, expected.images)
    small = open_data(IMAGES, image_size=6).source.train
    assert small.image_shape == (3, 6, 6)
    assert open_data(Pictures(), image_size=(6, 8)).source.train.image_shape == (3, 6, 8)
    assert open_data(IMAGES, channels=1).source.train.image_shape == (1, 12, 12)


def test_a_shuffled_loader_gives_the_same_set_each_time_and_leaves_the_process_stream() -> None:
    loader = DataLoader(TensorDataset(floats(), IMAGES.labels), batch_size=4, shuffle=True)
    torch.manual_seed(3)
    first = open_data(loader).source.train
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)
    again = open_data(loader).source.train
    assert torch.equal(first.labels, again.labels)
    assert sorted(first.labels.tolist()) == sorted(LABELS)


def test_a_normalisation_is_undone_where_it_is_known() -> None:
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (MEAN, STD))
    opened = open_data(((floats() - mean) / std, LABELS), constants=(MEAN, STD))
    assert isinstance(opened.source.train, ImageSet)
    assert torch.equal(opened.source.train.images, IMAGES.images)
    assert "undone" in opened.notes[0]
    with pytest.raises(SourceError, match=r"found -\d.*take Normalize out of their transform"):
        open_data(((floats() - mean) / std, LABELS))
    with pytest.raises(SourceError, match="take Normalize out"):
        open_data(((floats() - mean) / std, LABELS), constants=((0.5,) * 3, (2.0,) * 3))


def test_whole_floats_and_dark_images_are_noted() -> None:
    whole = open_data((IMAGES.images.float(), LABELS))
    assert isinstance(whole.source.train, ImageSet)
    assert torch.equal(whole.source.train.images, IMAGES.images)
    assert whole.notes == ("The images were read as 0 .. 255.",)
    assert "divided by 255 twice" in open_data((floats() / 255, LABELS)).notes[0]
    assert to_pixels(IMAGES.images.numpy().astype(np.int64))[1] == ()


def refused(data: Any) -> str:
    with pytest.raises((SourceError, TypeError)) as caught:
        open_data(data)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (7, "expected an ImageSet, (images, labels)"),
        ({"train": IMAGES, "test": IMAGES}, "give one: data['train']"),
        ((floats() * float("nan"), LABELS), "NaN or infinite"),
        ((IMAGES.images.long() * 300, LABELS), "expected whole numbers in 0 .. 255"),
        ((IMAGES.images.bool(), LABELS), "expected images of uint8 or floats; got bool"),
        ((IMAGES.images[:, :2], LABELS), "with 1 or 3 channels"),
        ((IMAGES.images, LABELS[:-1]), "expected 14 integer labels"),
        ((IMAGES.images, [0.5] * 14), "expected 14 integer labels; got float64"),
        ([], "the data set is empty"),
        ([(PICTURES[0], "cat")], "item 0: expected one integer label; got 'cat'"),
        ([(PICTURES[0], 0), (floats()[0], 1)], "item 1: expected a picture"),
        ([(floats()[0], 0), (floats()[0][:, :6], 1)], "item 1 has shape"),
        ([PICTURES[0]], "expected (image, label)"),
        ([{"pixels": PICTURES[0], "label": 0}], "rename its columns"),
        ([(PICTURES[0], 0), (PICTURES[1].resize((5, 5)), 1)], "give image_size"),
    ],
)
def test_what_is_wrong_is_said(data: Any, said: str) -> None:
    assert said in refused(data)


def test_what_is_opened_is_a_record() -> None:
    assert isinstance(open_data(IMAGES), OpenedData)
