"""Names of architectures, parsed once into typed values by a strict grammar.

::

    ARCH         NAME | NAME:OPTIONS | torchvision:NAME | timm:NAME | conditioned:LAYER@ARCH | FILE.py:FUNCTION
    NAME         letters, digits and underscores of ASCII; timm's also have dots and hyphens
    OPTIONS      NAME=NUMBER, NAME=NUMBER, ...; no spaces; 0 to 1024
    LAYER        parts of letters, digits, underscores and hyphens, with dots between them
    FILE         a path; the only part that may hold spaces

No name holds control, invisible or bidirectional characters, or is longer than 1,000. Building ``FILE.py:FUNCTION`` runs the
file. So that form is parsed only where the caller allows it: for what a user types, never for what a file names.
Which names exist is known to ``lustral.vision.models.build``.

Errors::

    ValueError
    └── ArchitectureError      the name does not follow the grammar
        └── CodeRefusedError   it is Python code, which is not allowed here
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lustral.core.characters import visible

CONDITIONED = "conditioned"  # the first word of conditioned:LAYER@BASE
MOST_NESTED = 4  # conditioned networks inside each other
LARGEST_OPTION = 1024
LONGEST_NAME = 1000  # characters
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_TIMM_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_LAYER = re.compile(r"[\w-]+(\.[\w-]+)*")
_OPTION = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)=(?P<value>[0-9]{1,4})")
_PYTHON_FILE = re.compile(r".+\.py:.+")  # generous: what looks like code is called code
_SHOWN = 200  # characters of a name in a message


class ArchitectureError(ValueError):
    """The name of an architecture does not follow the grammar; the message says how."""


class CodeRefusedError(ArchitectureError):
    """The name of an architecture is Python code where none is allowed."""


@dataclass(frozen=True)
class Registered:
    """One of our own networks.

    Attributes:
        name: key of ``lustral.vision.models.NETWORKS``, once it is built.
        options: (name, value) in the order given, each name once.
    """

    name: str
    options: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        """Return the name that parses to this."""
        options = ",".join(f"{name}={value}" for name, value in self.options)
        return f"{self.name}:{options}" if options else self.name


@dataclass(frozen=True)
class Torchvision:
    """A classification network of torchvision, untrained."""

    name: str

    def __str__(self) -> str:
        """Return the name that parses to this."""
        return f"torchvision:{self.name}"


@dataclass(frozen=True)
class Timm:
    """A network of timm, untrained."""

    name: str

    def __str__(self) -> str:
        """Return the name that parses to this."""
        return f"timm:{self.name}"


@dataclass(frozen=True)
class PythonFile:
    """What a function of a user's own Python file returns; building it runs the file."""

    file: str
    function: str

    def __str__(self) -> str:
        """Return the name that parses to this."""
        return f"{self.file}:{self.function}"


@dataclass(frozen=True)
class ConditionedOn:
    """A network with a polarizer for each class before one of its layers.

    Attributes:
        layer: name of the layer in the network of ``base``.
        base: the network inside.
    """

    layer: str
    base: Architecture

    def __str__(self) -> str:
        """Return the name that parses to this."""
        return f"{CONDITIONED}:{self.layer}@{self.base}"


@dataclass(frozen=True)
class Transformers:
    """A network of the package transformers, untrained, as the config.json of a model folder describes it.

    It has a name to be shown, but none to be parsed: the description is in the folder.

    Attributes:
        model_type: key of ``lustral.vision.models.files.hub_folder``'s list.
        settings: (name, value) of numbers, words and tuples of them.
        odd: names of other settings; a network that needs one is not built.
    """

    model_type: str
    settings: tuple[tuple[str, Any], ...]
    odd: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return a name to be shown."""
        return f"transformers:{self.model_type}"


Architecture = Registered | Torchvision | Timm | PythonFile | ConditionedOn | Transformers


def parse_architecture(text: str, *, allow_code: bool) -> Architecture:
    """Parse the name of an architecture.

    Args:
        text: the name, from anywhere.
        allow_code: whether it may be ``FILE.py:FUNCTION``, alone or inside of others; only for what a user gives himself.

    Raises:
        CodeRefusedError: it is Python code, and ``allow_code`` is false.
        ArchitectureError: it does not follow the grammar.

    >>> parse_architecture("conditioned:conv1@small_cnn:width=8", allow_code=False)
    ConditionedOn(layer='conv1', base=Registered(name='small_cnn', options=(('width', 8),)))
    """
    if text.count(f"{CONDITIONED}:") > MOST_NESTED:
        raise _malformed_nesting(text)
    if not 1 <= len(text) <= LONGEST_NAME:
        raise ArchitectureError(
            f"expected the name of an architecture, 1 to {LONGEST_NAME} characters; got {len(text)}"
        )
    if not text.isprintable() or visible(text) != text:
        raise ArchitectureError(
            f"expected an architecture without control, invisible or bidirectional characters; got {text[:_SHOWN]!a}"
        )
    layers, rest = [], text
    while rest.startswith(f"{CONDITIONED}:"):
        layer, _, rest = rest.removeprefix(f"{CONDITIONED}:").partition("@")
        layers.append(layer)
    if layers and not (all(map(_LAYER.fullmatch, layers)) and rest):
        raise _malformed_nesting(text)
    parsed = _parse_base(rest, text, allow_code=allow_code)
    for layer in reversed(layers):
        parsed = ConditionedOn(layer, parsed)
    return parsed


def as_architecture(arch: str | Architecture) -> Architecture:
    """Return what a caller gave as ``arch``; text of a caller's own may be Python code."""
    return parse_architecture(arch, allow_code=True) if isinstance(arch, str) else arch


