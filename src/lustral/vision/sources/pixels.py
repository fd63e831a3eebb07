"""Pixels as every source delivers them: uint8 ``(N, C, H, W)``, all images of one size.

Pictures are decoded as torchvision's ``ImageFolder`` does it, because that is how most models were trained: a turned
camera's orientation is not undone, and of a transparent picture the colours beneath are taken, without any background.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lustral.core.limits import MOST_CLASSES, MOST_PIXELS
from lustral.vision.records import ImageSet
from lustral.vision.sources.checks import Expansion, check_count, check_memory, check_names, open_regular
from lustral.vision.sources.record import SourceError

TEST_SPLITS = ("test", "val", "validation", "valid")  # names that a test split goes by, the preferred one first
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's other plug-ins are never tried; EPS runs Ghostscript
SUFFIXES = frozenset(
    {".bmp", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # of these formats
)
RGB = 3  # channels
_NUM_SHOWN = 5  # offending pictures that an error names
_GREY_WEIGHTS = (19595, 38470, 7471)  # / 65536: the luma of ITU-R 601, as Pillow rounds it
_CHUNK = 1024  # images made grey at a time


class UnreadableError(SourceError):
    """One picture that cannot be used."""


Picture = Path | bytes | Image.Image


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How pictures are brought to one size.

    Attributes:
        size: (height, width) in pixels.
        resize: scale the shorter side to this many pixels, then cut ``size`` out of the middle; None squeezes to ``size``.
    """

    size: tuple[int, int]
    resize: int | None = None

    def __post_init__(self) -> None:
        """Check the sizes."""
        if not all(side >= 1 for side in self.size) or self.size[0] * self.size[1] > MOST_PIXELS:
            raise SourceError(
                f"expected an image_size of at least 1 pixel a side, and at most {MOST_PIXELS:,} pixels; got "
                f"{self.size[0]} x {self.size[1]}"
            )
        if self.resize is not None and self.resize < max(self.size):
            raise SourceError(
                f"expected to resize to at least the image_size that is cut out, {max(self.size)}; got {self.resize}"
            )

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) to scale a picture to before ``cut``.

        Raises:
            ValueError: a picture so narrow that the scaled one would be larger than any may be.
        """
        if self.resize is None:
            return self.size
        shorter = min(height, width)
        scaled = self.resize * height // shorter, self.resize * width // shorter
        if scaled[0] * scaled[1] > MOST_PIXELS:
            raise ValueError(f"{width}x{height} pixels are too narrow to resize the shorter side to {self.resize}")
        return scaled

    def corner(self, height: int, width: int) -> tuple[int, int]:
        """Return the (top, left) of what is cut out of a scaled picture."""
        return round((height - self.size[0]) / 2), round((width - self.size[1]) / 2)


def framing(image_size: int | Sequence[int] | None, resize: int | None = None) -> Framing | None:
    """Return how to frame pictures, by the side of a square or (height, width); None where they keep their size.

    Raises:
        SourceError: impossible sizes.
    """
    if image_size is None:
        if resize is not None:
            raise SourceError("expected an image_size (--image-size) beside resize: what to cut out of the middle")
        return None
    sides = (image_size,) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) not in (1, 2):
        raise SourceError(f"expected an image_size of one side, or of height and width; got {len(sides)} numbers")
    return Framing(size=(sides[0], sides[-1]), resize=resize)


def frame_tensor(images: Tensor, frame: Framing) -> Tensor:
    """Return uint8 (N, C, H, W) images framed, bilinear and anti-aliased."""
    try:
        height, width = frame.scaled(images.shape[2], images.shape[3])
    except ValueError as error:
        raise SourceError(str(error)) from error
    check_memory(len(images) * images.shape[1] * height * width, "resized images")
    if images.shape[2:] != (height, width):
        images = F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)  # 8-bit: fast
    top, left = frame.corner(height, width)
    return images[:, :, top : top + frame.size[0], left : left + frame.size[1]].contiguous()


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Return uint8 images (N, C, H, W) with 1 or 3 channels as grey (luma) or RGB (three equal channels) ones."""
    if images.shape[1] == channels:
        return images
    if channels == RGB:
        check_memory(RGB * images.numel(), "images of three channels")
        return images.repeat(1, RGB, 1, 1)
    grey = torch.empty(len(images), 1, *images.shape[2:], dtype=torch.uint8)
    for start in range(0, len(images), _CHUNK):
        red, green, blue = images[start : start + _CHUNK].int().unbind(1)
        luma = _GREY_WEIGHTS[0] * red + _GREY_WEIGHTS[1] * green + _GREY_WEIGHTS[2] * blue
        grey[start : start + _CHUNK, 0] = ((luma + 0x8000) >> 16).to(torch.uint8)
    return grey


def build_set(where: str, images: Tensor, labels: Tensor, class_names: Sequence[str], num_classes: int) -> ImageSet:
    """Return an ``ImageSet``; its complaints become a ``SourceError`` that names ``where``."""
    if num_classes > MOST_CLASSES:
        raise SourceError(f"{where}: expected at most {MOST_CLASSES:,} classes; found {num_classes:,}")
    names = check_names(class_names, where)
    try:
        return ImageSet(images=images, labels=labels, num_classes=num_classes, class_names=names)
    except ValueError as error:
        raise SourceError(f"{where}: {error}") from error


