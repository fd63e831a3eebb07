from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from lustral.tables.comparison import compare
from lustral.tables.exports import (
    EXPORTS,
    cell_texts,
    comparison_lines,
    headings,
    rich_table,
    shown,
    to_csv,
    to_latex,
    to_markdown,
    to_parquet,
    write_summary,
)
from lustral.tables.rows import ROW_SCHEMA
from lustral.tables.summary import EXTREMES, METRICS, Query, Summary, table

ODD = r"50%_of & #1 [red]|~^{x}\ $y$ <b> `c` *"


def cell(defence: str, seed: int, **columns: Any) -> dict[str, Any]:
    return {
        "status": "done",
        "data": "digits",
        "attack": "badnets",
        "poison_rate": 0.1,
        "defence": defence,
        "clean_images": 100,
        "seed": seed,
        "defence_seed": 0,
        "victim_key": f"victim {seed}",
        "asr0": 1.0,
        "seconds": 61.25,
        "image_passes": 12_345.0,
        "peak_memory_bytes": 3 * 2**20,
        **columns,
    }


def made(**query: Any) -> Summary:
    cells = [cell("mesa", seed, acc=acc, asr=0.01, der=0.98) for seed, acc in enumerate((0.90, 0.92, 0.97))]
    cells.append(cell(ODD, 0, acc=0.9999, acc_low=0.99, acc_high=1.0, asr=0.5, poison_rate=None))
    return table(pa.Table.from_pylist(cells, schema=ROW_SCHEMA), Query(**{"by": ("defence",), **query}))


def on_screen(summary: Summary, width: int = 200) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(rich_table(summary, title="[Benchmark]"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_people_get_percent_with_the_interval_beside_it() -> None:
    summary = made()
    assert headings(summary) == [
        *("defence", "ACC (%)", "ASR (%)", "DER", "cells", "seeds", "failed"),
        *("benign ACC loss (points)", "time (s)", "image passes", "memory (MiB)"),
    ]
    odd, mesa = cell_texts(summary)
    assert odd[:4] == [ODD, ">99.9 [99.0, 100.0]", "50.0", "n/a"]
    assert mesa == ["mesa", "93.0 ± 9.0", "1.0 ± 0.0", "0.980 ± 0.000", "3", "3", "0", "n/a", "61.2", "12k", "3"]


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (1.0, "acc", "100.0"),
        (0.99951, "acc", ">99.9"),
        (-0.0004, "acc", "0.0"),
        (-0.0126, "acc_loss", "−1.3"),
        (0.98251, "der", "0.983"),
        (None, "asr", "n/a"),
        (9_999.0, "image_passes", "9,999"),
        (1_234_567.0, "image_passes", "1,235k"),
        (4_321.04, "seconds", "4,321.0"),
        (512.0 * 2**20, "peak_memory_bytes", "512"),
    ],
)
def test_values_in_the_unit_of_their_column(value: float | None, metric: str, text: str) -> None:
    assert shown(value, METRICS[metric]) == text


def test_every_metric_can_be_shown() -> None:
    summary = made(metrics=(*METRICS, *EXTREMES))
    assert all(len(texts) == len(headings(summary)) for texts in cell_texts(summary))


def test_the_terminal_shows_names_as_they_are() -> None:
    text = on_screen(made())
    assert ODD in text  # "[red]" is no colour here
    assert "[Benchmark]" in text
    assert "[low, high] is the Wilson" in text
    assert "93.0 ± 9.0" in text


def test_a_narrow_terminal_loses_nothing() -> None:
    text = on_screen(made(metrics=("acc",)), width=60)
    (line,) = [line for line in text.splitlines() if line.startswith(" mesa")]
    assert line.split()[-6:] == ["3", "0", "n/a", "61.2", "12k", "3"]
    assert "…" not in text
    assert all(len(line) <= 60 for line in text.splitlines())


def test_csv_has_every_column_at_full_precision() -> None:
    summary = made(by=("defence", "poison_rate"))
    rows = list(csv.DictReader(io.StringIO(to_csv(summary).decode())))
    assert list(rows[0]) == summary.rows.column_names
    for row, wanted in zip(rows, summary.rows.to_pylist(), strict=True):
        for name, value in wanted.items():
            assert row[name] == ("" if value is None else str(value))
    assert float(rows[1]["acc"]) == summary.rows.to_pylist()[1]["acc"]


def test_parquet_gives_the_table_back_with_its_caption() -> None:
    summary = made()
    read = pq.read_table(io.BytesIO(to_parquet(summary)))
    assert read.equals(summary.rows)
    assert read.schema.metadata[b"caption"].decode() == summary.caption


def test_markdown_keeps_its_columns() -> None:
    summary = made()
    lines = to_markdown(summary).decode().splitlines()
    bars = [line.replace("\\|", "").count("|") for line in lines[:4]]
    assert bars == [len(headings(summary)) + 1] * 4
    assert lines[1].startswith("| :--- | ---: |")
    assert r"50%\_of & #1 \[red\]\|~^{x}\\ $y$ \<b\> \`c\` \*" in lines[2]
    assert lines[5].startswith("Means over attacks")


def test_latex_escapes_what_is_special() -> None:
    summary = made()
    text = to_latex(summary).decode()
    (odd,) = [line for line in text.splitlines() if line.startswith("50")]
    assert odd.startswith(
        r"50\%\_of \& \#1 {[}red{]}$|$\textasciitilde{}\textasciicircum{}\{x\}\textbackslash{} \$y\$ $<$b$>$ `c` {*} & "
    )
    assert r"$>$99.9 {[}99.0, 100.0{]}" in odd
    assert r"93.0 $\pm$ 9.0" in text
    for line in text.splitlines():
        if line.endswith(r"\\"):
            assert line.replace(r"\&", "").count("&") == len(headings(summary)) - 1
    assert r"\begin{tabular}{l" + "r" * (len(headings(summary)) - 1) + "}" in text
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert text.isascii()


def test_names_with_line_breaks_stay_on_one_line() -> None:
    cells = pa.Table.from_pylist([cell("two\nlines", 0, acc=0.5)], schema=ROW_SCHEMA)
    summary = table(cells, Query(by=("defence",), metrics=("acc",)))
    assert "| two lines | 50.0 |" in to_markdown(summary).decode()
    assert "two lines & 50.0 &" in to_latex(summary).decode()
    assert next(iter(csv.DictReader(io.StringIO(to_csv(summary).decode()))))["defence"] == "two\nlines"


@pytest.mark.parametrize("ending", sorted(EXPORTS))
def test_tables_without_rows_can_be_written(ending: str, tmp_path: Path) -> None:
    summary = table(pa.Table.from_pylist([], schema=ROW_SCHEMA), Query())
    write_summary(summary, tmp_path / f"table{ending}")
    assert (tmp_path / f"table{ending}").read_bytes() == EXPORTS[ending](summary)
    on_screen(summary)


def test_the_ending_of_a_file_names_its_format(tmp_path: Path) -> None:
    write_summary(made(), tmp_path / "table.CSV")
    assert (tmp_path / "table.CSV").read_bytes() == to_csv(made())
    with pytest.raises(ValueError, match=r"no table format '\.parq'; did you mean '\.parquet'\?"):
        write_summary(made(), tmp_path / "table.parq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.CSV"]


def compared(gaps: list[float], metric: str) -> list[str]:
    cells = [cell("a", seed, **{metric: 0.5 + gap}) for seed, gap in enumerate(gaps)]
    cells += [cell("b", seed, **{metric: 0.5}) for seed in range(len(gaps))]
    return comparison_lines(compare(pa.Table.from_pylist(cells, schema=ROW_SCHEMA), "a", "b", metric))


def test_a_comparison_in_sentences() -> None:
    assert compared([0.1] * 6, "asr") == [
        "ASR: a 60.0, b 50.0; difference 10.0 points, 95 % interval [10.0, 10.0], "
        "paired bootstrap over 6 victims of 1 attacks.",
        "a is better on 0 of 6 victims, equal on 0, worse on 6.",
        "b is better.",
    ]
    assert compared([-0.1] * 6, "der")[0].startswith("DER: a 0.400, b 0.500; difference −0.100, 95 % interval")
    assert compared([0.1, -0.1] * 3, "der")[2] == "A tie: the interval holds 0."
    assert compared([0.1], "acc")[2] == "One victim decides nothing."
