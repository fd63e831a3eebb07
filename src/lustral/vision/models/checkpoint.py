"""The one place that opens model files, and never runs what is in them.

Model files are hostile input: every name and number found in a file is checked before it is believed, and an architecture that is
Python code is never run because a file names it. ``contents`` reads files as data,
``weight_sets`` finds the weights in them, and ``state_dicts`` fits them to a network.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lustral.core.files import sha256_of, write_bytes_atomic
from lustral.core.limits import LARGEST_EXTRA, LARGEST_IMAGE, MOST_CLASSES, is_class_count, is_image_shape
from lustral.vision.models.architecture import (
    Architecture,
    ArchitectureError,
    CodeRefusedError,
    Transformers,
    parse_architecture,
    runs_user_code,
)
from lustral.vision.models.build import (
    NETWORKS,
    build_network,
    count_logits,
    outline_network,
    require_logits,
    with_normalisation,
)
from lustral.vision.models.classifier import Classifier
from lustral.vision.models.files.contents import SAFETENSORS, Memory, finished_bytes, kind_of, read_model_file
from lustral.vision.models.files.folder_copy import Card, FolderPlan, plan_copy, write_copy
from lustral.vision.models.files.hub_folder import (
    HubFolder,
    check_pooling,
    is_hub_folder,
    package_keys,
    read_hub_folder,
)
from lustral.vision.models.files.state_dicts import (
    PROBE_CLASSES,
    ModelFileError,
    check_tensors,
    compare_keys,
    count_classes,
    find_image_shape,
    listing,
    not_finite,
)
from lustral.vision.models.files.weight_sets import (
    TOP,
    NamedTensors,
    WeightSet,
    choose_set,
    find_mappings,
    find_sets,
    known_keys,
    nearest_set,
)
from lustral.vision.models.variants import by_keys, nearest_network

logger = logging.getLogger(__name__)

FORMAT_VERSION = "1"
_PROBE_SHAPE = (3, 224, 224)
_MOST_HINTED = 16  # mappings that are compared with other networks for an error message


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A classifier from a file, and what is needed to write its like.

    Attributes:
        model: float32, in evaluation mode, on the CPU.
        arch: name of its architecture, see ``lustral.vision.models.build``.
        num_classes: number of classes K.
        image_shape: (C, H, W) of its images, pixels.
        key_prefix: what stood before each key in the file, e.g. "module."; empty for most.
        nesting: where in the file the weights were, e.g. "state_dict" or "model.state_dict"; None: at the top.
        layout: dtype of each tensor in the file, by the network's own keys, in the file's order.
        metadata: the file's text metadata (safetensors only).
        weights: which of the file's sets of weights it is: "state_dict", "model.ema", ...; "." where they are not inside of
            anything.
        other_weights: sets of weights in the file that would fit as well, or nearly, and were not looked at.
        sha256: of the file, in hexadecimal digits; of each file of weights, with blanks between, for a folder.
        class_names: in the order of the logits, where the file tells them.
        origin: where the weights lie in the file; None: nowhere.
    """

    model: Classifier
    arch: str
    num_classes: int
    image_shape: tuple[int, int, int]
    key_prefix: str
    nesting: str | None
    layout: Mapping[str, torch.dtype]
    metadata: Mapping[str, str]
    weights: str = TOP
    other_weights: tuple[str, ...] = ()
    sha256: str = ""
    class_names: tuple[str, ...] | None = None
    origin: Origin | None = None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the weights of a model lie, so that others can take their place.

    Attributes:
        files: the files that hold them, with the SHA-256 that each had.
        folder: of a model hub, whose other files go with them; None: there is one file.
        index: name of the file in it that says which file has which tensor.
        sets: the sets of weights that were equal there; each as the names that lead to its mapping, and the file's key of each of
            the network's keys.
    """

    files: Mapping[Path, str]
    folder: Path | None
    index: str | None
    sets: tuple[tuple[tuple[str, ...], Mapping[str, str]], ...]


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """What a file of ours says about its model; None where it is silent."""

    arch: str | Architecture | None = None
    num_classes: int | None = None
    image_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    why_no_arch: str = "the file does not say which architecture it is"


def load_model(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    allow_code: bool = False,
    weights: str | None = None,
) -> LoadedModel:
    """Open a file of weights without running anything in it, and build its classifier.

    Also opens a folder as model hubs have them (``lustral.vision.models.files.hub_folder``). Reads ``.safetensors``, and ``.pt``,
    ``.pth``, ``.bin``, ``.ckpt``, ``.tar`` of torch.save: a mapping of names to tensors, wherever it is in the file, with
    or without the names of wrappers in its keys (``module.``, ``_orig_mod.``, ...). What the file itself tells (metadata,
    shapes of its tensors) need not be given.

    Args:
        path: the file, or a folder with config.json.
        arch: name of the architecture, see ``lustral.vision.models.build``; needed where the file does not record it. Given
            here, it may be Python code, which is run; recorded in the file, it may not.
        num_classes: expected number of classes; None: as the weights have.
        image_shape: (C, H, W) of the images; needed where the file does not tell.
        mean: per channel on the [0, 1] scale, as the model was trained; None: as recorded, else 0.
        std: per channel on the [0, 1] scale, as the model was trained; None: as recorded, else 1.
        allow_code: whether the recorded architecture may be Python code, which is then run. Only for files whose writer is
            known: the file chooses what runs.
        weights: which set of weights, as ``LoadedModel.weights`` names it; needed where several differ and fit.

    Raises:
        ModelFileError: the file is missing, damaged, not weights, would need to run code, holds NaN or infinite
            weights, several sets of weights, or does not fit what was asked for.
        ValueError: unknown architecture, or a network that does not take such images.
    """
    path = Path(path)
    hub = read_hub_folder(path) if is_hub_folder(path) else None
    content, metadata = _read_content(path, hub)
    mappings = find_mappings(path, content)
    recorded = _read_metadata(path, metadata) if hub is None else _facts_of(path, hub, image_shape)

    network = (
        parse_architecture(arch, allow_code=True) if arch else _recorded_arch(path, recorded, allow_code=allow_code)
    )
    network = by_keys(network, known_keys(mappings))
    shape = _agreed_shape(path, image_shape, recorded.image_shape)
    probed = outline_network(network, num_classes=PROBE_CLASSES, image_shape=shape or _PROBE_SHAPE)
    probe = probed.state_dict()
    mappings, file_keys = _with_own_keys(network, probed, mappings)
    hint = partial(_hint, network, mappings)
    chosen, same, others = _choose(
        path, str(network), mappings, probe, weights=weights, sizes_known=shape is not None, hint=hint
    )
    tensors = chosen.tensors

    rows = count_classes(path, tensors, probe, asked=num_classes or recorded.num_classes)
    classes = max(rows, 2)  # one logit is two classes
    shape = shape or find_image_shape(path, tensors, probe)
    mean, std = mean or recorded.mean, std or recorded.std
    if mean is None and std is None:
        logger.warning("%s: no mean and std are known; pixels in [0, 1] go to the network as they are", path)
    bare = _build_fitting(path, network, tensors, rows=rows, image_shape=shape, hint=hint)
    if hub is not None and network == hub.arch:
        check_pooling(path, hub, bare)
    model = with_normalisation(bare, shape, mean, std, num_classes=classes)
    require_logits(model, network, rows=rows, image_shape=shape)
    check_tensors(path, tensors)
    model.network.load_state_dict(tensors)
    origin = _origin_of(path, hub, (chosen, *same), file_keys)
    return LoadedModel(
        model=model.eval(),
        arch=str(network),
        num_classes=classes,
        image_shape=shape,
        key_prefix=chosen.prefix,
        nesting=".".join(chosen.path) or None,
        layout={key: tensor.dtype for key, tensor in tensors.items()},
        metadata=metadata,
        weights=chosen.name,
        other_weights=others,
        sha256=" ".join(origin.files.values()),
        class_names=hub.class_names if hub else None,
        origin=origin,
    )


def _agreed_shape(
    path: Path, asked: tuple[int, int, int] | None, recorded: tuple[int, int, int] | None
) -> tuple[int, int, int] | None:
    """Return the shape of the images as asked for or recorded, which may not differ."""
    if asked and recorded and asked != recorded:
        raise ModelFileError(f"{path}: made for images of shape {recorded}; expected {asked}")
    return asked or recorded


def _origin_of(path: Path, hub: HubFolder | None, equal: Sequence[WeightSet], file_keys: Mapping[str, str]) -> Origin:
    """Return where equal sets of weights lie; ``file_keys`` maps the network's own keys to those of the file."""
    return Origin(
        files={file: sha256_of(file) for file in (hub.files if hub else (path,))},
        folder=path if hub else None,
        index=hub.index.name if hub and hub.index else None,
        sets=tuple(
            (found.path, {name: file_keys.get(key, key) for name, key in found.keys.items()}) for found in equal
        ),
    )


