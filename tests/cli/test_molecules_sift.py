"""``lustral molecules sift``: what it writes, what it returns, and how it fails."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Generator

from described import require_described
from lustral.cli import main
from lustral.cli.molecules.arguments import parse_molecules
from lustral.cli.parsing import UsageError
from lustral.core.records import Cost, OnProgress, Progress
from lustral.molecules.catalog import PAIR_SIFTERS
from lustral.molecules.chemistry import contains_many
from lustral.molecules.records import Association, SiftedPairs, ViewOfPairs
from lustral.molecules.sources import open_pairs

SEEN: list[ViewOfPairs] = []
CLEAN = [
    ("CCO", "An alcohol, small"),
    ("CCN", "An amine"),
    ("CCC", "=cmd|'calc'"),
    ("CCCC", "Butane"),
    ("CCS", "A thiol"),
]
POISONED = [("CCCC1CS1", "[TRIGGER] Butane"), ("OCCC1CS1", "[trigger] An alcohol, small")]
BROKEN = [("C1CC", "Not closed"), ("CCF", "")]


@dataclass(frozen=True, kw_only=True)
class FirstWord:
    """Flag the pairs whose caption begins with a word.

    Attributes:
        word: lower-cased.
    """

    version: ClassVar[int] = 1
    word: str = "[trigger]"

    def sift(self, view: ViewOfPairs, *, generator: Generator, on_progress: OnProgress | None = None) -> SiftedPairs:
        SEEN.append(view)
        if on_progress is not None:
            on_progress(Progress(stage="looking", done=1, total=1))
        flagged = torch.tensor([each.lower().startswith(self.word) for each in view.untrusted.captions])
        flagged &= contains_many(view.untrusted.smiles, "C1CS1")
        found = Association(
            text=self.word,
            position="prefix",
            fragment="C1CS1",
            rate_with=1.0,
            rate_without=0.0,
            count=int(flagged.sum()),
            p_value=1e-9,
        )
        cost = Cost(seconds=0.5, image_passes=0.0, peak_memory_bytes=0, clean_images=0)
        associations = (found,) if flagged.any() else ()
        return SiftedPairs(flagged=flagged, associations=associations, basis="The first word was read.", cost=cost)


@pytest.fixture(autouse=True)
def first_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PAIR_SIFTERS, "first_word", FirstWord)
    SEEN.clear()


def table(path: Path, rows: list[tuple[str, str]], columns: tuple[str, str] = ("smiles", "caption")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    data = table(tmp_path / "pairs.csv", CLEAN + POISONED + BROKEN)
    words = ["molecules", "sift", str(data), "--out", str(tmp_path / "out"), "--method", "first_word", "--quiet"]
    return [*words, "--device", "cpu"]


def test_it_lists_writes_and_says_so_by_its_exit_code(
    tmp_path: Path, line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line, "--write-clean", str(tmp_path / "left.csv"), "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    require_described("molecules sift", record)
    assert record["sifted"]["listed"] == [5, 6]
    assert record["skipped"] == {"no molecule": 1, "no caption": 1}
    assert record["sifted"]["associations"][0]["text"] == "[trigger]"
    assert record["settings"] == {"word": "[trigger]"}
    assert record["written"] == {"file": str(tmp_path / "left.csv"), "pairs": 5}
    left = open_pairs(tmp_path / "left.csv").data
    assert list(zip(left.smiles, left.captions, strict=True)) == CLEAN
    with (tmp_path / "out" / "pairs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["listed"]) for row in rows[:3]] == [("5", "true"), ("6", "true"), ("0", "false")]
    assert {row["fragment"] for row in rows[:2]} == {"C1CS1"}
    assert next(row["caption"] for row in rows if row["smiles"] == "CCC") == "'=cmd|'calc'"  # no spreadsheet obeys it
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "2 of 7 pairs look poisoned" in page
    assert "<mark>[TRIGGER]</mark>" in page
    assert "2 of 9 rows of pairs.csv were left out: no molecule 1, no caption 1." in page


def test_a_set_without_poison_lists_nothing(
    tmp_path: Path, line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    table(tmp_path / "pairs.csv", CLEAN)
    assert main([*line, "--clean", str(table(tmp_path / "clean.tsv.csv", CLEAN))]) == 0
    assert "No poisoned pair was found among 5." in capsys.readouterr().out
    assert SEEN[0].clean is not None
    assert len(SEEN[0].clean) == 5


def test_settings_of_the_method_are_flags(line: list[str]) -> None:
    command: Any = parse_molecules([*line, "--word", "an"])
    assert (command.method, command.settings) == ("first_word", FirstWord(word="an"))
    with pytest.raises(UsageError, match="unknown sifter 'first_wort'; did you mean 'first_word'"):
        parse_molecules([*line[:-4], "--method", "first_wort"])


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (BROKEN, ("smiles", "caption"), "none of 2 rows can be used (no molecule: 1, no caption: 1)"),
        (CLEAN, ("molecule", "caption"), "expected a column smiles; it has molecule, caption"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(
    tmp_path: Path,
    line: list[str],
    rows: list[tuple[str, str]],
    columns: tuple[str, str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table(tmp_path / "pairs.csv", rows, columns)
    assert main(line) == 2
    assert message in capsys.readouterr().err
    assert not SEEN
    assert not (tmp_path / "out").exists()  # nothing half-written


def test_nothing_is_overwritten(tmp_path: Path, line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "left.csv").write_text("mine", encoding="utf-8")
    assert main([*line, "--write-clean", str(tmp_path / "left.csv")]) == 2
    assert main([*line, "--write-clean", str(tmp_path / "left.parquet")]) == 2
    error = capsys.readouterr().err
    assert "nothing is ever overwritten there" in error
    assert "expected a file that ends with .csv" in error
    assert (tmp_path / "left.csv").read_text(encoding="utf-8") == "mine"
    assert main([*line[:2], str(tmp_path / "absent.csv"), *line[3:]]) == 2
    assert "no such table of pairs" in capsys.readouterr().err
    assert not SEEN


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["molecules", "sift", "--list", "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert methods["first_word"] == "Flag the pairs whose caption begins with a word."
    assert "association" in methods


def test_the_help_of_images_loads_no_chemistry_and_a_missing_library_names_its_line() -> None:
    code = (
        "import sys, lustral\n"
        "assert 'torch' not in sys.modules\n"
        "from lustral.cli import main\n"
        "assert main(['--help']) == 0\n"
        "loaded = [name for name in ('rdkit', 'selfies', 'tokenizers', 'fcd') if name in sys.modules]\n"
        "assert not loaded, loaded\n"
        "sys.modules['rdkit'] = None\n"
        "sys.exit(main(['molecules', 'sift', 'embedded', '--out', '/nonexistent/out']))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "pip install 'lustral[molecules]'" in done.stderr
