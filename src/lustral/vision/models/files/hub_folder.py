"""Model folders as model hubs have them: config.json beside the weights, in one file or several.

Two forms are read: timm's (``{"architecture": "resnet18", "pretrained_cfg": {...}}``) and that of the package transformers
(``{"model_type": "vit", ...}``), which has to be installed for its networks. Only numbers and names come from such a folder.
``auto_map`` and files of Python code are never looked at, and a network is one of ``_CLASSIFIERS`` or of timm's own list.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lustral.core.files import open_regular
from lustral.vision.models.architecture import Architecture, ArchitectureError, Timm, Transformers, parse_architecture
from lustral.vision.models.files.contents import NO_ONNX
from lustral.vision.models.files.state_dicts import ModelFileError, listing

CONFIG = "config.json"
_PREPROCESSOR = "preprocessor_config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in this order, as their own programs do
_INDEX = ".index.json"  # of weights in several files
MOST_JSON = 2**22  # bytes of a JSON file; ImageNet-21k's names take 2**20
MOST_SHARDS = 256
_LONGEST_NAME = 1000  # characters of a class name
_LARGEST_SIZE = 2**16  # of a layer; what the file does not hold is refused before it is built
_MOST_LAYERS = 512
_DEEPEST_LIST = 3  # lists inside each other in a setting
_LARGEST_SIDE = 4096  # pixels
_TIMM_SIZES = ("img_size", "in_chans", "num_classes")  # arguments that are known otherwise
_CLASSIFIERS = {  # model_type: the beginning of the names of its two classes
    "beit": "Beit",
    "bit": "Bit",
    "convnext": "ConvNext",
    "convnextv2": "ConvNextV2",
    "cvt": "Cvt",
    "data2vec-vision": "Data2VecVision",
    "deit": "DeiT",
    "dinov2": "Dinov2",
    "efficientnet": "EfficientNet",
    "focalnet": "FocalNet",
    "levit": "Levit",
    "mobilenet_v1": "MobileNetV1",
    "mobilenet_v2": "MobileNetV2",
    "mobilevit": "MobileViT",
    "mobilevitv2": "MobileViTV2",
    "poolformer": "PoolFormer",
    "pvt": "Pvt",
    "pvt_v2": "PvtV2",
    "regnet": "RegNet",
    "resnet": "ResNet",
    "segformer": "Segformer",
    "swiftformer": "SwiftFormer",
    "swin": "Swin",
    "swinv2": "Swinv2",
    "vit": "ViT",
    "vit_msn": "ViTMSN",
}


@dataclass(frozen=True, kw_only=True)
class HubFolder:
    """What a model folder says about its model; None where it is silent.

    Attributes:
        files: the files of its weights.
        shards: the file of each tensor, by the tensor's name; None: there is one file.
        index: the file that says which file has which tensor; None: there is one file.
        unread: other weights in the folder, which are not looked at.
        arch: the architecture; None: only its other facts are of use.
        why_no_arch: the reason for that.
        num_classes: number of classes K.
        image_shape: (C, H, W) of its images, pixels.
        is_fixed: whether the network takes images of that size only.
        mean: per channel, on the [0, 1] scale.
        std: per channel, on the [0, 1] scale.
        pooling: how the network pools its features, as timm calls it.
        class_names: in the order of the logits.
    """

    files: tuple[Path, ...]
    shards: Mapping[str, Path] | None
    index: Path | None
    unread: tuple[Path, ...]
    arch: Architecture | None
    why_no_arch: str
    num_classes: int | None
    image_shape: tuple[int, int, int] | None
    is_fixed: bool
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    pooling: str | None
    class_names: tuple[str, ...] | None


def is_hub_folder(path: Path) -> bool:
    """Tell whether a path is such a folder."""
    return path.is_dir() and (path / CONFIG).is_file()


def image_size_of(path: Path) -> tuple[int, int] | None:
    """Return (height, width) of the images that a folder's model takes; None for what is no such folder, or does not say."""
    shape = read_hub_folder(path).image_shape if is_hub_folder(path) else None
    return None if shape is None else shape[1:]