def _build_fitting(
    path: Path,
    network: Architecture,
    tensors: Mapping[str, Tensor],
    *,
    rows: int,
    image_shape: tuple[int, int, int],
    hint: Callable[[], str],
) -> nn.Module:
    """Build the network, once its sizes are sure to be plausible and to be those of the tensors."""
    if not is_class_count(max(rows, 2)) or not is_image_shape(image_shape):
        raise ModelFileError(
            f"{path}: expected 2 to {MOST_CLASSES:,} classes and images of {LARGEST_IMAGE:,} numbers at most; got "
            f"{max(rows, 2):,} classes of images {image_shape}"
        )
    if not runs_user_code(network):  # a user's code may compute with what it builds, so it has no outline
        outline = outline_network(network, num_classes=rows, image_shape=image_shape)
        compare_keys(path, str(network), tensors, outline.state_dict(), shapes=True, hint=hint)
        _require_small_extras(path, network, outline)
    bare = build_network(network, num_classes=rows, image_shape=image_shape)
    compare_keys(path, str(network), tensors, bare.state_dict(), shapes=True, hint=hint)
    return bare


def _read_content(path: Path, hub: HubFolder | None) -> tuple[Any, Mapping[str, str]]:
    """Return what a file holds, or the tensors of all files of a folder, and a file's text metadata."""
    if hub is None:
        stored = read_model_file(path)
        return stored.content, stored.metadata
    if hub.unread:
        logger.warning(
            "%s: looked at %s; not looked at: %s", path, hub.files[0].name, listing(p.name for p in hub.unread)
        )
    if hub.shards is None:
        return read_model_file(hub.files[0]).content, {}
    parts = {file: read_model_file(file).content for file in hub.files}
    missing = [
        key for key, file in hub.shards.items() if not isinstance(parts[file], Mapping) or key not in parts[file]
    ]
    if missing:
        raise ModelFileError(f"{path}: tensors that the index names are missing: {listing(missing)}")
    unlisted = [key for file, part in parts.items() for key in part if hub.shards.get(key) != file]
    if unlisted:
        raise ModelFileError(f"{path}: tensors that the index does not name: {listing(map(str, unlisted))}")
    return {key: parts[file][key] for key, file in hub.shards.items()}, {}


