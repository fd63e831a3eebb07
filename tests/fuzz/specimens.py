"""The valid files that are damaged. Each opens as it is, which the worker checks before it damages any."""

from __future__ import annotations

import importlib.util
import io
import json
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from bench.plans import quick_grid
from bench.synthetic import synthetic_store
from fuzz.mutators import planted_picture
from fuzz.trees import Tree, read_tree
from lustral.bench.runner import run_local
from lustral.store.store import Store
from lustral.vision.attacks import InputAware, Ssba, WaNet
from lustral.vision.attacks.steganography import EncoderRecipe
from lustral.vision.interfaces import Attack
from lustral.vision.models import Classifier, build_classifier, save_model
from lustral.vision.victims import implant, save_victim
from saved_results import erased, scanned
from toy import toy_images, toy_trainer

SHAPE = (3, 12, 12)
ARCH = "small_cnn:width=2"


def _model(arch: str) -> Classifier:
    torch.manual_seed(0)
    return build_classifier(arch, num_classes=4, image_shape=SHAPE)


def _state(arch: str = ARCH) -> dict[str, Tensor]:
    return dict(_model(arch).network.state_dict())


def safetensors_files() -> list[Tree]:
    """Files of ours, one of an architecture with a base, and one of bare weights."""
    found: list[Tree] = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in (ARCH, "resnet20", "conditioned:features.0@small_cnn:width=2"):
            path = Path(folder, "model.safetensors")
            save_model(path, _model(arch), arch=arch, image_shape=SHAPE)
            found.append({path.name: path.read_bytes()})
    return [*found, {"model.safetensors": save(_state(), {"format": "pt"})}]


def _checkpoints() -> list[Any]:
    """What people save: weights, a training run, averaged weights beside them, a pickled note."""
    state = _state()
    network = _model(ARCH).network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    sum(parameter.sum() for parameter in network.parameters()).backward()
    optimizer.step()
    return [
        state,
        {
            "epoch": 3,
            "state_dict": {f"module.{key}": value for key, value in state.items()},
            "optimizer": optimizer.state_dict(),
            "best": np.float64(0.5),
            "losses": np.arange(6.0).reshape(2, 3),
            "args": Namespace(lr=0.1, name="x", nested={"a": [1, (2, 3)]}),
        },
        {
            "model": state,
            "ema": {key: value.clone() for key, value in state.items()},
            "half": next(iter(state.values())).half(),
        },
    ]


def _saved(content: Any, **settings: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **settings)
    return file.getvalue()


def torch_files() -> list[Tree]:
    """Archives, under the endings that they have."""
    names = ("model.pt", "checkpoint.pth.tar", "pytorch_model.bin", "last.ckpt")
    saved = [_saved(content) for content in _checkpoints()]
    saved.append(_saved(_state(), pickle_protocol=4))
    return [{name: content} for name, content in zip(names, saved, strict=True)]


def legacy_files() -> list[Tree]:
    """Files as torch wrote them before version 1.6."""
    saved = [_saved(content, _use_new_zipfile_serialization=False) for content in _checkpoints()]
    return [{name: content} for name, content in zip(("model.pth", "model.tar", "model.pt"), saved, strict=True)]


def hub_folders() -> list[Tree]:
    """Folders of model hubs: timm's form in one file and in three, and the form of transformers."""
    if importlib.util.find_spec("transformers"):  # importing it loads libraries, which is no file's doing
        importlib.import_module("transformers.models.vit.modeling_vit")
    torch.manual_seed(0)
    state = timm.create_model("test_resnet", num_classes=4).state_dict()
    recipe = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "fixed_input_size": False}
    config = {
        "architecture": "test_resnet",
        "num_classes": 4,
        "pretrained_cfg": recipe,
        "label_names": ["ant", "bee", "cat", "dog"],
        "model_args": {"in_chans": 3},
    }
    base: dict[str, bytes] = {"config.json": json.dumps(config).encode(), "modeling.py": b"open('ran', 'w').close()\n"}
    parts: list[dict[str, Tensor]] = [{}, {}, {}]
    for number, (key, value) in enumerate(state.items()):
        parts[number % 3][key] = value
    names = [f"model-{number}-of-3.safetensors" for number in (1, 2, 3)]
    index = {"metadata": {}, "weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part}}
    old_index = {"weight_map": dict.fromkeys(state, "part.bin")}
    other = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "auto_map": {"AutoModelForImageClassification": "modeling.Net"},
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 12,
        "patch_size": 4,
        "id2label": {str(label): f"n{label}" for label in range(4)},
    }
    preprocessor = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": {"height": 12, "width": 12}}
    return [
        {**base, "model.safetensors": save(state)},
        {**base, "pytorch_model.bin": _saved(state)},
        {
            **base,
            "model.safetensors.index.json": json.dumps(index).encode(),
            **{name: save(part) for name, part in zip(names, parts, strict=True)},
        },
        {**base, "pytorch_model.bin.index.json": json.dumps(old_index).encode(), "part.bin": _saved(state)},
        {
            **base,
            "config.json": json.dumps(other).encode(),
            "preprocessor_config.json": json.dumps(preprocessor).encode(),
            "model.safetensors": save({"vit.weight": torch.zeros(3)}),
        },
    ]


