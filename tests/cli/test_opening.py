"""A model and the images for it: sizes and channels follow the command line and the network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lustral.cli import main
from lustral.cli.arguments import FileFormat, Scan, parse
from lustral.cli.opening import Opened, open_suspect

NETWORKS = {
    "grey": "nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, k))",
    "flat": "nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, k))",
    "rgb": "nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, k))",
    "rgba": "nn.Sequential(nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, k))",
    "wide": "nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 48, k))",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An image folder, the same grey images as an archive, and networks that take other images each."""
    grey = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    for index, image in enumerate(grey):
        folder = tmp_path / "pictures" / str(index % 3)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index:02}.png")
    np.savez(tmp_path / "grey.npz", images=grey, labels=np.arange(12) % 3)
    lines = [
        f"def {name}(k=3, num_classes=None):\n    k = num_classes or k\n    return {text}"
        for name, text in NETWORKS.items()
    ]
    (tmp_path / "net.py").write_text("from torch import nn\n" + "\n".join(lines))
    names: dict[str, object] = {"nn": nn, "k": 3}
    for name, text in NETWORKS.items():
        network = eval(text, names)  # our own text above
        torch.save(network.state_dict(), tmp_path / f"{name}.pth")
    return tmp_path


def opened(place: Path, network: str, data: str, *more: str) -> Opened:
    arch = f"{place / 'net.py'}:{network}"
    line = ["scan", str(place / f"{network}.pth"), "--arch", arch, "--data", str(place / data), *more]
    command = parse(line)
    assert isinstance(command, Scan)
    assert command.suspect.format == FileFormat(arch=arch)
    return open_suspect(command.suspect, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize("data", ["pictures", "grey.npz"])
@pytest.mark.parametrize(("network", "channels"), [("grey", 1), ("flat", 1), ("rgb", 3)])
def test_channels_follow_the_network(
    place: Path, network: str, channels: int, data: str, caplog: pytest.LogCaptureFixture
) -> None:
    suspect = opened(place, network, data)
    assert suspect.view.clean.image_shape == (channels, 28, 28)
    assert suspect.source.train.image_shape == (channels, 28, 28)
    images = next(suspect.view.clean.batches(4)).inputs
    assert suspect.view.model(images).shape == (4, 3)
    assert caplog.text.count("no mean and std are known") == 1
    if channels == 3:
        assert torch.equal(images[:, 0], images[:, 2])


def test_a_network_of_four_channels_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match=r"takes images of 4 channels; expected 1 \(grey\) or 3 \(RGB\)"):
        opened(place, "rgba", "pictures")


def test_a_network_that_fits_neither_is_told_as_before(place: Path) -> None:
    with pytest.raises(ValueError, match=r"\(3, 20, 20\)"):
        opened(place, "wide", "pictures", "--image-size", "20")


def test_height_and_width_and_resize_then_crop(place: Path) -> None:
    assert opened(place, "wide", "pictures", "--image-size", "32", "48").view.clean.image_shape == (3, 32, 48)
    cut = opened(place, "rgb", "pictures", "--image-size", "24", "--resize", "28").view.clean
    whole = opened(place, "rgb", "pictures").view.clean
    assert torch.equal(cut.images, whole.images[:, :, 2:26, 2:26])


def test_victims_of_pictures_of_many_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, victim = tmp_path / "data", tmp_path / "victim"
    rng = np.random.default_rng(0)
    for index in range(40):
        folder = data / ("train" if index < 30 else "test") / str(index % 3)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)).save(folder / f"{index:02}.png")
    sizes = ["--image-size", "16", "24", "--resize", "26"]
    line = [
        "implant",
        "badnets",
        "--data",
        str(data),
        "--out",
        str(victim),
        "--arch",
        "small_cnn:width=2",
        "--epochs",
        "1",
    ]
    assert main([*line, "--poison-rate", "0.2", *sizes]) == 0
    assert main(["evaluate", str(victim), "--data", str(data), *sizes]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(victim), "--data", str(data), "--image-size", "16"]) == 2
    assert "with the same --image-size and --resize" in capsys.readouterr().err
