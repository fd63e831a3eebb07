"""The files of ``torch.save``: a zip archive, or a row of pickles with the numbers behind them (before torch 1.6).

Nothing here calls ``torch.load``: ``pickles`` reads what is inside, from memory that maps the file. The
directory of an archive is checked before any of its names is used: entries are stored as they are, lie inside the file, and
do not add up to more than it.
"""

from __future__ import annotations

import io
import mmap
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import torch

from lustral.vision.models.files.pickle_values import IsProgram, OddData, PickleError, Storage
from lustral.vision.models.files.pickles import MOST_BYTES, read_pickle

Memory = mmap.mmap | bytearray
FIRST_SAFE_TORCH = (2, 10)
MOST_DIRECTORY = 2**24  # bytes of an archive's directory; an entry takes about 100

_MOST_PADDING = 2**17  # bytes between two entries of an archive; torch puts at most 4 KiB there, a name 64
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file before torch 1.6
_LEGACY_PROTOCOL = 1001
_END = b"PK\x05\x06"
_LOCAL = b"PK\x03\x04"


@dataclass(frozen=True)
class Entry:
    """Where a file inside an archive has its bytes.

    Attributes:
        start: first byte.
        size: number of bytes.
        checksums: where the CRC-32 of these bytes is written: in front of them, and in the directory.
    """

    start: int
    size: int
    checksums: tuple[int, ...]