def read_hub_folder(folder: Path) -> HubFolder:
    """Read what a folder says about its model, without running anything in it.

    Raises:
        ModelFileError: a file is missing, damaged, too long, or says what cannot be.
        OSError: a file cannot be read.
    """
    config = _read_json(folder / CONFIG)
    preprocessor = _read_json(folder / _PREPROCESSOR) if (folder / _PREPROCESSOR).exists() else {}
    files, shards, index, unread = _find_weights(folder)
    try:
        names = _class_names(config)
        is_timm = "architecture" in config and config.get("model_type") in (None, "timm_wrapper")
        facts = _timm_facts(config) if is_timm else _transformers_facts(config, preprocessor)
        arch, why = _timm_arch(config) if is_timm else _transformers_arch(config)
        classes = config.get("num_classes", config.get("num_labels")) or (len(names) if names else None)
        if classes is not None and (type(classes) is not int or not 1 <= classes <= _LARGEST_SIZE):
            raise ValueError(f"number of classes {str(classes)[:50]}")
        if names and classes and len(names) != classes:
            raise ValueError(f"{len(names)} class names for {classes} classes")
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ModelFileError(f"{folder / CONFIG}: damaged, or not of a model: {error}") from error
    if names and all(name == f"LABEL_{label}" for label, name in enumerate(names)):
        names = None  # what transformers writes where none were given
    return HubFolder(
        files=files,
        shards=shards,
        index=index,
        unread=unread,
        arch=arch,
        why_no_arch=why,
        num_classes=classes,
        class_names=names,
        **facts,
    )


