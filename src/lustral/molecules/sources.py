"""Where captioned molecules come from: a table of anybody's, or the few hundred pairs that this package carries.

A table is a Parquet, CSV or tab-separated file with a column of SMILES and one of captions. Each row is kept as one canonical
molecule with its caption, or counted as left out with its reason. Splitting goes by molecule and comes before poisoning: a
poisoned pair has a clean twin, which must not stand on the other side of the split.

Reference:
    Zhu, Xiao, Honavar, "3M-Diffusion", COLM 2024, and its code (which molecules are kept).
"""

from __future__ import annotations

import csv
import gzip
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch

from lustral.core.files import NotRegularError, read_regular
from lustral.core.limits import FREE_EXPANSION, LARGEST_TABLE, LONGEST_CAPTION, MOST_EXPANSION, MOST_PAIRS
from lustral.core.parquet_pages import declared_pages
from lustral.core.randomness import child
from lustral.molecules.chemistry import ALLOWED_ELEMENTS, LEAST_ATOMS, MOST_ATOMS, read, spelling
from lustral.molecules.records import MoleculeSet

SMILES_COLUMNS = ("smiles",)
CAPTION_COLUMNS = ("caption", "description", "text")
SUFFIXES = (".parquet", ".csv", ".tsv", ".txt")
_SHOWN = 8  # columns that an error names
_BATCH_ROWS, _BATCH_BYTES = 1_024, 2**26  # of a Parquet table, decoded at a time
EMBEDDED, TEXT_MOLECULE = "embedded", "text_molecule"
NAMED = (EMBEDDED, TEXT_MOLECULE)  # sources that are opened by name
DATA_VARIABLE = "LUSTRAL_DATA"  # environment variable with the folder of the second


class PairsError(ValueError):
    """A table of captioned molecules cannot be used; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class MoleculeSource:
    """Captioned molecules that were read, cleaned and freed of duplicates.

    Attributes:
        name: of the table, or "embedded".
        data: what is kept.
        unfiltered: distinct readable molecules with a caption, before the filter on size, elements and components; the raw
            poisoning rate counts these.
        rows: of the table.
        skipped: rows that were left out, by reason.
    """

    name: str
    data: MoleculeSet
    unfiltered: int
    rows: int
    skipped: Mapping[str, int] = field(default_factory=dict)

    def unfiltered_share(self, part: MoleculeSet) -> int:
        """Return how many unfiltered molecules stand behind a part of the data, such as the training split."""
        return max(len(part), round(self.unfiltered * len(part) / max(len(self.data), 1)))


def open_source(spec: str) -> MoleculeSource:
    """Open captioned molecules by name or path.

    Args:
        spec: "embedded"; "text_molecule", a table in the folder that LUSTRAL_DATA names; or the path of a table.

    Raises:
        PairsError: see ``open_pairs``; or the folder is not known.
        FileNotFoundError: there is no such table.
    """
    if spec == EMBEDDED:
        return embedded()
    path = Path(spec).expanduser()
    if spec == TEXT_MOLECULE and not path.exists():
        if not (folder := os.environ.get(DATA_VARIABLE)):
            raise PairsError(
                f"{TEXT_MOLECULE} is looked up in a folder: name it in the environment variable {DATA_VARIABLE}"
            )
        path = Path(folder) / f"{TEXT_MOLECULE}.parquet"
    if not path.exists():
        raise FileNotFoundError(
            2, f"no such table of pairs; expected a file ({', '.join(SUFFIXES)}) or {EMBEDDED!r}", str(path)
        )
    return open_pairs(path)


def open_pairs(path: Path, *, smiles_column: str | None = None, caption_column: str | None = None) -> MoleculeSource:
    """Read and clean a table of captioned molecules.

    Args:
        path: a .parquet file, a .csv file, a .tsv file with quotes, or a .txt file as 3M-Diffusion writes it: tabs, no quotes,
            two backslashes for one. All but Parquet are UTF-8 with a first row that names the columns.
        smiles_column: its name; None takes "smiles".
        caption_column: its name; None takes "caption", "description" or "text".

    Raises:
        PairsError: no such table, a damaged or too large one, a missing column, or no pair that can be kept.
        OSError: the file is not there or may not be read.
        ImportError: RDKit is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise PairsError(f"{path}: expected a table that ends with {', '.join(SUFFIXES)}")
    wanted = (
        (smiles_column,) if smiles_column else SMILES_COLUMNS,
        (caption_column,) if caption_column else CAPTION_COLUMNS,
    )
    rows = _parquet_rows(path, *wanted) if path.suffix.lower() == ".parquet" else _text_rows(path, *wanted)
    return clean_pairs(rows, name=path.name)


