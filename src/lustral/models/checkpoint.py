"""The one place that opens model files, and never runs what is in them.

Model files are hostile input: only safetensors and weights-only ``torch.load`` are used, every name and number found in
a file is checked before it is believed, and an architecture that is Python code is never run because a file names it.

What is found is fitted to a network by ``lustral.models.state_dicts``.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pickle
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lustral.files import write_bytes_atomic
from lustral.limits import LARGEST_EXTRA, LARGEST_IMAGE, MOST_CLASSES, is_class_count, is_image_shape
from lustral.models.architecture import (
    Architecture,
    ArchitectureError,
    CodeRefusedError,
    parse_architecture,
    runs_user_code,
)
from lustral.models.build import (
    build_network,
    count_logits,
    outline_network,
    require_logits,
    with_normalisation,
)
from lustral.models.classifier import Classifier
from lustral.models.preact_resnet import by_keys
from lustral.models.state_dicts import (
    PROBE_CLASSES,
    ModelFileError,
    check_tensors,
    compare,
    count_classes,
    find_image_shape,
    find_state_dict,
    listing,
    not_finite,
    strip_prefix,
)

logger = logging.getLogger(__name__)

FORMAT_VERSION = "1"
TORCH_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".tar")
_PROBE_SHAPE = (3, 224, 224)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A classifier from a file, and what is needed to write its like.

    Attributes:
        model: float32, in evaluation mode, on the CPU.
        arch: name of its architecture, see ``lustral.models.build``.
        num_classes: number of classes K.
        image_shape: (C, H, W) of its images, pixels.
        key_prefix: what stood before each key in the file, e.g. "module."; empty for most.
        nesting: where in the file the weights were, e.g. "state_dict" or "model.state_dict"; None: at the top.
        layout: dtype of each tensor in the file, by the network's own keys, in the file's order.
        metadata: the file's text metadata (safetensors only).
    """

    model: Classifier
    arch: str
    num_classes: int
    image_shape: tuple[int, int, int]
    key_prefix: str
    nesting: str | None
    layout: Mapping[str, torch.dtype]
    metadata: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """What a file of ours says about its model; None where it is silent."""

    arch: str | None = None
    num_classes: int | None = None
    image_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def load_model(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    allow_code: bool = False,
) -> LoadedModel:
    """Open a file of weights without running anything in it, and build its classifier.

    Reads ``.safetensors``, and ``.pt``, ``.pth``, ``.bin``, ``.ckpt``, ``.tar`` with torch's weights-only reader: a
    state dict, at the top or up to two levels inside (``state_dict``, ``model``, ``net``, ``model_state``,
    ``model_state_dict``), with or without the prefixes of wrappers (``module.``, ``_orig_mod.``, ...).
    What the file itself tells (metadata, shapes of its tensors) need not be given.

    Args:
        path: the file.
        arch: name of the architecture, see ``lustral.models.build``; needed where the file does not record it. Given
            here, it may be Python code, which is run; recorded in the file, it may not.
        num_classes: expected number of classes; None: as the weights have.
        image_shape: (C, H, W) of the images; needed where the file does not tell.
        mean: per channel on the [0, 1] scale, as the model was trained; None: as recorded, else 0.
        std: per channel on the [0, 1] scale, as the model was trained; None: as recorded, else 1.
        allow_code: whether the recorded architecture may be Python code, which is then run. Only for files whose writer is
            known: the file chooses what runs.

    Raises:
        ModelFileError: the file is missing, damaged, not weights, would need to run code, holds NaN or infinite
            weights, or does not fit what was asked for.
        ValueError: unknown architecture, or a network that does not take such images.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file")
    _check_suffix(path)
    found, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_torch(path), {})
    tensors, nesting = find_state_dict(path, found)
    check_tensors(path, tensors)
    recorded = _read_metadata(path, metadata)

    network = (
        parse_architecture(arch, allow_code=True) if arch else _recorded_arch(path, recorded, allow_code=allow_code)
    )
    network = by_keys(network, tensors)
    if image_shape and recorded.image_shape and image_shape != recorded.image_shape:
        raise ModelFileError(f"{path}: made for images of shape {recorded.image_shape}; expected {image_shape}")
    shape = image_shape or recorded.image_shape
    probe = outline_network(network, num_classes=PROBE_CLASSES, image_shape=shape or _PROBE_SHAPE).state_dict()
    tensors, key_prefix = strip_prefix(tensors, probe)
    compare(path, str(network), tensors, probe, shapes=False)

    rows = count_classes(path, tensors, probe, asked=num_classes or recorded.num_classes)
    classes = max(rows, 2)  # one logit is two classes
    shape = shape or find_image_shape(path, tensors, probe)
    mean, std = mean or recorded.mean, std or recorded.std
    if mean is None and std is None:
        logger.warning("%s: no mean and std are known; pixels in [0, 1] go to the network as they are", path)
    if not is_class_count(classes) or not is_image_shape(shape):
        raise ModelFileError(
            f"{path}: expected 2 to {MOST_CLASSES:,} classes and images of {LARGEST_IMAGE:,} numbers at most; got "
            f"{classes:,} classes of images {shape}"
        )
    if not runs_user_code(network):  # a user's code may compute with what it builds, so it has no outline
        outline = outline_network(network, num_classes=rows, image_shape=shape)
        compare(path, str(network), tensors, outline.state_dict(), shapes=True)
        _require_small_extras(path, network, outline)
    bare = build_network(network, num_classes=rows, image_shape=shape)
    compare(path, str(network), tensors, bare.state_dict(), shapes=True)
    model = with_normalisation(bare, shape, mean, std, num_classes=classes)
    require_logits(model, network, rows=rows, image_shape=shape)
    model.network.load_state_dict(tensors)
    return LoadedModel(
        model=model.eval(),
        arch=str(network),
        num_classes=classes,
        image_shape=shape,
        key_prefix=key_prefix,
        nesting=nesting,
        layout={key: tensor.dtype for key, tensor in tensors.items()},
        metadata=metadata,
    )


def _require_small_extras(path: Path, arch: Architecture, outline: nn.Module) -> None:
    """Refuse a network whose constants, which no file holds, would take more than ``LARGEST_EXTRA`` bytes."""
    stored = outline.state_dict().keys()
    size = sum(buffer.nbytes for name, buffer in outline.named_buffers() if name not in stored)
    if size > LARGEST_EXTRA:
        raise ModelFileError(
            f"{path}: {arch} has constants of {size:,} bytes at this image size; expected {LARGEST_EXTRA:,} at most"
        )


def save_model(
    path: str | os.PathLike[str],
    model: Classifier,
    *,
    arch: str,
    image_shape: tuple[int, int, int],
    key_prefix: str = "",
    nesting: str | None = None,
    layout: Mapping[str, torch.dtype] | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a classifier's weights atomically, under the network's own keys.

    Given ``key_prefix`` and ``layout`` of a ``LoadedModel``, the file has the keys, shapes and dtypes of the one that
    was loaded, so the code that opened that one opens this one. A ``.safetensors`` file also records architecture,
    number of classes, image shape, mean and std; the formats of torch record nothing, but restore ``nesting``.

    Args:
        path: ``.safetensors``, or one of torch's suffixes; its folder must exist.
        model: the classifier, on any device.
        arch: name of its architecture.
        image_shape: (C, H, W) of its images, pixels.
        key_prefix: put before each key.
        nesting: where to put the weights in a file of torch's; not used for safetensors, which are flat.
        layout: dtype of each tensor to write; None: all, as they are.
        extra: more text metadata (safetensors only).

    Raises:
        ValueError: unknown suffix, a malformed ``arch``, weights that are not finite, ``layout`` names a tensor that the
            model lacks or leaves out one that it needs, or ``extra`` uses a reserved name.
        OSError: the file could not be written; an old one is intact.
    """
    path = Path(path)
    _check_suffix(path)
    parse_architecture(arch, allow_code=True)  # nothing is written that could not be read
    state = model.network.state_dict()
    layout = layout or {key: tensor.dtype for key, tensor in state.items()}
    if unknown := layout.keys() - state.keys():
        raise ValueError(f"the model lacks tensors of the layout: {listing(sorted(unknown))}")
    if left_out := [key for key in state if key not in layout and not key.endswith("num_batches_tracked")]:
        raise ValueError(f"the layout leaves out tensors of the model: {listing(left_out)}")
    tensors = {  # own memory for each: formats refuse or keep tensors that share it
        key_prefix + key: state[key].detach().cpu().to(dtype, copy=True, memory_format=torch.contiguous_format)
        for key, dtype in layout.items()
    }
    if bad := not_finite(tensors):
        raise ValueError(f"refusing to write a model with NaN or infinite weights in {listing(bad)}")
    metadata = {
        "lustral": FORMAT_VERSION,
        "arch": arch,
        "num_classes": str(count_logits(model, image_shape)),
        "image_shape": ",".join(map(str, image_shape)),
        "mean": ",".join(map(str, model.normalise.mean.flatten().tolist())),
        "std": ",".join(map(str, model.normalise.std.flatten().tolist())),
    }
    if reserved := metadata.keys() & (extra or {}).keys():
        raise ValueError(f"reserved names in extra metadata: {', '.join(sorted(reserved))}")
    if path.suffix == ".safetensors":
        content = _safetensors_bytes(tensors, {**metadata, **(extra or {})})
    else:
        content = _torch_bytes(tensors, nesting)
    write_bytes_atomic(path, content)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the text metadata."""
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # hostile bytes can raise anything
        raise ModelFileError(f"{path}: damaged or cut short, or not a safetensors file: {error}") from error


def _read_torch(path: Path) -> Any:
    """Return what torch's weights-only reader finds: tensors, numbers, strings and containers, never code."""
    file = path.open("rb")  # outside of the try: torch raises OSError for damaged files as well
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the format, on the way to an error that says it better
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # hostile bytes can raise anything
        if _wants_code(path, error):
            raise ModelFileError(
                f"{path}: refused: it does not hold weights alone, and opening it would run code{_wanted_code(path)}. "
                "In the environment where it comes from, save the weights alone: "
                'torch.save(model.state_dict(), "weights.pt")'
            ) from error
        raise ModelFileError(
            f"{path}: damaged or cut short, or not a file of torch.save ({type(error).__name__})"
        ) from error