def reads_pickles(version: str) -> bool:
    """Tell whether pickled model files are opened with this version of torch.

    Before 2.10, torch's own weights-only reading could be made to run code (CVE-2025-32434, CVE-2026-24747). A file that we
    call harmless would be opened with it next.

    >>> reads_pickles("2.9.1+cu128"), reads_pickles("2.10.0"), reads_pickles("3.0.0a0")
    (False, True, True)
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) >= FIRST_SAFE_TORCH


def read_torch(memory: Memory) -> Any:
    """Return what a file of ``torch.save`` holds; its tensors look at ``memory``.

    Raises:
        PickleError: it is damaged, beyond a limit, or holds more than data; see the error's kinds.
    """
    if memory[257:262] == b"ustar":
        raise OddData("a tar archive, as torch wrote before version 0.1.10: open and save it with a newer one")
    try:
        return _read_archive(memory) if memory[:4] == _LOCAL else _read_legacy(memory)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, struct.error) as error:
        raise PickleError(f"{type(error).__name__}") from error  # hostile bytes


def pickles_inside(memory: Memory) -> list[bytes]:
    """Return the pickles in a file of ``torch.save``, or in one of ``pickle.dump``, as bytes that nobody read yet.

    Raises:
        PickleError: the directory of an archive is damaged, or a pickle is larger than ``MOST_BYTES``.
    """
    if memory[:4] != _LOCAL:
        return [bytes(memory[:MOST_BYTES])]
    try:
        entries = [entry for name, entry in _directory(memory).items() if name.endswith(".pkl")]
    except (LookupError, ValueError, struct.error) as error:
        raise PickleError(f"{type(error).__name__}") from error  # hostile bytes
    if any(entry.size > MOST_BYTES for entry in entries):
        raise PickleError(f"a pickle of more than {MOST_BYTES} bytes")
    return [bytes(memory[entry.start : entry.start + entry.size]) for entry in entries]


def correct_checksums(memory: Memory) -> None:
    """Write the checksums anew in an archive whose tensors were changed; other files have none."""
    if memory[:4] == _LOCAL:
        for entry in _directory(memory).values():
            checksum = zlib.crc32(memoryview(memory)[entry.start : entry.start + entry.size])
            for place in entry.checksums:
                memory[place : place + 4] = struct.pack("<I", checksum)


def _read_archive(memory: Memory) -> Any:
    entries = _directory(memory)
    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise PickleError("an archive without a data.pkl of torch.save")
    (root,) = roots
    if any(name.startswith(f"{root}/code/") or name == f"{root}/constants.pkl" for name in entries):
        raise IsProgram("a TorchScript program")
    order = entries.get(f"{root}/byteorder")
    if order is not None and memory[order.start : order.start + order.size] != b"little":
        raise OddData("numbers in big-endian order")
    found: dict[str, Storage] = {}

    def find_storage(name: tuple[Any, ...]) -> Storage:
        key, dtype, count = _storage_name(name)
        if key not in found:
            entry = entries.get(f"{root}/data/{key}")
            if entry is None:
                raise PickleError("numbers of a tensor are missing")
            found[key] = _storage(memory, entry.start, entry.size, dtype, count)
        return _agreeing(found[key], dtype, count)

    pickled = entries[f"{root}/data.pkl"]
    if pickled.size > MOST_BYTES:
        raise PickleError(f"a pickle of more than {MOST_BYTES} bytes")
    return read_pickle(io.BytesIO(memory[pickled.start : pickled.start + pickled.size]), find_storage)


def _directory(memory: Memory) -> dict[str, Entry]:
    """Return the entries of a zip archive by name, checked against the bytes that are there."""
    end = memory.rfind(_END, max(0, len(memory) - 2**16 - 22))
    if end < 0 or end + 22 > len(memory):
        raise PickleError("an archive without an end")
    size, start = struct.unpack_from("<II", memory, end + 12)
    if 0xFFFFFFFF in (size, start) or memory[end + 10 : end + 12] == b"\xff\xff":
        (end64,) = struct.unpack_from("<Q", memory, end - 12)
        if end64 + 56 > end or memory[end64 : end64 + 4] != b"PK\x06\x06":
            raise PickleError("an archive without an end")
        size, start = struct.unpack_from("<QQ", memory, end64 + 40)
    if size > MOST_DIRECTORY or start + size > end:
        raise PickleError(f"an archive whose directory is damaged or larger than {MOST_DIRECTORY} bytes")
    entries: dict[str, Entry] = {}
    total, place = 0, start
    while place < start + size:
        entry, name, length = _entry(memory, place, start)
        if name in entries:
            raise PickleError("an archive with two entries of one name")
        entries[name] = entry
        total += entry.size
        place += length
    if total > start:
        raise PickleError("an archive whose entries overlap")
    if start - total > _MOST_PADDING * (len(entries) + 1):
        raise PickleError("an archive with more than its entries")
    return entries


def _entry(memory: Memory, place: int, end: int) -> tuple[Entry, str, int]:
    """Read one entry of an archive's directory: itself, its name, and the length of what was read."""
    if memory[place : place + 4] != b"PK\x01\x02":
        raise PickleError("an archive whose directory is damaged")
    flags, method = struct.unpack_from("<HH", memory, place + 8)
    packed, size = struct.unpack_from("<II", memory, place + 20)
    name_length, extra_length, comment_length = struct.unpack_from("<HHH", memory, place + 28)
    (header,) = struct.unpack_from("<I", memory, place + 42)
    name = memory[place + 46 : place + 46 + name_length].decode("utf-8", "replace")
    extra = memory[place + 46 + name_length : place + 46 + name_length + extra_length]
    size, packed, header = _wide(extra, size, packed, header)
    if method != zipfile.ZIP_STORED and name.split("/")[1:2] == ["code"]:
        raise IsProgram("a TorchScript program")  # torch compresses nothing else
    if method != zipfile.ZIP_STORED or flags & 1 or packed != size:
        raise OddData("compressed or encrypted entries, which torch.save does not write")
    if header + 30 > end or memory[header : header + 4] != _LOCAL:
        raise PickleError("an archive whose directory is damaged")
    local_name, local_extra = struct.unpack_from("<HH", memory, header + 26)
    start = header + 30 + local_name + local_extra
    if start + size > end:
        raise PickleError("an archive that is cut short")
    (local_flags,) = struct.unpack_from("<H", memory, header + 6)
    places = [place + 16] if local_flags & 8 else [place + 16, header + 14]
    if (
        local_flags & 8 and memory[start + size : start + size + 4] == b"PK\x07\x08"
    ):  # the checksum stands behind the bytes
        places.append(start + size + 4)
    return Entry(start, size, tuple(places)), name, 46 + name_length + extra_length + comment_length


