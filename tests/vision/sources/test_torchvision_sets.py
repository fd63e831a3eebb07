from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from lustral.vision.records import ImageSet
from lustral.vision.sources import SourceError, load_source


class StandIn(torchvision.datasets.VisionDataset):  # type: ignore[misc]
    """Twelve grey squares for training and six for testing; knows its classes."""

    classes: tuple[str, ...] = ("dark", "mid", "bright")

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        super().__init__(root)
        assert download
        Path(root, "downloaded").touch()
        self.count = 12 if train else 6

    def __len__(self) -> int:
        return self.count

    def size(self, index: int) -> tuple[int, int]:
        return 4, 4

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        return Image.fromarray(np.full(self.size(index), 10 * index, dtype=np.uint8)), index % 3


class SplitStandIn(StandIn):
    """Chooses by ``split`` and names no classes."""

    classes = ()

    def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"Unknown value {split!r} for argument split")
        super().__init__(root, split == "train", download)


class Mixed(StandIn):
    def size(self, index: int) -> tuple[int, int]:
        return (4, 4) if index else (6, 5)


class TracksStandIn(Mixed):
    """Has file names as GTSRB has them: TRACK_FRAME.ppm, three frames a track."""

    @property
    def _samples(self) -> list[tuple[str, int]]:
        return [(f"/somewhere/{index // 3:05}_{index % 3:05}.ppm", index % 3) for index in range(len(self))]


class Boxes(StandIn):
    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        return super().__getitem__(index)[0], {"boxes": []}


class Offline(StandIn):
    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        raise OSError("no route to host")


@pytest.mark.parametrize(("make", "names"), [(StandIn, ("dark", "mid", "bright")), (SplitStandIn, ())])
def test_both_splits_are_read(
    make: type[Any], names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", make)
    source = load_source("torchvision:CIFAR10", root=tmp_path)
    assert isinstance(source.train, ImageSet)
    assert source.test is not None
    assert source.train.images.shape == (12, 3, 4, 4)
    assert source.train.images[:, 0, 0, 0].tolist() == [10 * index for index in range(12)]
    assert source.test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert source.train.class_names == names
    assert source.train.num_classes == 3
    assert (source.name, source.flip) == ("torchvision:CIFAR10", True)
    assert (tmp_path / "downloaded").exists()


def test_digits_and_signs_are_not_flipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "SVHN", SplitStandIn)
    assert not load_source("torchvision:SVHN", root=tmp_path).flip


def test_mixed_sizes_need_image_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "Food101", Mixed)
    with pytest.raises(SourceError, match=r"image 1: is 4x4 pixels, the first image 5x6"):
        load_source("torchvision:Food101", root=tmp_path)
    assert load_source("torchvision:Food101", root=tmp_path, image_size=8).train.image_shape == (3, 8, 8)


def test_gtsrb_groups_are_its_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "GTSRB", TracksStandIn)
    source = load_source("torchvision:GTSRB", root=tmp_path, image_size=4)
    expected = torch.arange(12) % 3 * 1000 + torch.arange(12) // 3
    assert source.groups is not None
    assert torch.equal(source.groups, expected)


def test_sets_without_labels_and_failed_downloads_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Boxes)
    with pytest.raises(SourceError, match=r"expected one integer label per image; got \{'boxes'"):
        load_source("torchvision:CIFAR10", root=tmp_path)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Offline)
    with pytest.raises(SourceError, match=r"torchvision cannot open it in .* \(no route to host\)"):
        load_source("torchvision:CIFAR10", root=tmp_path)


def test_unknown_set_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"'cifar10' with a train and a test split; did you mean 'CIFAR10'\?"):
        load_source("torchvision:cifar10", root=tmp_path)
    with pytest.raises(SourceError, match=r"it has .*CIFAR10"):
        load_source("torchvision:", root=tmp_path)
