"""Summaries and comparisons for people (terminal, Markdown, LaTeX) and for programs (CSV, Parquet).

People get percent with one decimal and the interval beside the mean; programs get every column of the summary, fractions at full
precision. Nothing here imports torch.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lustral.core.characters import visible
from lustral.core.files import write_bytes_atomic
from lustral.core.settings import suggest
from lustral.tables.comparison import Comparison
from lustral.tables.summary import EXTREMES, METRICS, Metric, Summary

MISSING = "n/a"
HEADINGS = {"poison_rate": "poison rate", "clean_images": "clean images", "defence_seed": "defence seed"}
UNITS = {"percent": "%", "points": "points", "score": "", "seconds": "s", "passes": "", "bytes": "MiB"}
COUNTS = ("cells", "seeds", "failed")
BENIGN_LOSS = "benign ACC loss (points)"
COSTS: dict[str, tuple[str, Metric]] = {
    "seconds_median": ("time (s)", Metric("seconds", form="seconds")),
    "image_passes_median": ("image passes", Metric("passes", form="passes")),
    "peak_memory_bytes_max": ("memory (MiB)", Metric("memory", form="bytes")),
}


def shown(value: float | None, metric: Metric) -> str:
    """Return a value in the unit of its column: percent, points, MiB or as it is.

    >>> shown(0.98341, METRICS["acc"]), shown(0.9999, METRICS["acc"]), shown(-0.004, METRICS["acc_loss"])
    ('98.3', '>99.9', '−0.4')
    >>> shown(127_252.0, METRICS["image_passes"]), shown(None, METRICS["der"])
    ('127k', 'n/a')
    """
    if value is None:
        return MISSING
    if metric.form == "percent":
        text = f"{100 * value:.1f}"
        return ">99.9" if value < 1 and text == "100.0" else _signed(text)
    if metric.form == "points":
        return _signed(f"{100 * value:.1f}")
    if metric.form == "score":
        return _signed(f"{value:.3f}")
    if metric.form == "bytes":
        return _signed(f"{value / 2**20:,.0f}")
    if metric.form == "passes":
        return _signed(f"{value:,.0f}" if abs(value) < 10_000 else f"{value / 1000:,.0f}k")
    return _signed(f"{value:,.1f}")


def _signed(text: str) -> str:
    """Return a number's text with a real minus sign, and none before zero."""
    return text.replace("-", "−") if text.strip("-0.") else text.lstrip("-")


def with_interval(row: Mapping[str, Any], name: str) -> str:
    """Return a metric of a row with its interval: "98.3 ± 0.4", "98.3 [97.9, 98.6]", or the mean alone.

    >>> with_interval({"acc": 0.98, "acc_half": 0.004, "acc_interval": "t"}, "acc")
    '98.0 ± 0.4'
    """
    metric = {**METRICS, **EXTREMES}[name]
    mean, kind = shown(row[name], metric), row.get(f"{name}_interval")
    if kind == "t":
        return f"{mean} ± {shown(row[f'{name}_half'], metric)}"
    if kind == "wilson":
        return f"{mean} [{shown(row[f'{name}_low'], metric)}, {shown(row[f'{name}_high'], metric)}]"
    return mean


def headings(summary: Summary) -> list[str]:
    """Return the headings of the columns that people see."""
    known = {**METRICS, **EXTREMES}
    names = [HEADINGS.get(name, name.replace("_", " ")) for name in summary.query.by]
    for metric in (known[name] for name in summary.query.metrics):
        unit = UNITS[metric.form]
        names.append(f"{metric.heading} ({unit})" if unit else metric.heading)
    return [*names, *COUNTS, BENIGN_LOSS, *(heading for heading, _ in COSTS.values())]


def cell_texts(summary: Summary) -> list[list[str]]:
    """Return the rows that people see, one text per heading."""
    rows = []
    for row in summary.rows.to_pylist():
        texts = ["–" if row[name] is None else _plain(row[name]) for name in summary.query.by]
        texts += [with_interval(row, name) for name in summary.query.metrics]
        texts += [f"{row[name]:,}" for name in COUNTS]
        texts.append(shown(row["benign_acc_loss"], METRICS["acc_loss"]))
        texts += [shown(row[name], metric) for name, (_, metric) in COSTS.items()]
        rows.append(texts)
    return rows


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else visible(" ".join(str(value).split()))


