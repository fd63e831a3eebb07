"""What a name or a file declares is looked at before there is memory for it."""

import json
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lustral.core.limits import LARGEST_NETWORK
from lustral.vision.models import build_classifier, load_model, look_at, save_model
from lustral.vision.models.build import build_network, outline_network

SHAPE = (3, 32, 32)
NAMES = [
    "small_cnn:width=4",
    "preact_resnet18:width=4",
    "vgg11_bn:width=4",
    "torchvision:squeezenet1_1",
    "torchvision:regnet_y_400mf",  # computes with tensors while it is built
    "timm:test_vit",
    "conditioned:features.4@small_cnn:width=4",
]


@pytest.mark.parametrize("arch", NAMES)
def test_an_outline_has_the_tensors_of_the_network_and_no_memory(arch: str) -> None:
    whole = build_network(arch, num_classes=7, image_shape=(3, 64, 64)).state_dict()
    outline = outline_network(arch, num_classes=7, image_shape=(3, 64, 64)).state_dict()
    assert {k: (t.shape, t.dtype) for k, t in outline.items()} == {k: (t.shape, t.dtype) for k, t in whole.items()}
    assert all(tensor.is_meta for tensor in outline.values())


@pytest.mark.parametrize("arch", NAMES)
def test_an_outline_is_tried_as_the_network_is(arch: str) -> None:
    assert look_at(arch, num_classes=7, image_shape=(3, 64, 64)).training
    if "test_vit" not in arch:  # takes any size
        with pytest.raises(ValueError, match=r"does not take images of shape \(3, 1, 1\)|building .* failed|gives"):
            look_at("small_cnn:width=4", num_classes=7, image_shape=(3, 1, 1))


def test_an_outline_leaves_the_global_stream_alone() -> None:
    before = torch.random.get_rng_state()
    look_at("small_cnn:width=4", num_classes=7, image_shape=SHAPE)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "arch",
    [
        "preact_resnet18:width=1024",
        "timm:vit_giant_patch14_dinov2",
        "conditioned:fc@torchvision:resnet50",
    ],
)
def test_giants_are_refused_before_they_are_built(arch: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for use in (look_at, build_classifier):
        with pytest.raises(ValueError, match=f"would have .* parameters; expected {LARGEST_NETWORK:,} at most"):
            use(arch, num_classes=1009, image_shape=(3, 224, 224))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024  # KiB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 10**9, "image_shape": SHAPE}, "100,000 classes at most"),
        ({"num_classes": 4, "image_shape": (3, 10**5, 10**5)}, "16,777,216 numbers at most"),
        ({"num_classes": 4, "image_shape": (10**8, 8, 8)}, "16,777,216 numbers at most"),
    ],
)
def test_absurd_requests_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_classifier("small_cnn:width=4", **arguments)  # type: ignore[arg-type]


def rewritten(path: Path, change: dict[str, str], **tensors: torch.Tensor) -> None:
    """Write a small model and change what its file says, past ``save_model``."""
    model = build_classifier("small_cnn:width=4", num_classes=5, image_shape=SHAPE, mean=[0.5] * 3, std=[0.5] * 3)
    save_model(path, model, arch="small_cnn:width=4", image_shape=SHAPE)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    metadata = json.loads(content[8 : 8 + length])["__metadata__"] | change
    safetensors.torch.save_file({**model.network.state_dict(), **tensors}, path, metadata)


DECLARED = [
    ({"arch": "small_cnn:width=1024"}, "do not fit small_cnn:width=1024"),
    ({"arch": "preact_resnet18:width=1024"}, "do not fit preact_resnet18"),
    ({"arch": "torchvision:vit_h_14", "image_shape": "3,28,28"}, "do not fit torchvision:vit_h_14"),
    ({"arch": "timm:vit_7b_patch16_dinov3"}, "do not fit timm:vit_7b_patch16_dinov3"),
    ({"arch": "conditioned:linear@small_cnn:width=1024"}, "do not fit conditioned"),
    ({"num_classes": "1000000000"}, "damaged metadata: 1000000000 classes"),
    ({"num_classes": "99999"}, "the weights have 5 classes; expected 99999"),
    ({"num_classes": "-5"}, "damaged metadata: -5 classes"),
    ({"image_shape": "3,4096,4096"}, "damaged metadata: image shape"),
    ({"image_shape": "4096,64,64"}, "do not fit small_cnn"),
    ({"image_shape": "1,4096,4096"}, "do not fit small_cnn"),
]


@pytest.mark.parametrize(("change", "message"), DECLARED)
def test_declared_sizes_are_compared_with_the_file_first(tmp_path: Path, change: dict[str, str], message: str) -> None:
    rewritten(tmp_path / "a.safetensors", change)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "a.safetensors")


def test_none_of_them_takes_memory(tmp_path: Path) -> None:
    """In a process of its own, whose address space ends a little above what it needs for an honest file."""
    rewritten(tmp_path / "honest.safetensors", {})
    paths = [tmp_path / f"{number}.safetensors" for number in range(len(DECLARED))]
    for path, (change, _) in zip(paths, DECLARED, strict=True):
        rewritten(path, change)
    script = """
import resource, sys
import timm, torchvision.models
from lustral.vision.models import load_model
load_model(sys.argv[1])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    try:
        load_model(path)
    except ValueError:
        continue
    raise SystemExit(f"{path} was opened")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
"""
    words = [sys.executable, "-c", script, str(tmp_path / "honest.safetensors"), *map(str, paths)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300 * 1024  # KiB


def test_a_large_image_is_tried_without_numbers(tmp_path: Path) -> None:
    rewritten(tmp_path / "a.safetensors", {"image_shape": "3,2048,2048"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load_model(tmp_path / "a.safetensors").image_shape == (3, 2048, 2048)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024


def test_a_table_of_nothing_is_no_head(tmp_path: Path) -> None:
    """A head of 10^7 rows without columns takes no byte in a file; a network with that head would."""
    rewritten(tmp_path / "a.safetensors", {"num_classes": "90000"}, **{"linear.weight": torch.zeros(90_000, 0)})
    with pytest.raises(ValueError, match=r"do not fit|classes|empty|no numbers"):
        load_model(tmp_path / "a.safetensors")
