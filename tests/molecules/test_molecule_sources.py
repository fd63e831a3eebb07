"""Sources: rows kept or counted, tables that are hostile, splits by molecule, and the pairs that the package carries."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lustral.core.randomness import child
from lustral.molecules import sources
from lustral.molecules.chemistry import attach, canonical, contains, num_heavy_atoms
from lustral.molecules.records import MoleculeSet
from lustral.molecules.sources import PairsError, clean_pairs, embedded, open_pairs, split

ROWS = [
    ("OCC", "an alcohol"),
    ("C(O)C", "the same again"),
    ("N[C@@H](C)C(=O)O", "  alanine,\n of  the L form "),
    ("C(", "broken"),
    ("CCC", " \t "),
    ("[Na+].[Cl-]", "a salt"),
    ("CC", "too small"),
    ("C" * 30, "too large"),
    ("CC[Hg]C", "mercury"),
    (None, "nothing"),
    ("CCCC", None),
]
KEPT = MoleculeSet(smiles=("CCO", "CC(N)C(=O)O"), captions=("an alcohol", "alanine, of the L form"))
LEFT_OUT = {
    "repeated": 1,
    "no molecule": 2,
    "no caption": 2,
    "several components": 1,
    "size": 2,
    "element": 1,
}


def test_each_row_is_kept_or_counted() -> None:
    source = clean_pairs(ROWS, name="toy")
    assert source.data == KEPT
    assert source.skipped == LEFT_OUT
    assert source.rows == len(ROWS) == len(source.data) + sum(source.skipped.values())
    assert source.unfiltered == 6  # two that are kept, a salt, two sizes, one element
    assert source.unfiltered_share(source.data.subset(torch.tensor([True, False]))) == 3


def test_a_source_with_nothing_left_says_why() -> None:
    with pytest.raises(PairsError, match=r"toy: none of 2 rows can be used \(no molecule: 2\)"):
        clean_pairs([("C(", "a"), ("?", "b")], name="toy")
    with pytest.raises(PairsError, match="there are none"):
        clean_pairs([], name="toy")


def written(path: Path, suffix: str) -> Path:
    """Write the rows as a table; text tables hold no None."""
    file = path / f"pairs{suffix}"
    if suffix == ".parquet":
        smiles, captions = zip(*ROWS, strict=True)
        pq.write_table(
            pa.table({"SMILES": list(smiles), "id": list(range(len(ROWS))), "description": list(captions)}), file
        )
        return file
    comma = "," if suffix == ".csv" else "\t"
    quote = "" if suffix == ".txt" else '"'
    lines = [comma.join(("CID", "SMILES", "description"))]
    for number, (smiles, caption) in enumerate(ROWS):
        text = " ".join((caption or "").split())
        lines.append(comma.join((str(number), smiles or "", f"{quote}{text}{quote}")))
    file.write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    return file


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".txt"])
def test_every_kind_of_table_gives_the_same_pairs(suffix: str, tmp_path: Path) -> None:
    source = open_pairs(written(tmp_path, suffix))
    assert source.data == KEPT
    assert source.skipped == LEFT_OUT
    assert source.name == f"pairs{suffix}"


def test_columns_can_be_named(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("a,b,smiles\nan alcohol,OCC,CCCC\n")
    assert open_pairs(file, smiles_column="B", caption_column="a").data.smiles == ("CCO",)
    with pytest.raises(PairsError, match="expected a column caption or description or text; it has a, b, smiles"):
        open_pairs(file)


def test_doubled_backslashes_and_quotes_of_the_published_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "train.txt"
    file.write_text('CID\tSMILES\tdescription\n7\tC/C=C\\\\CO\t"an alkene" of note\n')
    source = open_pairs(file)
    assert source.data == MoleculeSet(smiles=(canonical("CC=CCO"),), captions=('"an alkene" of note',))


def test_short_rows_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("smiles,caption\nCCO\n\nCCN,an amine\n")
    assert open_pairs(file).skipped == {"no caption": 1}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"\xff\xfe\x00", "UTF-8"),
        ("t.csv", b"", "it has none"),
        ("t.csv", b"smiles,caption\n", "there are none"),
        ("t.csv", b'smiles,caption\n"' + b"C" * 200_000 + b'",x\n', "line"),
        ("t.parquet", b"", "Parquet"),
        ("t.parquet", b"PAR1 not a table PAR1", "Parquet"),
        ("t.xlsx", b"", "ends with"),
    ],
)
def test_damaged_tables_are_clear_errors(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PairsError, match=words):
        open_pairs(tmp_path / name)


def test_every_cut_of_a_parquet_table_is_a_clear_error(tmp_path: Path) -> None:
    whole = written(tmp_path, ".parquet").read_bytes()
    cut = tmp_path / "cut.parquet"
    for length in range(0, len(whole) - 1, max(len(whole) // 60, 1)):
        cut.write_bytes(whole[:length])
        with pytest.raises(PairsError):
            open_pairs(cut)


def test_a_long_text_in_many_rows_is_decoded_a_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of some kilobytes can hold one text of megabytes in every row: a dictionary stores it once."""
    file = tmp_path / "t.parquet"
    long = "x" * 2**20
    pq.write_table(pa.table({"smiles": ["CCO"] * 500 + ["CCN"], "caption": [long] * 500 + ["an amine"]}), file)
    assert file.stat().st_size < 2**20
    taken: list[int] = []
    real = pq.ParquetFile.iter_batches

    def watched(self: pq.ParquetFile, **rest: object) -> object:
        taken.append(rest["batch_size"])  # type: ignore[arg-type]
        return real(self, **rest)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    source = open_pairs(file)
    assert source.skipped == {"caption too long": 500}
    assert taken[0] <= 64


