"""The site without a browser: complete, every link leads somewhere, hostile text stays text, and a killed run does no harm."""

from __future__ import annotations

import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.synthetic import defended, defended_keys, synthetic_store
from lustral.core.characters import visible
from lustral.report.words import percent, points
from lustral.site.addresses import file_name
from lustral.site.data import means_of, script_json, settings_of
from lustral.site.folder import MARKER, SiteError
from lustral.site.methods import CardError, method_page, read_cards
from lustral.site.page_writer import table_cells
from lustral.site.pages import SiteSummary, write_site
from lustral.site.records import png_size
from lustral.store.store import Store, content_key
from lustral.tables.rows import load_cells
from lustral.tables.summary import Query, table

CARDS = Path(__file__).parent.parent / "cards"
EVIL = """<img src=x onerror="window.evil=1"></script><script>window.evil=1</script>'"`{{ 7*7 }}"""
SVG = "http://www.w3.org/2000/svg"  # a name, not an address


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return synthetic_store(
        tmp_path_factory.mktemp("bench"), results=150, attacks=4, defences=4, seeds=3, clean=(100, 500)
    )


@pytest.fixture(scope="module")
def written(store: Store, tmp_path_factory: pytest.TempPathFactory) -> SiteSummary:
    return write_site(store, tmp_path_factory.mktemp("pages") / "site", cards=CARDS)


@pytest.fixture(scope="module")
def site(written: SiteSummary) -> Path:
    return written.path