@contextlib.contextmanager
def open_picture(picture: Path | bytes) -> Iterator[Image.Image]:
    """Open a picture of one of ``FORMATS``; only its header is read so far.

    Raises:
        UnreadableError: another format, damaged, larger than a picture may be, or no regular file.
    """
    with contextlib.ExitStack() as stack:
        try:
            content = io.BytesIO(picture) if isinstance(picture, bytes) else stack.enter_context(open_regular(picture))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of oddities, and of sizes that are checked here
                opened = stack.enter_context(Image.open(content, formats=FORMATS))
            _check_pixels(opened)
        except UnreadableError:
            raise
        except Exception as error:  # hostile bytes can raise anything
            raise UnreadableError(f"unreadable image ({_reason(error)})") from error
        yield opened


def _check_pixels(picture: Image.Image) -> None:
    if picture.width * picture.height > MOST_PIXELS:
        raise UnreadableError(
            f"unreadable image ({picture.width}x{picture.height} pixels; expected at most {MOST_PIXELS:,} in all)"
        )


def _reason(error: Exception) -> str:
    """Return what an error says, without the address of a stream in memory, or its kind."""
    said = str(error).partition(" <_io")[0]
    return said or type(error).__name__


@contextlib.contextmanager
def guarded_pillow() -> Iterator[None]:
    """Make ``PIL.Image.open`` as careful as ``open_picture`` while code of others, such as torchvision's, calls it.

    It changes the module for all threads until it ends.
    """
    original = Image.open

    @functools.wraps(original)
    def careful(fp: Any, mode: Any = "r", formats: Any = None) -> Image.Image:
        if isinstance(fp, str | Path):
            open_regular(Path(fp)).close()
        opened = original(fp, mode, formats=FORMATS)
        _check_pixels(opened)
        return opened

    Image.open = careful  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.open = original


def decode_picture(
    picture: Picture, frame: Framing | None, channels: int = RGB, expansion: Expansion | None = None
) -> NDArray[np.uint8]:
    """Decode a picture's first frame to RGB, or to grey.

    Args:
        picture: a file, its bytes, or an opened picture, with 8 bits per channel.
        frame: the size to bring it to, bilinear and anti-aliased; None keeps its size.
        channels: 3, or 1 for grey (luma).
        expansion: counts what the picture unpacks to, before it does.

    Returns:
        (channels, H, W) uint8.

    Raises:
        UnreadableError: it cannot be decoded.
        SourceError: by ``expansion``.
    """
    if isinstance(picture, Image.Image):
        _check_pixels(picture)
        return _decoded(picture, frame, channels)
    with open_picture(picture) as opened:
        if expansion is not None:
            expansion.add(RGB * opened.width * opened.height)
        return _decoded(opened, frame, channels)


def _decoded(picture: Image.Image, frame: Framing | None, channels: int) -> NDArray[np.uint8]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _pixels(picture, frame, channels)
    except Exception as error:  # hostile bytes can raise anything
        raise UnreadableError(f"unreadable image ({_reason(error)})") from error


def _pixels(picture: Image.Image, frame: Framing | None, channels: int) -> NDArray[np.uint8]:
    if picture.mode.startswith(("I", "F")):  # a plain conversion would clip these
        raise ValueError(f"expected 8 bits per channel, got mode {picture.mode}")
    rgb = picture.convert("RGB")
    if frame is not None:
        height, width = frame.scaled(rgb.height, rgb.width)
        if rgb.size != (width, height):
            rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
        top, left = frame.corner(height, width)
        rgb = rgb.crop((left, top, left + frame.size[1], top + frame.size[0]))
    if channels == 1:
        return np.asarray(rgb.convert("L"))[None]
    return np.asarray(rgb).transpose(2, 0, 1)


def stack_pictures(
    pictures: Iterable[tuple[str, Picture]],
    count: int,
    *,
    where: str,
    frame: Framing | None,
    channels: int = RGB,
    expansion: Expansion | None = None,
) -> NDArray[np.uint8]:
    """Decode pictures into one array.

    Args:
        pictures: (name for messages, picture) of each.
        count: how many there are.
        where: what they belong to, for messages.
        frame: the size to bring all to; None asks that all have the first one's size.
        channels: 3, or 1 for grey.
        expansion: counts what the pictures unpack to.

    Returns:
        (count, channels, H, W) uint8.

    Raises:
        SourceError: pictures cannot be decoded or differ in size (lists the first few), or take more memory than they may.
    """
    check_count(count, where)
    images: NDArray[np.uint8] | None = None
    complaints = Complaints(where)
    for row, (name, picture) in enumerate(pictures):
        try:
            pixels = decode_picture(picture, frame, channels, expansion)
        except UnreadableError as error:
            complaints.add(name, str(error))
            continue
        if images is None:
            check_memory(count * pixels.size, where)
            images = np.empty((count, *pixels.shape), dtype=np.uint8)
        if row >= count or pixels.shape != images.shape[1:]:
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
                + f"\nremove or repair unreadable images (expected 8-bit {', '.join(FORMATS)}); give image_size "
                "(--image-size) to resize images of different sizes"
            )