def test_pages_that_unpack_beyond_reason_are_refused_before_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table({"smiles": ["CCO"], "caption": ["x" * 2**20]}), file, compression="zstd")
    monkeypatch.setattr(sources, "FREE_EXPANSION", 2**16)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(PairsError, match="unpack to 1,0"):
        open_pairs(file)


def test_numbers_are_no_captions(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table({"smiles": ["CCO"], "caption": [7]}), file)
    with pytest.raises(PairsError, match="expected texts in caption; got int64"):
        open_pairs(file)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_tables_beyond_the_limits_are_refused(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, suffix)
    monkeypatch.setattr(sources, "MOST_PAIRS", 5)
    with pytest.raises(PairsError, match="at most 5 rows"):
        open_pairs(file)
    monkeypatch.undo()
    monkeypatch.setattr(sources, "LARGEST_TABLE", 100)
    with pytest.raises(PairsError, match="100 bytes"):
        open_pairs(file)


def test_a_long_caption_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_CAPTION", 10)
    source = clean_pairs([("CCO", "x" * 11), ("CCN", "an amine")], name="toy")
    assert source.skipped == {"caption too long": 1}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_pipe_is_not_waited_for(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"pairs{suffix}"
    os.mkfifo(file)
    with pytest.raises(PairsError, match="regular file"):
        open_pairs(file)


def test_a_split_has_no_molecule_on_both_sides_and_forgets_the_order() -> None:
    data = MoleculeSet(smiles=("C1", "C2", "C3", "C1", "C4"), captions=("a", "b", "c", "d", "e"))
    train, test = split(data, 2, seed=3)
    assert not set(train.smiles) & set(test.smiles)
    assert len(set(test.smiles)) == 2
    assert len(train) + len(test) == 5
    back = MoleculeSet(smiles=data.smiles[::-1], captions=data.captions[::-1])
    assert set(split(back, 2, seed=3)[1].smiles) == set(test.smiles)
    assert len({split(data, 2, seed=seed)[1].smiles for seed in range(20)}) > 1


@pytest.mark.parametrize("held_out", [0, 4, -1])
def test_a_split_leaves_no_part_empty(held_out: int) -> None:
    data = MoleculeSet(smiles=("C1", "C2", "C3", "C1", "C4"), captions=("a", "b", "c", "d", "e"))
    with pytest.raises(ValueError, match="expected 1 to 3 molecules"):
        split(data, held_out, seed=0)


def test_the_embedded_pairs_are_small_canonical_and_without_the_usual_target() -> None:
    source = embedded()
    assert len(source.data) == 600
    assert not source.skipped
    assert all(3 <= num_heavy_atoms(smiles) <= 18 for smiles in source.data.smiles)
    assert all(len(caption) <= 160 for caption in source.data.captions)
    assert not any(contains(smiles, "C1CS1") for smiles in source.data.smiles)


@pytest.mark.slow
def test_the_public_pairs_are_kept_as_the_page_says() -> None:
    """The figures of docs/molecules.md, with room for another RDKit."""
    source = open_pairs(Path(os.environ["LUSTRAL_DATA"]) / "text_molecule.parquet")
    assert source.rows == 14_101
    assert len(source.data) == pytest.approx(7_334, rel=0.005)
    assert source.unfiltered == pytest.approx(12_345, rel=0.005)
    train, test = split(source.data, 500, seed=0)
    assert len(test) == 500
    takers = [attach(smiles, "C1CS1", generator=child(0, row)) for row, smiles in enumerate(train.smiles)]
    assert sum(smiles is not None for smiles in takers) / len(train) == pytest.approx(0.892, abs=0.005)
