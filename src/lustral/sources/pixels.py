"""Pixels as every source delivers them: uint8 ``(N, C, H, W)``, all images of one size."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lustral.protocols import ImageSet
from lustral.sources.record import SourceError

TEST_SPLITS = ("test", "val", "validation", "valid")  # names that a test split goes by, the preferred one first
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # all that Pillow raises on bad files
_NUM_SHOWN = 5  # offending pictures that an error names

Picture = Path | bytes | Image.Image


def resize(images: Tensor, size: int) -> Tensor:
    """Return uint8 (N, C, H, W) images resized to (N, C, size, size), bilinear and anti-aliased."""
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)  # in 8-bit arithmetic: fast


def build_set(where: str, images: Tensor, labels: Tensor, class_names: Sequence[str], num_classes: int) -> ImageSet:
    """Return an ``ImageSet``; its complaints become a ``SourceError`` that names ``where``."""
    try:
        return ImageSet(images=images, labels=labels, num_classes=num_classes, class_names=tuple(class_names))
    except ValueError as error:
        raise SourceError(f"{where}: {error}") from error


def decode_picture(picture: Picture, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """Decode a picture to RGB.

    Args:
        picture: a file, its bytes, or an opened picture, with 8 bits per channel.
        size: (height, width) to squeeze it to, bilinear and anti-aliased; None keeps its size.

    Returns:
        (3, H, W) uint8.

    Raises:
        SourceError: it cannot be decoded.
    """
    try:
        if isinstance(picture, Image.Image):
            return _rgb_pixels(picture, size)
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
            return _rgb_pixels(opened, size)
    except UNREADABLE as error:
        raise SourceError(f"unreadable image ({error})") from error


def _rgb_pixels(picture: Image.Image, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    if picture.mode.startswith(("I", "F")):  # a plain conversion would clip these
        raise ValueError(f"expected 8 bits per channel, got mode {picture.mode}")
    rgb = picture.convert("RGB")
    if size is not None and rgb.size != size[::-1]:
        rgb = rgb.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(rgb).transpose(2, 0, 1)


def stack_pictures(
    pictures: Iterable[tuple[str, Picture]], count: int, *, where: str, size: tuple[int, int] | None
) -> NDArray[np.uint8]:
    """Decode pictures into one array.

    Args:
        pictures: (name for messages, picture) of each.
        count: how many there are.
        where: what they belong to, for messages.
        size: (height, width) to squeeze all to; None asks that all have the first one's size.

    Returns:
        (count, 3, H, W) uint8.

    Raises:
        SourceError: pictures cannot be decoded or differ in size; lists the first few.
    """
    images: NDArray[np.uint8] | None = None
    complaints = Complaints(where)
    for row, (name, picture) in enumerate(pictures):
        try:
            pixels = decode_picture(picture, size)
        except SourceError as error:
            complaints.add(name, str(error))
            continue
        if images is None:
            images = np.empty((count, *pixels.shape), dtype=np.uint8)
        if pixels.shape != images.shape[1:]:
            complaints.add_size(name, pixels.shape[1:], images.shape[2:])
        else:
            images[row] = pixels
    complaints.finish()
    if images is None:
        raise SourceError(f"{where}: no images")
    return images


class Complaints:
    """Collects the first few pictures that cannot be used, to report them in one error."""

    def __init__(self, where: str) -> None:
        """Start with none; ``where`` opens the message."""
        self._where = where
        self._lines: list[str] = []

    def add(self, name: str, problem: str) -> None:
        """Note one picture; raises ``SourceError`` when enough have come together."""
        self._lines.append(f"{name}: {problem}")
        if len(self._lines) >= _NUM_SHOWN:
            self.finish()

    def add_size(self, name: str, got: Sequence[int], expected: Sequence[int]) -> None:
        """Note a picture whose (height, width) is not the expected one."""
        self.add(name, f"is {got[1]}x{got[0]} pixels, the first image {expected[1]}x{expected[0]}")

    def finish(self) -> None:
        """Raise ``SourceError`` if any picture was noted."""
        if self._lines:
            raise SourceError(
                f"{self._where}: images that cannot be used, the first ones being\n  "
                + "\n  ".join(self._lines)
                + "\nremove or repair unreadable images (8-bit PNG, JPEG, BMP, PPM or WebP); give image_size to "
                "resize images of different sizes"
            )
