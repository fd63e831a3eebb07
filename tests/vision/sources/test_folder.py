import logging
import pickle
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from lustral.core.randomness import child
from lustral.core.records import Batch
from lustral.vision.images import as_float
from lustral.vision.records import ImageSet
from lustral.vision.sources import FolderStream, SourceError, load_source

# from Python 3.12 on, forking workers in a process with threads, as torch's is, draws this warning
allow_fork = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
CLASSES = ("ant", "bee", "cow")


def pixels(seed: int, height: int = 5, width: int = 6) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def fill(folder: Path, per_class: int, classes: Sequence[str] = CLASSES) -> Path:
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            Image.fromarray(pixels(100 * label + index)).save(folder / name / f"{index:02}.png")
    return folder


def stream_of(folder: Path, num_workers: int = 0, image_size: int | None = None) -> FolderStream:
    train = load_source(str(folder), stream=True, image_size=image_size).train
    assert isinstance(train, FolderStream)
    return replace(train, num_workers=num_workers)


def loaded(folder: Path, image_size: int | None = None) -> ImageSet:
    train = load_source(str(folder), image_size=image_size).train
    assert isinstance(train, ImageSet)
    return train


def test_plain_folder_holds_the_pixels_in_sorted_order(tmp_path: Path) -> None:
    source = load_source(str(fill(tmp_path / "bugs", 2)))
    assert isinstance(source.train, ImageSet)
    assert source.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert source.train.class_names == CLASSES
    assert np.array_equal(source.train.images[3].numpy(), pixels(101).transpose(2, 0, 1))
    assert (source.name, source.test, source.flip, source.groups) == ("bugs", None, True, None)


@pytest.mark.parametrize("split", ["test", "val"])
def test_folder_with_splits(tmp_path: Path, split: str) -> None:
    fill(tmp_path / "train", 3)
    fill(tmp_path / split, 1, CLASSES[1:])  # a class may be missing from the test split
    source = load_source(str(tmp_path))
    assert len(source.train) == 9
    assert source.test is not None
    assert source.test.labels.tolist() == [1, 2]
    assert source.test.num_classes == 3


def test_empty_folder_holds_the_place_of_a_class_and_other_files_are_ignored(tmp_path: Path) -> None:
    fill(tmp_path, 1, ["b", "d"])
    (tmp_path / "a").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("not a picture")
    train = loaded(tmp_path)
    assert train.class_names == ("a", "b", "d")
    assert train.labels.tolist() == [1, 2]


