"""Pictures: recovered triggers over a checkerboard, single images as PNG, and sheets that compare images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lustral.vision.images import as_uint8

CHECKER_DARK, CHECKER_LIGHT = 0.55, 0.72
CLOSE_UP_SHARE = 0.1  # rows and columns with less of the largest one's opacity stay outside
LARGEST_SIDE = 192  # pixels; larger pictures are scaled down to keep a page small
RESIDUAL_GAIN = 10
FRAME_COLOUR = "#d0202f"
SHEET_SIDE, SHEET_GAP, SHEET_LABEL = 96, 6, 18  # pixels


def png(image: Tensor) -> bytes:
    """Return one (C, H, W) uint8 image as PNG; other than 3 channels become their grey mean.

    Sides above 192 pixels are scaled down.
    """
    picture = _picture(image)
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    return _encode(picture)


def data_uri(content: bytes) -> str:
    """Return PNG bytes as an address that a page can hold inline."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def close_up(masks: Tensor, patterns: Tensor) -> Tensor:
    """Paint triggers as ``over_checkerboard`` does, cut to the one square that holds nearly all of their opacity.

    Args:
        masks: (S, 1, H, W) float opacity in [0, 1].
        patterns: (S, C, H, W) float in [0, 1].

    Returns:
        (S, C, M, M) uint8; no images at all where that square would be more than half the picture's shorter side.
    """
    window = close_window(masks)
    if window is None:
        return masks.new_empty((0, patterns.shape[1], 1, 1), dtype=torch.uint8)
    return over_checkerboard(masks[..., *window], patterns[..., *window])


def close_window(masks: Tensor) -> tuple[slice, slice] | None:
    """Return the rows and columns of the one square that holds nearly all opacity of masks (S, 1, H, W).

    None where it would be more than half the picture's shorter side, or where nothing is opaque.
    """
    height, width = masks.shape[-2:]
    opacity = masks.mean((0, 1))
    spans = []
    for profile in (opacity.sum(1), opacity.sum(0)):
        inside = (profile > CLOSE_UP_SHARE * profile.max()).nonzero().flatten()
        if not len(inside):
            return None
        spans.append((int(inside[0]), int(inside[-1]) + 1))
    side = max(end - start for start, end in spans) + 2
    if side > min(height, width) // 2:
        return None
    top, left = (
        min(max((start + end - side) // 2, 0), size - side)
        for (start, end), size in zip(spans, (height, width), strict=True)
    )
    return slice(top, top + side), slice(left, left + side)


def over_checkerboard(masks: Tensor, patterns: Tensor) -> Tensor:
    """Paint triggers over grey checks, so that what they leave see-through shows.

    Args:
        masks: (S, 1, H, W) float opacity in [0, 1].
        patterns: (S, C, H, W) float in [0, 1].

    Returns:
        (S, C, H, W) uint8.
    """
    height, width = masks.shape[-2:]
    side = max(1, min(height, width) // 16)
    rows, columns = torch.arange(height) // side, torch.arange(width) // side
    is_light = (rows[:, None] + columns[None, :]) % 2 == 0
    checks = torch.where(is_light, CHECKER_LIGHT, CHECKER_DARK)
    return as_uint8(checks + masks * (patterns - checks))


def stamp_sheet(images: Tensor, triggered: Tensor) -> bytes:
    """Draw one sheet of three rows: originals, triggered images, and their difference times 10 around mid-grey.

    Args:
        images: (n, C, H, W) uint8, n >= 1.
        triggered: the same images with the trigger, same shape and dtype.

    Returns:
        PNG bytes; small images are enlarged by a whole factor, so that single pixels can be seen.
    """
    if images.shape != triggered.shape or images.ndim != 4 or not len(images):
        raise ValueError(
            "expected two non-empty batches of equal shape (n, C, H, W); "
            f"got {tuple(images.shape)} and {tuple(triggered.shape)}"
        )
    if images.dtype != torch.uint8 or triggered.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images; got {images.dtype} and {triggered.dtype}")
    difference = triggered.float() - images.float()
    residual = (128 + RESIDUAL_GAIN * difference).clamp(0, 255).to(torch.uint8)
    rows = {"original": images, "triggered": triggered, f"difference x {RESIDUAL_GAIN}": residual}

    count, _, height, width = images.shape
    factor = max(1, SHEET_SIDE // max(height, width))
    cell_height, cell_width = height * factor + SHEET_GAP, width * factor + SHEET_GAP
    row_height = SHEET_LABEL + cell_height
    sheet = Image.new("RGB", (max(count * cell_width, 96) + SHEET_GAP, len(rows) * row_height + SHEET_GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, batch) in enumerate(rows.items()):
        top = SHEET_GAP + row * row_height
        draw.text((SHEET_GAP, top), name, fill="black", font=ImageFont.load_default(12))
        for column, image in enumerate(batch):
            picture = _picture(image).resize((width * factor, height * factor), Image.Resampling.NEAREST)
            sheet.paste(picture, (SHEET_GAP + column * cell_width, top + SHEET_LABEL))
    return _encode(sheet)


def contact_sheet(images: Tensor, captions: Sequence[str], framed: Sequence[bool], columns: int = 8) -> bytes:
    """Draw images in a grid with a line of text below each.

    Args:
        images: (n, C, H, W) uint8, n >= 1.
        captions: n texts; cut to the width of an image, and what is not ASCII becomes "?".
        framed: for each image, whether to draw a red frame around it.
        columns: images side by side.

    Returns:
        PNG bytes; small images are enlarged by a whole factor, large ones scaled down.
    """
    if (
        images.ndim != 4
        or not len(images)
        or images.dtype != torch.uint8
        or not len(captions) == len(framed) == len(images)
    ):
        raise ValueError(
            f"expected uint8 images (n, C, H, W), n >= 1, and a caption for each; got {tuple(images.shape)} {images.dtype} and "
            f"{len(captions)} captions"
        )
    height, width = images.shape[2:]
    factor = SHEET_SIDE // max(height, width) or SHEET_SIDE / max(height, width)
    size = max(int(width * factor), 1), max(int(height * factor), 1)
    cell = SHEET_SIDE + SHEET_GAP, size[1] + SHEET_LABEL + SHEET_GAP
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (min(columns, len(images)) * cell[0] + SHEET_GAP, rows * cell[1] + SHEET_GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = SHEET_GAP + place % columns * cell[0], SHEET_GAP + place // columns * cell[1]
        sheet.paste(
            _picture(image).resize(size, Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS),
            (left, top),
        )
        text = caption.encode("ascii", "replace").decode()
        while text and draw.textlength(text, font=font) > SHEET_SIDE:
            text = text[:-1]
        draw.text((left, top + size[1] + 3), text, fill="black", font=font)
        if framed[place]:
            box = (left - 2, top - 2, left + size[0] + 1, top + size[1] + 1)
            draw.rectangle(box, outline=FRAME_COLOUR, width=2)
    return _encode(sheet)


def _picture(image: Tensor) -> Image.Image:
    image = image.cpu()
    if len(image) == 3:
        return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return Image.fromarray(image.float().mean(0).round().to(torch.uint8).numpy())


def _encode(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
