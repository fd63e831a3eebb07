"""A row of pictures on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lustral.vision.figures import data_uri, png

LARGEST_PIXELATED = 96  # pixels; larger pictures are scaled smoothly


@dataclass(frozen=True, kw_only=True)
class PictureRow:
    """A row of pictures: what they are, their PNG data URIs, whether to enlarge them with hard edges, and a text below each."""

    caption: str
    pictures: tuple[str, ...]
    is_pixelated: bool
    texts: tuple[str, ...] = ()


def picture_row(caption: str, images: Tensor, texts: Sequence[str] = ()) -> PictureRow:
    """Return a row of (n, C, H, W) uint8 images, with n texts or none."""
    return PictureRow(
        caption=caption,
        pictures=tuple(data_uri(png(image)) for image in images),
        is_pixelated=max(images.shape[-2:]) <= LARGEST_PIXELATED,
        texts=tuple(texts),
    )