def _wants_code(path: Path, error: Exception) -> bool:
    """Tell a file that needs more than weights from one that is damaged, by what the weights-only reader said."""
    if "Unsupported operand" in str(error):  # either garbage, or a pickle that torch.save did not write
        with path.open("rb") as file:
            return file.read(1) == pickle.PROTO
    return isinstance(error, pickle.UnpicklingError) or "weights_only=True" in str(error)


def _wanted_code(path: Path) -> str:
    """Return " (names)" of the classes and functions that a file wants run, where they can be read without that."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # hostile bytes again; the names are only a courtesy
        return ""
    return f" ({listing(names, limit=3)})" if names else ""


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise ModelFileError(
            f"{path}: unknown kind of model file {path.suffix!r}; expected .safetensors, {', '.join(TORCH_SUFFIXES)}"
        )


def _safetensors_bytes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the file; its metadata are sorted, so that equal models give equal files (the library shuffles them)."""
    content = safetensors.torch.save(tensors, dict(metadata))
    (length,) = struct.unpack_from("<Q", content)
    header = {**json.loads(content[8 : 8 + length]), "__metadata__": dict(sorted(metadata.items()))}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data stay aligned
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _torch_bytes(tensors: Mapping[str, Tensor], nesting: str | None) -> bytes:
    """Return the file: a plain mapping of names to tensors, inside of others as ``nesting`` says."""
    content: Mapping[str, Any] = tensors
    for name in reversed(nesting.split(".") if nesting else []):
        content = {name: content}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _read_metadata(path: Path, metadata: Mapping[str, str]) -> _Recorded:
    """Read what ``save_model`` wrote; files of others say nothing."""
    version = metadata.get("lustral")
    if version is None:
        return _Recorded()
    if version != FORMAT_VERSION:
        raise ModelFileError(f"{path}: written in format {version!r}; this version reads {FORMAT_VERSION!r}")
    try:
        channels, height, width = (int(side) for side in metadata["image_shape"].split(","))
        recorded = _Recorded(
            arch=metadata["arch"],
            num_classes=int(metadata["num_classes"]),
            image_shape=(channels, height, width),
            mean=tuple(float(value) for value in metadata["mean"].split(",")),
            std=tuple(float(value) for value in metadata["std"].split(",")),
        )
    except (KeyError, ValueError) as error:
        raise ModelFileError(f"{path}: damaged metadata: {type(error).__name__}: {error}") from error
    if not is_image_shape(recorded.image_shape):
        raise ModelFileError(f"{path}: damaged metadata: image shape {metadata['image_shape']}")
    if not is_class_count(recorded.num_classes):
        raise ModelFileError(f"{path}: damaged metadata: {metadata['num_classes']} classes")
    if not all(map(math.isfinite, (*(recorded.mean or ()), *(recorded.std or ())))):
        raise ModelFileError(f"{path}: damaged metadata: mean {metadata['mean']}, std {metadata['std']}")
    return recorded


def _recorded_arch(path: Path, recorded: _Recorded, *, allow_code: bool) -> Architecture:
    if recorded.arch is None:
        raise ModelFileError(f"{path}: the file does not say which architecture it is; pass arch (--arch)")
    try:
        return parse_architecture(recorded.arch, allow_code=allow_code)
    except CodeRefusedError as error:
        raise ModelFileError(
            f"{path}: its architecture is recorded as {recorded.arch[:200]!r}, which is Python code and is not run because "
            "a file names it; if it is yours, pass arch (--arch)"
        ) from error
    except ArchitectureError as error:
        raise ModelFileError(f"{path}: damaged metadata: {error}") from error
