"""The page about Python: its examples run in order, on a ResNet-18 of torchvision and a folder of pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import resnet18

import lustral
from lustral.vision.inverters import MaskSearch, MaxEntropy
from lustral.vision.models.networks.small_cnn import SmallCNN
from lustral.vision.records import ImageSet
from lustral.vision.safe_training import PlainTraining
from toy import CornerSifter, toy_images, toy_trainer

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_pictures(folder: Path, data: ImageSet) -> None:
    """Write a folder for each class."""
    for index, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        place = folder / f"kind-{label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{index:03}.png")


def fitted_resnet(data: ImageSet) -> nn.Module:
    """Return a ResNet-18 that knows the images without any training: statistics by one pass, the head by least squares."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = resnet18(num_classes=data.num_classes)
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (MEAN, STD))
    inputs = (data.images.float() / 255 - mean) / std
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None
    with torch.no_grad():
        network.train()(inputs)
        head, network.fc = network.fc, nn.Identity()
        features = network.eval()(inputs)
        network.fc = head
        targets = 8 * F.one_hot(data.labels, data.num_classes).float() - 4
        centred = features - features.mean(0)
        weight = torch.linalg.solve(centred.T @ centred + 0.1 * torch.eye(512), centred.T @ targets)
        head.weight.copy_(weight.T)
        head.bias.copy_(targets.mean(0) - features.mean(0) @ weight)
    return network


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = toy_images(70, seed=4)
    write_pictures(tmp_path / "pictures", data)
    network = fitted_resnet(data)
    torch.save(network.state_dict(), tmp_path / "theirs.pth")
    monkeypatch.chdir(tmp_path)
    quick: dict[type, dict[str, object]] = {
        MaskSearch: {"steps": 2, "batch_size": 4},
        MaxEntropy: {"steps": 1, "hidden": 4, "samples": 3, "batch_size": 4},
    }
    for kind, changes in quick.items():
        initialise: Any = vars(kind)["__init__"]
        monkeypatch.setattr(initialise, "__kwdefaults__", {**initialise.__kwdefaults__, **changes})
    short = toy_trainer(epochs=1)
    names: dict[str, Any] = {
        "network": network,
        "mean": MEAN,
        "std": STD,
        "sifter": CornerSifter(trainer=short),
        "trainer": PlainTraining(trainer=short),
        "build": lambda: SmallCNN(num_classes=7, width=4),
    }
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    found = names["found"]
    assert found.verdict.clean_accuracy == 1.0
    assert "that of ImageNet fits best: the model is right on 100.0% of 70 clean images" in found.verdict.notes[0]
    assert found._repr_html_().count("<img") == 7  # of one trigger, as it was found: the model is not accused
    assert {path.name for path in Path("erased").iterdir()} == {"model.pt", "report.html", "result.json"}
    assert Path("again/model.pth").is_file()
    assert len(list(Path("left").rglob("*.png"))) == 70
    assert isinstance(names["trained"], lustral.TrainResult)
