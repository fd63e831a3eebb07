"""Recovered triggers in a terminal: two pixels to a character, the upper half of a block in one colour, its ground in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.color import Color
from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn import functional as F

from lustral.report.words import quoted
from lustral.vision.figures import close_window, over_checkerboard
from lustral.vision.images import as_float, as_uint8
from lustral.vision.records import ImageSet, RecoveredTrigger, TriggerKind

UPPER_HALF = "▀"
MOST_ROWS = 16  # of one picture
LARGEST_FACTOR = 3  # of small pictures: 8x8 pixels become 24 columns and 12 rows
GAP = 3  # columns between two pictures
LEAST_COLUMNS = 8  # of a picture; narrower ones show nothing
MOST_TRIGGERS = 3
MOST_IMAGES = 32  # that a faint trigger is tried on
LARGEST_GAIN = 1000.0
COLOURS = ("truecolor", "256")
KINDS: dict[TriggerKind, str] = {"patch": "a patch", "faint": "a faint change of the whole image"}


def can_draw(console: Console) -> bool:
    """Say whether pictures can be shown: on a terminal that has the colours and the character, and is allowed colours."""
    return (
        console.is_terminal
        and bool(console.file.isatty())
        and not console.no_color
        and console.color_system in COLOURS
        and console.encoding.lower().replace("-", "").startswith("utf")
    )


def half_blocks(image: Tensor, most_columns: int, most_rows: int = MOST_ROWS) -> Text:
    """Return a picture as lines of characters.

    Args:
        image: (C, H, W) uint8; other than 3 channels become their grey mean.
        most_columns: characters that a line may have.
        most_rows: lines that it may have.
    """
    pixels = fitted(image, most_columns, 2 * most_rows).permute(1, 2, 0).tolist()
    text = Text(no_wrap=True, end="")
    for top in range(0, len(pixels), 2):
        if top:
            text.append("\n")
        below = pixels[top + 1] if top + 1 < len(pixels) else [None] * len(pixels[top])
        for upper, lower in zip(pixels[top], below, strict=True):
            ground = None if lower is None else Color.from_rgb(*lower)
            text.append(UPPER_HALF, Style(color=Color.from_rgb(*upper), bgcolor=ground))
    return text


def fitted(image: Tensor, width: int, height: int) -> Tensor:
    """Return (3, h, w) uint8 with h at most ``height`` and w at most ``width``: enlarged by a whole factor, or averaged."""
    image = image.cpu() if len(image) == 3 else image.cpu().float().mean(0, keepdim=True).round().expand(3, -1, -1)
    scale = min(width / image.shape[2], height / image.shape[1])
    if scale >= 1:
        factor = min(int(scale), LARGEST_FACTOR)
        return image.repeat_interleave(factor, 1).repeat_interleave(factor, 2).to(torch.uint8)
    size = [max(1, int(side * scale)) for side in image.shape[1:]]
    return F.interpolate(image[None].float(), size, mode="area")[0].round().to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The two pictures of one recovered trigger, (C, H, W) uint8, with what each shows."""

    trigger: Tensor
    mask: Tensor
    trigger_words: str
    mask_words: str


def panel(found: RecoveredTrigger, clean: ImageSet) -> Panel:
    """Choose what to show of a recovered trigger.

    A patch is painted over grey checks, closer where a picture of the whole would be scaled down. Of a faint trigger the mean
    change of clean images is shown around grey, and both pictures are stretched until something is seen.
    """
    found = found.to("cpu")
    mask, pattern = found.masks[:1], found.patterns[:1]
    if found.kind == "faint":
        images = as_float(clean.images[:MOST_IMAGES].cpu())
        first = replace(found, masks=mask, patterns=pattern)
        change = (first(images) - images).mean(0) if len(images) else (mask * (pattern - 0.5))[0]
        gain, opacity = stretch(change.abs().max() / 0.5), stretch(mask.max())
        return Panel(
            trigger=as_uint8(0.5 + gain * change),
            mask=as_uint8(opacity * mask)[0],
            trigger_words=f"change{times(gain)}",
            mask_words=f"mask{times(opacity)}",
        )
    window = close_window(mask) if mask.shape[2] > 2 * MOST_ROWS else None
    near = "" if window is None else ", close-up"
    if window is not None:
        mask, pattern = mask[..., *window], pattern[..., *window]
    return Panel(
        trigger=over_checkerboard(mask, pattern)[0],
        mask=as_uint8(mask)[0],
        trigger_words=f"trigger{near}",
        mask_words=f"mask{near}",
    )


def stretch(largest: Tensor) -> float:
    """Return the factor that makes the largest value of a picture 1; 1 of a picture that is empty, or large enough."""
    value = float(largest)
    return min(max(1 / value, 1.0), LARGEST_GAIN) if value > 0 else 1.0


def times(gain: float) -> str:
    """Return a factor in words; nothing of none.

    >>> times(12.3), times(1.0)
    (', 12 times as strong', '')
    """
    return f", {gain:.2g} times as strong" if gain > 1.05 else ""


def trigger_panels(
    triggers: Sequence[RecoveredTrigger], suspects: Sequence[int], clean: ImageSet, names: Sequence[str], width: int
) -> list[RenderableType]:
    """Return the pictures of recovered triggers for a terminal: each beside its mask, below what it is.

    Args:
        triggers: recovered ones; the first three are shown.
        suspects: labels that are accused.
        clean: images, to see what a faint trigger changes.
        names: of all classes, safe to show.
        width: columns of the terminal; a narrow one gets nothing.
    """
    columns = (width - GAP) // 2
    if columns < LEAST_COLUMNS:
        return []
    shown: list[RenderableType] = []
    for found in triggers[:MOST_TRIGGERS]:
        pictures = panel(found, clean)
        grid = Table.grid(padding=(0, GAP, 0, 0))
        grid.add_row(half_blocks(pictures.trigger, columns), half_blocks(pictures.mask, columns))
        grid.add_row(Text(pictures.trigger_words, "dim"), Text(pictures.mask_words, "dim"))
        flagged = "" if found.target_label in suspects else " (not flagged)"
        head = Text.assemble(
            ("Recovered trigger", "bold"), f" towards {quoted(names[found.target_label])}{flagged}: {KINDS[found.kind]}"
        )
        shown.append(Group(head, grid))
    if len(triggers) > MOST_TRIGGERS:
        shown.append(f"and {len(triggers) - MOST_TRIGGERS} more recovered triggers in the report")
    return shown