def _with_own_keys(
    arch: Architecture, network: nn.Module, mappings: list[NamedTensors]
) -> tuple[list[NamedTensors], dict[str, str]]:
    """Return tensors under the keys of a network whose package renames them, and the file's key of each such key."""
    if not isinstance(arch, Transformers):
        return mappings, {}
    first, *others = mappings
    own_keys = package_keys(network, first.tensors)
    tensors = {own_keys[key]: tensor for key, tensor in first.tensors.items()}
    return [NamedTensors(first.path, tensors), *others], {own: key for key, own in own_keys.items()}


def _facts_of(path: Path, hub: HubFolder, image_shape: tuple[int, int, int] | None) -> _Recorded:
    """Return what a folder says about its model; the size of its images only where another cannot be asked for."""
    keeps_size = hub.is_fixed or image_shape is None or hub.image_shape is None or image_shape[0] != hub.image_shape[0]
    return _Recorded(
        arch=hub.arch,
        num_classes=hub.num_classes,
        image_shape=hub.image_shape if keeps_size else None,
        mean=hub.mean,
        std=hub.std,
        why_no_arch=hub.why_no_arch,
    )


def _hint(network: Architecture, mappings: Sequence[NamedTensors]) -> str:
    """Return which other architecture has the keys of one of the largest mappings, as the rest of a sentence."""
    for mapping in sorted(mappings, key=lambda mapping: -len(mapping.tensors))[:_MOST_HINTED]:
        shapes = {key: t.shape for key, t in zip(known_keys([mapping]), mapping.tensors.values(), strict=True)}
        nearest = nearest_network(shapes, NETWORKS)
        if nearest is not None and nearest != network:
            return f" Keys and sizes are those of {nearest}"
    return ""


