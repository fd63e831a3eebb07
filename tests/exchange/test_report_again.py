"""Pages from real results, once more."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_results import Results

from lustral.cli import main


@pytest.mark.parametrize(("name", "pictures"), [("scan", True), ("erase", False), ("plain", False)])
def test_a_written_result_is_a_page_again(name: str, pictures: bool, results: Results, tmp_path: Path) -> None:
    assert main(["report", str(results.folder / name), "--out", str(tmp_path / "page.html"), "--quiet"]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    first = (results.folder / name / "report.html").read_text(encoding="utf-8")

    def headline(text: str) -> str:
        return text.partition('id="headline">')[2].partition("<")[0]

    assert headline(page) == headline(first)
    assert ("data:image/png" in page) == pictures
    assert ("The way between the weights" in page) == (name != "scan")


@pytest.mark.parametrize("name", ["sift", "train", "evaluate"])
def test_other_results_are_named_and_refused(name: str, results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(results.folder / name)]) == 2
    assert f"a result of `lustral {name}`" in capsys.readouterr().err


def test_the_record_keeps_the_losses_between_the_weights(results: Results) -> None:
    line = results.printed["erase"]["weight_line"]
    assert (line["shares"][0], line["shares"][-1], line["has_true_trigger"]) == (0, 1, True)
    assert line["triggered"][0] > line["clean"][0], "the given model takes triggered images for another class"
