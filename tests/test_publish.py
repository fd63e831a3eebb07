"""`benchmarks/publish.py`: kept rows, tables and cards say what the store holds, and what it does not hold."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lustral.cli import main
from lustral.store.store import Store

ROOT = Path(__file__).parents[1]
PLAN = """
name = "small"
description = "Two erasers, one attack."
clean = [60]
trainer.epochs = 4
[[data]]
name = "digits"
arch = ["small_cnn:width=8"]
[[attacks]]
method = "badnets"
target_labels = [3]
[[defences]]
method = "bn_refresh"
[[defences]]
method = "clp"
[run]
threads = 1
"""
PAGE = "# A page\n\n<!-- publish {} -->\nold\n<!-- end -->\n\nBelow.\n"


@pytest.fixture(scope="module")
def publish() -> ModuleType:
    spec = importlib.util.spec_from_file_location("publish", ROOT / "benchmarks" / "publish.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["publish"] = module
    spec.loader.exec_module(module)
    return module


def repository(root: Path) -> Path:
    """Make what ``publish`` writes into: a plan, pages with places for tables, and two cards."""
    for folder in ("benchmarks/plans", "benchmarks/results", "docs", "tests/cards"):
        (root / folder).mkdir(parents=True)
    (root / "benchmarks/plans/small.toml").write_text(PLAN)
    (root / "docs/results.md").write_text(PAGE.format("small") + PAGE.format("choice"))
    (root / "README.md").write_text(PAGE.format("measured"))
    for method in ("badnets", "bn_refresh"):
        card = {"method": method, "published": {"source": f"the paper of {method}"}, "ours": {"command": "older"}}
        (root / f"tests/cards/{method}.json").write_text(json.dumps(card))
    return root


def test_what_a_store_holds_of_a_plan_is_published(publish: ModuleType, tmp_path: Path) -> None:
    root = repository(tmp_path)
    plan, results, url = root / "benchmarks/plans/small.toml", root / "benchmarks/results", str(root / "store")
    assert main(["bench", "run", str(plan), "--store", url, "--where", "defence=bn_refresh", "--quiet"]) == 0
    store = Store(url).open(create=False)
    publish.keep(plan, store, results)
    publish.publish(root)

    victim, refreshed, missing = publish.read_kept(results / "small.json")["rows"]
    (record,) = store.records("purifications")
    hits, images = record["metrics"]["after"]["acc"]["hits"], record["metrics"]["after"]["acc"]["n"]
    assert refreshed["acc"] == [hits, images]
    assert (refreshed["seed"], refreshed["clean_images"], refreshed["epochs"]) == (0, 60, 4)
    assert refreshed["settings"] == record["spec"]["defence"]["settings"]
    assert refreshed["versions"].items() >= record["spec"]["versions"].items()
    assert refreshed["machine"].startswith("cpu, ")
    assert (victim["defence"], victim["settings"]["target_label"]) == ("none", 3)
    assert (missing["defence"], missing["status"]) == ("clp", "not run")

    page = (root / "docs/results.md").read_text()
    accuracy = 100 * (victim["acc0"][0] / victim["acc0"][1])
    assert f"| badnets | 10 | 1 | 4 | {accuracy:.1f} |" in page
    assert f"{accuracy - 100 * hits / images:.1f} |" in page
    assert "**1 of 3 cells are not run.**" in page
    assert "Not run at all: clp." in page
    assert page.count("Below.") == 2
    assert "old" not in page.split("\n")
    card = json.loads((root / "tests/cards/bn_refresh.json").read_text())
    assert card["published"] == {"source": "the paper of bn_refresh"}
    (ours,) = card["ours"]["victims"]
    assert ours["acc"] == pytest.approx(hits / images, abs=1e-5)
    assert card["erasers"] == {"small": card["ours"]}

    written = [path for path in root.rglob("*") if path.suffix in (".md", ".json") and "store" not in path.parts]
    before = {path: path.read_bytes() for path in written}
    publish.keep(plan, Store(str(tmp_path / "empty")).open(create=True), results)  # what is kept stays
    publish.publish(root)
    assert {path: path.read_bytes() for path in written} == before


def test_a_cell_keeps_its_name_over_versions_and_not_over_settings(publish: ModuleType) -> None:
    victim = {"seed": 0, "trainer": {"epochs": 6}, "start": None, "versions": {"Trainer": 1}}
    record = {
        "spec": {"victim": victim, "seed": 0, "versions": {"Clp": 1}},
        "facts": {"defence": "clp", "clean_images": 60},
    }
    name = publish.name_of(record)
    older = {**record, "spec": {"victim": {**victim, "versions": {"Trainer": 0}}, "seed": 0, "versions": {"Clp": 0}}}
    longer = {**record, "spec": {**record["spec"], "victim": {**victim, "trainer": {"epochs": 12}}}}
    assert publish.name_of(older) == name
    assert publish.name_of(longer) != name
    assert publish.name_of({**record, "facts": {"defence": "clp u=4", "clean_images": 60}}) != name


def row(attack: str, asr: int, acc: int, asr0: int = 90) -> dict[str, object]:
    benign = attack == "benign"
    return {
        **{"defence": "sau", "attack": attack, "seed": 0, "arch": "small_cnn", "clean_images": 10, "status": "done"},
        **{"acc0": [80, 100], "asr0": [0, 0] if benign else [asr0, 100], "acc": [acc, 100], "ra": [50, 100]},
        **{"asr": [0, 0] if benign else [asr, 100], "der": 0.5, "seconds": 2.0, "image_passes": 30},
    }


def test_means_count_attacks_that_worked_and_benign_models_apart(publish: ModuleType) -> None:
    rows = [row("badnets", 10, 78), row("sig", 30, 77), row("tact", 0, 0, asr0=40), row("benign", 0, 79)]
    mean = publish.mean_of("sau", rows)
    assert (mean.victims, mean.worst, mean.passes) == (2, 0.3, 3.0)
    assert (mean.asr, mean.loss, mean.benign) == pytest.approx((0.2, 0.025, 0.01))
    assert publish.mean_of("clp", rows) is None
    assert publish.best(rows, 0.03).defence == "sau"
    assert publish.best(rows, 0.02) is None


def test_erasers_are_compared_on_the_victims_that_all_of_them_met(publish: ModuleType) -> None:
    half = [{**row(attack, left, 78), "defence": "anp"} for attack, left in (("badnets", 20), ("sig", 20))]
    whole = [row(attack, left, 78) for attack, left in (("badnets", 10), ("sig", 10), ("bpp", 90))]
    searcher = [{**row(attack, 0, 80), "defence": "baeraser"} for attack in ("badnets", "sig")]
    once = {**row("badnets", 0, 80), "defence": "clp"}
    found = publish.best([*half, *whole, *searcher, once], 0.03)
    assert (found.defence, found.victims, found.asr) == ("sau", 2, pytest.approx(0.1))
    assert publish.best([*half, *whole, *searcher, once], 0.03, searching=True).defence == "baeraser"
    assert publish.best([once], 0.03) is None
    useless = [row(attack, 85, 80) for attack in ("badnets", "sig")]
    assert publish.best(useless, 0.03) is None


def test_scans_show_their_verdicts_and_are_in_no_mean(publish: ModuleType) -> None:
    scan = {
        **{
            "defence": "mask_area",
            "attack": "sig",
            "seed": 0,
            "arch": "small_cnn",
            "clean_images": 10,
            "status": "done",
        },
        **{"outcome": "clean", "correct": False},
    }
    rows = [row("sig", 30, 77), scan]
    assert "| mask_area | clean (wrong) |" in publish.cells_table(rows)
    assert "| sau | 30.0 / 3.0 |" in publish.cells_table(rows)
    assert "mask_area" not in publish.means_table(rows)


def test_seeds_share_a_line(publish: ModuleType) -> None:
    assert publish.spread([0.5, 0.7, None]) == "60.0 (50.0 to 70.0)"
    assert publish.spread([0.5, 0.5]) == "50.0"
    assert publish.spread([None]) == "—"


def test_victims_that_an_eraser_returned_unchanged_can_be_left_out(publish: ModuleType) -> None:
    rows = [row("badnets", 10, 78), row("sig", 90, 80)]
    assert publish.mean_of("sau", rows).victims == 2
    assert publish.mean_of("sau", rows, found=True).victims == 1


def test_a_page_that_asks_for_what_nobody_measured_is_refused(publish: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.format("nothing"))
    with pytest.raises(publish.PublishError, match="a place for 'nothing'; there are choice"):
        publish.fill(page, {"choice": "text"})
    assert page.read_text() == PAGE.format("nothing")


def test_pages_and_cards_are_what_the_kept_rows_make(publish: ModuleType, tmp_path: Path) -> None:
    """Fails where a number was typed by hand, or a version changed: run `python benchmarks/publish.py`."""
    for part in ("benchmarks/plans", "benchmarks/results", "tests/cards"):
        shutil.copytree(ROOT / part, tmp_path / part)
    (tmp_path / "docs").mkdir()
    for page in ("docs/results.md", "README.md"):
        shutil.copy(ROOT / page, tmp_path / page)
    publish.publish(tmp_path)
    for path in [*tmp_path.glob("*.md"), *tmp_path.glob("docs/*.md"), *tmp_path.glob("tests/cards/*.json")]:
        assert path.read_text() == (ROOT / path.relative_to(tmp_path)).read_text(), path.name


UNTRUSTED = (
    PLAN.replace('"badnets"\n', '"badnets"\nlabel = "patch"\n').split("[[defences]]")[0]
    + """
