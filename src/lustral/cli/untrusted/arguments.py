"""The flags of ``lustral sift`` and ``lustral train``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

import tyro

from lustral.catalog import SAFE_TRAINERS, SIFTERS
from lustral.cli.exporting import SetExports
from lustral.cli.parsing import FLAT, Common, Switch

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class UntrustedData:
    """A training set of unknown origin, and what is known about it.

    Attributes:
        data: the training set: an image folder, a .csv label table with the columns file and label, an .npz or .parquet
            file, or a name as cifar10, whose whole training split is then untrusted.
        clean: images that nobody could have poisoned: a set like DATA; or, of a known name, how many of its reserve.
        classes: file with the names of the classes in the order of their numbers, one a line or a JSON list.
        image_size: pixels to resize the images to: the side of a square, or height and width.
        resize: scale the shorter side to this many pixels first, and cut --image-size out of the middle.
        flip: whether a mirrored image keeps its meaning; where it is left out, known names know it, and others do.
        arch: network to train; small_cnn for images below 20 pixels and preact_resnet18:width=16 for the rest if left out.
            FILE.py:function runs that file.
    """

    data: tyro.conf.Positional[str]
    clean: str | None = None
    classes: Path | None = None
    image_size: tuple[int, ...] | None = None
    resize: int | None = None
    flip: bool | None = None
    arch: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sift(Generic[Settings]):
    """List the suspicious images of a training set. Exit code 0: none listed, 1: poisoned images listed, 2: error.

    Attributes:
        given: the training set and what is known about it.
        out: folder for scores.csv, scores.parquet, sheet.png, report.html and result.json.
        method: how to sift; `lustral sift --list` explains each.
        settings: of the method.
        write_clean: folder, new or empty, for what is left when the listed images are taken away. Nothing is ever deleted.
        write_clean_as: copies of the pictures in a folder for each class, or a list of their files in clean.txt. Arrays are
            copied to clean.npz.
        exports: files for other tools.
        list: explain each method in a line.
    """

    given: Annotated[UntrustedData, FLAT]
    out: Path
    method: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(SIFTERS) + "}")] = ""
    settings: Annotated[Settings, FLAT, tyro.conf.AvoidSubcommands]
    write_clean: Path | None = None
    write_clean_as: Literal["copies", "list"] = "copies"
    exports: Annotated[SetExports, FLAT] = SetExports()
    list: Switch = False
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class Train(Generic[Settings]):
    """Train a model on a set of unknown origin without learning its backdoor.

    Attributes:
        given: the training set and what is known about it.
        out: folder for model.safetensors, report.html and result.json.
        method: how to train; `lustral train --list` explains each.
        settings: of the method.
        test: images to measure the model on, which the method never sees; the test split of DATA if left out.
        list: explain each method in a line.
    """

    given: Annotated[UntrustedData, FLAT]
    out: Path
    method: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(SAFE_TRAINERS) + "}")] = ""
    settings: Annotated[Settings, FLAT, tyro.conf.AvoidSubcommands]
    test: str | None = None
    list: Switch = False
    common: Annotated[Common, FLAT] = Common()
