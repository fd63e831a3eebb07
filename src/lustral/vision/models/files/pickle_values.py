"""What the names in the pickles of model files stand for: numbers, text, containers and tensors, made without importing any.

``CALLS`` are functions of the few that pickles of weights call, written anew: each looks at bytes that are there. ``RECORDS``
are classes that only hold settings. ``lustral.vision.models.files.pickles`` is the machine that asks.

Errors::

    Exception
    └── PickleError     damaged, or beyond a limit
        ├── WantsCode   it would import or call what is no data
        └── OddData     data of a kind that no weights have
"""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LARGEST_KEY = 2**60  # hashes of larger integers can be made to collide
_MOST_DIMENSIONS = 64  # as numpy has
CONTAINERS = (dict, list, set, tuple, frozenset)


class PickleError(Exception):
    """A pickle that is damaged or beyond a limit; the message is the reason."""


class WantsCode(PickleError):
    """A pickle that would import or call what is no data; the message is its name."""


class OddData(PickleError):
    """A pickle of data of a kind that no weights have; the message says which."""


class IsProgram(OddData):
    """An archive with a TorchScript program in it."""


@dataclass(frozen=True)
class Storage:
    """The numbers behind a tensor: a range of the file's bytes.

    Attributes:
        numbers: (N,) of the storage's dtype, or uint8 where it has none; looks at the bytes. None: not known yet, and
            tensors are left out.
    """

    numbers: Tensor | None


class Record(dict[str, Any]):
    """The attributes of an object that only holds settings, by name."""


@dataclass(frozen=True)
class Name:
    """A name in a pickle that may be called or is a class."""

    name: str


@dataclass(eq=False)
class UnreadArray:
    """A numpy array before its content is known."""

    value: np.ndarray[Any, Any] | None = None


@dataclass(eq=False)
class UnreadDType:
    """A numpy dtype before its byte order is known."""

    value: np.dtype[Any]


def named(module: str, attribute: str) -> Any:
    """Return what a name stands for here, or refuse it."""
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    name = f"{module}.{attribute}"
    if name in _VALUES:
        return _VALUES[name]
    if name in CALLS or name in RECORDS or name in _CLASSES:
        return Name(name)
    if module == "torch._utils" and attribute.startswith("_rebuild_"):
        raise OddData(f"tensors that are no plain weights ({attribute})")
    raise WantsCode(name)


def as_key(value: Any) -> Any:
    """Return a key or a member of a set, if it is a number or text."""
    value = finished(value)
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bytes | bool | float):
        return value
    if isinstance(value, int) and abs(value) < _LARGEST_KEY:
        return value
    if isinstance(value, tuple) and len(value) <= _MOST_DIMENSIONS:
        return str(
            tuple(as_key(part) for part in value if not isinstance(part, tuple))
        )  # text has hashes of this process
    raise OddData(f"a key that is a {type(value).__name__}")


def finished(value: Any) -> Any:
    """Return a value as callers get it."""
    if isinstance(value, UnreadArray):
        if value.value is None:
            raise PickleError("a numpy array without content")
        return value.value
    if isinstance(value, UnreadDType):
        return value.value
    if isinstance(value, Name):
        return value.name
    return value


def items_of(made: Any) -> list[Any]:
    """Return the values of a container."""
    return list(made.values()) if isinstance(made, dict) else list(made)


def require_text(value: Any) -> str:
    """Return the value, if it is text."""
    if not isinstance(value, str):
        raise PickleError("damaged pickle")
    return value


def require_tuple(value: Any) -> tuple[Any, ...]:
    """Return the value, if it is a tuple."""
    if not isinstance(value, tuple):
        raise PickleError("damaged pickle")
    return value


def require_mapping(value: Any) -> Mapping[Any, Any]:
    """Return the value, if it is a mapping."""
    if not isinstance(value, Mapping):
        raise PickleError("damaged pickle")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    """Return a shape or strides: integers of at least 0."""
    sizes = require_tuple(value)
    if len(sizes) > _MOST_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**62 for size in sizes):
        raise PickleError("damaged shape of a tensor")
    return sizes


# Tensors


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """Look at a storage as a tensor, if all its numbers are in there."""
    if not isinstance(storage, Storage):
        raise PickleError("a tensor without numbers")
    if storage.numbers is None:
        return torch.empty(0)
    size, stride = _sizes(size), _sizes(stride)
    (start,) = _sizes((offset,))
    if len(size) != len(stride):
        raise PickleError("damaged shape of a tensor")
    last = start + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if all(size) else -1
    if last >= len(storage.numbers) or math.prod(max(length, 1) for length in size) >= 2**62:
        raise PickleError("a tensor is larger than the numbers that the file has for it")
    if last < 0:
        return torch.empty(size, dtype=storage.numbers.dtype)
    return storage.numbers.as_strided(size, stride, start)