def rich_table(summary: Summary, title: str | None = None) -> Table:
    """Return the table for the terminal."""
    table = Table(
        title=None if title is None else Text(title),
        caption=Text(summary.caption),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for index, heading in enumerate(headings(summary)):
        justify: Literal["left", "right"] = "left" if index < len(summary.query.by) else "right"
        table.add_column(Text(heading), justify=justify, overflow="fold")
    for texts in cell_texts(summary):
        table.add_row(*map(Text, texts))
    return table


def comparison_lines(comparison: Comparison) -> list[str]:
    """Return what a comparison says, in sentences."""
    metric, pairs = METRICS[comparison.metric], comparison.pairs
    unit = {"percent": " points", "passes": " image passes"}.get(metric.form, f" {UNITS[metric.form]}".rstrip())
    difference = replace(metric, form="points") if metric.form == "percent" else metric
    first, second, gap = (
        shown(value, kind)
        for value, kind in (
            (comparison.mean_first, metric),
            (comparison.mean_second, metric),
            (comparison.difference, difference),
        )
    )
    lines = [f"{metric.heading}: {comparison.first} {first}, {comparison.second} {second}; difference {gap}{unit}"]
    if comparison.low is not None and comparison.high is not None:
        ends = f"[{shown(comparison.low, difference)}, {shown(comparison.high, difference)}]"
        lines[0] += f", 95 % interval {ends}, paired bootstrap over {pairs:,} victims of {comparison.attacks:,} attacks"
    lines[0] += "."
    lines.append(
        f"{comparison.first} is better on {comparison.wins:,} of {pairs:,} victims, equal on {comparison.ties:,}, "
        f"worse on {comparison.losses:,}."
    )
    verdicts = {
        "first": f"{comparison.first} is better.",
        "second": f"{comparison.second} is better.",
        "tie": "A tie: the interval holds 0.",
        "unknown": "One victim decides nothing.",
    }
    lines.append(verdicts[comparison.verdict])
    if comparison.unpaired:
        cells = "1 cell" if comparison.unpaired == 1 else f"{comparison.unpaired:,} cells"
        lines.append(f"Without a partner or without this metric: {cells}.")
    return [*lines, comparison.note] if comparison.note else lines


def to_csv(summary: Summary) -> bytes:
    """Return all columns as CSV (UTF-8): fractions at full precision, an empty field where nothing is known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(summary.rows.column_names)
    for row in summary.rows.to_pylist():
        writer.writerow([visible(value, keep="\n\t") if isinstance(value, str) else value for value in row.values()])
    return text.getvalue().encode()


def to_parquet(summary: Summary) -> bytes:
    """Return all columns as a Parquet file; its metadata has the caption under "caption"."""
    buffer = io.BytesIO()
    pq.write_table(summary.rows.replace_schema_metadata({"caption": summary.caption}), buffer)
    return buffer.getvalue()


def to_markdown(summary: Summary) -> bytes:
    """Return the table for people as Markdown, its caption below."""
    num_names = len(summary.query.by)
    names = headings(summary)
    rule = [":---" if index < num_names else "---:" for index in range(len(names))]
    body = [[_markdown(text) for text in texts] for texts in [names, *cell_texts(summary)]]
    lines = ["| " + " | ".join(texts) + " |" for texts in [body[0], rule, *body[1:]]]
    return ("\n".join([*lines, "", _markdown(summary.caption)]) + "\n").encode()


def to_latex(summary: Summary) -> bytes:
    """Return the table for people as a LaTeX table environment; the document needs the booktabs package."""
    num_names = len(summary.query.by)
    names = headings(summary)
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_latex(summary.caption)}}}",
        f"\\begin{{tabular}}{{{'l' * num_names}{'r' * (len(names) - num_names)}}}",
        "\\toprule",
        _latex_row(names),
        "\\midrule",
        *map(_latex_row, cell_texts(summary)),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return ("\n".join(lines) + "\n").encode()


EXPORTS: dict[str, Callable[[Summary], bytes]] = {
    ".csv": to_csv,
    ".parquet": to_parquet,
    ".tex": to_latex,
    ".md": to_markdown,
}


def write_summary(summary: Summary, path: str | os.PathLike[str]) -> None:
    """Write a summary in the format that the file's ending names, whole or not at all.

    Raises:
        ValueError: no format has this ending.
        OSError: it cannot be written.
    """
    ending = Path(path).suffix.lower()
    if ending not in EXPORTS:
        raise ValueError(f"{os.fspath(path)}: no table format {ending!r}{suggest(ending, EXPORTS)}")
    write_bytes_atomic(path, EXPORTS[ending](summary))


LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{character: f"{{{character}}}" for character in "[]*"},  # special after the end of a row
    **{"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"},
    **{"<": "$<$", ">": "$>$", "|": "$|$", "±": "$\\pm$", "−": "$-$", "–": "--"},
}


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in visible(text))


def _latex_row(texts: Sequence[str]) -> str:
    return " & ".join(map(_latex, texts)) + " \\\\"


def _markdown(text: str) -> str:
    return "".join(f"\\{character}" if character in "\\|*_`<>[]" else character for character in visible(text))
