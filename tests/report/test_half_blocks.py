"""Small pictures in a terminal: the pixels by hand, and nothing of them anywhere else."""

from __future__ import annotations

import io
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.text import Text

from lustral.cli.console import Screen
from lustral.report.figures.half_blocks import can_draw, fitted, half_blocks, panel, trigger_panels
from lustral.report.page import ReportData
from lustral.vision.records import ImageSet
from toy import mask_verdict, toy_images, true_trigger

ESCAPE = re.compile(r"\x1b\[[\d;]*m")


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def console_of(file: Any = None, **environ: str) -> Console:
    env = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "80"} | environ
    return Console(file=file or Terminal(), _environ=env)


def printed(shown: list[Any], width: int = 80) -> str:
    console = console_of(COLUMNS=str(width))
    for part in shown:
        console.print(part)
    assert isinstance(console.file, Terminal)
    return console.file.getvalue()


def test_two_pixels_make_a_character() -> None:
    image = torch.tensor(
        [[[255, 0], [1, 2], [3, 4]], [[0, 0], [1, 2], [3, 4]], [[9, 0], [1, 2], [3, 4]]], dtype=torch.uint8
    )
    small = half_blocks(image, 3, 16)  # 2 columns wide: no whole factor but 1 fits
    assert small.plain == "▀▀\n▀▀"
    first, last = small.spans[0].style, small.spans[-1].style
    assert str(first) == "#ff0009 on #010101"
    assert str(last) == "#040404", "there is no pixel below the last row"


@pytest.mark.parametrize(
    ("shape", "size"), [((8, 8), (24, 24)), ((12, 12), (24, 24)), ((224, 224), (32, 32)), ((64, 16), (32, 8))]
)
def test_pictures_keep_their_sides_within_sixteen_rows(shape: tuple[int, int], size: tuple[int, int]) -> None:
    picture = fitted(torch.full((1, *shape), 7, dtype=torch.uint8), 38, 32)
    assert picture.shape == (3, *size)
    assert picture.unique().tolist() == [7]
    assert len(half_blocks(picture, 38).plain.splitlines()) <= 16


def test_a_patch_stands_beside_its_mask() -> None:
    text = printed(trigger_panels([true_trigger()], [4], toy_images(14, seed=0), [f"class {i}" for i in range(7)], 80))
    lines = ESCAPE.sub("", text).splitlines()
    assert lines[0] == "Recovered trigger towards “class 4”: a patch"
    assert [line.count("▀") for line in lines[1:13]] == [48] * 12  # twice 12 pixels, doubled
    assert lines[13].split() == ["trigger", "mask"]
    corner = text.splitlines()[12]
    assert corner.count("38;2;255;255;255;48;2;255;255;255") >= 2, "white on white in both pictures"


def test_a_small_patch_in_a_large_picture_is_shown_close_up() -> None:
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 60:63, 60:63] = 1
    found = replace(true_trigger(), masks=mask, patterns=torch.ones(1, 3, 64, 64))
    shown = panel(found, toy_images(7, seed=0))
    assert shown.trigger_words == "trigger, close-up"
    assert shown.mask.shape == (1, 5, 5)
    assert int((shown.mask == 255).sum()) == 9


def test_a_faint_trigger_is_stretched_and_says_so() -> None:
    change = torch.zeros(1, 3, 12, 12)
    change[:, :, :6] = 1
    found = replace(true_trigger(), masks=torch.full((1, 1, 12, 12), 0.05), patterns=change, kind="faint")
    grey = ImageSet(images=torch.full((4, 3, 12, 12), 128, dtype=torch.uint8), labels=torch.arange(4), num_classes=7)
    shown = panel(found, grey)
    level = 128 / 255
    gain = 0.5 / (0.05 * level)  # the lower half is darkened most
    assert shown.trigger_words == f"change, {gain:.2g} times as strong"
    assert shown.mask_words == "mask, 20 times as strong"
    assert shown.trigger[0, -1, -1] == 0
    assert shown.trigger[0, 0, 0] == round(255 * (0.5 + gain * 0.05 * (1 - level)))
    none = replace(found, masks=torch.zeros(1, 1, 12, 12))
    assert panel(none, grey).trigger_words == "change"
    assert "a faint change" in printed(trigger_panels([found], [], grey, ["x"] * 7, 80))


def test_narrow_terminals_and_many_triggers() -> None:
    many = [replace(true_trigger(), target_label=label) for label in range(5)]
    names = [f"class {i}" for i in range(7)]
    assert trigger_panels(many, [], toy_images(14, seed=0), names, 15) == []
    shown = trigger_panels(many, [], toy_images(14, seed=0), names, 40)
    assert len(shown) == 4
    lines = ESCAPE.sub("", printed(shown, 40)).splitlines()
    assert max(map(len, lines)) <= 45
    assert "and 2 more recovered triggers" in " ".join(lines[-2:])


@pytest.mark.parametrize(
    ("environ", "drawn"),
    [
        ({}, True),
        ({"COLORTERM": ""}, True),  # 256 colours
        ({"NO_COLOR": "1"}, False),
        ({"TERM": "xterm", "COLORTERM": ""}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_only_terminals_with_colours_are_drawn_on(environ: dict[str, str], drawn: bool) -> None:
    assert can_draw(console_of(**environ)) == drawn
    assert not can_draw(console_of(io.StringIO(), **environ))
    assert not can_draw(console_of(io.StringIO(), FORCE_COLOR="1", **environ)), "a pipe stays a pipe"


def test_a_terminal_without_the_character_gets_none() -> None:
    file = Terminal()
    file.encoding = "ascii"  # type: ignore[misc]
    assert not can_draw(console_of(file))


@pytest.mark.parametrize("flags", [{}, {"json": True}, {"quiet": True}, {"hidden": True}])
def test_the_screen_draws_where_somebody_looks(flags: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = os.openpty()
    for name, value in {"TERM": "xterm-256color", "COLORTERM": "truecolor"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    verdict = mask_verdict([9.0] * 7, suspects=[4], triggers=[true_trigger()])
    page = ReportData(title="m", clean=toy_images(14, seed=0), verdict=verdict)
    given: dict[str, Any] = {"json": False, "quiet": False} | flags
    with open(follower, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        assert len(Screen(**given).trigger_pictures(verdict, page)) == (0 if flags else 1)
        assert Screen(**given).trigger_pictures(None, page) == []
    os.close(leader)
    with Path(os.devnull).open("w", encoding="utf-8") as nothing:
        monkeypatch.setattr("sys.stdout", nothing)
        assert Screen(**given).trigger_pictures(verdict, page) == []


def test_hostile_names_command_no_terminal() -> None:
    data = ReportData(title="m", clean=replace(toy_images(7, seed=0), class_names=("\x1b[2J",) * 7))
    shown = trigger_panels([true_trigger()], [4], data.clean, data.class_names, 80)
    assert "\x1b[2J" not in printed(shown)
    assert isinstance(shown[0].renderables[0], Text)  # type: ignore[union-attr]


def test_a_grey_trigger_is_drawn_in_grey() -> None:
    found = replace(true_trigger(), masks=torch.ones(1, 1, 8, 8), patterns=torch.full((1, 1, 8, 8), 0.2))
    shown = panel(found, toy_images(7, seed=0))
    assert half_blocks(shown.trigger, 30).plain.count("▀") == 24 * 12