def innermost(arch: Architecture) -> Architecture:
    """Return the network inside of all conditioned ones."""
    while isinstance(arch, ConditionedOn):
        arch = arch.base
    return arch


def runs_user_code(arch: str | Architecture) -> bool:
    """Tell whether building this architecture runs a Python file: ``FILE.py:FUNCTION``, alone or inside of others."""
    try:
        return isinstance(innermost(as_architecture(arch)), PythonFile)
    except ArchitectureError:  # it will never be built
        return False


def code_in(content: Any) -> Iterator[str]:
    """Yield every text in nested plain data, e.g. a specification, that is an architecture of Python code."""
    waiting = [content]  # no recursion: content may be nested without end
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            if runs_user_code(part):
                yield part
        elif isinstance(part, Mapping):
            waiting += part.values()
        elif isinstance(part, list | tuple):
            waiting += part


def _parse_base(text: str, whole: str, *, allow_code: bool) -> Architecture:
    """Parse what is no conditioned network; ``whole`` is shown in messages."""
    shown = repr(whole[:_SHOWN])
    if _PYTHON_FILE.fullmatch(text):
        if not allow_code:
            raise CodeRefusedError(f"{shown} is Python code: building it would run the file")
        file, _, function = text.rpartition(":")
        if not file.endswith(".py") or not function.isidentifier():
            raise ArchitectureError(f"expected FILE.py:FUNCTION, the name of a function; got {shown}")
        return PythonFile(file, function)
    name, colon, rest = text.partition(":")
    if name == "torchvision":
        if not _WORD.fullmatch(rest):
            raise ArchitectureError(f"unknown torchvision classifier {rest[:_SHOWN]!r}; expected torchvision:NAME")
        return Torchvision(rest)
    if name == "timm":
        if not _TIMM_NAME.fullmatch(rest):
            raise ArchitectureError(
                f"unknown timm model {rest[:_SHOWN]!r}; expected timm:NAME, a name of timm's own list"
            )
        return Timm(rest)
    if not _WORD.fullmatch(name):
        raise ArchitectureError(
            f"unknown architecture {shown}; expected a name of ASCII letters, digits and underscores, torchvision:NAME, "
            f"timm:NAME, {CONDITIONED}:LAYER@BASE or FILE.py:FUNCTION"
        )
    options: dict[str, int] = {}
    for item in rest.split(",") if colon else []:
        found = _OPTION.fullmatch(item)
        if found is None or int(found["value"]) > LARGEST_OPTION:
            option = item.partition("=")[0][:_SHOWN]
            wanted = f"{option}=1 .. {LARGEST_OPTION}" if option.isidentifier() and option.isascii() else "NAME=NUMBER"
            raise ArchitectureError(f"expected {wanted} in {shown}; got {item[:_SHOWN]!r}")
        if found["name"] in options:
            raise ArchitectureError(f"{found['name']} is given twice in {shown}; take one of them away")
        options[found["name"]] = int(found["value"])
    return Registered(name, tuple(options.items()))


def _malformed_nesting(text: str) -> ArchitectureError:
    return ArchitectureError(
        f"expected {CONDITIONED}:LAYER@BASE, at most {MOST_NESTED} inside each other; got {text[:_SHOWN]!r}"
    )
