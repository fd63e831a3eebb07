"""The documentation site: its checks find faults, generated pages are up to date, and with MkDocs at hand the whole of it builds.

.venv/bin/python -m pytest -m slow tests/docs          # builds the site; needs the extra `docs`, and two minutes
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = (ROOT / "docs" / "hooks", ROOT / "benchmarks")


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """Let the scripts of the site be imported; they are in no package."""
    sys.path[:0] = [str(folder) for folder in SCRIPTS]
    yield
    for folder in SCRIPTS:
        sys.path.remove(str(folder))


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def page(folder: Path, name: str, body: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"<html><body>{body}</body></html>", encoding="utf-8")


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    page(
        tmp_path, "index.html", '<a href="sub/a.html#here">1</a><a href="https://example.org/x">2</a><img src="no.png">'
    )
    page(
        tmp_path,
        "sub/a.html",
        '<h2 id="here"></h2><a href="../">up</a><a href="#gone">3</a><a href="../../out.html">4</a><a href="#defence=x">5</a>',
    )
    assert script("checks").broken_links(tmp_path) == [
        "index.html: no.png",
        "sub/a.html: #gone",
        "sub/a.html: ../../out.html",
    ]
    assert script("checks").broken_links(tmp_path, ignored="no.png")[0].startswith("sub/")


def test_words_that_search_misses_are_found(tmp_path: Path) -> None:
    entries = [{"title": "WaNet", "text": ""}, {"title": "", "text": "of WaNet"}]
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "search_index.json").write_text(json.dumps({"docs": entries}))
    assert script("checks").missed_words(tmp_path, {"WaNet": 2}) == []
    assert script("checks").missed_words(tmp_path, {"WaNet": 3, "SIG": 1}) == [
        "search finds 'WaNet' 2 times",
        "search finds 'SIG' 0 times",
    ]


def test_the_comparison_of_methods_is_what_the_cards_say() -> None:
    matrix, text = script("matrix"), (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    parts = matrix.parts(matrix.read_cards(ROOT / "tests" / "cards"))
    assert matrix.filled(text, parts) == text, "run: python benchmarks/matrix.py"
    assert all(part in text for part in parts.values())


def test_what_a_victim_of_a_card_counts_for() -> None:
    matrix = script("matrix")
    good = {"attack": "badnets size=4", "asr_before": 0.9, "acc_before": 0.9, "asr": 0.04, "acc": 0.88, "ra": 0.8}
    plans = {
        "a": [good, good | {"asr": 0.06}, good | {"acc": 0.86}, good | {"ra": 0.5}],
        "b": [good | {"asr_before": 0.4}],
    }
    assert matrix.handled(plans) == "badnets 1 of 4"
    assert matrix.handled({}) == "not measured"


def test_every_method_is_compared() -> None:
    from lustral.core.versions import listed_methods

    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert [name for name in listed_methods() if f"[`{name}`]" not in text] == []


def test_a_notebook_runs_as_a_server_would_run_it(tmp_path: Path) -> None:
    notebooks = script("notebooks")
    sources = [("markdown", "# Head"), ("code", "x = 2\nprint('<b>')\nx + 1"), ("code", "x;"), ("code", "")]
    cells = [{"cell_type": kind, "source": [text]} for kind, text in sources]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    ran = list(notebooks.run(notebooks.read(tmp_path / "n.ipynb"), {}))
    assert [(cell.printed, cell.shown) for cell in ran] == [("", ""), ("<b>\n", "<pre>3</pre>"), ("", ""), ("", "")]
    text = notebooks.as_page(ran, "n.ipynb")
    assert text.startswith("# Head\n\n[The notebook itself](n.ipynb)")
    assert "<pre>&lt;b&gt;\n</pre><pre>3</pre>" in text


def test_the_kept_results_become_a_leaderboard(tmp_path: Path) -> None:
    victim = {
        "name": "a",
        "data": "digits",
        "arch": "small_cnn",
        "attack": "badnets",
        "poison_rate": 0.1,
        "target_label": 3,
    }
    victim |= {
        "seed": 0,
        "defence": "none",
        "clean_images": 0,
        "status": "done",
        "key": "k1",
        "epochs": 20,
        "settings": {},
    }
    victim |= {"versions": {}, "acc0": [90, 100], "asr0": [80, 90], "ra0": [1, 90], "seconds": 5.0, "at": "2026-11-27"}
    erased = victim | {"name": "b", "key": "k2", "defence": "sau", "clean_images": 72, "der": 0.9}
    erased |= {"acc": [89, 100], "asr": [2, 90], "ra": [80, 90], "image_passes": 10}
    sifted = victim | {"name": "c", "key": "k3", "defence": "fct", "clean_images": 72, "image_passes": 10}
    sifted |= {
        "sifting": {"auroc": 0.9, "auprc": 0.8, "tpr": [5, 9], "fpr": [0, 90], "precision": [5, 5], "listed": [5, 99]}
    }
    (tmp_path / "results").mkdir()
    rows = [erased, victim, sifted, victim | {"name": "d", "status": "not run"}]
    (tmp_path / "results" / "p.json").write_text(json.dumps({"plan": "p", "rows": rows}))
    (tmp_path / "results" / "speed.json").write_text("[]")
    (tmp_path / "cards").mkdir()
    summary = script("leaderboard").write_leaderboard(tmp_path / "results", tmp_path / "out", tmp_path / "cards")
    assert (summary.cells, summary.victims) == (2, 1)
    assert len(summary.problems) == 1
    assert "3 of 3 cells were made by older versions" in summary.problems[0]
    shown = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "out" / "cells").glob("*.html"))
    assert "erased" in shown
    assert "55.6" in shown, "the share of poisoned images listed, 5 of 9"


def test_every_address_of_the_kept_leaderboard_leads_somewhere(tmp_path: Path) -> None:
    script("leaderboard").write_leaderboard(
        ROOT / "benchmarks" / "results", tmp_path / "pages", ROOT / "tests" / "cards"
    )
    assert "table.html#" in (tmp_path / "pages" / "index.html").read_text(encoding="utf-8") + "".join(
        path.read_text(encoding="utf-8") for path in (tmp_path / "pages" / "methods").glob("*.html")
    )
    assert script("checks").broken_links(tmp_path) == []


@pytest.mark.slow
def test_the_whole_site_builds(tmp_path: Path) -> None:
    config = pytest.importorskip("mkdocs.config", reason="needs pip install 'lustral[docs]'")
    from mkdocs.commands.build import build

    loaded = config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"))
    build(loaded)
    assert (tmp_path / "site" / "leaderboard" / "index.html").is_file()