def embedded() -> MoleculeSource:
    """Return the pairs that the package carries: 600 molecules of ChEBI-20, of at most 18 heavy atoms, with short captions.

    They come from the validation and test splits of ChEBI-20, which blender-nlp/MolT5 holds under BSD-3-Clause; structures and
    texts are ChEBI's (EMBL-EBI, CC BY 4.0). Changed here: SMILES are canonical, captions end with the last whole sentence within
    160 characters.
    """
    packed = resources.files("lustral.molecules").joinpath("embedded", "chebi_pairs.tsv.gz").read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()
    return clean_pairs((line.split("\t", 1) for line in lines[1:]), name="embedded")  # the first line names the columns


def clean_pairs(rows: Iterable[Sequence[str | None]], *, name: str) -> MoleculeSource:
    """Keep each molecule once, in its canonical spelling, with its first caption.

    Left out, and counted: empty and very long captions, texts that are no molecule, molecules of several components, with fewer
    than 3 or more than 29 heavy atoms, or with elements that the victim does not know, and repeated molecules.

    Args:
        rows: (SMILES, caption) of each row.
        name: of the source; errors start with it.

    Raises:
        PairsError: nothing is left; says why.
    """
    kept: dict[str, str] = {}
    known: set[str] = set()
    skipped: Counter[str] = Counter()
    count = 0
    for smiles, caption in rows:
        count += 1
        if count > MOST_PAIRS:
            raise PairsError(f"{name}: expected at most {MOST_PAIRS:,} rows; there are more")
        words = " ".join((caption or "").split())
        if not words or len(words) > LONGEST_CAPTION:
            skipped["no caption" if not words else "caption too long"] += 1
            continue
        molecule = read((smiles or "").strip().replace("\\\\", "\\"))  # some tables write each backslash twice
        if molecule is None:
            skipped["no molecule"] += 1
            continue
        written = spelling(molecule)
        if written in known:
            skipped["repeated"] += 1
            continue
        known.add(written)
        if reason := _unfit(molecule, written):
            skipped[reason] += 1
        else:
            kept[written] = words
    if not kept:
        reasons = ", ".join(f"{reason}: {times:,}" for reason, times in skipped.most_common())
        raise PairsError(f"{name}: none of {count:,} rows can be used ({reasons or 'there are none'})")
    data = MoleculeSet(smiles=tuple(kept), captions=tuple(kept.values()))
    return MoleculeSource(name=name, data=data, unfiltered=len(known), rows=count, skipped=dict(skipped.most_common()))


def _unfit(molecule: object, written: str) -> str:
    """Return why the victim would drop a molecule, or ""."""
    if "." in written:
        return "several components"
    if not LEAST_ATOMS <= molecule.GetNumHeavyAtoms() <= MOST_ATOMS:  # type: ignore[attr-defined]
        return "size"
    if any(atom.GetSymbol() not in ALLOWED_ELEMENTS for atom in molecule.GetAtoms()):  # type: ignore[attr-defined]
        return "element"
    return ""


def split(data: MoleculeSet, held_out: int, *, seed: int) -> tuple[MoleculeSet, MoleculeSet]:
    """Split by molecule: equal molecules stay together, and the order of the rows does not matter.

    Args:
        data: clean pairs. Poison one of the parts afterwards, never the whole before.
        held_out: distinct molecules of the second part.
        seed: names the split.

    Returns:
        (training, held-out) pairs, each in the order of the data.

    Raises:
        ValueError: one of the parts would be empty.
    """
    molecules = sorted(set(data.smiles))
    if not 0 < held_out < len(molecules):
        raise ValueError(
            f"expected 1 to {len(molecules) - 1} molecules to hold out of {len(molecules)}; got {held_out}"
        )
    order = torch.randperm(len(molecules), generator=child(seed, "molecules", "split")).tolist()
    chosen = {molecules[place] for place in order[:held_out]}
    is_held_out = torch.tensor([smiles in chosen for smiles in data.smiles], dtype=torch.bool)
    return data.subset(~is_held_out), data.subset(is_held_out)


