"""What is inside a model file: tensors by name, and whatever else was saved with them; and the same file with other numbers.

Files are mapped, not loaded: a length that a file declares is compared with its bytes, and its numbers come from the disk
when a network of known size takes them.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from lustral.core.files import map_regular
from lustral.vision.models.files.pickle_values import IsProgram, OddData, PickleError, WantsCode
from lustral.vision.models.files.state_dicts import ModelFileError
from lustral.vision.models.files.torch_files import correct_checksums, read_torch, reads_pickles

Memory = mmap.mmap | bytearray
SAFETENSORS = ".safetensors"
TORCH_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".tar")
MOST_BYTES = 2**33  # of a model file
MOST_TENSORS = 2**16  # in a model file
MOST_HEADER = 2**23  # bytes of a safetensors header; a tensor takes about 100
SCRIPT_SUFFIXES = (".torchscript", ".ptl")
ONNX = ".onnx"
NO_ONNX = (
    "ONNX is no form to scan or erase: it holds a graph for inference, and both need gradients. Open the weights that it was "
    "made from; or rebuild the network with a converter that you trust, and give it to Python: lustral.scan(network, data)"
)
_DTYPES = {
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "I16": torch.int16,
        "I32": torch.int32,
        "I64": torch.int64,
    },
}


@dataclass(frozen=True)
class Stored:
    """A model file that was read.

    Attributes:
        content: a mapping of names to tensors, or nested containers with such mappings in them.
        metadata: the file's text metadata (safetensors only).
        memory: the file's bytes, private: writing to a tensor of ``content`` changes them and not the file.
    """

    content: Any
    metadata: Mapping[str, str]
    memory: Memory


def kind_of(path: Path) -> str:
    """Return the ending that says how a model file is written: ".safetensors", ".pth", ".pth.tar", ...

    Raises:
        ModelFileError: it is none that we know.
    """
    if path.suffix not in (SAFETENSORS, *TORCH_SUFFIXES):
        raise ModelFileError(
            f"{path}: unknown kind of model file {path.suffix!r}; expected {SAFETENSORS}, {', '.join(TORCH_SUFFIXES)}"
        )
    before = path.with_suffix("").suffix
    return before + path.suffix if path.suffix == ".tar" and before in TORCH_SUFFIXES else path.suffix


def read_model_file(path: Path) -> Stored:
    """Read a model file without running anything in it, whatever it is.

    Raises:
        ModelFileError: missing, not a regular file, damaged, too large, or more than data; the message says why.
        OSError: it may not be read.
    """
    if path.suffix == ONNX:
        raise ModelFileError(f"{path}: refused: {NO_ONNX}")
    if path.suffix in SCRIPT_SUFFIXES:
        raise ModelFileError(f"{path}: refused: {program_words(path)}")
    kind = kind_of(path)
    if kind != SAFETENSORS and not reads_pickles(torch.__version__):
        raise ModelFileError(
            f"{path}: pickled model files are not opened with torch {torch.__version__}, whose weights-only reading can be "
            "made to run code (CVE-2025-32434, CVE-2026-24747); use torch 2.10 or newer, or save the weights as "
            f"{SAFETENSORS} where the file comes from"
        )
    try:
        memory = map_regular(path, most=MOST_BYTES)
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file") from error
    except ValueError as error:
        raise ModelFileError(str(error)) from error
    if kind == SAFETENSORS:
        return _read_safetensors(path, memory)
    try:
        return Stored(read_torch(memory), {}, memory)
    except WantsCode as error:
        raise ModelFileError(
            f"{path}: refused: it does not hold weights alone, and opening it would run code ({error}). "
            "In the environment where it comes from, save the weights alone: "
            'torch.save(model.state_dict(), "weights.pt")'
        ) from error
    except IsProgram as error:
        raise ModelFileError(f"{path}: refused: {program_words(path)}") from error
    except OddData as error:
        raise ModelFileError(f"{path}: refused: it holds {error}; save the weights alone") from error
    except PickleError as error:
        raise ModelFileError(f"{path}: damaged or cut short, or not a file of torch.save: {error}") from error


def program_words(path: Path) -> str:
    """Return why a TorchScript program is not opened, and the two lines that take the weights out of it."""
    return (
        "it is a TorchScript program. Opening it runs code that it holds, and an eraser needs the network's layers, which it "
        "does not have any more. In an environment that may be lost, take the weights out, and open them with --arch:\n"
        f"  state = torch.jit.load({path.name!r}, map_location='cpu').state_dict()\n"
        "  torch.save(state, 'weights.pt')"
    )


def finished_bytes(stored: Stored, kind: str) -> Memory:
    """Return the bytes of a file whose tensors were written to."""
    if kind != SAFETENSORS:
        correct_checksums(stored.memory)
    return stored.memory


def _read_safetensors(path: Path, memory: Memory) -> Stored:
    """Look at the tensors of a file whose header the library has checked."""
    damaged = f"{path}: damaged or cut short, or not a safetensors file"
    if len(memory) < 8:
        raise ModelFileError(f"{damaged}: {len(memory)} bytes")
    (length,) = struct.unpack_from("<Q", memory)
    if length > min(MOST_HEADER, len(memory) - 8):
        raise ModelFileError(f"{damaged}: a header of {length} bytes; expected at most {MOST_HEADER}, inside the file")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
        header: dict[str, Any] = json.loads(memory[8 : 8 + length])
        if len(header) > MOST_TENSORS + 1:
            raise ModelFileError(f"{len(header)} tensors; expected at most {MOST_TENSORS}")
        tensors = {key: _view(memory, 8 + length, entry) for key, entry in header.items() if key != "__metadata__"}
    except OSError:
        raise
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except Exception as error:  # hostile bytes can raise anything
        raise ModelFileError(f"{damaged}: {error}") from error
    return Stored(tensors, metadata, memory)


def _view(memory: Memory, start: int, entry: Mapping[str, Any]) -> Tensor:
    """Look at one tensor of a safetensors file."""
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ModelFileError(f"numbers of the kind {str(entry['dtype'])[:20]}; expected one of {', '.join(_DTYPES)}")
    shape = [int(size) for size in entry["shape"]]
    first, last = entry["data_offsets"]
    if first == last:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=(last - first) // dtype.itemsize, offset=start + first).view(
        shape
    )
