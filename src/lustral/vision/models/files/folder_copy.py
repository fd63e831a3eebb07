"""A copy of a model folder with other weights: every file that is no weights as it was, all of it or nothing.

What is written lies in a hidden folder until it is whole. Then each file gets its name, and ``config.json`` the last: a folder
without it is no model to any program, so none opens half of one.

Links are refused: a folder from somewhere else may point at files of this machine, and its copy is made to be published.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lustral.core.files import NotRegularError, read_regular, write_bytes_atomic
from lustral.vision.models.files.contents import Memory
from lustral.vision.models.files.hub_folder import CONFIG
from lustral.vision.models.files.state_dicts import ModelFileError, listing

logger = logging.getLogger(__name__)

CARD = "README.md"
MOST_CARD = 2**22  # bytes of a model card
MOST_FILES = 1_000  # that are no weights
MOST_FILE = 2**26  # bytes of one of them; vocabularies and pictures take less
MOST_BYTES = 2**29  # of all of them
DEEPEST = 8  # folders inside each other
OTHER_WEIGHTS = re.compile(  # endings of files that hold the given weights once more, or what training left behind
    r"\.(bin|ckpt|gguf|h5|joblib|keras|mar|mlmodel|msgpack|np[yz]|onnx|onnx_data|ort|ot|pb|pdparams|pickle|pkl|pt|pt2|pte|ptl|pth"
    r"|safetensors|tar|tflite|torchscript|zip)"
)

Card = Callable[[bytes | None, Mapping[str, str]], bytes]
"""Makes a model card: from the given one, None where there is none, and the SHA-256 of each new file of weights."""


@dataclass(frozen=True, kw_only=True)
class FolderPlan:
    """What a copy of a model folder has.

    Attributes:
        folder: the given folder.
        weights: names of the files that get other weights.
        copied: files that stay as they are, relative to the folder, with "/" between parts.
        left_out: what is not copied: other files of weights, and hidden folders.
    """

    folder: Path
    weights: tuple[str, ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]


def plan_copy(folder: Path, weights: Collection[str], *, index: str | None = None) -> FolderPlan:
    """List what belongs to a copy of a model folder.

    Other weights are left out: they are the given ones in another form, and a program that prefers that form would open them.

    Args:
        folder: the given folder.
        weights: names of the files that were read.
        index: name of the file that says which tensor is in which of them.

    Raises:
        ModelFileError: a link, a pipe or a device in it, or more files or bytes than the limits above.
        OSError: it cannot be read.
    """
    copied: list[str] = []
    left_out: list[str] = []
    total = 0
    for number, (path, size) in enumerate(_walk(folder, folder, left_out)):
        name = path.relative_to(folder).as_posix()
        if name in weights:
            continue
        if name != index and OTHER_WEIGHTS.fullmatch(Path(name.removesuffix(".index.json")).suffix.lower()):
            left_out.append(name)
        else:
            copied.append(name)
            total += size
        beyond = name in copied[-1:] and (size > MOST_FILE or total > MOST_BYTES)
        if beyond or number >= MOST_FILES:
            raise ModelFileError(
                f"{folder}: expected at most {MOST_FILES:,} files, and beside the weights {MOST_FILE:,} bytes each and "
                f"{MOST_BYTES:,} together; {name!r} is beyond that: move what is no part of the model out of the folder"
            )
    return FolderPlan(folder=folder, weights=tuple(weights), copied=tuple(copied), left_out=tuple(left_out))


def require_room(out: Path, plan: FolderPlan, *, beside: Collection[str] = ()) -> None:
    """Refuse a place for a copy that holds anything else: files of two models in one folder are neither.

    Args:
        out: the new folder; there need not be one yet.
        plan: what it will have.
        beside: names of other files that may be there.

    Raises:
        ValueError: it is the given folder, inside of it or around it, or has other files in it.
    """
    given, new = plan.folder.resolve(), out.resolve()
    if given == new or given in new.parents or new in given.parents:
        raise ValueError(
            f"{out}: expected another folder than {plan.folder}, which stays as it is; choose another (--out)"
        )
    expected = {*plan.weights, *plan.copied, CARD, *beside}
    expected |= {name.partition("/")[0] for name in plan.copied}
    others = sorted(path.name for path in out.iterdir() if path.name not in expected) if out.is_dir() else []
    if others:
        raise ValueError(
            f"{out}: expected a new or empty folder for a copy of {plan.folder}, or an earlier copy; it holds "
            f"{listing(map(repr, others))}: choose another (--out)"
        )


def write_copy(
    out: Path,
    plan: FolderPlan,
    weights: Iterable[tuple[str, Memory]],
    *,
    card: Card | None = None,
    beside: Collection[str] = (),
) -> None:
    """Write a copy of a model folder; after an error nothing of it is there.

    Args:
        out: folder that exists, see ``require_room``.
        plan: what the copy has.
        weights: name and content of each file of weights; one at a time is in memory.
        card: makes the model card; None: it stays as it is.
        beside: names of files that the caller writes, and that are not copied.

    Raises:
        ModelFileError: a file became a link, or larger than it may be.
        ValueError: see ``require_room``.
        OSError: the disk is full, ...
    """
    require_room(out, plan, beside=beside)
    names = [name for name in plan.copied if name not in beside]
    with _staging(out) as stage:
        digests: dict[str, str] = {}
        for name, content in weights:
            write_bytes_atomic(stage / name, content)
            digests[name] = hashlib.sha256(content).hexdigest()
        for name in names:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(stage / name, _read(plan.folder / name, MOST_FILE))
        if card is not None:
            given = _read(plan.folder / CARD, MOST_CARD) if CARD in names else None
            write_bytes_atomic(stage / CARD, card(given, digests))
            names.append(CARD)
        _commit(stage, out, [*digests, *dict.fromkeys(names)])
    if plan.left_out:
        logger.warning("%s: not copied: %s", plan.folder, listing(plan.left_out))


def _walk(folder: Path, inside: Path, left_out: list[str], depth: int = 0) -> Iterator[tuple[Path, int]]:
    """Yield each file below a folder with its size, in order of its name; hidden folders are noted and left out."""
    if depth > DEEPEST:
        raise ModelFileError(f"{folder}: more than {DEEPEST} folders inside each other")
    with os.scandir(inside) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            if entry.name.startswith("."):
                left_out.append(path.relative_to(folder).as_posix() + "/")
            else:
                yield from _walk(folder, path, left_out, depth + 1)
        elif entry.is_file(follow_symlinks=False):
            yield path, entry.stat(follow_symlinks=False).st_size
        elif entry.is_symlink() and _blob(path) is not None:
            yield path, path.stat().st_size
        else:
            raise ModelFileError(
                f"{folder}: {path.relative_to(folder).as_posix()!r} is a link or no regular file; a copy that is made to be "
                "published follows none: copy the folder with its contents first (cp -rL), if you know where they lead"
            )


def _blob(path: Path) -> Path | None:
    """Return the file that a link of the hub's own cache stands for, ``blobs/DIGEST`` of ``snapshots/REVISION/NAME``, or None."""
    target = Path(os.path.normpath(path.parent / os.readlink(path)))
    snapshots = next((parent.parent for parent in path.parents if parent.parent.name == "snapshots"), None)
    is_of_cache = snapshots is not None and target.parent == snapshots.parent / "blobs"
    is_link = target.is_symlink() or target.parent.is_symlink()
    return target if is_of_cache and target.is_file() and not is_link else None


def _read(path: Path, most: int) -> bytes:
    """Read a file that is copied."""
    target = _blob(path) if path.is_symlink() else path
    try:
        return read_regular(path if target is None else target, most=most, follow=False)
    except NotRegularError as error:
        raise ModelFileError(f"{error}; nothing was written") from error


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """Yield a hidden folder inside another, on the same disk; it is gone afterwards."""
    stage = out / f".{secrets.token_hex(8)}.tmp"
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _commit(stage: Path, out: Path, names: Iterable[str]) -> None:
    """Give the files of a staging folder their names, ``config.json`` the last; after an error none of them has one."""
    (out / CONFIG).unlink(missing_ok=True)  # an earlier copy is no model from here on
    done: list[Path] = []
    try:
        for name in sorted(names, key=lambda name: name == CONFIG):
            target = out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / name, target)
            done.append(target)
    except BaseException:
        for target in done:
            target.unlink(missing_ok=True)
        for folder in sorted({target.parent for target in done} - {out}, reverse=True):
            with suppress(OSError):  # it holds something else
                folder.rmdir()
        raise