def _wide(extra: bytes | bytearray, *fields: int) -> list[int]:
    """Return the sizes and the place of an entry, some of which stand in the field for large archives."""
    numbers: list[int] = []
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            numbers = [value for (value,) in struct.iter_unpack("<Q", extra[4 : 4 + length // 8 * 8])]
        extra = extra[4 + length :]
    try:
        return [numbers.pop(0) if value == 0xFFFFFFFF else value for value in fields]
    except IndexError:
        raise PickleError("an archive whose directory is damaged") from None


def _read_legacy(memory: Memory) -> Any:
    """Read magic number, protocol, system, content and the list of storages, each a pickle; then the storages."""
    if memory[:1] != pickle.PROTO:
        raise PickleError("not a file of torch.save")
    window = io.BytesIO(memory[:MOST_BYTES])
    wanted: dict[str, tuple[torch.dtype, int]] = {}

    def refuse(_: tuple[Any, ...]) -> Storage:
        raise PickleError("damaged pickle")

    def note(name: tuple[Any, ...]) -> Storage:
        key, dtype, count = _storage_name(name)
        if key in wanted and wanted[key] != (dtype, count):
            raise PickleError("numbers of a tensor have two types")
        wanted[key] = dtype, count
        return Storage(None)

    first = read_pickle(window, refuse)
    if type(first) is not int or first != _MAGIC or read_pickle(window, refuse) != _LEGACY_PROTOCOL:
        raise PickleError("not a file of torch.save")
    if read_pickle(window, refuse).get("little_endian") is not True:
        raise OddData("numbers in big-endian order")
    content = window.tell()
    read_pickle(window, note)  # for the names of its storages, whose numbers come behind
    keys = read_pickle(window, refuse)
    found: dict[str, Storage] = {}
    place = window.tell()
    for key in keys if isinstance(keys, list) else ():
        if key not in wanted or key in found or place + 8 > len(memory):
            raise PickleError("numbers of a tensor are missing")
        (count,) = struct.unpack_from("<q", memory, place)
        dtype, declared = wanted[key]
        if count != declared:
            raise PickleError("numbers of a tensor are missing")
        size = count * dtype.itemsize
        found[key] = _storage(memory, place + 8, size, dtype, count)
        place += 8 + size
    if place != len(memory):
        raise PickleError("bytes behind its end")
    window.seek(content)

    def find_storage(name: tuple[Any, ...]) -> Storage:
        key, dtype, count = _storage_name(name)
        if key not in found:
            raise PickleError("numbers of a tensor are missing")
        return _agreeing(found[key], dtype, count)

    return read_pickle(window, find_storage)


def _storage_name(name: tuple[Any, ...]) -> tuple[str, torch.dtype, int]:
    """Check a persistent name: ("storage", dtype, key, device, number of numbers, a view in old files)."""
    if len(name) not in (5, 6) or name[0] != "storage":
        raise OddData("source text of a pickled network")
    _, dtype, key, _, count, *view = name
    if not isinstance(dtype, torch.dtype) or not isinstance(key, str) or type(count) is not int or count < 0:
        raise PickleError("damaged name of a tensor's numbers")
    if view and view[0] is not None:
        raise OddData("storages that are parts of others, as torch wrote before version 0.4")
    return key, dtype, count


def _storage(memory: Memory, start: int, size: int, dtype: torch.dtype, count: int) -> Storage:
    """Look at a range of the file as numbers."""
    if count * dtype.itemsize > size or start + size > len(memory):
        raise PickleError("numbers of a tensor are missing")
    if not count:
        return Storage(torch.empty(0, dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about memory that may not be written to
        return Storage(torch.frombuffer(memory, dtype=dtype, count=count, offset=start))


def _agreeing(storage: Storage, dtype: torch.dtype, count: int) -> Storage:
    if storage.numbers is None or storage.numbers.dtype != dtype or len(storage.numbers) != count:
        raise PickleError("numbers of a tensor have two types")
    return storage
