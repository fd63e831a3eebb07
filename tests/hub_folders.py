"""Model folders as hubs have them, of tiny networks that know some pictures without any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lustral.vision.records import ImageSet

SIDE = 32  # pixels that the networks take
NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


def write_pictures(folder: Path, data: ImageSet) -> None:
    """Write a folder for each class, with pictures of the size of the networks."""
    images = F.interpolate(data.images.float(), size=(SIDE, SIDE), mode="nearest").byte()
    for index, (image, label) in enumerate(zip(images, data.labels.tolist(), strict=True)):
        place = folder / NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(place / f"{index:03}.png")


def inputs_of(data: ImageSet) -> Tensor:
    """Return the pictures as a network gets them, normalised with 0.5."""
    return F.interpolate(data.images.float(), size=(SIDE, SIDE), mode="nearest") / 255 * 2 - 1


def fit_head(head: nn.Linear, features: Tensor, labels: Tensor) -> None:
    """Set a last layer by least squares, so that it is right on its images."""
    targets = 8 * F.one_hot(labels, head.out_features).double() - 4
    mean, spread = features.mean(0), features.std(0) + 1e-6
    scaled = ((features - mean) / spread).double()
    weight = scaled.T @ torch.linalg.solve(scaled @ scaled.T + 0.01 * torch.eye(len(scaled)), targets - targets.mean(0))
    with torch.no_grad():
        head.weight.copy_(weight.T / spread)
        head.bias.copy_(targets.mean(0) - head.weight.double() @ mean.double())


def write_timm(folder: Path, data: ImageSet, *, shards: int = 1) -> Path:
    """Write timm's form, with a model card and pretty much what else stands in such folders."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("test_resnet", num_classes=len(NAMES))
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None
    with torch.no_grad():
        network.train()(inputs_of(data))
        features = network.eval().forward_head(network.forward_features(inputs_of(data)), pre_logits=True)
    fit_head(network.get_classifier(), features, data.labels)
    folder.mkdir()
    recipe = {"input_size": [3, SIDE, SIDE], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": "test_resnet", "num_classes": 7, "label_names": NAMES, "pretrained_cfg": recipe}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    if shards == 1:
        safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = [f"model-{part + 1:05}-of-{shards:05}.safetensors" for part in range(shards)]
    where = {key: names[number % shards] for number, key in enumerate(state)}
    for name in names:
        part = {key: value for key, value in state.items() if where[key] == name}
        safetensors.torch.save_file(part, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def write_vit(folder: Path, data: ImageSet) -> Path:
    """Write a vision transformer as the package transformers does."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = ViTConfig(
        **sizes,
        intermediate_size=96,
        image_size=SIDE,
        patch_size=8,
        id2label=dict(enumerate(NAMES)),
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ViTForImageClassification(config).eval()
    with torch.no_grad():
        features = network.vit(pixel_values=inputs_of(data)).last_hidden_state[:, 0]
    fit_head(network.classifier, features, data.labels)
    network.save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)  # mean and std are 0.5
    return folder
