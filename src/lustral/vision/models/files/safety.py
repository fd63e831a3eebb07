"""What a model file would do to whoever opens it with a reader that runs pickles: its format, its imports, its size.

A pickle is a program. The names that it would import are listed here without importing, calling or even building anything: the
opcodes are walked once, and a name is what stands in them. That is less than ``pickles`` does, which reads a file, and it goes
on where that one stops: a file that is refused is listed whole. What a name stands for is asked of ``pickle_values``: data, or
code.

Reference: Python's ``pickletools``, whose opcode table says what each instruction takes.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lustral.core.files import map_regular, sha256_of
from lustral.vision.models.files.contents import MOST_BYTES, SAFETENSORS, Memory
from lustral.vision.models.files.pickle_values import PickleError, WantsCode, named
from lustral.vision.models.files.pickles import MOST_STEPS
from lustral.vision.models.files.torch_files import pickles_inside

Format = Literal["safetensors", "torch archive", "torch before 1.6", "pickle", "tar archive", "unknown"]
COMPUTED = "(a name that is computed while it runs)"
REGISTRY = "(a name from the reader's extension registry)"
DAMAGED = "(not readable from here on)"
MOST_NAMES = 1_000  # different names that are listed of one file
MOST_CHARACTERS = 200  # of a name that is listed; a hostile one may fill the file

_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # the first pickle before torch 1.6
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, names of the storages; then numbers follow
_TEXT = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"}
_KEEPING = {"PUT", "BINPUT", "LONG_BINPUT"}
_RECALLING = {"GET", "BINGET", "LONG_BINGET"}
_SILENT = {"PROTO", "FRAME"}


@dataclass(frozen=True, kw_only=True)
class ImportedName:
    """A name that a pickle would import.

    Attributes:
        name: module and attribute, joined by a dot.
        times: how often the pickle asks for it.
        is_data: whether it only builds numbers, text, containers or tensors; False: it would run code.
    """

    name: str
    times: int
    is_data: bool


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What can be said of a model file without opening it.

    Attributes:
        file: its path, as given.
        format: how it is written; only "safetensors" cannot hold code.
        num_bytes: its size.
        sha256: of its content, in hexadecimal digits.
        imports: names that its pickles would import, those that are no data first.
    """

    file: str
    format: Format
    num_bytes: int
    sha256: str
    imports: tuple[ImportedName, ...] = ()

    @property
    def name(self) -> str:
        """The last part of its path."""
        return Path(self.file).name

    @property
    def code(self) -> tuple[str, ...]:
        """The names that would run code."""
        return tuple(entry.name for entry in self.imports if not entry.is_data)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return {
            "file": self.file,
            "format": self.format,
            "bytes": self.num_bytes,
            "sha256": self.sha256,
            "imports": [asdict(entry) for entry in self.imports],
        }


def safety_record(facts: Iterable[FileFacts]) -> dict[str, Any]:
    """Return the facts about the files of a model, ready for JSON, and whether any of them would run code."""
    facts = list(facts)
    return {"runs_code": any(each.code for each in facts), "files": [each.to_dict() for each in facts]}


def facts_of_files(files: Mapping[Path, str]) -> tuple[FileFacts, ...]:
    """Return the facts about files whose SHA-256 is known."""
    return tuple(file_facts(path, sha256=digest) for path, digest in files.items())


def file_facts(path: Path, *, sha256: str | None = None) -> FileFacts:
    """Look at a model file, whatever is in it.

    Args:
        path: a regular file.
        sha256: of its content, if it is known.

    Raises:
        OSError: it is not there or may not be read.
        ValueError: it is no regular file, or larger than ``MOST_BYTES``.
    """
    memory = map_regular(path, most=MOST_BYTES)
    form = format_of(path, memory)
    names = Counter[str]() if form in ("safetensors", "tar archive") else _imports_inside(memory, form)
    if form == "unknown" and set(names) <= {DAMAGED}:
        names.clear()  # no pickle of the first protocols either, which have no sign of their own
    elif form == "unknown":
        form = "pickle"
    listed = (
        ImportedName(name=name[:MOST_CHARACTERS], times=times, is_data=is_data(name)) for name, times in names.items()
    )
    return FileFacts(
        file=str(path),
        format=form,
        num_bytes=len(memory),
        sha256=sha256 or sha256_of(path),
        imports=tuple(sorted(listed, key=lambda entry: (entry.is_data, entry.name))[:MOST_NAMES]),
    )


