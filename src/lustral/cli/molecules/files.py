"""What ``lustral molecules`` writes: pairs and molecules as tables that spreadsheets and training code can open."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from lustral.api.score_files import csv_text
from lustral.core.files import write_text_atomic
from lustral.molecules.records import Association, MoleculeSet, SiftedPairs
from lustral.molecules.victims import pairs_text

LISTED_COLUMNS = ("row", "listed", "text", "fragment", "smiles", "caption")
DRAWN_COLUMNS = ("caption", "sample", "smiles")


def write_pairs(path: Path, data: MoleculeSet) -> None:
    """Write pairs as a table that every command reads again, each text as it is."""
    write_text_atomic(path, pairs_text(data))


def write_listed(path: Path, data: MoleculeSet, found: SiftedPairs) -> None:
    """Write every pair with what it is listed for, the listed ones first; made safe for spreadsheets."""
    flags = found.flagged.tolist()
    rows = []
    for place in sorted(range(len(data)), key=lambda index: not flags[index]):
        smiles, caption = data.smiles[place], data.captions[place]
        reason = reason_of(caption, found.associations) if flags[place] else None
        text, fragment = ("", "") if reason is None else (reason.text, reason.fragment)
        rows.append(
            (place, str(flags[place]).lower(), csv_text(text), csv_text(fragment), csv_text(smiles), csv_text(caption))
        )
    _write(path, LISTED_COLUMNS, rows)


def reason_of(caption: str, associations: Sequence[Association]) -> Association | None:
    """Return the worst association whose text a caption holds; None where its text is spelt otherwise."""
    lowered = " ".join(caption.lower().split())
    return next((each for each in associations if each.text in lowered), None)


def write_molecules(path: Path, captions: Sequence[str], molecules: Sequence[Sequence[str]]) -> None:
    """Write the molecules that were drawn for captions; made safe for spreadsheets."""
    rows = (
        (csv_text(caption), number, smiles)
        for caption, drawn in zip(captions, molecules, strict=True)
        for number, smiles in enumerate(drawn, 1)
    )
    _write(path, DRAWN_COLUMNS, rows)


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text_atomic(path, text.getvalue())
