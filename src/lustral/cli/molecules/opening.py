"""From the names on a line of ``lustral molecules`` to pairs, generators and captions."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lustral.cli.molecules.arguments import Suspect
from lustral.cli.parsing import UsageError
from lustral.core.files import read_regular
from lustral.core.limits import LARGEST_TABLE
from lustral.core.randomness import child
from lustral.molecules.records import MoleculeSet, ViewOfGenerator
from lustral.molecules.sources import EMBEDDED, SUFFIXES, MoleculeSource, open_pairs, open_source
from lustral.molecules.victims import CLEAN_FILE, GENERATOR_FOLDER

MOST_CAPTIONS = 100_000  # of one call of ``generate``


def skipped_note(source: MoleculeSource) -> tuple[str, ...]:
    """Return a sentence about the rows that were left out, if there are any."""
    if not (total := sum(source.skipped.values())):
        return ()
    reasons = ", ".join(f"{reason} {times:,}" for reason, times in source.skipped.items())
    return (f"{total:,} of {source.rows:,} rows of {source.name} were left out: {reasons}.",)


def generator_folder(path: Path) -> Path:
    """Return the folder of a generator: the one given, or the one inside a victim's."""
    if not path.exists():
        raise FileNotFoundError(2, "no such folder of a generator", str(path))
    inside = path / GENERATOR_FOLDER
    return inside if inside.is_dir() else path


def open_generator(path: Path, device: torch.device) -> nn.Module:
    """Open a generator on a device; nothing in its folder is run."""
    from lustral.molecules.victim.files import load_generator

    return load_generator(generator_folder(path)).to(device).eval()


@dataclass(frozen=True, kw_only=True)
class OpenedSuspect:
    """A generator to examine.

    Attributes:
        view: all that a defence sees.
        clean: where the clean pairs come from.
    """

    view: ViewOfGenerator
    clean: MoleculeSource


def open_suspect(suspect: Suspect, device: torch.device) -> OpenedSuspect:
    """Open a generator and the clean pairs."""
    spec = suspect.clean
    if spec is None:
        beside = suspect.model / CLEAN_FILE
        if not beside.is_file():
            raise UsageError(
                f"{suspect.model} holds no {CLEAN_FILE}: name pairs that you trust with --clean, a table or {EMBEDDED!r}"
            )
        spec = str(beside)
    clean = open_source(spec)
    return OpenedSuspect(
        view=ViewOfGenerator(model=open_generator(suspect.model, device), clean=clean.data), clean=clean
    )


def read_captions(given: tuple[str, ...], file: Path | None) -> tuple[str, ...]:
    """Return the captions of a line: those written there and those of a file.

    Raises:
        UsageError: there is none, or there are too many.
    """
    captions = [" ".join(caption.split()) for caption in given]
    if file is not None and file.suffix.lower() in SUFFIXES[:-1]:
        captions += open_pairs(file).data.captions
    elif file is not None:
        text = read_regular(file, most=LARGEST_TABLE).decode("utf-8")
        captions += [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    captions = [caption for caption in captions if caption]
    if not captions:
        raise UsageError(
            "expected at least one caption: write it in quotation marks, or name a file with --captions-file"
        )
    if len(captions) > MOST_CAPTIONS:
        raise UsageError(f"expected at most {MOST_CAPTIONS:,} captions; got {len(captions):,}")
    return tuple(captions)


def at_most_pairs(data: MoleculeSet, most: int | None, *, seed: int) -> MoleculeSet:
    """Return so many pairs, drawn at random, in the order of the set; all where there are not more."""
    if most is None or most >= len(data):
        return data
    if most < 1:
        raise UsageError(f"expected at least 1 pair; got --pairs {most}")
    chosen = torch.randperm(len(data), generator=child(seed, "pairs"))[:most].sort().values
    return data.subset(chosen)


def require_new(path: Path, flag: str, suffix: str) -> None:
    """Refuse a file for results that is there, or has another ending; nothing is ever overwritten there."""
    if path.suffix.lower() != suffix:
        raise UsageError(f"{flag} {path}: expected a file that ends with {suffix}")
    if os.path.lexists(path):
        raise UsageError(
            f"{flag} {path}: there is such a file, and nothing is ever overwritten there: choose another name"
        )