def build_transformers(
    arch: Transformers, num_classes: int, image_shape: tuple[int, int, int]
) -> Callable[[], nn.Module]:
    """Return what builds a network of the package transformers, untrained, with that package's keys.

    Raises:
        ValueError: the package is not installed or lacks the network.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(
            f"{arch} is a network of the package transformers, which cannot be imported ({error}): pip install 'lustral[hub]'"
        ) from error
    start = _CLASSIFIERS[arch.model_type]
    try:
        make_config = getattr(transformers, f"{start}Config")
        network = getattr(transformers, f"{start}ForImageClassification")
    except AttributeError as error:
        raise ValueError(f"transformers {transformers.__version__} has no {arch}; try a newer one") from error
    own = inspect.signature(make_config.__init__).parameters
    general = {*inspect.signature(transformers.PretrainedConfig.__init__).parameters, "kwargs", "num_labels"}
    settings = {name: value for name, value in arch.settings if name in own and name not in general}
    settings |= {name: image_shape[0] for name in ("num_channels",) if name in own}
    settings = {name: _as_lists(value) for name, value in settings.items()}
    if odd := [name for name in arch.odd if name in own and name not in general]:
        raise ValueError(f"{arch}: settings that are neither numbers nor words: {listing(odd)}")

    def build() -> nn.Module:
        made: nn.Module = network(make_config(**settings, num_labels=num_classes))
        return made

    return build


def check_pooling(folder: Path, hub: HubFolder, network: nn.Module) -> None:
    """Refuse a network that pools its features in another way than the folder says; no shape would tell.

    Raises:
        ModelFileError: it does.
    """
    found = getattr(network, "global_pool", None)
    found = getattr(found, "pool_type", found)
    if hub.pooling and isinstance(found, str) and found != hub.pooling:
        raise ModelFileError(
            f"{folder}: its network pools features by {hub.pooling!r}, {hub.arch} by {found!r}; pass arch (--arch) that does"
        )


def package_keys(network: nn.Module, keys: Collection[str]) -> dict[str, str]:
    """Return a network's own name for each key of a file, as the package transformers renames them when it opens one.

    Since version 5 its networks have other keys than its files, which keep the older ones.
    """
    try:
        conversion = importlib.import_module("transformers.conversion_mapping")
    except ImportError:  # an older version
        return {key: key for key in keys}
    renamings = [
        change for change in conversion.get_model_conversion_mapping(network) if not hasattr(change, "operations")
    ]
    own = network.state_dict().keys()
    found: dict[str, str] = {}
    for key in keys:
        name = key
        for renaming in renamings if key not in own else ():
            name, _ = renaming.rename_source_key(name)
        found[key] = name if name in own else key
    twice = [name for name, count in Counter(found.values()).items() if count > 1]
    return {key: key for key in keys} if twice else found


def _find_weights(folder: Path) -> tuple[tuple[Path, ...], dict[str, Path] | None, Path | None, tuple[Path, ...]]:
    """Return the files of weights, the file of each tensor where they are several, the index, and other weights."""
    there = [
        folder / (name + ending) for name in _WEIGHTS for ending in ("", _INDEX) if (folder / (name + ending)).exists()
    ]
    if not there:
        raise ModelFileError(
            f"{folder}: config.json, but no weights; expected {' or '.join(_WEIGHTS)}, or their index"
            + (f"; {NO_ONNX}" if any(folder.glob("*.onnx")) or any(folder.glob("onnx/*.onnx")) else "")
        )
    chosen, unread = there[0], tuple(there[1:])
    if not chosen.name.endswith(_INDEX):
        return (chosen,), None, None, unread
    listed = _read_json(chosen).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise ModelFileError(f"{chosen}: damaged: expected the file of each tensor under weight_map")
    names = sorted(set(listed.values()))
    ending = Path(chosen.name.removesuffix(_INDEX)).suffix
    bad = [name for name in names if Path(name).name != name or Path(name).suffix != ending or not name.isprintable()]
    if bad or len(names) > MOST_SHARDS:
        raise ModelFileError(
            f"{chosen}: expected at most {MOST_SHARDS} files {ending} beside it; got {listing(map(repr, bad or names))}"
        )
    return (
        tuple(folder / name for name in names),
        {key: folder / name for key, name in listed.items()},
        chosen,
        unread,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            text = file.read(MOST_JSON + 1)
        if len(text) > MOST_JSON:
            raise ModelFileError(f"{path}: more than {MOST_JSON} bytes")
        found = json.loads(text)
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: no readable JSON ({type(error).__name__}): {error}") from error
    if not isinstance(found, dict):
        raise ModelFileError(f"{path}: expected a JSON object; got a {type(found).__name__}")
    return found


def _class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    found = config.get("label_names") or config.get("id2label")
    if not found:
        return None
    if isinstance(found, dict):
        by_label = {int(label): name for label, name in found.items()}
        if sorted(by_label) != list(range(len(by_label))):
            raise ValueError("labels of the class names that are not 0, 1, 2, ...")
        found = [by_label[label] for label in range(len(by_label))]
    if not isinstance(found, list) or not all(
        isinstance(name, str) and name.isprintable() and len(name) <= _LONGEST_NAME for name in found
    ):
        raise ValueError(f"expected class names of at most {_LONGEST_NAME} characters that can be printed")
    return tuple(found)


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the names and values under a name; empty where there is nothing."""
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise ValueError(f"expected names and values under {name}; got {str(found)[:50]}")
    return found


def _timm_arch(config: Mapping[str, Any]) -> tuple[Architecture | None, str]:
    arguments = _part(config, "model_args")
    odd = [name for name in arguments if name not in _TIMM_SIZES]
    if odd:
        return None, f"its model_args ({listing(map(str, odd))}) make it another network than timm:NAME"
    try:
        arch = parse_architecture(f"timm:{config['architecture']}", allow_code=False)
    except ArchitectureError as error:
        return None, str(error)
    return (arch, "") if isinstance(arch, Timm) else (None, "its architecture is no name of timm's")


