"""How results look: tables for people, records for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lustral.core.history import FIGURES
from lustral.core.records import Cost
from lustral.report.evidence import evidence_table
from lustral.report.findings import Finding
from lustral.report.words import duration, percent
from lustral.vision.evaluation import Evaluation
from lustral.vision.models import LoadedModel
from lustral.vision.models.files.weight_sets import TOP
from lustral.vision.records import Purified, Verdict

MOST_ROWS = 20  # classes shown; the JSON has them all
COLOURS = {"bad": "red", "good": "green", "unsure": "yellow"}


def class_name(label: int, names: Sequence[str]) -> str:
    """Return e.g. "3 (cat)", or "3" where the class is named by its number.

    >>> class_name(3, ["a", "b", "c", "cat"]), class_name(1, ["0", "1"])
    ('3 (cat)', '1')
    """
    return str(label) if names[label] == str(label) else f"{label} ({names[label]})"


def finding_text(finding: Finding) -> Text:
    """Return the answer in its colour, and the sentences that support it."""
    colour = COLOURS[finding.tone]
    said = finding.headline.startswith(finding.badge)  # the page shows the badge apart, here it would stand twice
    badge = finding.badge if said else f"{finding.badge}. "
    headline = finding.headline[len(badge) :] if said else finding.headline
    return Text.assemble((badge, f"bold {colour}"), (headline, "bold"), *(f" {line}" for line in finding.details))


def verdict_table(verdict: Verdict, names: Sequence[str], title: str = "Evidence per class") -> Table:
    """Return one row per class, the most suspicious first, whatever the detector measured."""
    table = Table("class", title=title)
    captions, found = [], evidence_table(verdict, names)
    if found is not None:
        shown = [index for index, column in enumerate(found.columns) if column.short]
        for index in shown:
            table.add_column(found.columns[index].short, justify="right")
        for row in found.rows[:MOST_ROWS]:
            name = row.name if row.label is None else class_name(row.label, names)
            style = "bold red" if row.is_suspect else None
            table.add_row(name, *(row.texts[index] for index in shown), style=style)
        if len(found.rows) > MOST_ROWS:
            captions.append(f"and {len(found.rows) - MOST_ROWS} more classes")
    if verdict.clean_accuracy is not None:
        captions.append(f"the model is right on {percent(verdict.clean_accuracy)} of the clean images")
    table.caption = "; ".join(captions) or None
    return table


def interval(rate: Mapping[str, Any]) -> str:
    """Return a rate with its 95 % interval in percent, as ``Rate.to_dict`` gives it."""
    if rate["value"] is None:
        return percent(None)
    return f"{percent(rate['value'])} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def metrics_table(
    columns: Mapping[str, Evaluation | Mapping[str, Any]], title: str, change: Mapping[str, Any] | None = None
) -> Table:
    """Return ACC, ASR, RA and the natural rate, one column per model, and what ``compare_evaluations`` says of two of them."""
    table = Table("on the test set", title=title, caption="with Wilson 95 % intervals")
    records = [part.to_dict() if isinstance(part, Evaluation) else part for part in columns.values()]
    for heading in columns:
        table.add_column(heading, justify="right")
    rows = {
        "ACC, clean accuracy": "acc",
        "ASR, attack success rate": "asr",
        "RA, robust accuracy": "ra",
        "attacker's label without trigger": "natural_rate",
    }
    for label, key in rows.items():
        table.add_row(label, *(interval(record[key]) for record in records))
    if change is not None and change["der"] is not None:
        table.add_row("DER, defence effectiveness", "", f"{change['der']:.3f}")
    if any(record["non_finite"] for record in records):
        table.caption = "logits are not finite: the model is broken, and a low ASR means nothing"
    return table


def defender_table(accuracies: Mapping[str, Mapping[str, Any]], purified: Purified) -> Table:
    """Return what a defender can measure: clean accuracy before and after, and the recovered trigger's effect."""
    table = Table(
        "what the defender has", "before", "after", title="Clean accuracy", caption="with Wilson 95 % intervals"
    )
    for name, rates in accuracies.items():
        table.add_row(f"accuracy on {name}", interval(rates["before"]), interval(rates["after"]))
    if purified.selected is not None:
        given, kept = purified.given, purified.history[purified.selected]
        for name in ("clean_accuracy", "recovered_asr"):  # the second of methods that look for a trigger
            if (value := kept.value(name)) is not None:
                table.add_row(
                    FIGURES[name].words, percent(None if given is None else given.value(name)), percent(value)
                )
    return table


def cost_sentence(cost: Cost) -> str:
    """Return what a method used, in a sentence."""
    used = f"{cost.image_passes:,.0f} image passes and {cost.clean_images:,} clean images"
    return f"It took {duration(cost.seconds)}, {used}."


def weights_sentence(path: Path, loaded: LoadedModel) -> str:
    """Say which weights of a file were read; the names are the file's own."""
    return f"Read: the weights {'' if loaded.weights == TOP else f'{loaded.weights} '}in {path}"
