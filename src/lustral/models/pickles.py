"""Read the pickles of model files without running anything that they name.

A pickle is a program for a stack machine that may import and call whatever it names. This reader is such a machine with
nothing to import: a name is looked up in ``_CALLS``, ``_RECORDS`` or ``_VALUES``, and any other ends the reading. What it
returns are numbers, text, containers, and tensors that look at the bytes of the file.

* A name is never imported. Objects of a few classes that only hold settings (``_RECORDS``) become mappings.
* Whatever a pickle declares (lengths, shapes, strides) is compared with the bytes that are there before memory is taken.
* Containers are filled before they go into others. So there are no circles, and depth and size are known while reading.
* Keys are numbers and text, whose hashes an author cannot choose.
"""

from __future__ import annotations

import gc
import io
import math
import pickletools
import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_BYTES = 2**26  # of one pickle, without the tensors' numbers; that of a ResNet-152 has 2**17
MOST_STEPS = 1_000_000  # opcodes of one pickle; about 60 for a tensor, 15 for a note about an image
MOST_ITEMS = 10_000_000  # values in all containers, counted each time that they are reached
DEEPEST = 64  # containers inside each other
_LARGEST_KEY = 2**60  # hashes of larger integers can be made to collide
_MOST_DIMENSIONS = 64  # as numpy has


class PickleError(Exception):
    """A pickle that is damaged or beyond a limit; the message is the reason."""


class WantsCode(PickleError):
    """A pickle that would import or call what is no data; the message is its name."""


class OddData(PickleError):
    """A pickle of data of a kind that no weights have; the message says which."""


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
class _Name:
    """A name in a pickle that may be called or is a class."""

    name: str


@dataclass(eq=False)
class _Array:
    """A numpy array before its content is known."""

    value: np.ndarray[Any, Any] | None = None


@dataclass(eq=False)
class _DType:
    """A numpy dtype before its byte order is known."""

    value: np.dtype[Any]


