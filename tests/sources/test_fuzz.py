"""Thousands of damaged data sets: each is read or refused with a ``SourceError``; none hangs or takes much memory."""

from __future__ import annotations

import contextlib
import io
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lustral.sources import SourceError, load_source

ROUNDS = 600  # of each kind
MOST_SECONDS = 10
MOST_GROWTH = 2**20  # KiB of the process's peak resident size
KINDS = ("bmp", "jpg", "png", "ppm", "pgm", "tif", "webp", "npz", "packed.npz", "parquet", "packed.parquet")


def sample(kind: str, rng: np.random.Generator) -> bytes:
    """Return a small data set, or a picture of one."""
    images = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(6) % 2
    file = io.BytesIO()
    if kind.endswith("npz"):
        save = np.savez_compressed if kind.startswith("packed") else np.savez
        save(file, train_images=images, train_labels=labels, train_track=np.arange(6), class_names=["a", "b"])  # type: ignore[operator]
    elif kind.endswith("parquet"):
        cells = []
        for image in images:
            cell = io.BytesIO()
            Image.fromarray(image).save(cell, "PNG")
            cells.append({"bytes": cell.getvalue(), "path": "x"})
        table = pa.table({"image": cells, "label": labels, "split": ["train"] * 5 + ["test"]})
        pq.write_table(table, file, compression="zstd" if kind.startswith("packed") else "none")
    else:
        picture = Image.fromarray(images[0])
        names = {"jpg": "JPEG", "pgm": "PPM", "tif": "TIFF"}
        (picture.convert("L") if kind == "pgm" else picture).save(file, names.get(kind, kind.upper()))
    return file.getvalue()


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Change bytes, cut, repeat or exchange parts; numbers become those that overflow."""
    broken = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        start, length = int(rng.integers(len(broken))), int(rng.integers(1, 9))
        choice = rng.integers(6)
        if choice == 0:
            broken[start] = int(rng.integers(256))
        elif choice == 1:
            broken[start : start + length] = bytes([(0, 255, 127, 128)[rng.integers(4)]]) * length
        elif choice == 2:
            del broken[start : start + length]
        elif choice == 3:
            other = int(rng.integers(len(broken)))
            broken[start : start + length] = broken[other : other + length]
        elif choice == 4:
            broken[start:start] = broken[start : start + 50 * length]
        elif len(broken) > 8:
            del broken[len(broken) - length :]
    return bytes(broken) or b"\0"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_data_is_read_or_refused(tmp_path: Path, kind: str) -> None:
    check(tmp_path, kind, ROUNDS, lambda content, rng: damage(content, rng))


@pytest.mark.parametrize("kind", KINDS)
def test_some_damaged_data_is_read_or_refused(tmp_path: Path, kind: str) -> None:
    check(tmp_path, kind, 30, lambda content, rng: damage(content, rng))


def check(folder: Path, kind: str, rounds: int, change: Callable[[bytes, np.random.Generator], bytes]) -> None:
    rng = np.random.default_rng(sum(map(ord, kind)))
    content, spec = sample(kind, rng), folder / f"x.{kind}"
    if "npz" not in kind and "parquet" not in kind:
        for name in ("a", "b"):
            (folder / name).mkdir()
            Image.new("RGB", (8, 8)).save(folder / name / "y.png")
        spec = folder
    path = folder / "b" / f"x.{kind}" if spec == folder else spec
    path.write_bytes(content)
    assert len(load_source(str(spec)).train) >= 3
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(rounds):
        path.write_bytes(change(content, rng))
        for settings in ({}, {"image_size": (5, 7), "channels": 1}):
            start = time.process_time()
            with contextlib.suppress(SourceError):
                load_source(str(spec), **settings)  # type: ignore[arg-type]
            assert time.process_time() - start < MOST_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH
