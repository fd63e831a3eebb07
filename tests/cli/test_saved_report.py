"""``lustral report``: the page of a saved result, and files that are none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from described import require_described
from lustral.cli import main
from lustral.cli.saved import reading
from lustral.vision.verdict_files import write_verdict
from saved_results import ABOUT, NAMES, erased, scanned, verdict
from toy import toy_images


def report(file: Path, content: Any, *words: object) -> int:
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return main(["report", str(file), *map(str, words)])


def test_a_scan_is_shown_again_with_its_triggers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_verdict(tmp_path, verdict(), model=torch.nn.Linear(2, 2), clean=toy_images(14, seed=0), about=ABOUT)
    (tmp_path / "report.html").write_text("the page with all pictures")
    assert main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "Backdoored" in said
    assert "Missing: Clean images" in said
    page = (tmp_path / "result.html").read_text(encoding="utf-8")
    assert page.count("<img") == 2, "the trigger and its close-up; images are not kept"
    assert "Towards “eel”" in page
    assert "4.2 px" in page
    assert "&lt;m&gt;.pt" in page
    assert "os.system" in page
    assert "Made from a record" in page
    assert (tmp_path / "report.html").read_text() == "the page with all pictures"


def test_what_was_printed_is_shown_without_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(tmp_path / "report.json", scanned(), "--json", "--out", tmp_path / "new" / "page.html") == 0
    record = json.loads(capsys.readouterr().out)
    require_described("report", record)
    assert record["page"] == str(tmp_path / "new" / "page.html")
    assert "written with --out alone" in record["missing"][1]
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert "<img" not in page
    assert "works on 100% of held-out images" in page


def test_triggers_of_another_scan_are_not_shown(tmp_path: Path) -> None:
    write_verdict(tmp_path, verdict(), model=torch.nn.Linear(2, 2), clean=toy_images(14, seed=0), about=ABOUT)
    triggers = tmp_path / "triggers.safetensors"
    triggers.write_bytes(triggers.read_bytes()[:-1] + b"x")
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "result.html").read_text(encoding="utf-8")
    assert "<img" not in page
    assert "a file was exchanged" in page


def test_an_erasure_is_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(tmp_path / "report.json", erased()) == 0
    assert "Erased" in capsys.readouterr().out
    page = (tmp_path / "report-again.html").read_text(encoding="utf-8")
    for text in (
        "100.0% → 1.7%",
        "A note.",
        "The way between the weights",
        "Audit",
        "How the erasure went",
        "96 images of",
    ):
        assert text in page
    assert "Where it looks" not in page
    assert "Where the networks look, and the map of their features" in page


def changed(record: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    *path, last = place.split(".")
    part: Any = record
    for name in path:
        part = part[int(name)] if isinstance(part, list) else part[name]
    part[int(last) if isinstance(part, list) else last] = value
    return record


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "cannot be read"),
        ("[1]", "a JSON list and no object"),
        ("{}", "no result of lustral"),
        ('{"version": "2.1.0", "runs": []}', "no result of lustral"),
        ("[" * 100_000, "cannot be read"),
        ('{"verdict":' + "[" * 200 + "]" * 200 + "}", "nested"),
        ('{"sifted": {}}', "a result of `lustral sift`"),
        ('{"history": [], "sifted": {}}', "a result of `lustral train`"),
        ('{"command": "lustral molecules scan", "verdict": {}}', "a result of `lustral molecules`"),
        ('{"before": {}}', "a result of `lustral evaluate`"),
        ('{"verdict": {}, "schema": 1}', "another version of lustral (schema 1, expected 2)"),
        ('{"verdict": {}, "schema": 2}', "Field required"),
    ],
)
def test_what_is_no_such_result_is_refused(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(tmp_path / "x.json", content) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "expected the result.json of `lustral scan`" in error or "run the command again" in error
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    ("make", "place", "value"),
    [
        (scanned, "classes", []),
        (scanned, "classes", ["a"] * 3),  # labels beyond it
        (scanned, "classes", ["a" * 2000] * 7),
        (scanned, "image_shape", [3, 10**6, 10**6]),
        (scanned, "image_shape", [12, 12]),
        (scanned, "verdict.outcome", "fine"),
        (scanned, "verdict.evidence.0.value", 10**400),
        (scanned, "verdict.triggers.0.num_samples", 10**9),
        (scanned, "verdict.cost.peak_memory_bytes", 10**40),
        (scanned, "file_safety.files.0.format", "exe"),
        (erased, "purified.history.0", {"epoch": -1}),
        (erased, "purified.history.0.clean_accuracy", 10**60),
        (erased, "purified.selected", 9),
        (erased, "purified.cost.seconds", -1),
        (erased, "purified.cost.peak_memory_bytes", 10**400),
        (erased, "before.acc.hits", 61),
        (erased, "before.acc.n", 10**400),
        (erased, "before.per_class", []),
        (erased, "weight_line.shares", [2.0, 3.0]),
        (erased, "weight_line.clean", [1.0]),
        (erased, "purified.verdict", 7),
    ],
)
def test_hostile_values_are_refused(
    make: Callable[[], dict[str, Any]], place: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(tmp_path / "x.json", changed(make(), place, value)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'x.json'}")
    assert len(error) < 2200
    assert not (tmp_path / "x.html").exists()


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    record = changed(scanned(), "classes", ["<script>alert(1)</script>", "\x1b[2J", *NAMES[2:]])
    assert report(tmp_path / "x.json", changed(record, "model", "</title><img src=x>")) == 0
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert "\x1b" not in page


def test_too_large_and_endless_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reading, "LARGEST_VERDICT", 1000)
    assert report(tmp_path / "x.json", scanned()) == 2
    assert "larger than the 1,000 bytes" in capsys.readouterr().err
    os.mkfifo(tmp_path / "pipe")
    assert main(["report", str(tmp_path / "pipe")]) == 2
    assert "no regular file" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_a_table_without_bound_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reading, "MOST_CELLS", 10)
    assert report(tmp_path / "x.json", scanned()) == 2
    assert "more than 10 cells" in capsys.readouterr().err


def test_the_result_itself_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(tmp_path / "x.json", scanned(), "--out", tmp_path / "x.json") == 2
    assert "write over the result" in capsys.readouterr().err
    assert json.loads((tmp_path / "x.json").read_text()) == scanned()
