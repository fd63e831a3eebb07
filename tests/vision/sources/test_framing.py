"""Sizes and channels: what torchvision's transforms give, the same for every kind of source."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import transforms

from lustral.vision.records import ImageSet
from lustral.vision.sources import FolderStream, SourceError, load_source, source_with_channels

SIZES = ((40, 30), (31, 50), (64, 33))  # width, height


def pixels(width: int, height: int) -> NDArray[np.uint8]:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """An image folder and a table of the same three pictures of different sizes."""
    cells = []
    for index, (width, height) in enumerate(SIZES):
        folder = tmp_path / "folder" / str(min(index, 1))
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(pixels(width, height))
        picture.save(folder / f"{index}.png")
        content = io.BytesIO()
        picture.save(content, "PNG")
        cells.append(content.getvalue())
    pq.write_table(pa.table({"png": cells, "label": [0, 1, 1]}), tmp_path / "table.parquet")
    return tmp_path


def images_of(spec: Path, **settings: Any) -> Tensor:
    train = load_source(str(spec), **settings).train
    return train.images if isinstance(train, ImageSet) else train.load().images


def expected(*steps: Any) -> Tensor:
    change = transforms.Compose([*steps, transforms.PILToTensor()])
    return torch.stack([change(Image.fromarray(pixels(*size))) for size in SIZES])


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"image_size": 32}, [transforms.Resize((32, 32))]),
        ({"image_size": (32, 48)}, [transforms.Resize((32, 48))]),
        ({"image_size": 24, "resize": 29}, [transforms.Resize(29), transforms.CenterCrop(24)]),
        ({"image_size": (20, 27), "resize": 27}, [transforms.Resize(27), transforms.CenterCrop((20, 27))]),
        ({"image_size": (32, 48), "channels": 1}, [transforms.Resize((32, 48)), transforms.Grayscale()]),
    ],
)
@pytest.mark.parametrize(("name", "stream"), [("folder", False), ("folder", True), ("table.parquet", False)])
def test_pictures_are_framed_as_torchvision_does(
    pictures: Path, name: str, stream: bool, settings: dict[str, Any], steps: list[Any]
) -> None:
    source = load_source(str(pictures / name), stream=stream, **settings)
    if isinstance(source.train, FolderStream):
        assert source.train.num_workers > 0
        source = load_source(str(pictures / name), stream=None, **settings)
        assert isinstance(source.train, FolderStream)
        images = source.train.load().images
    else:
        images = images_of(pictures / name, **settings)
    assert torch.equal(images, expected(*steps))


def test_arrays_and_digits_are_framed_too(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 30), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=[0, 1])
    assert images_of(tmp_path / "x.npz", image_size=(10, 12)).shape == (2, 1, 10, 12)
    cut = images_of(tmp_path / "x.npz", image_size=(20, 10), resize=20)
    assert np.array_equal(cut[:, 0].numpy(), images[:, :, 10:20])
    assert load_source("digits", image_size=(16, 24)).train.image_shape == (3, 16, 24)
    assert load_source("digits", image_size=16, resize=20).train.image_shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": (1, 2, 3)}, "one side, or of height and width; got 3 numbers"),
        ({"image_size": (32, 0)}, "at least 1 pixel a side"),
        ({"image_size": 100_000}, "at most 64,000,000 pixels"),
        ({"resize": 256}, "expected an image_size"),
        ({"image_size": 224, "resize": 200}, "resize to at least the image_size that is cut out, 224; got 200"),
        ({"channels": 4}, "1 channel .grey. or 3 .RGB.; got 4"),
    ],
)
def test_impossible_sizes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load_source("digits", **settings)


def test_channels_change_alike_before_and_after_decoding(pictures: Path) -> None:
    as_rgb = load_source(str(pictures / "folder"), image_size=16)
    grey = images_of(pictures / "folder", image_size=16, channels=1)
    assert grey.shape == (3, 1, 16, 16)
    changed = source_with_channels(as_rgb, 1).train
    assert isinstance(changed, ImageSet)
    assert torch.equal(changed.images, grey)
    streamed = source_with_channels(load_source(str(pictures / "folder"), image_size=16, stream=None), 1).train
    assert isinstance(streamed, FolderStream)
    assert torch.equal(streamed.load().images, grey)
    assert next(streamed.batches(2)).inputs.shape == (2, 1, 16, 16)


def test_grey_arrays_become_three_equal_channels_on_request(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=[0, 1])
    three = images_of(tmp_path / "x.npz", channels=3)
    assert all(np.array_equal(three[:, channel].numpy(), images) for channel in range(3))
    assert torch.equal(images_of(tmp_path / "x.npz", channels=1)[:, 0], three[:, 0])
