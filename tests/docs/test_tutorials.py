"""The tutorials run from top to bottom on embedded data, and come to what they tell."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import lustral

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[Any]]:
    """Return the names and the cells of a notebook after it ran in a folder."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "hooks"))
    monkeypatch.delitem(sys.modules, "notebooks", raising=False)
    import notebooks  # type: ignore[import-not-found]

    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    return names, list(notebooks.run(notebooks.read(TUTORIALS / f"{name}.ipynb"), names))


def test_comparing_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, cells = run("comparing", tmp_path, monkeypatch)
    lines = "".join(cell.printed for cell in cells).splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(names["methods"])]] == names["methods"]


def test_a_strangers_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, cells = run("stranger_model", tmp_path, monkeypatch)
    said = "".join(cell.printed for cell in cells)
    assert (names["found"].outcome, names["found"].suspects) == ("backdoored", ("class 3",)), said
    assert any(cell.shown.count("<img") > 2 for cell in cells), "the trigger in pictures"
    assert isinstance(names["erased"], lustral.EraseResult)
    assert (tmp_path / "cleaned" / "report.html").is_file()
    assert "the same keys: True" in said
    assert names["erased_rate"] < 0.2 < 0.8 < names["given_rate"], said


def test_a_strangers_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, cells = run("stranger_data", tmp_path, monkeypatch)
    flagged, poisoned = names["sifted"].flagged.numpy(), names["poisoned"]
    said = "".join(cell.printed for cell in cells)
    assert flagged[poisoned].mean() > 0.7, said
    assert flagged[~poisoned].mean() < 0.02
    assert names["left"] == (~flagged).sum()
    assert names["rate"] < 0.9, said  # 0.56: the 19 of 75 that the sifter missed teach it in part
    assert (tmp_path / "trained").is_dir()