def _imports_inside(memory: Memory, form: Format) -> Counter[str]:
    most = _LEGACY_PICKLES if form == "torch before 1.6" else None
    names: Counter[str] = Counter()
    try:
        for content in pickles_inside(memory):
            names.update(imports_of(content, most=most))
    except PickleError:
        names[DAMAGED] += 1
    return names


def format_of(path: Path, memory: Memory) -> Format:
    """Return how a file is written, by its first bytes; safetensors have none of their own and are known by their name."""
    if memory[:4] == b"PK\x03\x04":
        return "torch archive"
    if memory[257:262] == b"ustar":
        return "tar archive"
    if memory[: len(_LEGACY_MAGIC)] == _LEGACY_MAGIC:
        return "torch before 1.6"
    if path.suffix == SAFETENSORS:
        return "safetensors"
    return "pickle" if memory[:1] == pickle.PROTO else "unknown"


def is_data(name: str) -> bool:
    """Tell whether a name that a pickle imports stands for data alone.

    >>> is_data("collections.OrderedDict"), is_data("posix.system"), is_data(COMPUTED)
    (True, False, False)
    """
    module, _, attribute = name.rpartition(".")
    try:
        named(module, attribute)
    except WantsCode:
        return False
    except PickleError:
        return True  # tensors of a kind that is not read, which are data all the same
    return True


def imports_of(content: bytes, *, most: int | None = None) -> Counter[str]:
    r"""Return the names that a pickle would import, and the pickles that follow it at once, as in a file before torch 1.6.

    Where a name is not written out in front of the instruction that imports it, it counts as ``COMPUTED``.

    Args:
        content: begins with a pickle.
        most: how many pickles to look at; None: as many as follow each other.

    >>> imports_of(b"cposix\nsystem\n(S'ls'\ntR.")
    Counter({'posix.system': 1})
    """
    file, names, steps, seen = io.BytesIO(content), Counter[str](), 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd escapes in the text of damaged files
        while True:
            walk, seen = _Walk(), seen + 1
            try:
                for opcode, argument, _ in pickletools.genops(file):
                    steps += 1
                    if steps > MOST_STEPS:
                        raise ValueError(f"more than {MOST_STEPS} steps")
                    name = walk.step(opcode.name, argument)
                    if name is not None:
                        names[name] += 1
            except Exception:  # hostile bytes can raise anything
                names[DAMAGED] += 1
                return names
            if seen == most or content[file.tell() : file.tell() + 1] != pickle.PROTO:
                return names


class _Walk:
    """The last values of a pickle as far as they are text: enough to read the names that stand in it."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._recent: list[str | None] = [None, None]
        self._memo: dict[int, str | None] = {}

    def step(self, opcode: str, argument: Any) -> str | None:
        """Pass one instruction, and return the name that it imports, or None."""
        last = self._recent[-1]
        if opcode in _SILENT:
            return None
        if opcode == "MEMOIZE":
            self._memo[len(self._memo)] = last
            return None
        if opcode in _KEEPING:
            self._memo[int(argument)] = last
            return None
        found: str | None = None
        if opcode in ("GLOBAL", "INST"):
            found = ".".join(str(argument).split(" ", 1))
        elif opcode == "STACK_GLOBAL":
            module, attribute = self._recent
            found = COMPUTED if module is None or attribute is None else f"{module}.{attribute}"
        elif opcode in ("EXT1", "EXT2", "EXT4"):
            found = REGISTRY
        text = str(argument) if opcode in _TEXT else self._memo.get(int(argument)) if opcode in _RECALLING else None
        self._recent = [last, text]
        return found