def read_pickle(file: io.BytesIO, find_storage: Callable[[tuple[Any, ...]], Storage]) -> Any:
    """Read one pickle and leave the file behind its end.

    Args:
        file: the bytes, at the start of a pickle.
        find_storage: returns the storage that a persistent name stands for, or raises ``PickleError``.

    Returns:
        Numbers, text, bytes, numpy arrays, tensors, and lists, tuples, sets and mappings of them.

    Raises:
        PickleError: see its kinds; nothing was imported or called.
    """
    machine = _Machine(find_storage)
    with _without_collector(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd escapes in the text of damaged files
        return _run(machine, file)


def _run(machine: _Machine, file: io.BytesIO) -> Any:
    steps = 0
    try:
        for opcode, argument, _ in pickletools.genops(file):
            steps += 1
            if steps > MOST_STEPS:
                raise PickleError(f"more than {MOST_STEPS} steps")
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except PickleError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise PickleError(f"damaged pickle ({type(error).__name__})") from error
    raise PickleError("damaged pickle")


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keep Python from looking through all containers again and again while a million of them are made."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


_MARK = object()
_NOTHING = {"PROTO", "FRAME"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
}
_EMPTY: Mapping[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
_FIXED = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CONTAINERS = (dict, list, set, tuple, frozenset)


@dataclass
class _Machine:
    """The stack, the memo, and what is known of each container."""

    find_storage: Callable[[tuple[Any, ...]], Storage]
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    measures: dict[int, tuple[int, int]] = field(default_factory=dict)  # by id: depth and number of values
    placed: set[int] = field(default_factory=set)  # by id: containers that are inside of others
    kept: list[Any] = field(default_factory=list)  # so that no id is used twice

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleError("damaged pickle")
        return value

    def pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def step(self, name: str, argument: Any) -> None:
        """Run one opcode."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = self._top()
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self._top()
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _NOTHING:
            pass
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _FIXED:
            count = _FIXED[name]
            items = [self.pop() for _ in range(count)][::-1]
            stack.append(self._filled(tuple(items), items))
        elif name == "TUPLE":
            items = self.pop_to_mark()
            stack.append(self._filled(tuple(items), items))
        elif name in _EMPTY:
            stack.append(self._filled(_EMPTY[name](), []))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [self.pop()] if name == "APPEND" else self.pop_to_mark()
            self._extend(self._top(), items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.pop_to_mark()
            self._set_items(self._top(), items)
        elif name == "DICT":
            items = self.pop_to_mark()
            stack.append(self._filled({}, []))
            self._set_items(stack[-1], items)
        elif name == "LIST":
            items = self.pop_to_mark()
            stack.append(self._filled(items, items))
        elif name == "FROZENSET":
            items = self.pop_to_mark()
            stack.append(self._filled(frozenset(map(_key, items)), items))
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            stack.append(_named(module, attribute))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            stack.append(_named(_text(module), _text(attribute)))
        elif name == "REDUCE":
            arguments, function = self.pop(), self.pop()
            stack.append(self._call(function, arguments))
        elif name == "NEWOBJ":
            arguments, kind = self.pop(), self.pop()
            stack.append(self._new(kind, arguments))
        elif name == "BUILD":
            state = self.pop()
            self._build(self._top(), state)
        elif name == "BINPERSID":
            stack.append(self.find_storage(_tuple(self.pop())))
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self.pop_to_mark()
        elif name == "DUP":
            stack.append(self._top())
        else:
            raise WantsCode(f"the pickle instruction {name}")

    def _top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise PickleError("damaged pickle")
        return self.stack[-1]

    def _filled(self, container: Any, items: list[Any]) -> Any:
        """Note a container with its first items."""
        if id(container) not in self.measures:
            self.kept.append(container)
            self.measures[id(container)] = (1, 1)
        if items:
            self._place(container, items)
        return container

    def _place(self, container: Any, items: list[Any]) -> None:
        """Count items that go into a container; from now on they stay as they are."""
        if id(container) in self.placed:
            raise PickleError("a container is filled after it went into another")
        depth, size = self.measures[id(container)]
        size += len(items)
        for item in items:
            if isinstance(item, _CONTAINERS):
                if item is container:
                    raise PickleError("a container holds itself")
                inner_depth, inner_size = self.measures.get(id(item), (1, 1))
                depth, size = max(depth, inner_depth + 1), size + inner_size
                self.placed.add(id(item))
        if depth > DEEPEST or size > MOST_ITEMS:
            raise PickleError(f"more than {DEEPEST} containers inside each other, or {MOST_ITEMS} values")
        self.measures[id(container)] = depth, size

    def _extend(self, container: Any, items: list[Any]) -> None:
        items = [_finished(item) for item in items]
        self._place(container, items)
        if isinstance(container, list):
            container.extend(items)
        elif isinstance(container, set):
            container.update(map(_key, items))
        else:
            raise PickleError("damaged pickle")

    def _set_items(self, container: Any, items: list[Any]) -> None:
        if not isinstance(container, dict) or len(items) % 2:
            raise PickleError("damaged pickle")
        keys, values = items[::2], [_finished(item) for item in items[1::2]]
        values = [None if key == "_parent" else value for key, value in zip(keys, values, strict=True)]  # links back
        self._place(container, values)
        for key, value in zip(keys, values, strict=True):
            container[_key(key)] = value

    def _new(self, kind: Any, arguments: Any) -> Any:
        """Make an object of a class."""
        name = kind.name if isinstance(kind, _Name) else ""
        if name == "collections.OrderedDict" and arguments == ():
            return self._filled(OrderedDict(), [])
        if name not in _RECORDS:
            raise WantsCode(name or "a call of a value")
        record = self._filled(Record(), [])
        for item in _tuple(arguments):
            if isinstance(item, Mapping):
                self._set_items(record, [part for pair in item.items() for part in pair])
        return record

    def _call(self, function: Any, arguments: Any) -> Any:
        """Do what a pickle asks of one of the known functions."""
        name = function.name if isinstance(function, _Name) else ""
        arguments = _tuple(arguments)
        if name in _RECORDS:
            return self._new(function, arguments)
        if name == "copyreg._reconstructor":
            kind, *rest = arguments
            return self._new(kind, () if len(rest) < 2 or rest[1] is None else (rest[1],))
        if name in _CALLS:
            made = _CALLS[name](*arguments)
            return self._filled(made, _items(made)) if isinstance(made, _CONTAINERS) else made
        raise WantsCode(name or "a call of a value")

    def _build(self, target: Any, state: Any) -> None:
        """Give an object its state."""
        if isinstance(target, _DType):
            _set_byte_order(target, _tuple(state))
        elif isinstance(target, _Array):
            target.value = _array(_tuple(state))
        elif isinstance(target, Record):
            for part in state if isinstance(state, tuple) else (state,):
                if part is not None:
                    self._set_items(target, [item for pair in _mapping(part).items() for item in pair])
        elif isinstance(target, OrderedDict):
            _mapping(state)  # torch's note of versions; it is not needed
        else:
            raise PickleError("damaged pickle")


def _named(module: str, attribute: str) -> Any:
    """Return what a name stands for here, or refuse it."""
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    name = f"{module}.{attribute}"
    if name in _VALUES:
        return _VALUES[name]
    if name in _CALLS or name in _RECORDS or name in _CLASSES:
        return _Name(name)
    if module == "torch._utils" and attribute.startswith("_rebuild_"):
        raise OddData(f"tensors that are no plain weights ({attribute})")
    raise WantsCode(name)


def _key(value: Any) -> Any:
    """Return a key or a member of a set, if it is a number or text."""
    value = _finished(value)
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bytes | bool | float):
        return value
    if isinstance(value, int) and abs(value) < _LARGEST_KEY:
        return value
    if isinstance(value, tuple) and len(value) <= _MOST_DIMENSIONS:
        return str(
            tuple(_key(part) for part in value if not isinstance(part, tuple))
        )  # text has hashes of this process
    raise OddData(f"a key that is a {type(value).__name__}")


def _finished(value: Any) -> Any:
    """Return a value as callers get it."""
    if isinstance(value, _Array):
        if value.value is None:
            raise PickleError("a numpy array without content")
        return value.value
    if isinstance(value, _DType):
        return value.value
    if isinstance(value, _Name):
        return value.name
    return value


def _items(made: Any) -> list[Any]:
    return list(made.values()) if isinstance(made, dict) else list(made)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise PickleError("damaged pickle")
    return value


def _tuple(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        raise PickleError("damaged pickle")
    return value


def _mapping(value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise PickleError("damaged pickle")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    """Return a shape or strides: integers of at least 0."""
    sizes = _tuple(value)
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
    names = [part.name if isinstance(part, _Name) else "" for part in (function, kind)]
    if names[0] not in _TENSORS or names[1] not in _CLASSES:
        raise OddData(f"tensors of a class of their own ({names[1] or 'unknown'})")
    return _TENSORS[names[0]](*_tuple(arguments))


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


def _dtype(name: Any, *_: Any) -> _DType:
    if isinstance(name, bytes):
        name = name.decode("latin1")
    if isinstance(name, str) and _DATE_DTYPE.fullmatch(name):
        return _DType(np.dtype(np.int64))  # the count of the unit
    if not isinstance(name, str) or not _PLAIN_DTYPE.fullmatch(name):
        kind = "Python objects" if str(name).strip("|<>=").startswith("O") else f"the dtype {str(name)[:20]!r}"
        raise OddData(f"numpy data of {kind}; expected numbers or text")
    return _DType(np.dtype(name))


def _set_byte_order(target: _DType, state: tuple[Any, ...]) -> None:
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
    return value.decode("latin1") if isinstance(value, bytes) else _text(value)


def _array(state: tuple[Any, ...]) -> np.ndarray[Any, Any]:
    """Return the array of ``(version, shape, dtype, whether columns come first, bytes)``."""
    shape, dtype, columns_first, content = state[-4:]
    return _from_bytes(_bytes(content), dtype, shape, "F" if columns_first else "C")


def _from_bytes(content: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> np.ndarray[Any, Any]:
    shape, content = _sizes(shape), _bytes(content)
    if not isinstance(dtype, _DType):
        raise PickleError("damaged numpy array")
    if math.prod(shape) * dtype.value.itemsize != len(content):
        raise PickleError("a numpy array is not as long as its shape says")
    if not content:
        return np.empty(shape, dtype.value) if math.prod(map(bool, shape)) else np.empty((0,), dtype.value)
    return np.frombuffer(content, dtype.value).reshape(shape, order="F" if order == "F" else "C")


def _new_array(*_: Any) -> _Array:
    return _Array()


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any, *rest: Any) -> _Array:
    return _Array(_from_bytes(content, dtype, shape, _as_text(order), *rest))


def _scalar(dtype: Any, content: Any) -> Any:
    return _from_bytes(content, dtype, (1,), "C")[0]


# Other data


def _encode(text: Any, encoding: Any) -> bytes:
    """Return bytes that old pickles write as text."""
    if encoding not in ("latin1", "latin-1"):
        raise OddData(f"bytes in the encoding {str(encoding)[:20]!r}")
    return _text(text).encode("latin1")


def _empty_bytes(*arguments: Any) -> bytes:
    if arguments:
        raise WantsCode("builtins.bytes")
    return b""


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((_key(key), _finished(value)) for key, value in pairs)


def _defaults(*_: Any) -> dict[Any, Any]:
    return {}  # what it would make for a missing key is of no use here


def _counter(counts: Any = None) -> Counter[Any]:
    return Counter({_key(key): count for key, count in _mapping(counts or {}).items()})


def _deque(items: Any = (), _: Any = None) -> list[Any]:
    return [_finished(item) for item in _tuple(tuple(items) if isinstance(items, list) else items)]


def _bytearray(content: Any = b"", encoding: Any = "latin-1") -> bytes:
    """Return bytes that are in the file; a number would ask for memory."""
    if isinstance(content, str):
        return _encode(content, encoding)
    if not isinstance(content, bytes | bytearray):
        raise WantsCode("builtins.bytearray")
    return bytes(content)


def _set(items: Any = ()) -> set[Any]:
    return {_key(item) for item in items}


def _frozen(items: Any = ()) -> frozenset[Any]:
    return frozenset(_set(items))


def _complex(real: Any, imaginary: Any = 0.0) -> complex:
    return complex(float(real), float(imaginary))


def _size(sizes: Any) -> torch.Size:
    return torch.Size(_sizes(sizes))


def _shown(name: str) -> Callable[..., str]:
    """Return a function that keeps a small value as text."""

    def show(*parts: Any) -> str:
        return f"{name}({', '.join(str(part)[:100] for part in parts[:16] if not isinstance(part, _CONTAINERS))})"

    return show


def _path(*parts: Any) -> str:
    return "/".join(map(_text, parts))


_PATHS = ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
_DATES = ("date", "datetime", "time", "timedelta", "timezone")
_CALLS: Mapping[str, Callable[..., Any]] = {
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
_RECORDS = {  # classes that only hold settings; none of them is imported
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