def test_pictures_below_a_class_folder_are_found(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    (tmp_path / "bee" / "images").mkdir()
    Image.fromarray(pixels(7)).save(tmp_path / "bee" / "images" / "x.JPEG")
    assert loaded(tmp_path).labels.bincount().tolist() == [1, 2, 1]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_stream_yields_what_the_loaded_set_yields(tmp_path: Path, seed: int | None, drop_last: bool) -> None:
    folder = fill(tmp_path, 4)

    def batches(data: FolderStream | ImageSet) -> list[Batch]:
        generator = None if seed is None else child(seed, "order")
        return list(data.batches(5, generator=generator, drop_last=drop_last))

    streamed, in_memory = batches(stream_of(folder)), batches(loaded(folder))
    assert len(streamed) == len(in_memory) == (2 if drop_last else 3)
    for batch, expected in zip(streamed, in_memory, strict=True):
        assert batch.inputs.dtype == torch.float32
        assert all(torch.equal(*each) for each in zip(batch, expected, strict=True))
        assert torch.equal(batch.inputs, as_float(loaded(folder).images[batch.index]))


@allow_fork
def test_workers_change_nothing(tmp_path: Path) -> None:
    stream = stream_of(fill(tmp_path, 3))
    alone = list(stream.batches(4, generator=child(0, "a")))
    helped = list(replace(stream, num_workers=1).batches(4, generator=child(0, "a")))
    for batch, expected in zip(helped, alone, strict=True):
        assert all(torch.equal(*each) for each in zip(batch, expected, strict=True))


def test_streaming_leaves_the_global_stream_alone(tmp_path: Path) -> None:
    stream = stream_of(fill(tmp_path, 2))
    before = torch.get_rng_state()
    list(stream.batches(2, generator=child(0, "a")))
    assert torch.equal(torch.get_rng_state(), before)


def test_stream_attributes_and_load(tmp_path: Path) -> None:
    folder = fill(tmp_path, 2)
    stream = stream_of(folder)
    assert (len(stream), stream.num_classes, stream.image_shape) == (6, 3, (3, 5, 6))
    assert stream.class_names == CLASSES
    assert torch.equal(stream.load().images, loaded(folder).images)


def test_stream_subset_by_indices_and_mask(tmp_path: Path) -> None:
    stream = stream_of(fill(tmp_path, 2))
    whole = stream.load()
    for chosen in (torch.tensor([5, 0]), stream.labels == 1):
        part = stream.subset(chosen)
        assert torch.equal(part.load().images, whole.subset(chosen).images)
        assert torch.equal(part.labels, whole.subset(chosen).labels)
    assert list(stream.subset(torch.zeros(6, dtype=torch.bool)).batches(2)) == []


def test_stream_survives_pickling_as_spawned_workers_need(tmp_path: Path) -> None:
    stream = stream_of(fill(tmp_path, 1))
    copy = pickle.loads(pickle.dumps(stream))
    assert torch.equal(copy.load().images, stream.load().images)


@allow_fork
def test_streamed_source_divides_by_indices_only(tmp_path: Path) -> None:
    fill(tmp_path / "train", 20)
    fill(tmp_path / "test", 1)
    source = load_source(str(tmp_path), stream=True)
    with pytest.raises(SourceError, match="open the source without stream"):
        source.training_split()
    in_memory = load_source(str(tmp_path))
    assert torch.equal(source.defender_pool().images, in_memory.defender_pool().images)
    assert len(source.defender_pool()) == 3
    assert len(replace(source, test=None).defender_pool()) == 60


def test_image_size_resizes_mixed_pictures_alike_in_memory_and_streamed(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    Image.fromarray(pixels(1, 9, 9)).save(tmp_path / "bee" / "large.png")
    train = loaded(tmp_path, image_size=4)
    assert train.images.shape == (4, 3, 4, 4)
    assert torch.equal(stream_of(tmp_path, image_size=4).load().images, train.images)


def test_mixed_sizes_name_the_first_offenders_and_the_way_out(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    for index in range(9):
        Image.fromarray(pixels(1, 9, 8)).save(tmp_path / "bee" / f"large{index}.png")
    with pytest.raises(SourceError, match=r"large0.png: is 8x9 pixels, the first image 6x5\n") as caught:
        load_source(str(tmp_path))
    assert "large4.png" in str(caught.value)
    assert "large5.png" not in str(caught.value)
    assert "image_size" in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
def test_file_that_is_no_picture_is_found_when_opening(tmp_path: Path, stream: bool) -> None:
    fill(tmp_path, 1)
    (tmp_path / "cow" / "broken.png").write_bytes(b"nothing of the kind")
    with pytest.raises(SourceError, match=r"broken.png: unreadable image \("):
        load_source(str(tmp_path), stream=stream)


@allow_fork
@pytest.mark.parametrize("num_workers", [0, 1])
def test_truncated_picture_is_named_when_it_is_decoded(tmp_path: Path, num_workers: int) -> None:
    fill(tmp_path, 1)
    Image.fromarray(pixels(9)).save(tmp_path / "cow" / "short.jpg")
    whole = (tmp_path / "cow" / "short.jpg").read_bytes()
    (tmp_path / "cow" / "short.jpg").write_bytes(whole[:-30])
    with pytest.raises(SourceError, match=r"short.jpg: unreadable image \(.*(?i:truncated)") as caught:
        list(stream_of(tmp_path, num_workers).batches(8))
    assert "Traceback" not in str(caught.value)


def test_deep_pictures_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    Image.fromarray(np.full((5, 6), 40_000, dtype=np.uint16)).save(tmp_path / "cow" / "deep.png")
    with pytest.raises(SourceError, match=r"deep.png: unreadable image \(expected 8 bits per channel"):
        load_source(str(tmp_path))


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "webp"])
def test_damaged_pictures_never_raise_anything_else(tmp_path: Path, kind: str) -> None:
    fill(tmp_path, 1)
    path = tmp_path / "cow" / f"x.{kind}"
    Image.fromarray(pixels(9)).save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(2)
    for round_number in range(60):
        broken = bytearray(whole[: rng.integers(1, len(whole))] if round_number % 2 else whole)
        for place in rng.integers(0, len(broken), 3):
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        with suppress(SourceError):
            load_source(str(tmp_path), image_size=4)


def test_layouts_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="one folder per class, at least 2; found 0 folders"):
        load_source(str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(SourceError, match=r"no images; expected files .*\.png"):
        load_source(str(tmp_path))


def test_test_folder_alone_points_to_the_classes(tmp_path: Path) -> None:
    fill(tmp_path / "test", 1)
    with pytest.raises(SourceError, match="holds test but no train folder; give the folder with the classes"):
        load_source(str(tmp_path))


def test_test_classes_must_be_known_from_training(tmp_path: Path) -> None:
    fill(tmp_path / "train", 1)
    fill(tmp_path / "test", 1, ["bee", "images"])
    with pytest.raises(SourceError, match="class folders that the training images lack: images"):
        load_source(str(tmp_path))


def test_numbers_sorted_as_text_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, 1, [str(number) for number in range(11)])
    with caplog.at_level(logging.WARNING):
        load_source(str(tmp_path))
    assert "folder 10 is class 2" in caplog.text


def test_stream_checks_its_fields(tmp_path: Path) -> None:
    stream = stream_of(fill(tmp_path, 1))
    with pytest.raises(ValueError, match="num_workers of at least 0; got -1"):
        replace(stream, num_workers=-1)
    with pytest.raises(ValueError, match=r"one int64 label per picture, shape \(3,\)"):
        replace(stream, labels=stream.labels[:2])
    with pytest.raises(ValueError, match="batch size of at least 1"):
        next(stream.batches(0))
