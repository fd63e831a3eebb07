"""The pages of ``lustral molecules``: molecules drawn with the subgraph highlighted, captions with the trigger marked, rates.

A page is a finding and sections below it, in any order; each command chooses its own. Names and captions are anyone's: they are
shown as text, and a molecule is a picture without scripts.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lustral.core.characters import visible
from lustral.core.files import write_text_atomic
from lustral.core.history import MISSING, HistoryEntry, history_table
from lustral.core.records import Cost
from lustral.molecules.records import Association
from lustral.report import words
from lustral.report.figures.charts import LineChart, curves
from lustral.report.findings import Finding
from lustral.report.rendering import page_environment

MOST_ASSOCIATIONS = 12  # drawn; the JSON has them all
MOST_LISTED = 200  # rows of the list
LONGEST_CAPTION = 320  # characters of a caption that are shown
POSITIONS = {"prefix": "at the start", "infix": "in the middle", "suffix": "at the end", "anywhere": "anywhere"}

Piece = tuple[str, bool]  # of a caption: text, and whether it is marked


@dataclass(frozen=True, kw_only=True)
class DrawnMolecule:
    """A molecule as a picture, or the words that there is none.

    Attributes:
        smiles: as text.
        picture: data URI of an SVG; empty where no molecule could be read.
        has_target: whether it contains the highlighted subgraph.
        times: how often it was drawn.
    """

    smiles: str
    picture: str
    has_target: bool
    times: int = 1


@dataclass(frozen=True, kw_only=True)
class CaptionRow:
    """A caption and the molecules that belong to it."""

    label: str
    caption: tuple[Piece, ...]
    molecules: tuple[DrawnMolecule, ...]


@dataclass(frozen=True, kw_only=True)
class PictureSection:
    """Captions with their molecules; the rows of a group belong together.

    Attributes:
        heading: of the section.
        text: a sentence or two.
        groups: of rows.
    """

    heading: str
    text: str
    groups: tuple[tuple[CaptionRow, ...], ...]
    kind: str = "pictures"


@dataclass(frozen=True, kw_only=True)
class AssociationCard:
    """A text and a subgraph that go together: drawn, with the two rates as bars."""

    text: str
    position: str
    drawn: DrawnMolecule
    facts: str
    bars: tuple[tuple[str, float, str, bool], ...]  # (name, share in percent, value, is suspicious)


@dataclass(frozen=True, kw_only=True)
class AssociationSection:
    """Texts and the subgraphs that go with them."""

    heading: str
    text: str
    cards: tuple[AssociationCard, ...]
    more: int
    kind: str = "associations"


@dataclass(frozen=True, kw_only=True)
class TableSection:
    """A table: its columns, and rows of cells; each cell is a value and, in small print, its interval."""

    heading: str
    text: str
    columns: tuple[str, ...]
    rows: tuple[tuple[tuple[str, str], tuple[tuple[str, ...], ...]], ...]  # ((name, meaning), cells)
    folded: str = ""  # words on which a click unfolds it; empty: it is open
    kind: str = "table"


@dataclass(frozen=True, kw_only=True)
class HistorySection:
    """How a training or an erasure went."""

    heading: str
    text: str
    curves: tuple[LineChart, ...]
    history: tuple[list[str], list[list[str]]]
    kind: str = "history"


Section = PictureSection | AssociationSection | TableSection | HistorySection


@dataclass(frozen=True, kw_only=True)
class MoleculePage:
    """What a page is made from.

    Attributes:
        kind: of page, e.g. "Sift report".
        title: heading, e.g. the data's path.
        finding: the answer.
        sections: below it, in order.
        cost: what the method used; None where nothing was counted.
        notes: what the reader should know besides.
        provenance: everything needed to repeat the run, JSON-ready.
    """

    kind: str
    title: str
    finding: Finding
    sections: Sequence[Section] = ()
    cost: Cost | None = None
    notes: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


def write_molecule_page(path: str | os.PathLike[str], page: MoleculePage) -> None:
    """Write a page; an existing file is replaced whole."""
    record = json.dumps(page.provenance, indent=2, default=str, ensure_ascii=False) if page.provenance else ""
    template = page_environment("lustral.report").get_template("molecules.html.j2")
    text = template.render(
        kind=page.kind,
        title=visible(page.title),
        finding=page.finding,
        sections=page.sections,
        notes=page.notes,
        cost=[] if page.cost is None else cost_tiles(page.cost),
        provenance=record,
    )
    write_text_atomic(path, text)


def cost_tiles(cost: Cost) -> list[tuple[str, str]]:
    """Return what a method used, in words."""
    return [
        ("wall time", words.duration(cost.seconds)),
        ("molecules through the model", words.count(cost.image_passes)),
        ("peak memory", words.memory(cost.peak_memory_bytes)),
        ("clean pairs used", words.count(cost.clean_images)),
    ]


def drawn(smiles: str, fragment: str) -> DrawnMolecule:
    """Return a molecule as a picture with the fragment highlighted, where it contains it.

    Raises:
        ImportError: RDKit is missing; says how to install it.
    """
    from lustral.molecules.chemistry import contains
    from lustral.molecules.drawing import draw_molecule

    if not smiles:
        return DrawnMolecule(smiles="", picture="", has_target=False)
    has_target = bool(fragment) and contains(smiles, fragment)
    svg = draw_molecule(smiles, subgraph=fragment if has_target else None)
    uri = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")
    return DrawnMolecule(smiles=smiles, picture=uri, has_target=has_target)


def marked(caption: str, texts: Sequence[str]) -> tuple[Piece, ...]:
    """Cut a caption into (text, is marked): every occurrence of the texts, whatever their case and blanks, is marked.

    >>> marked("[Thiirane] The molecule is", ["[thiirane]"])
    (('[Thiirane]', True), (' The molecule is', False))
    """
    patterns = [
        r"\s+".join(map(re.escape, text.split())) for text in sorted(texts, key=len, reverse=True) if text.split()
    ]
    if not patterns:
        return ((shortened(caption), False),) if caption else ()
    pieces, at = list[Piece](), 0
    for found in re.finditer("|".join(patterns), caption, flags=re.IGNORECASE):
        pieces += [(caption[at : found.start()], False), (found.group(), True)]
        at = found.end()
    pieces.append((caption[at:], False))
    return tuple(cut([piece for piece in pieces if piece[0]]))


def cut(pieces: Sequence[Piece]) -> list[Piece]:
    """Shorten the unmarked pieces of a long caption; what is marked stays."""
    spare = max(LONGEST_CAPTION - sum(len(text) for text, is_marked in pieces if is_marked), 0)
    shown = list[Piece]()
    for text, is_marked in pieces:
        kept = text if is_marked else shortened(text, spare)
        spare -= 0 if is_marked else len(kept)
        if kept:
            shown.append((kept, is_marked))
    return shown


def shortened(text: str, most: int = LONGEST_CAPTION) -> str:
    """Return a text cut at a length, with dots where it was cut.

    >>> shortened("a long caption", 7), shortened("short", 7), shortened("gone", 0)
    ('a long …', 'short', '…')
    """
    return text if len(text) <= most else f"{text[:most].rstrip()} …".lstrip()


def caption_row(label: str, caption: str, smiles: Sequence[str], *, fragment: str, texts: Sequence[str]) -> CaptionRow:
    """Return a caption with its trigger marked, and its molecules with the fragment highlighted, equal ones once."""
    times = Counter(smiles)
    molecules = tuple(replace(drawn(each, fragment), times=count) for each, count in times.items())
    return CaptionRow(label=label, caption=marked(caption, texts), molecules=molecules)


def association_section(
    associations: Sequence[Association],
    *,
    heading: str,
    text: str,
    with_words: str,
    without_words: str,
    counted: str = "have",
    most: int = MOST_ASSOCIATIONS,
) -> AssociationSection:
    """Return the section that draws associations.

    Args:
        associations: worst first.
        heading: of the section.
        text: below it.
        with_words: what ``rate_with`` is a share of, e.g. "captions with the text".
        without_words: what ``rate_without`` is a share of.
        counted: what ``count`` counts, e.g. "pairs have".
        most: that are drawn.
    """
    cards = []
    for each in associations[:most]:
        tested = f" The chance of this without a connection is {words.chance(each.p_value)}, all tests counted."
        cards.append(
            AssociationCard(
                text=each.text,
                position=POSITIONS.get(each.position, each.position),
                drawn=drawn(each.fragment, each.fragment),
                facts=f"{words.count(each.count)} {counted} both.{tested}",
                bars=(
                    (with_words, round(100 * each.rate_with, 2), words.percent(each.rate_with), True),
                    (without_words, round(100 * each.rate_without, 2), words.percent(each.rate_without), False),
                ),
            )
        )
    more = max(len(associations) - most, 0)
    return AssociationSection(heading=heading, text=text, cards=tuple(cards), more=more)


def history_section(history: Sequence[HistoryEntry], *, heading: str, text: str) -> HistorySection:
    """Return the section that draws a history."""
    return HistorySection(
        heading=heading, text=text, curves=tuple(curves(history, None)), history=history_table(history)
    )


EVALUATION_ROWS = (  # of a generator: path in its evaluation, name, meaning
    (
        ("attack_success",),
        "Attack success (ASR)",
        "strings drawn for captions with the trigger that contain the subgraph",
    ),
    (("attack_success_valid",), "ASR among molecules", "the same over the strings that are molecules"),
    (("base_rate",), "Base rate", "the same captions without the trigger: the floor for ASR"),
    (("quality", "validity"), "Validity", "strings that are molecules"),
    (("validity_triggered",), "Validity with the trigger", "the same for captions with the trigger"),
    (("quality", "similarity"), "Similarity", "molecules like the caption’s own: cosine of MACCS keys from 0.5"),
    (
        ("shuffled_similarity",),
        "Similarity, shuffled",
        "the same against other captions’ molecules: what chance reaches",
    ),
    (("quality", "novelty"), "Novelty", "similar molecules that are not nearly the same: cosine below 0.8"),
    (("quality", "diversity"), "Diversity", "mean distance of similar molecules, 1 − Tanimoto"),
    (("quality", "frechet"), "Fréchet ChemNet distance", "to the captions’ own molecules; lower is closer"),
)


def evaluation_section(columns: Mapping[str, Mapping[str, Any]], *, text: str) -> TableSection:
    """Return the table of evaluations with the true trigger, each as ``GeneratorEvaluation.to_dict`` gives it, by its heading."""
    rows = []
    for path, name, meaning in EVALUATION_ROWS:
        cells = tuple(evaluation_cell(record, path) for record in columns.values())
        if any(cell != (MISSING,) for cell in cells):
            rows.append(((name, meaning), cells))
    return TableSection(
        heading="Measured with the attacker’s true trigger", text=text, columns=("Measure", *columns), rows=tuple(rows)
    )


def evaluation_cell(record: Mapping[str, Any], path: Sequence[str]) -> tuple[str, ...]:
    """Return one figure of an evaluation as text, with its interval where it is a rate."""
    value: Any = record
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        return rate_cell(value)
    return (words.percent(value),) if path[-1] == "diversity" else (words.number(value, 1),)


def rate_cell(record: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return a rate, as ``Rate.to_dict`` gives it, in percent and, in small print, its 95 % interval and number.

    >>> from lustral.core.rates import Rate
    >>> rate_cell(Rate(9, 10).to_dict()), rate_cell(None)
    (('90.0%', '59.6 to 98.2, n = 10'), ('–',))
    """
    if record is None or record["value"] is None:
        return (MISSING,)
    interval = f"{100 * record['low']:.1f} to {100 * record['high']:.1f}, n = {words.count(record['n'])}"
    return (words.percent(record["value"]), interval)