# Data sets


def _pixels() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def npz_files() -> list[Tree]:
    """Arrays as they are, and packed."""
    found: list[Tree] = []
    for pack in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        arrays = {"train_images": _pixels(), "train_labels": np.arange(6) % 2, "test_images": _pixels()[:4]}
        names = np.array(["a", "b"])
        pack(file, **arrays, test_labels=np.arange(4) % 2, train_track=np.arange(6), class_names=names)  # type: ignore[operator]
        found.append({"x.npz": file.getvalue()})
    return found


def _picture(form: str, pixels: np.ndarray[Any, Any]) -> bytes:
    file, picture = io.BytesIO(), Image.fromarray(pixels)
    picture.convert({"pgm": "L", "pbm": "1"}.get(form, "RGB")).save(
        file, {"jpg": "JPEG", "pgm": "PPM", "pbm": "PPM", "tif": "TIFF"}.get(form, form.upper())
    )
    return file.getvalue()


def _written(table: pa.Table, compression: str = "none") -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, compression=compression)
    return file.getvalue()


def parquet_files() -> list[Tree]:
    """Tables of pictures: plain and packed, and with bare bytes."""
    cells = [{"bytes": _picture("png", pixels), "path": "x"} for pixels in _pixels()]
    labels = np.arange(6) % 2
    table = pa.table({"image": cells, "label": labels, "split": ["train"] * 5 + ["test"]})
    bare = pa.table({"image": [cell["bytes"] for cell in cells], "label": labels})
    files = (_written(table), _written(table, "zstd"), _written(bare, "snappy"))
    return [{"x.parquet": content} for content in files]


def odd_table(draw: Any) -> bytes:
    """Return a table whose columns are other than they should be."""
    pictures: list[Any] = [_picture("png", pixels) for pixels in _pixels()]
    columns: list[Any] = [
        pictures,
        [
            {"bytes": draw.choice((picture, planted_picture(draw), None, b"")), "path": "/etc/passwd"}
            for picture in pictures
        ],
        [
            {"bytes": None, "path": path}
            for path in ("/dev/zero", "../x", "http://127.0.0.1:9/x", "", "x", "/etc/passwd")
        ],
        [planted_picture(draw) for _ in pictures],
        [draw.choice((None, 0, -1, 1, 10**9, 2**62)) for _ in pictures],
        pa.array([draw.choice((0, 1, 2**63, 2**64 - 1)) for _ in pictures], pa.uint64()),
        [draw.choice((0.0, 1.0, float("nan"), float("inf"), 1e300)) for _ in pictures],
        [draw.choice(("train", "test", "\u202e", "x" * 5000, "", "[/red]")) for _ in pictures],
        [[0]] * 6,
        [{"a": {"b": [1]}}] * 6,
        pa.array([None] * 6),
        pa.array(["train"] * 6).dictionary_encode(),
        pa.array([b"train"] * 6, pa.large_binary()),
        [True, False] * 3,
        pa.array([1, 2, 3, 4, 5, 6], pa.timestamp("ns")),
        [0, 1] * 3,
        [0, 1] * 3,
    ]
    table: dict[str, Any] = {"image": columns[0], "label": [0, 1] * 3, "split": ["train"] * 4 + ["test"] * 2}
    for _ in range(draw.choice((0, 1, 1, 2, 3))):
        name = draw.choice([*table])
        table[name] = draw.choice(columns[:4] if name == "image" and draw.random() < 0.6 else columns)
        if draw.random() < 0.1:
            table[draw.choice(("img", "", "\0", "Image", "x" * 5000))] = table.pop(name)
    return _written(
        pa.table(table).slice(0, draw.choice((0, 1, 6, 6, 6))), draw.choice(("none", "zstd", "snappy", "gzip"))
    )