def _tensor_with_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    """Look at a storage without a dtype of its own as a tensor of one."""
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise PickleError("a tensor without numbers")
    if storage.numbers is None:
        return torch.empty(0)
    whole = len(storage.numbers) // dtype.itemsize * dtype.itemsize
    return _tensor(Storage(storage.numbers[:whole].view(dtype)), offset, size, stride)


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise PickleError("a parameter without numbers")
    return data


def _tensor_of_type(function: Any, kind: Any, arguments: Any, _state: Any) -> Tensor:
    """Build a tensor that has attributes besides its numbers; they are left out."""
    names = [part.name if isinstance(part, Name) else "" for part in (function, kind)]
    if names[0] not in _TENSORS or names[1] not in _CLASSES:
        raise OddData(f"tensors of a class of their own ({names[1] or 'unknown'})")
    return _TENSORS[names[0]](*require_tuple(arguments))


_TENSORS: Mapping[str, Callable[..., Tensor]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}


# numpy

_DATE_DTYPE = re.compile(r"[<>=]?[Mm]8(?:\[[0-9A-Za-z]{1,8}\])?")
_PLAIN_DTYPE = re.compile(r"[<>|=]?(?:[?bBhHiIlLqQefdFD]|b1|[iu][1248]|f[248]|c(?:8|16)|[SU][0-9]{1,5})")


def _dtype(name: Any, *_: Any) -> UnreadDType:
    if isinstance(name, bytes):
        name = name.decode("latin1")
    if isinstance(name, str) and _DATE_DTYPE.fullmatch(name):
        return UnreadDType(np.dtype(np.int64))  # the count of the unit
    if not isinstance(name, str) or not _PLAIN_DTYPE.fullmatch(name):
        kind = "Python objects" if str(name).strip("|<>=").startswith("O") else f"the dtype {str(name)[:20]!r}"
        raise OddData(f"numpy data of {kind}; expected numbers or text")
    return UnreadDType(np.dtype(name))


def set_byte_order(target: UnreadDType, state: tuple[Any, ...]) -> None:
    """Read the byte order in a dtype's state; fields are refused."""
    if len(state) < 3 or any(part is not None for part in state[2:5]):
        raise OddData("numpy data with fields")
    order = _as_text(state[1])
    if order not in ("<", ">", "|", "="):
        raise PickleError("damaged dtype")
    if order == "<":
        target.value = target.value.newbyteorder("<")
    elif order == ">":
        target.value = target.value.newbyteorder(">")


def _bytes(value: Any) -> bytes:
    if isinstance(value, str):
        value = value.encode("latin1")
    if not isinstance(value, bytes | bytearray):
        raise OddData("a numpy array of Python objects")
    return bytes(value)


def _as_text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else require_text(value)


def filled_array(state: tuple[Any, ...]) -> np.ndarray[Any, Any]:
    """Return the array of ``(version, shape, dtype, whether columns come first, bytes)``."""
    shape, dtype, columns_first, content = state[-4:]
    return _from_bytes(_bytes(content), dtype, shape, "F" if columns_first else "C")


def _from_bytes(content: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> np.ndarray[Any, Any]:
    shape, content = _sizes(shape), _bytes(content)
    if not isinstance(dtype, UnreadDType):
        raise PickleError("damaged numpy array")
    if math.prod(shape) * dtype.value.itemsize != len(content):
        raise PickleError("a numpy array is not as long as its shape says")
    if not content:
        return np.empty(shape, dtype.value) if math.prod(map(bool, shape)) else np.empty((0,), dtype.value)
    return np.frombuffer(content, dtype.value).reshape(shape, order="F" if order == "F" else "C")


def _new_array(*_: Any) -> UnreadArray:
    return UnreadArray()


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any, *rest: Any) -> UnreadArray:
    return UnreadArray(_from_bytes(content, dtype, shape, _as_text(order), *rest))


def _scalar(dtype: Any, content: Any) -> Any:
    return _from_bytes(content, dtype, (1,), "C")[0]


# Other data


def _encode(text: Any, encoding: Any) -> bytes:
    """Return bytes that old pickles write as text."""
    if encoding not in ("latin1", "latin-1"):
        raise OddData(f"bytes in the encoding {str(encoding)[:20]!r}")
    return require_text(text).encode("latin1")


