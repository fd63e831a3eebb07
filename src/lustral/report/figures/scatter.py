"""Clouds of points as positions in a square: pages draw them as SVG that follows their colours. Imports no torch.

The markup is in ``insight.html.j2`` and the style in ``insight.css`` of the templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MARGIN = 4.0  # percent on each side
LARGEST = 1e300  # of a coordinate that is drawn: differences must stay finite
LEAST = 1e-300  # of a distance that a scale is made for

Point = Sequence[float]


@dataclass(frozen=True, slots=True)
class Dots:
    """Points of one kind: its name in the style sheet, its name for a reader, how many there are, and their SVG path."""

    figure: str
    name: str
    count: int
    path: str


@dataclass(frozen=True, slots=True)
class Scatter:
    """Points in a 100 x 100 box, of equal scale in both directions.

    Attributes:
        title: what they are.
        groups: the points by kind; later ones lie over earlier ones.
        description: the picture in a sentence, for those who cannot see it.
    """

    title: str
    groups: tuple[Dots, ...]
    description: str


def scatter(title: str, groups: Mapping[str, tuple[str, Sequence[Point]]]) -> Scatter:
    """Place points.

    Args:
        title: what they are.
        groups: for each name in the style sheet the name for a reader, and (x, y) of each point. Points that are no finite
            numbers are left out; kinds without points too.
    """
    drawable = {
        figure: (name, [(x, y) for x, y in points if abs(x) < LARGEST and abs(y) < LARGEST])  # False for NaN
        for figure, (name, points) in groups.items()
    }
    every = [point for _, points in drawable.values() for point in points]
    middle, half = _box(every)

    def place(x: float, y: float) -> str:
        scale = (50 - MARGIN) / half
        return f"M{50 + scale * (x - middle[0]):.2f} {50 - scale * (y - middle[1]):.2f}h0"

    dots = tuple(
        Dots(figure, name, len(points), "".join(place(x, y) for x, y in points))
        for figure, (name, points) in drawable.items()
        if points
    )
    counts = ", ".join(f"{group.count} {group.name}" for group in dots)
    return Scatter(title=title, groups=dots, description=f"{title}: {counts or 'no points'}.")


def _box(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], float]:
    """Return the middle of the points and half the side of the square around them; 1 where they are all in one place.

    >>> _box([(0.0, 0.0), (2.0, 8.0)])
    ((1.0, 4.0), 4.0)
    """
    if not points:
        return (0.0, 0.0), 1.0
    low = [min(point[axis] for point in points) / 2 for axis in (0, 1)]
    high = [max(point[axis] for point in points) / 2 for axis in (0, 1)]
    half = max(high[0] - low[0], high[1] - low[1])
    return (low[0] + high[0], low[1] + high[1]), half if half > LEAST else 1.0