def _column(names: Sequence[str], wanted: Sequence[str], path: Path) -> int:
    """Return the place of the first wanted column, whatever its case."""
    lower = [name.strip().lower() for name in names]
    for each in wanted:
        if each.lower() in lower:
            return lower.index(each.lower())
    shown = ", ".join(name[:40] for name in names[:_SHOWN])
    raise PairsError(f"{path}: expected a column {' or '.join(wanted)}; it has {shown or 'none'}")


def _text_rows(path: Path, smiles: Sequence[str], caption: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (SMILES, caption) of a table of text."""
    try:
        content = read_regular(path, most=LARGEST_TABLE).decode("utf-8-sig")
    except (NotRegularError, UnicodeDecodeError) as error:
        raise PairsError(f"{path}: expected a table of UTF-8 text ({error})") from error
    suffix = path.suffix.lower()
    quoting: Literal[0, 3] = csv.QUOTE_NONE if suffix == ".txt" else csv.QUOTE_MINIMAL
    rows = csv.reader(io.StringIO(content, newline=""), delimiter="," if suffix == ".csv" else "\t", quoting=quoting)
    try:
        names = next(rows, [])
        first, second = _column(names, smiles, path), _column(names, caption, path)
        for row in rows:
            if row:
                yield (row[first] if first < len(row) else ""), (row[second] if second < len(row) else "")
    except csv.Error as error:
        raise PairsError(f"{path}: line {rows.line_num}: {error}") from error


def _parquet_rows(path: Path, smiles: Sequence[str], caption: Sequence[str]) -> Iterator[tuple[str | None, str | None]]:
    """Yield (SMILES, caption) of a Parquet table."""
    try:
        content = read_regular(path, most=LARGEST_TABLE)
    except NotRegularError as error:
        raise PairsError(str(error)) from error
    try:
        yield from _parquet_cells(content, path, smiles, caption)
    except PairsError:
        raise
    except Exception as error:  # hostile bytes can raise anything
        raise PairsError(f"{path}: cannot be read as a Parquet table ({error}); fetch or save it again") from error


def _parquet_cells(
    content: bytes, path: Path, smiles: Sequence[str], caption: Sequence[str]
) -> Iterator[tuple[str | None, str | None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.ParquetFile(pa.BufferReader(content))
    names = table.schema_arrow.names
    columns = [names[_column(names, wanted, path)] for wanted in (smiles, caption)]
    for name in columns:
        kind = table.schema_arrow.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise PairsError(f"{path}: expected texts in {name}; got {kind}")
    if table.metadata.num_rows > MOST_PAIRS:
        raise PairsError(f"{path}: expected at most {MOST_PAIRS:,} rows; it has {table.metadata.num_rows:,}")
    rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(_largest_page(content, table.metadata, columns, path), 1)))
    for batch in table.iter_batches(batch_size=rows, columns=columns, use_threads=False):
        yield from zip(*(batch.column(batch.schema.get_field_index(name)).to_pylist() for name in columns), strict=True)


def _largest_page(content: bytes, metadata: Any, columns: Sequence[str], path: Path) -> int:
    """Check what the pages of the columns declare; return the size of the largest one, which no cell exceeds, in bytes."""
    unpacked, largest = 0, 0
    for group in range(metadata.num_row_groups):
        for place in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(place)
            if chunk.path_in_schema in columns:
                starts = [chunk.data_page_offset]
                if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                    starts.append(chunk.dictionary_page_offset)
                size = min(chunk.total_compressed_size, len(content))
                pages = declared_pages(io.BytesIO(content), min(starts), size)
                unpacked, largest = unpacked + sum(pages), max(largest, *pages, 0)
    if unpacked > max(MOST_EXPANSION * len(content), FREE_EXPANSION):
        raise PairsError(
            f"{path}: {len(content):,} bytes that unpack to {unpacked:,}; expected at most {MOST_EXPANSION} times as many"
        )
    return largest