class Page(HTMLParser):
    """Collects addresses, ids and text of a page, and checks that elements are closed in order."""

    VOID = frozenset({"meta", "link", "img", "br", "input", "path", "line", "wbr"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, f"{path}: {self.open} not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.append(name)
            if name in ("href", "src"):
                self.addresses.append((tag, value or ""))
            if name == "id":
                self.ids.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def pages(site: Path) -> Iterator[Path]:
    yield from sorted(site.rglob("*.html"))


def script_data(site: Path, name: str, variable: str) -> list[dict[str, Any]]:
    """Read a table that the scripts read."""
    text = (site / "assets" / name).read_text()
    content = json.loads(re.search(rf"^LUSTRAL\.{variable} = (.*);$", text, re.M)[1])  # type: ignore[index]
    columns = {
        key: column if isinstance(column, list) else [None if c < 0 else column["words"][c] for c in column["codes"]]
        for key, column in content["columns"].items()
    }
    return [{key: values[index] for key, values in columns.items()} for index in range(content["length"])]


def page_text(path: Path) -> str:
    return re.sub(r"\s+", " ", Page(path).text)


# -- what is there --------------------------------------------------------------------------------------------------


def test_every_record_has_a_page(store: Store, site: Path, written: SiteSummary) -> None:
    failed = {record["kind"]: record["key"] for record in store.records("failures")}
    assert {path.stem for path in (site / "victims").iterdir()} == store.keys("victims") | {failed["victim"]}
    assert {path.stem for path in (site / "cells").iterdir()} == defended_keys(store) | store.keys("failures") - {
        failed["victim"]
    }
    assert (written.cells, written.victims) == (153, 31)
    assert written.methods == len(list((site / "methods").glob("*.html")))
    assert written.size == sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    assert written.problems == ()


def test_every_link_leads_to_a_file_of_the_site(site: Path) -> None:
    for path in pages(site):
        page = Page(path)
        assert len(page.ids) == len(set(page.ids)), path
        for tag, address in page.addresses:
            if address == "data:,":  # no icon
                continue
            parts = urlsplit(address)
            assert (parts.scheme, parts.netloc) == ("", ""), f"{path}: {tag} leads away: {address}"
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path}: {address}"
            assert target.is_relative_to(site), f"{path}: {address}"
            if parts.fragment and target == path:
                assert parts.fragment in page.ids


def test_links_into_the_table_name_columns_and_values_that_it_has(site: Path) -> None:
    rows = script_data(site, "cells.js", "cells")
    found = 0
    for path in pages(site):
        for _, address in Page(path).addresses:
            if "table.html#" in address:
                wanted = {name: values[0] for name, values in parse_qs(urlsplit(address).fragment).items()}
                matches = [row for row in rows if all(str(row[name]) == value for name, value in wanted.items())]
                assert matches, f"{path}: {address}"
                found += 1
    assert found > 300


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*"):
        if path.suffix in (".html", ".js", ".css"):
            text = path.read_text(encoding="utf-8").replace(SVG, "")
            assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|fetch\(|XMLHttpRequest|\bimport\(", text), path


def test_pages_share_their_style_and_scripts_and_stay_small(site: Path) -> None:
    for path in pages(site):
        page = Page(path)
        assert "style" not in page.tags
        assert all(address.endswith(".js") for tag, address in page.addresses if tag == "script")
        assert not any(name.startswith("on") for name in page.attributes)
        assert path.stat().st_size < 40_000, path


def test_the_scripts_never_turn_text_into_markup(site: Path) -> None:
    for path in (site / "assets").glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", path.read_text()
        )


def test_every_picture_is_written_once(store: Store, site: Path, written: SiteSummary) -> None:
    digests = {
        entry["sha256"]
        for kind in ("victims", "scans", "purifications")
        for record in store.records(kind)
        for name, entry in record["files"].items()
        if name.endswith(".png")
    }
    assert {path.stem for path in (site / "pictures").iterdir()} == digests
    assert written.pictures == len(digests)


def test_a_result_shows_its_victims_trigger_and_the_recovered_one(store: Store, site: Path) -> None:
    result = next(record for record in defended(store) if "recovered.png" in record["files"])
    victim = store.read("victims", result["victim_key"])
    page = Page(site / "cells" / f"{result['key']}.html")
    shown = [Path(address).stem for tag, address in page.addresses if tag == "img"]
    assert shown == [victim["files"]["trigger.png"]["sha256"], result["files"]["recovered.png"]["sha256"]]
    assert ("a", f"../victims/{victim['key']}.html") in page.addresses


def test_a_cells_page_holds_its_numbers_specification_and_command(store: Store, site: Path) -> None:
    record = next(r for r in defended(store) if "after" in r["metrics"] and r["facts"]["attack"] != "benign")
    text = page_text(site / "cells" / f"{record['key']}.html")
    for when in ("before", "after"):
        for name in ("acc", "asr", "ra", "natural_rate"):
            rate = record["metrics"][when][name]
            assert (
                f"{100 * rate['value']:.1f}%{100 * rate['low']:.1f}–{100 * rate['high']:.1f}n = {rate['n']:,}" in text
            )
    assert f"{record['metrics']['compare']['der']:.3f}" in text
    assert f"lustral bench repeat {record['key'][:12]} --store STORE" in text
    source = (site / "cells" / f"{record['key']}.html").read_text()
    shown = re.search(r"Full specification</summary><pre tabindex=\"0\">(.*?)</pre>", source, re.S)
    assert shown is not None
    assert json.loads(html.unescape(shown[1])) == record["spec"]
    siblings = [r["key"] for r in defended(store) if r["victim_key"] == record["victim_key"] and r != record]
    assert all(f"../cells/{key}.html" in source for key in siblings)


def test_a_detectors_page_says_whether_it_was_right(store: Store, site: Path) -> None:
    record = next(r for r in defended(store) if "detection" in r["metrics"] and r["metrics"]["detection"]["alarm"])
    found, text = record["metrics"]["detection"], page_text(site / "cells" / f"{record['key']}.html")
    assert f"Right{'yes' if found['correct'] else 'no'}" in text
    assert "Evidence for each label" in text


def test_a_failures_page_has_the_traceback(store: Store, site: Path) -> None:
    for record in store.records("failures"):
        folder = "victims" if record["kind"] == "victim" else "cells"
        text = Page(site / folder / f"{record['key']}.html").text
        assert record["traceback"] in text
        assert "--retry-failed" in text  # there is no result that could be repeated


def test_a_fine_tuned_victim_leads_to_the_model_it_started_from(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "bench", results=1, attacks=1, defences=1, seeds=1, data=("digits",), failures=0)
    benign = next(record for record in store.records("victims") if record["facts"]["attack"] == "benign")
    spec = {**benign["spec"], "start": benign["spec"]}
    tuned = {**benign, "spec": spec, "victim_key": benign["key"], "facts": {**benign["facts"], "attack": "tuned"}}
    store.put("victims", content_key(spec), tuned)
    write_site(store, tmp_path / "site")
    page = Page(tmp_path / "site" / "victims" / f"{content_key(spec)}.html")
    assert ("a", f"../victims/{benign['key']}.html") in page.addresses
    assert "The model it started from" in page.text


def test_the_place_of_the_store_is_nowhere_told(store: Store, site: Path) -> None:
    for path in site.rglob("*"):
        if path.is_file():
            assert store.root.encode() not in path.read_bytes(), path


# -- numbers --------------------------------------------------------------------------------------------------------


def test_heat_maps_show_what_the_tables_say(store: Store, site: Path) -> None:
    by = ("data", "arch", "poison_rate", "clean_images", "attack", "defence")
    rows = table(load_cells(store), Query(by=by, metrics=("der", "asr", "acc_loss", "correct"))).rows.to_pylist()
    shown = {tuple(row[name] for name in by): row for row in script_data(site, "settings.js", "settings")}
    assert len(shown) == len(rows)
    for row in rows:
        place = {**row, "clean_images": None} if row["defence"] == "none" else row
        mine = shown[tuple(place[name] for name in by)]
        for name in ("der", "asr", "acc_loss", "correct"):
            for end in ("", "_low", "_high"):
                assert mine[name + end] == (
                    None if row[name + end] is None else pytest.approx(row[name + end], rel=1e-5)
                )
            assert mine[f"{name}_n"] == row["cells"] - row[f"{name}_skipped"]


def test_a_weak_attack_has_no_der_and_does_not_move_the_mean_over_attacks(store: Store, site: Path) -> None:
    settings = script_data(site, "settings.js", "settings")
    weak = [row for row in settings if row["attack"] == "sig" and row["defence"] == "baeraser"]
    assert weak
    assert all(row["der"] is None and row["asr"] is not None and row["asr0"] <= 0.5 for row in weak)
    for mean in script_data(site, "settings.js", "means"):
        parts = [
            row["der"]
            for row in settings
            if all(row[name] == mean[name] for name in ("data", "arch", "poison_rate", "clean_images", "defence"))
            and row["der"] is not None
        ]
        if parts:
            assert mean["der"] == pytest.approx(sum(parts) / len(parts), rel=1e-5)  # each attack counts once


def test_the_benign_model_is_in_no_mean_over_attacks(store: Store) -> None:
    cells = load_cells(store)
    benign = [row for row in settings_of(cells) if row["attack"] == "benign" and row["defence"] == "fine_tuning"]
    assert all(row["acc_loss"] is not None for row in benign)
    assert all(row["poison_rate"] is not None for row in means_of(cells))


def test_cells_script_has_one_row_per_record_victims_first(store: Store, site: Path) -> None:
    rows = script_data(site, "cells.js", "cells")
    keys = store.keys("victims") | defended_keys(store) | store.keys("failures")
    assert sorted(row["key"] for row in rows) == sorted(keys)
    is_defended = [row["kind"] != "victim" for row in rows]
    assert is_defended == sorted(is_defended)
    result = next(record for record in defended(store) if "after" in record["metrics"])
    row = next(row for row in rows if row["key"] == result["key"])
    assert row["acc_low"] == pytest.approx(result["metrics"]["after"]["acc"]["low"], rel=1e-5)
    assert (row["victim_key"], row["seed"]) == (result["victim_key"], result["facts"]["seed"])
    nothing_done = next(row for row in rows if row["kind"] == "victim" and row["status"] == "done")
    assert (nothing_done["seconds"], nothing_done["der"], nothing_done["clean_images"]) == (None, None, None)


def test_a_methods_page_has_the_published_number_beside_the_cards_and_ours(store: Store, site: Path) -> None:
    card = json.loads((CARDS / "badnets.json").read_text())
    text = page_text(site / "methods" / "badnets.html")
    assert card["published"]["source"] in text
    assert f"published {100 * card['published']['acc']:.1f}%{100 * card['published']['asr']:.1f}%" in text
    ours = card["ours"]["victims"][0]
    assert f"{100 * ours['acc']:.1f}%{100 * ours['asr']:.1f}%" in text
    assert card["ours"]["command"] in text
    mean = next(
        row
        for row in settings_of(load_cells(store))
        if (row["attack"], row["defence"], row["data"], row["poison_rate"]) == ("badnets", "none", "cifar10", 0.1)
    )
    assert f"{100 * mean['acc']:.1f}%±{100 * mean['acc_half']:.1f}" in text


def test_a_methods_page_has_the_means_of_the_cards_tables_and_the_card_as_a_file(site: Path) -> None:
    card = json.loads((CARDS / "sau.json").read_text())
    assert json.loads((site / "methods" / "sau.json").read_text()) == card
    assert 'href="sau.json"' in (site / "methods" / "sau.html").read_text()
    name, table = next(iter(card["erasers"].items()))
    victims = [row for row in table["victims"] if row.get("asr_before", 0) > 0.5]
    assert victims
    acc, asr, ra = (100 * sum(row[key] for row in victims) / len(victims) for key in ("acc", "asr", "ra"))
    clean = f"{victims[0]['clean_images']:,} clean images"
    row = f"{name}{table['setting']}, {clean} {acc:.1f}%{asr:.1f}%{ra:.1f}%"
    assert row in page_text(site / "methods" / "sau.html")


def test_a_published_fall_of_asr_stands_beside_ours(store: Store, site: Path) -> None:
    text = page_text(site / "methods" / "baeraser.html")
    card = json.loads((CARDS / "baeraser.json").read_text())
    ours = next(row for row in card["ours"]["victims"] if row["asr_before"] > 0.5)
    assert "ASR lowered by, points" in text
    before_and_fall = f"{percent(ours['asr_before'])}{points(ours['asr_before'] - ours['asr'])}"
    assert before_and_fall in text
    mean = next(row for row in means_of(load_cells(store)) if row["defence"] == "baeraser")
    assert points(mean["asr0"] - mean["asr"]) in text


@pytest.mark.parametrize(
    ("before", "after", "fall"),
    [(0.9, 0.1, "+80.0"), (0.99844, 0.99844, "0.0"), (0.5, 0.5004, "0.0"), (0.5, 0.4996, "0.0"), (0.5, 0.56, "−6.0")],
)
def test_a_fall_of_asr_has_its_sign_and_one_that_rounds_to_zero_has_none(
    before: float, after: float, fall: str
) -> None:
    card = {"method": "new", "published": {"asr_drop": 0.99}, "ours": {"asr_before": before, "asr": after}}
    page = method_page("new", card, [], [])
    column = page["columns"].index("ASR lowered by, points")
    assert [row["cells"][column][0] for group in page["groups"] for row in group["rows"]] == ["+99.0", fall]


def test_a_method_with_a_card_and_no_result_shows_the_cards_columns_and_says_so(site: Path) -> None:
    card = json.loads((CARDS / "anp.json").read_text())
    text = page_text(site / "methods" / "anp.html")
    assert "This store has no result of this method." in text
    published, ours = card["published"], card["ours"]["victims"][0]
    assert "WhereACCASRRADER" in text
    row = "".join(f"{100 * published[key]:.1f}%" for key in ("acc", "asr", "ra"))
    assert f"published {row}{published['der']:.3f}" in text
    how = f"10% poison, {ours['clean_images']} clean images, target {ours['target_label']}, {ours['epochs']} epochs, seed 0"
    assert f"{ours['attack']}{how} {100 * ours['acc']:.1f}%" in text
    assert "no result" not in page_text(site / "methods" / "baeraser.html")


def test_a_method_of_which_all_failed_says_how_many_and_has_no_empty_table() -> None:
    where = {"data": "digits", "arch": "small_cnn", "attack": "badnets", "attack_method": "badnets"}
    made = {"defence": "new", "defence_method": "new", "poison_rate": 0.1, "clean_images": 100}
    row = {**where, **made, "cells": 0, "seeds": 0, "failed": 2}
    page = method_page("new", None, [row], [])
    assert page["absence"] == "This store has no result of this method: 2 cells failed."
    assert (page["columns"], page["groups"]) == ([], [])
    done = method_page("new", None, [{**row, "cells": 1, "seeds": 1, "asr": 0.25}], [])
    assert done["absence"] == ""
    assert [row["cells"] for group in done["groups"] for row in group["rows"]] == [[("25.0%", "")]]


def test_a_methods_page_says_what_it_needs_and_costs_and_who_attacks(site: Path) -> None:
    text = page_text(site / "methods" / "anp.html")
    assert "Needs beyond clean imagesbatch normalisation" in text
    assert "Costs by default62 passes of each of 2,500 clean images" in text
    assert "The attackersupplies data: dirty labels" in page_text(site / "methods" / "badnets.html")


def test_all_cards_make_pages(site: Path) -> None:
    for path in CARDS.glob("*.json"):
        card = json.loads(path.read_text())
        assert html.escape(card["published"]["source"], quote=False) in (site / "methods" / path.name).with_suffix(
            ".html"
        ).read_text().replace("&#39;", "'").replace("&#34;", '"')


# -- hostile and damaged input --------------------------------------------------------------------------------------


def evil_store(root: Path) -> Store:
    """Return a store with markup in every text of a victim, a result and a failure."""
    store = synthetic_store(root, results=6, attacks=1, defences=2, seeds=1, data=("digits",), failures=0)
    victim = next(record for record in store.records("victims") if record["facts"]["attack"] != "benign")
    keys: dict[str, str] = {}
    for kind, record in (
        ("victims", victim),
        ("purifications", next(r for r in defended(store) if "after" in r["metrics"])),
    ):
        spec = {**record["spec"], "evil": EVIL, "seed": 99}
        facts = {name: EVIL if isinstance(value, str) else value for name, value in record["facts"].items()}
        detail = {
            "history": [{"epoch": 0, EVIL: 1.0}, {"epoch": 1, EVIL: EVIL}],
            "notes": [EVIL],
            "selected": EVIL,
            "per_class": {"before": [None, {"value": None}]},
            "verdict": {"outcome": EVIL, "basis": EVIL, "suspects": [0], "evidence": [{"label": 0, EVIL: EVIL}]},
        }
        key = content_key(spec)
        changed = {
            **record,
            "spec": spec,
            "facts": facts | {"defence_kind": "purifier"} if kind == "purifications" else facts,
            "title": EVIL,
            "class_names": [EVIL],
            "victim_key": keys.get("victims"),
            "made": record["made"] | {"device": EVIL},
        }
        store.put(kind, key, changed, {"detail.json": json.dumps(detail).encode()})  # type: ignore[arg-type]
        keys[kind] = key
    spec = {**victim["spec"], "seed": 100}
    failure = {
        **victim,
        "spec": spec,
        "status": "failed",
        "title": EVIL,
        "error": EVIL,
        "traceback": f"\x1f{EVIL}",
    }
    store.put("failures", content_key(spec), {key: value for key, value in failure.items() if key != "metrics"})
    return store


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    write_site(evil_store(tmp_path / "bench"), tmp_path / "site", title=EVIL)
    seen = 0
    for path in pages(tmp_path / "site"):
        page = Page(path)
        assert "onerror" not in page.attributes
        assert page.tags.count("script") == sum(tag == "script" for tag, _ in page.addresses), "a script without a file"
        assert all(address != "x" for _, address in page.addresses)
        seen += page.text.count("{{ 7*7 }}")  # and no template of ours was made from it
    assert seen > 50
    for path in (tmp_path / "site" / "assets").glob("*.js"):
        assert "</script" not in path.read_text()
    assert all(
        path.resolve().parent == tmp_path / "site" / "methods" and re.fullmatch(r"[\w-]+\.html", path.name)
        for path in (tmp_path / "site" / "methods").iterdir()
    )


def test_keys_that_are_no_keys_are_refused(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "bench", results=2, attacks=1, defences=1, seeds=1, data=("digits",), failures=0)
    record = defended(store)[0]
    path = Path(store.path(f"{record['kind']}s", record["key"]))
    path.write_text(json.dumps({**record, "key": "../../escaped"}))
    with pytest.raises(SiteError, match="64 hexadecimal digits"):
        write_site(store, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_missing_and_damaged_files_are_said_on_the_page_and_the_overview(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "bench", results=8, attacks=1, defences=1, seeds=1, data=("digits",), failures=0)
    victim = next(record for record in store.records("victims") if "trigger.png" in record["files"])
    result = defended(store)[0]
    (Path(store.folder(victim)) / "trigger.png").write_bytes(b"something else")
    (Path(store.folder(result)) / "detail.json").unlink()
    summary = write_site(store, tmp_path / "site")
    assert len(summary.problems) == 2
    for path, word in (
        (f"victims/{victim['key']}.html", "trigger.png has changed"),
        (f"cells/{result['key']}.html", "detail.json is missing"),
        ("index.html", "2 files of the store could not be shown"),
    ):
        text = page_text(tmp_path / "site" / path)
        assert word in text
        assert str(tmp_path) not in text


def test_a_picture_that_is_no_png_is_not_shown(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "bench", results=1, attacks=1, defences=1, seeds=1, data=("digits",), failures=0)
    victim = next(record for record in store.records("victims") if "trigger.png" in record["files"])
    store.remove("victims", victim["key"])
    store.put("victims", victim["key"], victim, {"trigger.png": b"<svg onload='alert(1)'/>"})
    summary = write_site(store, tmp_path / "site")
    assert "no PNG" in summary.problems[0]
    assert b"<svg onload" not in b"".join(path.read_bytes() for path in (tmp_path / "site" / "pictures").iterdir())


def test_an_empty_store_makes_a_site_that_says_so(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "bench")).open(create=True)
    summary = write_site(store, tmp_path / "site")
    assert (summary.cells, summary.victims, summary.methods) == (0, 0, 0)
    assert "no results" in page_text(tmp_path / "site" / "index.html")


def test_cards_that_cannot_be_used_are_named_all_at_once(tmp_path: Path, store: Store) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('["method"]')
    (tmp_path / "c.json").write_text('{"method": "x"}')
    (tmp_path / "d.json").write_text('{"method": "x"}')
    with pytest.raises(CardError) as caught:
        write_site(store, tmp_path / "site", cards=tmp_path)
    assert [re.search(r"([abcd])\.json", line)[1] for line in str(caught.value).splitlines()] == ["a", "b", "d"]  # type: ignore[index]
    with pytest.raises(CardError, match="no folder"):
        read_cards(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "card",
    [
        {"method": "m", "published": [{"source": "A", "acc": 0.5}, {"source": "B", "table": {"x": {"asr": 0.25}}}]},
        {"method": "m", "published": None, "ours": {"seconds": 3.0, "note": "words", "odd": [1, "two", None]}},
        {"method": "m", "ours": {"victims": [{"attack": "sig", "asr": 0.1, "audit": {"before": {"exact": 0.1}}}]}},
        {"method": "m"},
    ],
)
def test_cards_of_any_shape_make_a_page(tmp_path: Path, card: dict[str, Any]) -> None:
    (tmp_path / "m.json").write_text(json.dumps(card))
    store = Store(str(tmp_path / "bench")).open(create=True)
    write_site(store, tmp_path / "site", cards=tmp_path)
    text = page_text(tmp_path / "site" / "methods" / "m.html")
    if isinstance(card.get("published"), list):
        assert "50.0%" in text
        assert "25.0%" in text
        assert text.index("Published source: A") < text.index("Published source: B")
    if "victims" in card.get("ours", {}):
        assert "sig, before" in text
        assert "card 1" not in text


# -- the folder -----------------------------------------------------------------------------------------------------


def small_store(root: Path) -> Store:
    return synthetic_store(root, results=30, attacks=2, defences=2, seeds=2, data=("digits",))


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_site_is_replaced_by_the_next_one(tmp_path: Path) -> None:
    store = small_store(tmp_path / "bench")
    write_site(store, tmp_path / "out" / "site", title="first")
    gone = next(iter(defended_keys(store)))
    store.remove("scans", gone)
    store.remove("purifications", gone)
    write_site(store, tmp_path / "out" / "site", title="second")
    assert "second" in page_text(tmp_path / "out" / "site" / "index.html")
    assert not (tmp_path / "out" / "site" / "cells" / f"{gone}.html").exists()
    assert left_in(tmp_path / "out") == {"site"}


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    store = small_store(tmp_path / "bench")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(SiteError, match="no site of lustral"):
        write_site(store, other)
    with pytest.raises(SiteError, match="no site of lustral"):
        write_site(store, tmp_path / "bench")
    with pytest.raises(SiteError, match="is a file"):
        write_site(store, other / "thesis.txt")
    site = tmp_path / "site"
    site.mkdir()  # empty: may be used
    write_site(store, site)
    (site / "CNAME").write_text("example.org")
    with pytest.raises(SiteError, match="CNAME"):
        write_site(store, site)
    assert (other / "thesis.txt").read_text() == "years of work"
    assert left_in(tmp_path) == {"bench", "other", "site"}


def test_an_error_leaves_the_old_site_and_nothing_else(tmp_path: Path) -> None:
    store = small_store(tmp_path / "bench")
    write_site(store, tmp_path / "out" / "site", title="first")

    def stop(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_site(store, tmp_path / "out" / "site", title="second", on_progress=stop)
    assert "first" in page_text(tmp_path / "out" / "site" / "index.html")
    assert left_in(tmp_path / "out") == {"site"}


def test_a_killed_run_leaves_the_old_site(tmp_path: Path) -> None:
    small_store(tmp_path / "bench")
    out = tmp_path / "out" / "site"
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom lustral.site.pages import write_site\n"
        "from lustral.store.store import Store\n"
        f"store = Store({str(tmp_path / 'bench')!r}).open(create=False)\n"
        "def kill(done, total):\n    if done == 20 and len(sys.argv) > 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"write_site(store, Path({str(out)!r}), on_progress=kill)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, "kill"], check=False).returncode == -signal.SIGKILL
    assert not out.exists(), "half a site"
    subprocess.run([sys.executable, "-c", code], check=True)
    before = (out / "index.html").read_bytes()
    assert subprocess.run([sys.executable, "-c", code, "kill"], check=False).returncode == -signal.SIGKILL
    assert (out / "index.html").read_bytes() == before
    assert left_in(out / "cells") >= {f"{key}.html" for key in defended_keys(Store(str(tmp_path / "bench")))}


def test_leftovers_of_killed_runs_go_and_a_site_set_aside_comes_back(tmp_path: Path) -> None:
    store = small_store(tmp_path / "bench")
    out = tmp_path / "out" / "site"
    write_site(store, out, title="first")
    fresh, stale, foreign = (
        tmp_path / "out" / name for name in (".site.0123456789ab.new", ".site.ba9876543210.new", ".site.old")
    )
    for folder in (fresh, stale, foreign):
        folder.mkdir()
    os.utime(stale, (time.time() - 7200, time.time() - 7200))
    os.rename(out, tmp_path / "out" / ".site.aaaaaaaaaaaa.old")  # killed between the two renames
    with pytest.raises(KeyboardInterrupt):
        write_site(store, out, on_progress=interrupt)
    assert "first" in page_text(out / "index.html")
    assert left_in(tmp_path / "out") == {"site", fresh.name, foreign.name}


def interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_progress_counts_every_page(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    write_site(
        small_store(tmp_path / "bench"), tmp_path / "site", on_progress=lambda done, total: told.append((done, total))
    )
    total = len(list(pages(tmp_path / "site")))
    assert told == [(done, total) for done in range(1, total + 1)]


def test_the_site_does_not_wait_for_torch(tmp_path: Path) -> None:
    small_store(tmp_path / "bench")
    code = (
        "import sys\nfrom pathlib import Path\nfrom lustral.site.pages import write_site\n"
        "from lustral.store.store import Store\n"
        f"write_site(Store({str(tmp_path / 'bench')!r}).open(create=False), Path({str(tmp_path / 'site')!r}))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert json.loads((tmp_path / "site" / MARKER).read_text())["lustral_site"] == 1


@pytest.mark.slow
def test_ten_thousand_results_take_thirty_seconds(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "bench", results=10_000, attacks=16, defences=24, seeds=5)
    began = time.process_time()  # of this core: others may be busy on it
    write_site(store, tmp_path / "site", cards=CARDS)
    assert time.process_time() - began <= 30.0


# -- parts ----------------------------------------------------------------------------------------------------------


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_script_json_keeps_the_content_and_cannot_end_a_script(content: Any) -> None:
    text = script_json({"": content, "end": "</script><!-- \u2028"})
    assert json.loads(text)[""] == content
    assert "</" not in text
    assert "<!--" not in text
    assert text.isascii()


@given(st.lists(st.text(), min_size=2, max_size=2, unique=True))
def test_methods_have_files_of_their_own(names: list[str]) -> None:
    files = [file_name(name) for name in names]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in files)
    if all(names):  # the empty name is no method
        assert files[0] != files[1]


@given(st.lists(st.text(), min_size=1))
def test_cells_in_one_go_are_the_cells_one_by_one(texts: list[str]) -> None:
    expected = "".join(f"<td>{html.escape(visible(text.replace(chr(31), ' ')))}</td>" for text in texts)
    assert html.unescape(str(table_cells(texts))) == html.unescape(expected)
    assert str(table_cells(texts)).count("<td>") == len(texts)


def test_png_size_reads_the_header() -> None:
    header = (
        b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (96).to_bytes(4, "big") + (48).to_bytes(4, "big") + b"\x08\x02\0\0\0"
    )
    assert png_size(header) == (96, 48)
    assert png_size(header[:20]) is None
    assert png_size(b"GIF89a" + header[6:]) is None
