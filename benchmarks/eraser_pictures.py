"""Draw what erasers left of each attack as a heat map, for docs/results-erasers.md; `benchmarks/erasers.py cards` calls it."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from lustral.core.files import write_bytes_atomic

ROW, COLUMN = 0.3, 0.78  # inches
LETTER = 0.075  # inches of a letter of a method's name, at most
HEADS = 1.05  # inches for the names of attacks, and what the columns are
LEAST_SHARE = 0.5  # of the attacks that a method must have met to get a row
COSTLY = 0.06  # loss of accuracy at the end of the colours
COLOURS = LinearSegmentedColormap.from_list("erased", ["#6fa8e8", "#eef1f6", "#f09a5b"])  # those of the pages

Cell = float | None


@dataclass(frozen=True, kw_only=True)
class Line:
    """A method: what it leaves of each attack and on average, and what it costs; None where it did not meet every attack."""

    method: str
    left: Sequence[Cell]
    rank: float
    mean: Cell
    cost: Cell
    benign: Cell


def heat_map(rows: Sequence[dict[str, Any]], path: Path, *, attacks: Sequence[str], title: str) -> None:
    """Draw attack success after each eraser, and the accuracy that it cost on average and on a benign model.

    Methods are sorted by what they leave on average; after those that met every attack come those that met at least half.

    Args:
        rows: kept results, one for each method and attack, "benign" among the attacks.
        path: PNG to write.
        attacks: columns, in this order.
        title: above the map.
    """
    lines = sorted(lines_of(rows, attacks), key=lambda line: (line.mean is None, line.rank))
    given = [next(float(row["before"]["asr"]) for row in rows if row["attack"] == attack) for attack in attacks]
    names = ["before", *(line.method for line in lines)]
    success: list[list[Cell]] = [[*given, statistics.fmean(given)], *([*line.left, line.mean] for line in lines)]
    heads = ["attacks", "benign"] if any(line.benign is not None for line in lines) else ["attacks"]
    costs: list[list[Cell]] = [[None, None], *([line.cost, line.benign] for line in lines)]
    costs = [cost[: len(heads)] for cost in costs]

    labels = 0.2 + LETTER * max(map(len, names))
    width, height = labels + COLUMN * (len(attacks) + len(heads) + 1.4), HEADS + ROW * len(names) + 0.15
    figure = Figure(figsize=(width, height), dpi=110)
    bottom, top = 0.15 / height, 1 - HEADS / height
    wide, narrow = COLUMN * (len(attacks) + 1) / width, COLUMN * len(heads) / width
    left_map = figure.add_axes((labels / width, bottom, wide, top - bottom))
    right_map = figure.add_axes((labels / width + wide + 0.3 * COLUMN / width, bottom, narrow, top - bottom))
    paint(left_map, success, [*(attack.split()[0] for attack in attacks), "mean"], largest=1.0)
    paint(right_map, costs, heads, largest=COSTLY)
    left_map.set_yticks(range(len(names)), names, fontsize=8)
    left_map.axvline(len(attacks) - 0.5, color="white", linewidth=4)
    left_map.axhline(0.5, color="white", linewidth=4)
    figure.text(0.01, 1 - 0.2 / height, title, fontsize=10, weight="bold", va="center")
    for axes, said in ((left_map, "attack success left, %"), (right_map, "ACC loss")):
        figure.text(axes.get_position().x0, 1 - 0.48 / height, said, fontsize=8.5, va="center", color="#444444")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_bytes_atomic(path, buffer.getvalue())


def lines_of(rows: Sequence[dict[str, Any]], attacks: Sequence[str]) -> Iterator[Line]:
    """Yield a line for each method that met at least ``LEAST_SHARE`` of the attacks."""
    found = {(row["defence"], row["attack"]): row for row in rows}
    for method in dict.fromkeys(row["defence"] for row in rows):
        met = [found[method, attack] for attack in attacks if (method, attack) in found]
        if len(met) < LEAST_SHARE * len(attacks):
            continue
        mean = statistics.fmean(row["after"]["asr"] for row in met)
        complete = len(met) == len(attacks)
        benign = found.get((method, "benign"))
        yield Line(
            method=method,
            left=[found[method, attack]["after"]["asr"] if (method, attack) in found else None for attack in attacks],
            rank=mean,
            mean=mean if complete else None,
            cost=statistics.fmean(map(lost, met)) if complete else None,
            benign=lost(benign) if benign else None,
        )


def lost(row: dict[str, Any]) -> float:
    """Return the accuracy that a method cost, as a fraction."""
    return float(row["before"]["acc"] - row["after"]["acc"])


def paint(axes: Axes, cells: Sequence[Sequence[Cell]], heads: Sequence[str], *, largest: float) -> None:
    """Fill axes with coloured numbers in per cent, columns named above; None stays empty."""
    numbers = [[float("nan") if cell is None else cell for cell in line] for line in cells]
    axes.imshow(numbers, cmap=COLOURS, vmin=0.0, vmax=largest, aspect="auto")
    for y, line in enumerate(cells):
        for x, cell in enumerate(line):
            if cell is not None:
                axes.text(x, y, f"{100 * cell:.1f}", ha="center", va="center", fontsize=8, color="#1a1f2b")
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(heads)), [head.replace("_", "\n") for head in heads], fontsize=8)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.set_xticks([x + 0.5 for x in range(len(heads) - 1)], minor=True)
    axes.set_yticks([y + 0.5 for y in range(len(cells) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