def picture_folders(form: str) -> Callable[[], list[Tree]]:
    """Return what makes a folder of two classes, one picture of which is in a format."""

    def make() -> list[Tree]:
        plain = _picture("png", _pixels()[1])
        return [{"a/y.png": plain, "b/y.png": plain, f"b/x.{form}": _picture(form, _pixels()[0])}]

    return make


def image_folders() -> list[Tree]:
    """A flat folder and one with a test part."""
    pictures = [_picture("png", pixels) for pixels in _pixels()]
    flat = {f"{'ab'[number % 2]}/{number}.png": picture for number, picture in enumerate(pictures)}
    return [flat, {**{f"train/{name}": content for name, content in flat.items()}, "test/a/0.png": pictures[0]}]


CLASSES = ("ant", "bee", "tabby cat", "ox")


def class_files() -> list[Tree]:
    """Names of classes: a line each, a list, and by number."""
    numbered = {str(number): name for number, name in enumerate(CLASSES)}
    return [
        {"names.txt": "\n".join(reversed(CLASSES)).encode()},
        {"names.json": json.dumps(CLASSES).encode()},
        {"config.json": json.dumps({"id2label": numbered, "model_type": "vit"}).encode()},
    ]


# Victims, plans, stores


def victim_folders() -> list[Tree]:
    """Victims with a learnt trigger, with a computed one, with an encoder, and without an attack."""
    attacks: list[Attack | None] = [
        InputAware(width=4, steps=2, mask_epochs=1),
        WaNet(),
        Ssba(encoder=EncoderRecipe(bits=4, width=2, steps=2, images=100), least_bit_accuracy=0, least_psnr=0),
        None,
    ]
    found: list[Tree] = []
    for attack in attacks:
        train, test, trainer = toy_images(200, seed=0), toy_images(40, seed=1), toy_trainer(epochs=1)
        victim = implant(attack, train, test, arch=ARCH, trainer=trainer, seed=0, data_name="toy")
        with tempfile.TemporaryDirectory() as folder:
            save_victim(Path(folder, "victim"), victim, test)
            found.append(read_tree(Path(folder, "victim")))
    return found


SMALL_PLAN = b"""# as plans are
name = "p"
description = "x"
seeds = [0, 1]
defence_seeds = [0]
poison_rates = [0.1]
clean = [60, 0.03]
trainer = { epochs = 2 }
[[data]]
name = "digits"
arch = ["small_cnn:width=2"]
[[attacks]]
method = "badnets"
settings = { size = 2 }
grid = { margin = [0, 1] }
target_labels = [3, 5]
[[attacks]]
method = "tact"
data = ["digits"]
[[attacks]]
method = "none"
[[defences]]
method = "fine_tuning"
label = "short"
settings = { least_steps = 4, trainer = { epochs = 1 } }
[[defences]]
method = "bn_refresh"
clean = [20]
[[exclude]]
reason = "too slow"
defence = "bn_refresh"
seed = 1
[run]
threads = 1
"""


def result_files() -> list[Tree]:
    """Return saved results of a scan and an erasure."""
    return [{"result.json": json.dumps(record).encode()} for record in (scanned(), erased())]


def plan_files() -> list[Tree]:
    """A plan with every kind of table, and those of the repository that need no data."""
    plans = Path(__file__).parents[2] / "benchmarks" / "plans"
    return [
        {"plan.toml": SMALL_PLAN},
        *({"plan.toml": (plans / name).read_bytes()} for name in ("toy.toml", "zoo_toy.toml")),
    ]


def stores() -> list[Tree]:
    """A store of a few made-up records with their files, and one of a victim and a purified model that can be measured again."""
    quick = {
        "seeds": [0],
        "data": [{"name": "digits", "arch": [ARCH], "trainer": {"epochs": 1}}],
        "attacks": [{"method": "badnets"}],
        "defences": [{"method": "bn_refresh"}],
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "store")
        synthetic_store(root, results=4, attacks=1, defences=2, seeds=1, data=("digits",), failures=1, details=True)
        real = Store(str(Path(folder, "real"))).open(create=True)
        run_local(quick_grid(**quick), real, device=torch.device("cpu"))
        return [read_tree(root), read_tree(Path(real.root))]