def _choose(
    path: Path,
    arch: str,
    mappings: Sequence[NamedTensors],
    probe: Mapping[str, Tensor],
    *,
    weights: str | None,
    sizes_known: bool,
    hint: Callable[[], str],
) -> tuple[WeightSet, list[WeightSet], tuple[str, ...]]:
    """Return the weights to look at, those that equal them, and the names of others; say what else there is."""
    sets = find_sets(mappings, probe)
    if not sets:
        nearest = nearest_set([m for m in mappings if weights in (None, ".".join(m.path) or TOP)] or mappings, probe)
        strangers = {key.removeprefix(nearest.prefix): torch.empty(0) for key in nearest.unwanted}
        compare_keys(path, arch, {**nearest.tensors, **strangers}, probe, shapes=False, hint=hint)
        raise ModelFileError(f"{path}: two tensors for each weight of {arch}: {listing(nearest.keys.values())}")
    of_optimizer = [found for found in sets if NamedTensors(found.path, {}).of_optimizer and found.name != weights]
    if 0 < len(of_optimizer) < len(sets):
        sets = [found for found in sets if found not in of_optimizer]
        names = listing(found.name for found in of_optimizer)
        logger.warning("%s: taken for an optimizer's memory, and not looked at: %s", path, names)
    chosen, same = choose_set(path, sets, probe, wanted=weights, sizes_known=sizes_known)
    if chosen.unwanted:
        logger.warning(
            "%s: %s does not use %d tensors of the file: %s",
            *(path, arch, len(chosen.unwanted), listing(chosen.unwanted)),
        )
    others = tuple(found.name for found in sets if found is not chosen and found not in same)
    if others:
        logger.warning("%s: looked at %s; not looked at: %s", path, chosen.name, listing(others))
    return chosen, same, others


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
    kind = kind_of(path)
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
    if kind == SAFETENSORS:
        content = _safetensors_bytes(tensors, {**metadata, **(extra or {})})
    else:
        content = _torch_bytes(tensors, nesting)
    write_bytes_atomic(path, content)