[[attacks]]
method = "none"
[[defences]]
method = "spectral"
clean = [0]
[[defences]]
method = "plain"
label = "plain short"
clean = [0]
settings = { trainer = { epochs = 1 } }
[[defences]]
method = "strip"
[run]
threads = 1
"""
)


def test_siftings_and_trainings_have_tables_cards_and_pages(publish: ModuleType, tmp_path: Path) -> None:
    root = repository(tmp_path)
    plan, results, url = root / "benchmarks/plans/small.toml", root / "benchmarks/results", str(root / "store")
    plan.write_text(UNTRUSTED)
    for card in (root / "tests/cards").glob("*.json"):
        card.unlink()
    for method in ("spectral", "plain"):
        card = {"method": method, "published": {"source": "a paper"}, "ours": {"command": "older"}}
        (root / f"tests/cards/{method}.json").write_text(json.dumps(card))
    site = root / "pages"
    command = ["bench", "run", str(plan), "--store", url, "--where", "defence_method=spectral,plain", "--quiet"]
    assert main([*command, "--site", str(site), "--cards", str(root / "tests/cards")]) == 0
    store = Store(url).open(create=False)
    publish.keep(plan, store, results)
    publish.publish(root)

    page = (root / "docs/results.md").read_text()
    siftings = {record["facts"]["attack"]: record for record in store.records("siftings")}
    found = siftings["patch"]["metrics"]["sifting"]
    rates = [f"{100 * found[name]['hits'] / found[name]['n']:.1f}" for name in ("tpr", "fpr") if found[name]["n"]]
    assert f"| spectral | patch | {found['auroc']:.3f} | {found['auprc']:.3f} | {' | '.join(rates)} |" in page
    assert "| spectral | benign | — | — | — |" in page
    trained = next(r for r in store.records("trainings") if r["facts"]["attack"] == "patch")["metrics"]
    ends = [100 * trained[when]["asr"]["hits"] / trained[when]["asr"]["n"] for when in ("before", "after")]
    assert f"| plain short | patch | {ends[0]:.1f} | {ends[1]:.1f} |" in page
    assert "eraser | victims" not in page
    assert "Not run at all: strip." in page

    card = json.loads((root / "tests/cards/spectral.json").read_text())
    (patch, benign) = card["siftings"]["small"]["victims"]
    assert patch["auroc"] == pytest.approx(found["auroc"], abs=1e-5)
    assert "auroc" not in benign
    assert json.loads((root / "tests/cards/plain.json").read_text())["trainings"]["small"]["victims"][0]["acc"] > 0

    text = (site / "methods/spectral.html").read_text()
    assert "Needs beyond the training set" in text
    assert "image of the training set" in text
    cell = (site / f"cells/{siftings['patch']['key']}.html").read_text()
    assert "The list of suspicious images" in cell
    assert "Scores of clean and poisoned images" in cell
    assert f"{found['auroc']:.3f}" in cell
    assert (site / f"cells/{siftings['benign']['key']}.html").exists()
    assert "holds something else" not in (site / "index.html").read_text()
    assert "safe trainer" in (site / "assets/cells.js").read_text()
