import hashlib
import importlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import lustral.vision.sources
from lustral.vision.records import ImageSet
from lustral.vision.sources import DataSource, SourceError, load_source, source_names

needs_data = pytest.mark.skipif(
    "LUSTRAL_DATA" not in os.environ, reason="set LUSTRAL_DATA to the folder with cifar10.npz and the other sets"
)


def sets_of(source: DataSource) -> tuple[ImageSet, ImageSet]:
    assert isinstance(source.train, ImageSet)
    assert source.test is not None
    return source.train, source.test


def pixel_digest(data: ImageSet) -> str:
    """SHA-256 of the pixels as (N, H, W, C)."""
    return hashlib.sha256(data.images.permute(0, 2, 3, 1).contiguous().numpy().tobytes()).hexdigest()


def test_exported_names_are_sorted_and_importable() -> None:
    assert lustral.vision.sources.__all__ == sorted(lustral.vision.sources.__all__)
    module = importlib.import_module("lustral.vision.sources")
    assert all(hasattr(module, name) for name in lustral.vision.sources.__all__)


def test_digits_have_the_known_sizes() -> None:
    train, test = sets_of(load_source("digits"))
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape[1:] == test.images.shape[1:] == (3, 32, 32)
    assert train.num_classes == 10
    assert torch.cat([train.labels, test.labels]).bincount().tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip
    assert all(34 <= count <= 37 for count in test.labels.bincount().tolist())


def test_digits_are_grey_deterministic_and_use_the_full_range() -> None:
    source = load_source("digits")
    train, test = sets_of(source)
    assert torch.equal(train.images[:, 0], train.images[:, 2])
    assert (int(train.images.min()), int(train.images.max())) == (0, 255)
    assert torch.equal(sets_of(load_source("digits"))[1].images, test.images)
    assert (source.name, source.flip, source.reserve_fraction) == ("digits", False, 0.2)
    attacker, reserve = source.training_split()
    assert (len(attacker), len(reserve)) == (1150, 287)


def test_digits_at_their_own_size_are_the_original_pixels() -> None:
    from sklearn.datasets import load_digits

    train, test = sets_of(load_source("digits", image_size=8))
    grey = torch.cat([train.images, test.images])[:, 0].double() * 16 / 255
    assert {tuple(row) for row in grey.round().long().flatten(1).tolist()} == {
        tuple(row) for row in load_digits().data.astype(int).tolist()
    }


def test_names_are_sorted() -> None:
    assert source_names() == ("cifar10", "digits", "gtsrb", "mnist", "tinyimagenet10")


def test_named_file_is_looked_up_under_root(tmp_path: Path) -> None:
    images = np.full((20, 28, 28), 9, dtype=np.uint8)
    labels = np.arange(20) % 10
    np.savez(tmp_path / "mnist.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    source = load_source("mnist", root=tmp_path)
    train, test = sets_of(source)
    assert train.images.shape == test.images.shape == (20, 3, 32, 32)
    assert bool((train.images[0, 1, 2:-2, 2:-2] == 9).all())
    assert int(train.images[0].sum()) == 3 * 28 * 28 * 9  # the margin is black
    assert (source.name, source.flip) == ("mnist", False)
    assert load_source("mnist", root=tmp_path, image_size=28).train.image_shape == (3, 28, 28)


def test_named_file_is_looked_up_under_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUSTRAL_DATA", str(tmp_path))
    with pytest.raises(SourceError, match=r"gtsrb32\.npz does not exist") as caught:
        load_source("gtsrb")
    assert str(tmp_path) in str(caught.value)
    assert "LUSTRAL_DATA" in str(caught.value)
    assert "--data PATH" in str(caught.value)


@pytest.mark.parametrize("spec", ["cifar10", "torchvision:CIFAR10"])
def test_missing_data_folder_says_what_to_set(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUSTRAL_DATA", raising=False)
    with pytest.raises(SourceError, match=r"set the environment variable LUSTRAL_DATA to the folder .*--data PATH"):
        load_source(spec)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(SourceError, match=r"no data set 'cifar-10'.*did you mean 'cifar10'\?"):
        load_source("cifar-10")
    with pytest.raises(SourceError, match="known names: cifar10, digits"):
        load_source("/no/such/place")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"")
    with pytest.raises(SourceError, match=r"expected an \.npz, a \.parquet or a \.csv file; got \.zip"):
        load_source(str(tmp_path / "images.zip"))


def test_only_folders_stream() -> None:
    with pytest.raises(SourceError, match="only an image folder or a label table can be streamed"):
        load_source("digits", stream=True)


def test_image_size_must_be_positive() -> None:
    with pytest.raises(SourceError, match=r"image_size of at least 1 pixel a side.* got 0 x 0"):
        load_source("digits", image_size=0)


@needs_data
def test_cifar10_is_bit_exact() -> None:
    source = load_source("cifar10")
    train, test = sets_of(source)
    assert pixel_digest(train) == "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a"
    assert pixel_digest(test) == "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04"
    assert train.class_names[6] == "frog"
    assert train.labels[:5].tolist() == [6, 9, 9, 4, 1]
    attacker, reserve = source.split_indices()
    assert train.labels[reserve].bincount().tolist() == [250] * 10
    assert len(attacker) == 47_500


@needs_data
def test_gtsrb_is_exact_and_its_reserve_keeps_tracks_whole() -> None:
    source = load_source("gtsrb")
    train, test = sets_of(source)
    assert pixel_digest(train) == "60158122812c96b5696c59e8daaa06f54720236997078dd99e3e37d8dd4faabd"
    assert pixel_digest(test) == "b7134a5523f72e29f8eaaf17eb0691ac90dbf75d8117920e6062767ca85a1db8"
    assert source.groups is not None
    attacker, reserve = source.split_indices()
    assert not set(source.groups[attacker].tolist()) & set(source.groups[reserve].tolist())
    assert int(train.labels[reserve].bincount(minlength=43).min()) >= 14  # at least one track of every class
    assert len(reserve) / len(train) == pytest.approx(0.05, abs=0.01)
    assert not source.flip


@needs_data
def test_mnist_and_tiny_imagenet_have_their_published_sizes() -> None:
    train, test = sets_of(load_source("mnist"))
    assert (len(train), len(test), train.image_shape) == (60_000, 10_000, (3, 32, 32))
    tiny = load_source("tinyimagenet10")
    train, test = sets_of(tiny)
    assert (len(train), len(test), train.image_shape) == (5_000, 500, (3, 64, 64))
    assert train.class_names[0] == "goldfish"
    assert train.labels.bincount().tolist() == [500] * 10
    assert tiny.flip