def save_like(stem: str | os.PathLike[str], model: Classifier, loaded: LoadedModel) -> Path:
    """Write the file that a model came from with the weights of another model of the same architecture.

    Everything else stays as it was, byte by byte: keys, nesting, order, dtypes, strides, and whatever else the file holds.
    Sets of weights that were equal stay equal; others stay as they were. A folder of a model hub comes back as its files.

    Args:
        stem: path of the new file without the ending, which is that of the given one; its folder must exist. The files of a
            folder of a model hub keep their names and go beside it.
        model: of the architecture of ``loaded``, on any device.
        loaded: as ``load_model`` returned it.

    Returns:
        The path of the new file, or of the folder.

    Raises:
        ModelFileError: the given file is not the one that was read any more, or cannot hold the weights.
        ValueError: weights that are not finite in the file's dtypes.
        OSError: the file could not be written; an old one is intact.
    """
    origin = _known_origin(loaded)
    if origin.folder is not None:
        save_folder_like(Path(stem).parent, model, loaded)
        return Path(stem).parent
    (source,) = origin.files
    path = Path(f"{os.fspath(stem)}{kind_of(source)}")
    write_bytes_atomic(path, _with_weights(source, origin, model))
    return path


def save_folder_like(
    out: Path,
    model: Classifier,
    loaded: LoadedModel,
    *,
    card: Card | None = None,
    beside: Collection[str] = (),
) -> None:
    """Write the model folder that a model came from with the weights of another model, whole or not at all.

    Args:
        out: folder that exists; see ``require_room``.
        model: of the architecture of ``loaded``, on any device.
        loaded: as ``load_model`` returned it for a folder of a model hub.
        card: makes the model card; None: it stays as it is.
        beside: names of files that the caller writes into the folder.

    Raises:
        ModelFileError, ValueError, OSError: as for ``save_like``; and see ``write_copy``.
    """
    origin = _known_origin(loaded)
    plan = copy_plan(loaded)
    assert plan is not None
    weights = ((source.name, _with_weights(source, origin, model)) for source in origin.files)
    write_copy(out, plan, weights, card=card, beside=beside)


def copy_plan(loaded: LoadedModel) -> FolderPlan | None:
    """Return what a copy of the folder has that a model came from; None where it came from something else.

    Raises:
        ModelFileError: the folder cannot be copied; see ``plan_copy``.
    """
    origin = loaded.origin
    if origin is None or origin.folder is None:
        return None
    return plan_copy(origin.folder, [file.name for file in origin.files], index=origin.index)


def _known_origin(loaded: LoadedModel) -> Origin:
    if loaded.origin is None:
        raise ValueError("the model was not read from a file; use save_model")
    return loaded.origin


def _with_weights(source: Path, origin: Origin, model: Classifier) -> Memory:
    """Return the bytes of one of the files that a model came from, with the weights of another model."""
    stored = read_model_file(source)
    if sha256_of(source) != origin.files[source]:
        raise ModelFileError(f"{source}: the file changed while it was worked on; nothing was written")
    state = model.network.state_dict()
    mappings = {mapping.path: mapping.tensors for mapping in find_mappings(source, stored.content)}
    written: dict[str, tuple[Tensor, Tensor]] = {}
    for path, keys in origin.sets:
        for name, key in keys.items():
            if key in mappings.get(path, {}):
                written[key] = mappings[path][key], state[name].detach().cpu()
                written[key][0].copy_(written[key][1])
    if bad := [key for key, (tensor, _) in written.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"refusing to write a model with NaN or infinite weights in {listing(bad)}")
    if bad := [key for key, (tensor, value) in written.items() if not torch.equal(tensor, value.to(tensor.dtype))]:
        raise ModelFileError(f"{source}: these tensors share numbers in it and no longer can: {listing(bad)}")
    return finished_bytes(stored, kind_of(source))


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
        raise ModelFileError(f"{path}: {recorded.why_no_arch}; pass arch (--arch)")
    if not isinstance(recorded.arch, str):
        return recorded.arch
    try:
        return parse_architecture(recorded.arch, allow_code=allow_code)
    except CodeRefusedError as error:
        raise ModelFileError(
            f"{path}: its architecture is recorded as {recorded.arch[:200]!r}, which is Python code and is not run because "
            "a file names it; if it is yours, pass arch (--arch)"
        ) from error
    except ArchitectureError as error:
        raise ModelFileError(f"{path}: damaged metadata: {error}") from error