def _empty_bytes(*arguments: Any) -> bytes:
    if arguments:
        raise WantsCode("builtins.bytes")
    return b""


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((as_key(key), finished(value)) for key, value in pairs)


def _defaults(*_: Any) -> dict[Any, Any]:
    return {}  # what it would make for a missing key is of no use here


def _counter(counts: Any = None) -> Counter[Any]:
    return Counter({as_key(key): count for key, count in require_mapping(counts or {}).items()})


def _deque(items: Any = (), _: Any = None) -> list[Any]:
    return [finished(item) for item in require_tuple(tuple(items) if isinstance(items, list) else items)]


def _bytearray(content: Any = b"", encoding: Any = "latin-1") -> bytes:
    """Return bytes that are in the file; a number would ask for memory."""
    if isinstance(content, str):
        return _encode(content, encoding)
    if not isinstance(content, bytes | bytearray):
        raise WantsCode("builtins.bytearray")
    return bytes(content)


def _set(items: Any = ()) -> set[Any]:
    return {as_key(item) for item in items}


def _frozen(items: Any = ()) -> frozenset[Any]:
    return frozenset(_set(items))


def _complex(real: Any, imaginary: Any = 0.0) -> complex:
    return complex(float(real), float(imaginary))


def _size(sizes: Any) -> torch.Size:
    return torch.Size(_sizes(sizes))


def _shown(name: str) -> Callable[..., str]:
    """Return a function that keeps a small value as text."""

    def show(*parts: Any) -> str:
        return f"{name}({', '.join(str(part)[:100] for part in parts[:16] if not isinstance(part, CONTAINERS))})"

    return show


def _path(*parts: Any) -> str:
    return "/".join(map(require_text, parts))


_PATHS = ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
_DATES = ("date", "datetime", "time", "timedelta", "timezone")
CALLS: Mapping[str, Callable[..., Any]] = {
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_type,
    "torch._utils._rebuild_device_tensor_from_numpy": lambda *_: _refuse("tensors of another device"),
    "torch.Size": _size,
    "torch.device": _shown("device"),
    "numpy.dtype": _dtype,
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _new_array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
    "_codecs.encode": _encode,
    "builtins.bytes": _empty_bytes,
    "builtins.bytearray": _bytearray,
    **{f"builtins.{kind}": _shown(kind) for kind in ("range", "slice")},
    "builtins.xrange": _shown("range"),  # as protocol 2 calls it
    "builtins.set": _set,
    "builtins.frozenset": _frozen,
    "builtins.complex": _complex,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _defaults,
    "collections.Counter": _counter,
    "collections.deque": _deque,
    "copyreg._reconstructor": lambda *_: None,  # see _Machine._call
    **{f"datetime.{kind}": _shown(kind) for kind in _DATES},
    **{f"{module}.{kind}": _path for module in ("pathlib", "pathlib._local") for kind in _PATHS},
    "decimal.Decimal": _shown("Decimal"),
    "fractions.Fraction": _shown("Fraction"),
}
RECORDS = {  # classes that only hold settings; none of them is imported
    "argparse.Namespace",
    "types.SimpleNamespace",
    "uuid.UUID",
    "addict.addict.Dict",
    "box.box.Box",
    "detectron2.config.config.CfgNode",
    "easydict.EasyDict",
    "fvcore.common.config.CfgNode",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "ml_collections.config_dict.config_dict.ConfigDict",
    "munch.Munch",
    *(f"omegaconf.base.{kind}" for kind in ("ContainerMetadata", "Metadata")),
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Bytes", "Float", "Integer", "Path", "String")),
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
}
_CLASSES = {  # that others are told about, or that stand for themselves
    "builtins.object",
    *(f"builtins.{kind}" for kind in ("bool", "bytes", "dict", "float", "int", "list", "str", "tuple", "type")),
    *(f"builtins.{kind}" for kind in ("long", "unicode")),  # as protocol 2 calls int and str
    *(f"numpy.{kind}" for kind in ("bool_", "float16", "float32", "float64", "int32", "int64", "uint8")),
    "numpy.ndarray",
    "torch.Tensor",
    "torch._tensor.Tensor",
    "torch.nn.parameter.Buffer",
    "torch.nn.parameter.Parameter",
    "typing.Any",
}
_STORAGES = {
    "Bool": torch.bool,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Float": torch.float32,
    "Double": torch.float64,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
_VALUES: Mapping[str, Any] = {
    **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.UntypedStorage": torch.uint8,
    "torch.strided": "strided",
}


def _refuse(reason: str) -> Any:
    raise OddData(reason)
