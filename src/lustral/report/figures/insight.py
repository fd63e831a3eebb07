"""What an erasure changed inside a network, drawn: heat over pictures, two clouds of points, and a line of losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lustral.report.figures.charts import LineChart, line_chart
from lustral.report.figures.pictures import PictureRow, picture_row
from lustral.report.figures.scatter import Scatter, scatter
from lustral.report.words import percent, quoted
from lustral.vision.images import as_float, as_uint8
from lustral.vision.insight import FeatureMap, HeatMaps, Insight, WeightLine

DIMMED = 0.75  # of a picture's brightness that stays under the heat
OPACITY = 0.8  # of the hottest spot

HOW_TO_READ_HEAT = (
    "Warm spots speak for the model’s answer, written below each picture: before erasing they sit on the trigger, afterwards "
    "they should sit on what the image shows."
)
HOW_TO_READ_FEATURES = (
    "Each dot is an image, and near dots are alike to the network: before erasing triggered images gather at the trigger’s "
    "class, afterwards they should lie among the others."
)
HOW_TO_READ_LINE = (
    "Lower is better: from left to right the loss of triggered images should fall while that of clean ones stays low; a hump "
    "between says that the two models lie in separate valleys."
)
HOW_TO_READ_CLEAN_LINE = (
    "Lower is better: the loss of clean images should stay low from left to right; a hump between says that the two models lie "
    "in separate valleys."
)


@dataclass(frozen=True, kw_only=True)
class InsightFigures:
    """Everything of the section; what is empty or None is left out.

    Attributes:
        basis: which images and which trigger, in a sentence.
        heat: rows of pictures.
        features: the cloud before and the one after.
        line: the losses.
        how_to_read: one sentence each for "heat", "features" and "line".
        left_out: sentences on what is not shown.
    """

    basis: str
    heat: tuple[PictureRow, ...]
    features: tuple[Scatter, ...]
    line: LineChart | None
    how_to_read: dict[str, str]
    left_out: tuple[str, ...]


def insight_figures(insight: Insight, names: Sequence[str]) -> InsightFigures:
    """Draw what was seen; ``names`` are those of all classes."""
    line = None if insight.line is None else loss_chart(insight.line)
    return InsightFigures(
        basis=basis(insight),
        heat=() if insight.heat is None else heat_rows(insight.heat, names),
        features=() if insight.features is None else feature_scatters(insight.features),
        line=line,
        how_to_read={
            "heat": HOW_TO_READ_HEAT,
            "features": HOW_TO_READ_FEATURES,
            "line": HOW_TO_READ_LINE if insight.line and insight.line.triggered else HOW_TO_READ_CLEAN_LINE,
        },
        left_out=insight.left_out,
    )


def basis(insight: Insight) -> str:
    """Say which images and which trigger the figures are made with."""
    of = "images of the test set, which the method never saw" if insight.are_unseen else "of the clean images"
    start = f"Made with {insight.num_images} {of}"
    if not insight.has_trigger:
        return f"{start}."
    stamp = "the attacker’s true trigger" if insight.has_true_trigger else "the recovered trigger"
    return f"{start}, and the same images of other classes with {stamp}."


def heat_rows(heat: HeatMaps, names: Sequence[str]) -> tuple[PictureRow, ...]:
    """Return the triggered images, and where each model looks in them with its answers below."""
    rows = [picture_row("triggered images that the given model gets wrong", heat.images)]
    for when, maps, answers in (
        ("given model", heat.before, heat.answers_before),
        ("erased model", heat.after, heat.answers_after),
    ):
        said = [quoted(names[label]) for label in answers]
        rows.append(picture_row(f"where the {when} looks (Grad-CAM), and its answer", heated(heat.images, maps), said))
    return tuple(rows)


def heated(images: Tensor, maps: Tensor) -> Tensor:
    """Lay heat over pictures: red where it is weak, yellow where it is strong.

    Args:
        images: (n, C, H, W) uint8.
        maps: (n, H, W) float in [0, 1].

    Returns:
        (n, 3, H, W) uint8.
    """
    grey = as_float(images).mean(1, keepdim=True) * DIMMED
    heat = maps.clamp(0, 1)[:, None]
    colour = torch.cat([torch.ones_like(heat), heat, torch.zeros_like(heat)], 1)
    return as_uint8(grey + OPACITY * heat * (colour - grey))


def feature_scatters(features: FeatureMap) -> tuple[Scatter, ...]:
    """Return the clouds before and after."""
    kinds = {
        "others": ("clean", ~features.is_triggered & ~features.is_target),
        "target": ("clean, of the trigger’s class", features.is_target),
        "triggered": ("triggered", features.is_triggered),
    }
    return tuple(
        scatter(
            f"{when} ({percent(shown, 0)} of the variance)",
            {figure: (name, points[chosen].tolist()) for figure, (name, chosen) in kinds.items()},
        )
        for when, points, shown in (
            ("Before", features.before, features.shown_before),
            ("After", features.after, features.shown_after),
        )
    )


def loss_chart(line: WeightLine) -> LineChart | None:
    """Return the losses on the line; None where none is a number."""
    series = {"clean_loss": ("clean images", line.clean)}
    if line.triggered:
        series["triggered_loss"] = ("triggered images, by what they show", line.triggered)
    if not any(math.isfinite(value) for _, values in series.values() for value in values):
        return None
    texts = ["given" if share == 0 else "erased" if share == 1 else f"{share:.0%} of the way" for share in line.shares]
    return line_chart("mean cross-entropy", series, texts)
