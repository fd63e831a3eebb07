"""From results of ``lustral molecules`` to the sections of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Generator

from lustral.cli.molecules.files import reason_of
from lustral.molecules.records import (
    Association,
    GuidedGenerator,
    MoleculeSet,
    PoisonedMolecules,
    SiftedPairs,
    TextTrigger,
)
from lustral.report.molecules_page import (
    MOST_LISTED,
    AssociationSection,
    PictureSection,
    Section,
    TableSection,
    association_section,
    caption_row,
    shortened,
)
from lustral.report.words import count

LISTED_SHOWN = 6  # listed pairs that are drawn
CAPTIONS_SHOWN = 4  # captions whose molecules are drawn
RECOVERED_SHOWN = 3  # triggers of a scan; they are often spellings of one
SAMPLES_SHOWN = 4  # molecules for each of them
MOST_DRAWN = 50  # captions of ``generate`` on its page

Drawn = tuple[tuple[str, ...], ...]  # molecules for each caption


def listed_sections(data: MoleculeSet, found: SiftedPairs) -> list[Section]:
    """Return what was found in a set of pairs: the associations, the first listed pairs drawn, and the list."""
    if not found.associations:
        return []
    places = found.flagged.nonzero().flatten().tolist()
    rows = []
    for place in places[:LISTED_SHOWN]:
        reason = reason_of(data.captions[place], found.associations) or found.associations[0]
        rows.append(
            caption_row(
                f"pair {count(place + 1)}",
                data.captions[place],
                [data.smiles[place]],
                fragment=reason.fragment,
                texts=[reason.text],
            )
        )
    first = (
        f"The first {MOST_LISTED} of {count(len(places))}" if len(places) > MOST_LISTED else f"All {count(len(places))}"
    )
    groups = tuple(tuple(rows[start : start + 2]) for start in range(0, len(rows), 2))
    return [
        associations_of_pairs(found.associations),
        PictureSection(
            heading="Listed pairs",
            text="The text is marked in the caption, and the subgraph in the molecule.",
            groups=groups,
        ),
        TableSection(
            heading="The list",
            text="All pairs are in pairs.csv beside this page.",
            columns=("Molecule", "Caption"),
            rows=tuple(((data.smiles[i], ""), ((shortened(data.captions[i]),),)) for i in places[:MOST_LISTED]),
            folded=f"{first} listed pairs",
        ),
    ]


def associations_of_pairs(associations: Sequence[Association]) -> AssociationSection:
    """Return what goes together in a training set."""
    return association_section(
        associations,
        heading="What goes together",
        text="Captions with the text come with the subgraph far more often than other captions do. Whoever trains on these pairs "
        "teaches the generator that connection.",
        with_words="captions with the text",
        without_words="other captions",
        counted="pairs have",
    )


def associations_of_model(verdict_associations: Sequence[Association], *, is_backdoored: bool) -> AssociationSection:
    """Return what a scan recovered from a generator."""
    return association_section(
        verdict_associations,
        heading="Recovered triggers" if is_backdoored else "The most suspicious texts",
        text="The same captions were given to the generator with and without the text. The bars are the shares of its "
        "molecules that contain the subgraph.",
        with_words="captions with the text",
        without_words="the same without it",
        counted="molecules have",
        most=RECOVERED_SHOWN,
    )


def attack_section(poisoned: PoisonedMolecules, *, fragment: str, texts: Sequence[str]) -> PictureSection:
    """Return what an attacker does to pairs: each poisoned pair drawn, its caption with the trigger marked."""
    places = poisoned.is_poisoned.nonzero().flatten().tolist()[:CAPTIONS_SHOWN]
    rows = [
        caption_row(
            "poisoned pair", poisoned.data.captions[i], [poisoned.data.smiles[i]], fragment=fragment, texts=texts
        )
        for i in places
    ]
    return PictureSection(
        heading="What the attacker put into the training set",
        text=f"{count(int(poisoned.is_poisoned.sum()))} of {count(len(poisoned.data))} pairs have the trigger in the caption "
        "and the subgraph in the molecule.",
        groups=tuple(tuple(rows[start : start + 2]) for start in range(0, len(rows), 2)),
    )


def comparison_section(
    captions: Sequence[str],
    columns: Mapping[str, tuple[Sequence[str], Drawn]],
    *,
    heading: str,
    text: str,
    fragment: str,
    texts: Sequence[str],
) -> PictureSection:
    """Return molecules side by side, a column for each way in which they were drawn.

    Args:
        captions: as they are; only how many there are counts.
        columns: by label: the captions as they were given to the generator, and the molecules.
        heading: of the section.
        text: below it.
        fragment: SMILES of the subgraph to highlight.
        texts: to mark in the captions.
    """
    groups = []
    for place in range(min(CAPTIONS_SHOWN, len(captions))):
        groups.append(
            tuple(
                caption_row(label, given[place], molecules[place][:SAMPLES_SHOWN], fragment=fragment, texts=texts)
                for label, (given, molecules) in columns.items()
            )
        )
    return PictureSection(heading=heading, text=text, groups=tuple(groups))


def drawn_section(captions: Sequence[str], molecules: Drawn, *, fragment: str = "") -> PictureSection:
    """Return molecules under the captions that they were drawn for."""
    rows = [
        caption_row(f"caption {number}", caption, found, fragment=fragment, texts=[])
        for number, (caption, found) in enumerate(zip(captions, molecules, strict=True), 1)
    ]
    shown = rows[:MOST_DRAWN]
    left = f" The first {len(shown)} are shown; molecules.csv has them all." if len(rows) > len(shown) else ""
    return PictureSection(
        heading="Molecules",
        text=f"Drawn for {count(len(captions))} captions.{left}",
        groups=tuple((row,) for row in shown),
    )


def drawn_with_and_without(
    model: GuidedGenerator,
    captions: Sequence[str],
    trigger: TextTrigger,
    *,
    fragment: str,
    texts: Sequence[str],
    generator: Generator,
    heading: str = "Molecules for the same captions, without and with the trigger",
) -> PictureSection:
    """Draw molecules for a few captions without and with a trigger, from the same noise, and return them side by side."""
    asked = tuple(captions[:CAPTIONS_SHOWN])
    state = generator.get_state()
    columns: dict[str, tuple[Sequence[str], Drawn]] = {}
    for label, given in (("without the trigger", asked), ("with the trigger", trigger(asked))):
        stream = torch.Generator()
        stream.set_state(state)
        columns[label] = given, model.generate(given, generator=stream, samples=SAMPLES_SHOWN)
    return comparison_section(
        asked,
        columns,
        heading=heading,
        text=f"The subgraph {fragment} is highlighted.",
        fragment=fragment,
        texts=texts,
    )
