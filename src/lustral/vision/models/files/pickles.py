"""Read the pickles of model files without running anything that they name.

A pickle is a program for a stack machine that may import and call whatever it names. This reader is such a machine with
nothing to import: a name is looked up in ``pickle_values``, and one that is not there ends the reading. What it
returns are numbers, text, containers, and tensors that look at the bytes of the file.

* A name is never imported. Objects of a few classes that only hold settings (``RECORDS`` there) become mappings.
* Whatever a pickle declares (lengths, shapes, strides) is compared with the bytes that are there before memory is taken.
* Containers are filled before they go into others. So there are no circles, and depth and size are known while reading.
* Keys are numbers and text, whose hashes an author cannot choose.
"""

from __future__ import annotations

import gc
import io
import pickletools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lustral.vision.models.files.pickle_values import (
    CALLS,
    CONTAINERS,
    RECORDS,
    Name,
    PickleError,
    Record,
    Storage,
    UnreadArray,
    UnreadDType,
    WantsCode,
    as_key,
    filled_array,
    finished,
    items_of,
    named,
    require_mapping,
    require_text,
    require_tuple,
    set_byte_order,
)

MOST_BYTES = 2**26  # of one pickle, without the tensors' numbers; that of a ResNet-152 has 2**17
MOST_STEPS = 1_000_000  # opcodes of one pickle; about 60 for a tensor, 15 for a note about an image
MOST_ITEMS = 10_000_000  # values in all containers, counted each time that they are reached
DEEPEST = 64  # containers inside each other


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
            stack.append(self._filled(frozenset(map(as_key, items)), items))
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            stack.append(named(module, attribute))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            stack.append(named(require_text(module), require_text(attribute)))
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
            stack.append(self.find_storage(require_tuple(self.pop())))
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
            if isinstance(item, CONTAINERS):
                if item is container:
                    raise PickleError("a container holds itself")
                inner_depth, inner_size = self.measures.get(id(item), (1, 1))
                depth, size = max(depth, inner_depth + 1), size + inner_size
                self.placed.add(id(item))
        if depth > DEEPEST or size > MOST_ITEMS:
            raise PickleError(f"more than {DEEPEST} containers inside each other, or {MOST_ITEMS} values")
        self.measures[id(container)] = depth, size

    def _extend(self, container: Any, items: list[Any]) -> None:
        items = [finished(item) for item in items]
        self._place(container, items)
        if isinstance(container, list):
            container.extend(items)
        elif isinstance(container, set):
            container.update(map(as_key, items))
        else:
            raise PickleError("damaged pickle")

    def _set_items(self, container: Any, items: list[Any]) -> None:
        if not isinstance(container, dict) or len(items) % 2:
            raise PickleError("damaged pickle")
        keys, values = items[::2], [finished(item) for item in items[1::2]]
        values = [None if key == "_parent" else value for key, value in zip(keys, values, strict=True)]  # links back
        self._place(container, values)
        for key, value in zip(keys, values, strict=True):
            container[as_key(key)] = value

    def _new(self, kind: Any, arguments: Any) -> Any:
        """Make an object of a class."""
        name = kind.name if isinstance(kind, Name) else ""
        if name == "collections.OrderedDict" and arguments == ():
            return self._filled(OrderedDict(), [])
        if name not in RECORDS:
            raise WantsCode(name or "a call of a value")
        record = self._filled(Record(), [])
        for item in require_tuple(arguments):
            if isinstance(item, Mapping):
                self._set_items(record, [part for pair in item.items() for part in pair])
        return record

    def _call(self, function: Any, arguments: Any) -> Any:
        """Do what a pickle asks of one of the known functions."""
        name = function.name if isinstance(function, Name) else ""
        arguments = require_tuple(arguments)
        if name in RECORDS:
            return self._new(function, arguments)
        if name == "copyreg._reconstructor":
            kind, *rest = arguments
            return self._new(kind, () if len(rest) < 2 or rest[1] is None else (rest[1],))
        if name in CALLS:
            made = CALLS[name](*arguments)
            return self._filled(made, items_of(made)) if isinstance(made, CONTAINERS) else made
        raise WantsCode(name or "a call of a value")

    def _build(self, target: Any, state: Any) -> None:
        """Give an object its state."""
        if isinstance(target, UnreadDType):
            set_byte_order(target, require_tuple(state))
        elif isinstance(target, UnreadArray):
            target.value = filled_array(require_tuple(state))
        elif isinstance(target, Record):
            for part in state if isinstance(state, tuple) else (state,):
                if part is not None:
                    self._set_items(target, [item for pair in require_mapping(part).items() for item in pair])
        elif isinstance(target, OrderedDict):
            require_mapping(state)  # torch's note of versions; it is not needed
        else:
            raise PickleError("damaged pickle")