def _timm_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    recipe = _part(config, "pretrained_cfg") or config
    shape = recipe.get("input_size")
    arguments = _part(config, "model_args")
    if shape is not None and (size := arguments.get("img_size")) is not None:
        shape = [shape[0], *_pair(size)]
    if shape is not None and "in_chans" in arguments:
        shape = [arguments["in_chans"], *shape[1:]]
    return {
        "image_shape": None if shape is None else _shape(*shape),
        "is_fixed": bool(recipe.get("fixed_input_size", False)),
        "mean": _constants(recipe.get("mean"), positive=False),
        "std": _constants(recipe.get("std"), positive=True),
        "pooling": str(config["global_pool"])[:50] if config.get("global_pool") else None,
    }


def _transformers_arch(config: Mapping[str, Any]) -> tuple[Architecture | None, str]:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _CLASSIFIERS:
        known = ", ".join(_CLASSIFIERS)
        return None, f"its model_type {str(kind)[:50]!r} is no image classifier known here ({known})"
    settings, odd = [], []
    for name, value in config.items():
        if not _is_plain(value):
            odd.append(name)
            continue
        most = _MOST_LAYERS if "layers" in name or "depth" in name else _LARGEST_SIZE
        if any(not abs(number) <= most for number in _numbers(value)):
            raise ValueError(f"{name[:50]} beyond {most}")
        settings.append((name, _as_tuples(value)))
    return Transformers(kind, tuple(settings), tuple(odd)), ""


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Tell whether a value is a number, a word, or a short list of such values or of lists of them."""
    if isinstance(value, list):
        return (
            depth < _DEEPEST_LIST and len(value) <= _MOST_LAYERS and all(_is_plain(part, depth + 1) for part in value)
        )
    return value is None or isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 50)


def _numbers(value: Any) -> list[int | float]:
    if isinstance(value, list):
        return [number for part in value for number in _numbers(part)]
    return [value] if isinstance(value, int | float) else []


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _as_lists(value: Any) -> Any:
    return [*map(_as_lists, value)] if isinstance(value, tuple) else value


def _transformers_facts(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    size = config.get("image_size")
    wanted = size
    if wanted is None:
        crops = preprocessor.get("do_center_crop", True)
        wanted = (preprocessor.get("crop_size") if crops else None) or preprocessor.get("size")
    channels, _, _ = _shape(config.get("num_channels", config.get("in_channels", 3)), 1, 1)
    mean, std = (preprocessor.get(f"image_{name}") for name in ("mean", "std"))
    if preprocessor.get("do_normalize") is False:
        mean, std = [0.0] * channels, [1.0] * channels
    scale = 255 * preprocessor.get("rescale_factor", 1 / 255) if preprocessor.get("do_rescale", True) else 255
    if mean is not None and std is not None:  # (x * scale - mean) / std, where x is in [0, 1]
        mean, std = ([value / scale for value in values] for values in (mean, std))
    return {
        "image_shape": None if wanted is None else _shape(channels, *_pair(wanted)),
        "is_fixed": size is not None,
        "mean": _constants(mean, positive=False),
        "std": _constants(std, positive=True),
        "pooling": None,
    }


def _pair(size: Any) -> tuple[Any, Any]:
    """Return height and width of what configurations call a size."""
    if isinstance(size, dict):
        return (size["shortest_edge"],) * 2 if "shortest_edge" in size else (size["height"], size["width"])
    if isinstance(size, list):
        height, width = size
        return height, width
    return size, size


def _shape(channels: Any, height: Any, width: Any) -> tuple[int, int, int]:
    if not all(type(side) is int and 1 <= side <= _LARGEST_SIDE for side in (channels, height, width)):
        raise ValueError(f"image shape {str((channels, height, width))[:100]}")
    return channels, height, width


def _constants(values: Any, *, positive: bool) -> tuple[float, ...] | None:
    if values is None:
        return None
    numbers = tuple(float(value) for value in values)
    if (
        not all(math.isfinite(value) and (value > 0 or not positive) for value in numbers)
        or len(numbers) > _LARGEST_SIDE
    ):
        raise ValueError(f"mean or std {str(numbers)[:100]}")
    return numbers
