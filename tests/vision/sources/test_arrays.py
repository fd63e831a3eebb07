import io
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from lustral.vision.records import ImageSet
from lustral.vision.sources import DataSource, SourceError, load_source
from lustral.vision.sources.arrays import undo_residuals

LABELS = np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)


def random_images(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def residuals(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Encode (N, H, W, 3) RGB: differences of channels, then of neighbours along both axes, modulo 256."""
    red, green, blue = (images[..., channel].astype(int) for channel in range(3))
    planes = np.stack([green, red - green, blue - green])
    for axis in (3, 2):
        planes = np.diff(planes, axis=axis, prepend=0)
    return (planes % 256).astype(np.uint8)


def save(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def train_of(source: DataSource) -> ImageSet:
    assert isinstance(source.train, ImageSet)
    return source.train


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "toy.npz"


def test_residuals_decode_to_the_encoded_pixels() -> None:
    images = random_images(5, 7, 4, 3)
    assert np.array_equal(undo_residuals(residuals(images)), images.transpose(0, 3, 1, 2))


def test_residuals_of_one_red_pixel_by_hand() -> None:
    res = np.zeros((3, 1, 2, 2), dtype=np.uint8)
    res[1, 0] = [[200, 56], [56, 200]]  # R - G: +200 at the corner, taken back to its right, below, and so restored
    assert undo_residuals(res)[0].tolist() == [[[200, 0], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]


def test_residual_coded_archive(archive: Path) -> None:
    train, test = random_images(6, 8, 8, 3), random_images(2, 8, 8, 3)
    source = load_source(
        save(
            archive,
            train_res=residuals(train),
            train_labels=LABELS,
            train_track=np.array([0, 0, 0, 4, 4, 4], dtype=np.uint16),
            test_res=residuals(test),
            test_labels=np.array([0, 2]),
            class_names=np.array(["cat", "dog", "eel", "fox"]),
        )
    )
    assert np.array_equal(train_of(source).images.numpy(), train.transpose(0, 3, 1, 2))
    assert source.test is not None
    assert np.array_equal(source.test.images.numpy(), test.transpose(0, 3, 1, 2))
    assert source.train.class_names == ("cat", "dog", "eel", "fox")
    assert source.train.num_classes == 4
    assert source.groups is not None
    assert source.groups.tolist() == [0, 1000, 2000, 4, 1004, 2004]
    assert (source.name, source.flip) == ("toy", True)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [((6, 5, 4), (1, 5, 4)), ((6, 5, 4, 3), (3, 5, 4)), ((6, 5, 4, 1), (1, 5, 4)), ((6, 3, 5, 4), (3, 5, 4))],
)
def test_plain_archive_in_every_layout(archive: Path, stored: tuple[int, ...], expected: tuple[int, int, int]) -> None:
    images = random_images(*stored)
    source = load_source(save(archive, images=images, labels=LABELS.astype(np.int32)))
    assert source.train.image_shape == expected
    assert source.test is None
    assert train_of(source).labels.tolist() == LABELS.tolist()
    assert int(train_of(source).images.sum()) == int(images.sum(dtype=np.int64))


def test_channels_last_keeps_each_pixel(archive: Path) -> None:
    images = random_images(6, 5, 4, 3)
    train = train_of(load_source(save(archive, images=images, labels=LABELS)))
    assert train.images[2, 1, 4, 3].item() == images[2, 4, 3, 1]


def test_images_are_resized_on_request(archive: Path) -> None:
    flat = np.full((6, 8, 8), 77, dtype=np.uint8)
    source = load_source(
        save(archive, train_images=flat, train_labels=LABELS, test_images=flat[:2], test_labels=LABELS[:2]),
        image_size=4,
    )
    assert train_of(source).images.shape == (6, 1, 4, 4)
    assert bool((train_of(source).images == 77).all())
    assert source.test is not None
    assert source.test.image_shape == (1, 4, 4)


IMAGES = random_images(6, 4, 4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": IMAGES}, "no training images; found pictures; expected train_res"),
        ({"images": IMAGES}, "lacks labels; found images"),
        ({"labels": LABELS}, "lacks images; found labels"),
        ({"train_images": IMAGES, "train_labels": LABELS, "test_images": IMAGES}, "lacks test_labels"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "holds no images"),
        ({"images": IMAGES, "labels": LABELS[:5]}, "expected 6 integer labels; got uint8 of shape"),
        ({"images": IMAGES, "labels": LABELS.astype(float)}, "expected 6 integer labels; got float64"),
        ({"images": IMAGES, "labels": LABELS.astype(int) - 1}, "labels must start at 0; found -1"),
        ({"images": IMAGES, "labels": LABELS, "class_names": np.array(["a", "b"])}, r"expected 0 .. 1, found 0 .. 2"),
        ({"images": IMAGES, "labels": LABELS * 0}, "at least 2 classes"),
        ({"images": IMAGES / 255, "labels": LABELS}, r"expected uint8 images in 0 .. 255; got float64; store floats"),
        ({"images": random_images(6, 4, 4, 2), "labels": LABELS}, r"with 1 or 3 channels; got \(6, 4, 4, 2\)"),
        ({"train_res": IMAGES, "train_labels": LABELS}, r"train_res of shape \(3, N, H, W\) uint8"),
        ({"images": IMAGES, "labels": np.array([None] * 6)}, "holds Python objects, which are not read"),
    ],
)
def test_archives_that_do_not_fit(archive: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        load_source(save(archive, **arrays))
    assert str(archive) in str(caught.value)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_archive(archive: Path, kept: float) -> None:
    save(archive, images=random_images(60, 8, 8), labels=np.resize(LABELS, 60))
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(SourceError, match="truncated or corrupt"):
        load_source(str(archive))


def test_corrupt_archive_never_raises_anything_else(archive: Path) -> None:
    np.savez_compressed(archive, images=random_images(60, 8, 8), labels=np.resize(LABELS, 60))
    whole = archive.read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(200):
        broken = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            broken[place] = rng.integers(256)
        archive.write_bytes(broken)
        with suppress(SourceError):
            load_source(str(archive))


def test_single_array_is_no_archive(tmp_path: Path) -> None:
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, IMAGES)
    with pytest.raises(SourceError, match="got a single array"):
        load_source(str(tmp_path / "one.npz"))


def encoded(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def table(**columns: Any) -> pa.Table:
    return pa.table(columns)


@pytest.mark.parametrize("as_record", [False, True])
def test_parquet_of_encoded_pictures(tmp_path: Path, as_record: bool) -> None:
    pixels = random_images(4, 5, 6, 3)
    cells: list[Any] = [encoded(entry) for entry in pixels[:3]] + [encoded(pixels[3, :, :, 0])]  # the last one grey
    if as_record:
        cells = [{"bytes": cell, "path": "somewhere.png"} for cell in cells]
    rows = table(image=cells, label=[0, 1, 1, 0], split=["train", "train", "val", "train"])
    pq.write_table(rows.replace_schema_metadata({"class_names": "cat|dog|eel"}), tmp_path / "toy.parquet")
    source = load_source(str(tmp_path / "toy.parquet"))
    assert np.array_equal(train_of(source).images[:2].numpy(), pixels[:2].transpose(0, 3, 1, 2))
    assert np.array_equal(train_of(source).images[2].numpy(), np.stack([pixels[3, :, :, 0]] * 3))
    assert source.test is not None
    assert np.array_equal(source.test.images[0].numpy(), pixels[2].transpose(2, 0, 1))
    assert source.test.labels.tolist() == [1]
    assert source.train.class_names == ("cat", "dog", "eel")


def test_parquet_without_splits_is_a_plain_set_and_resizes(tmp_path: Path) -> None:
    cells = [encoded(random_images(5, 6, 3)), encoded(random_images(9, 7, 3), "JPEG")]
    pq.write_table(table(jpeg=cells, label=[0, 1]), tmp_path / "toy.parquet")
    source = load_source(str(tmp_path / "toy.parquet"), image_size=4)
    assert source.test is None
    assert train_of(source).images.shape == (2, 3, 4, 4)
    with pytest.raises(SourceError, match=r"row 1: is 7x9 pixels, the first image 6x5\n.*image_size"):
        load_source(str(tmp_path / "toy.parquet"))


PNG = encoded(random_images(4, 4, 3))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0, 1]}, "expected a column label and one of jpeg, image"),
        ({"jpeg": [PNG, PNG]}, "expected a column label and one of"),
        ({"jpeg": [PNG, PNG[:40]], "label": [0, 1]}, r"row 1: unreadable image"),
        ({"jpeg": [PNG, None], "label": [0, 1]}, r"row 1: unreadable image"),
        ({"jpeg": [PNG, PNG], "label": ["a", "b"]}, "expected 2 integer labels"),
        ({"jpeg": [PNG, PNG], "label": [0, 1], "split": ["train", "extra"]}, "found 'extra'"),
        ({"jpeg": [PNG, PNG], "label": [0, 1], "split": ["val", "val"]}, "no rows of split train"),
        ({"jpeg": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "no images"),
    ],
)
def test_tables_that_do_not_fit(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(table(**columns), tmp_path / "toy.parquet")
    with pytest.raises(SourceError, match=message):
        load_source(str(tmp_path / "toy.parquet"))


def test_truncated_table(tmp_path: Path) -> None:
    path = tmp_path / "toy.parquet"
    pq.write_table(table(jpeg=[PNG, PNG], label=[0, 1]), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SourceError, match="cannot be read as a Parquet table"):
        load_source(str(path))


def test_labels_become_int64(archive: Path) -> None:
    source = load_source(save(archive, images=IMAGES, labels=LABELS))
    assert source.train.labels.dtype == torch.int64
