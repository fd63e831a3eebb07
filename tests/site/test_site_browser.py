"""The site in a browser, opened from the disk: it sorts, filters, draws, listens to the keyboard, and complains about nothing."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_site import evil_store

from bench.synthetic import defended, defended_keys, synthetic_store
from lustral.site.pages import write_site
from lustral.store.store import Store

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on this machine")
CARDS = Path(__file__).parent.parent / "cards"
PAGES = ("index.html", "table.html", "charts.html", "methods.html")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return synthetic_store(
        tmp_path_factory.mktemp("bench"), results=480, attacks=4, defences=8, seeds=3, clean=(100, 500)
    )


@pytest.fixture(scope="module")
def site(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_site(store, tmp_path_factory.mktemp("pages") / "a site", cards=CARDS).path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as run:
        started = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Tab:
    """A page of the browser that remembers what it complained about and what it asked for."""

    def __init__(self, browser: Any, site: Path, **options: Any) -> None:
        self.site = site
        self.page = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}).new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", self._note_failure)
        self.page.on("request", self._require_file)

    def _note_failure(self, request: Any) -> None:
        left_behind = request.resource_type == "image" and request.failure == "net::ERR_ABORTED"
        if not left_behind:  # a lazy picture may be on its way when the page is left
            self.complaints.append(f"failed: {request.url}: {request.failure}")

    def _require_file(self, request: Any) -> None:
        if not request.url.startswith(("file://", "data:")):
            self.complaints.append(f"asked the network for {request.url}")

    def open(self, path: str) -> Any:
        self.page.goto(f"{self.site.as_uri()}/{path}")
        return self.page


@pytest.fixture
def tab(browser: Any, site: Path) -> Iterator[Tab]:
    opened = Tab(browser, site)
    yield opened
    opened.page.context.close()
    assert opened.complaints == []


def test_a_missing_picture_is_complained_about(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text('<img src="gone.png" loading="lazy" width="9" height="9">', encoding="utf-8")
    tab = Tab(browser, tmp_path)
    tab.open("page.html").wait_for_function("document.images[0].complete")
    tab.page.context.close()
    assert any(text.startswith("failed:") and "gone.png" in text for text in tab.complaints)


def column(page: Any, name: str) -> list[str]:
    """Return the texts of a column of the table of cells."""
    names = [text.strip() for text in page.locator("#cells thead th").all_inner_texts()]
    return [
        text.strip()
        for text in page.locator(f"#cells tbody tr > :nth-child({names.index(name) + 1})").all_inner_texts()
    ]


def heading(page: Any, name: str) -> Any:
    return page.locator("#cells thead th").filter(has_text=re.compile(rf"^{name}$"))


def number(text: str) -> float:
    return float(text.replace("−", "-").replace("–", "nan").rstrip("%"))


def test_a_click_on_a_heading_sorts_and_another_turns_it_round(tab: Tab) -> None:
    page = tab.open("table.html")
    heading(page, "ASR").get_by_role("button").click()
    assert heading(page, "ASR").get_attribute("aria-sort") == "ascending"
    rising = [number(text) for text in column(page, "ASR")]
    assert rising == sorted(rising)
    heading(page, "ASR").get_by_role("button").click()
    assert heading(page, "ASR").get_attribute("aria-sort") == "descending"
    falling = [number(text) for text in column(page, "ASR")]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] > rising[-1]
    heading(page, "DER").get_by_role("button").click()
    assert heading(page, "DER").get_attribute("aria-sort") == "descending"  # the best first
    assert page.locator("#cells [aria-sort]").count() == 1


def test_rows_without_a_value_come_last_both_ways(tab: Tab) -> None:
    page = tab.open("table.html#attack=benign&sort=asr")
    assert set(column(page, "ASR")) == {"–"}
    for sort in ("acc_loss", "-acc_loss"):
        page.goto("about:blank")
        page = tab.open(f"table.html#data=digits&seed=1&size=250&sort={sort}")
        texts = column(page, "ACC loss")
        assert "–" in texts
        assert all(text == "–" for text in texts[texts.index("–") :])


def test_filters_narrow_the_table_and_stay_in_the_address(tab: Tab, store: Store) -> None:
    page = tab.open("table.html")
    page.get_by_label("Attack", exact=True).select_option("badnets")
    page.get_by_label("Defence", exact=True).select_option("mesa")
    assert set(column(page, "Attack")) == {"badnets"}
    assert set(column(page, "Defence")) == {"mesa"}
    expected = [
        record
        for record in defended(store)
        if (record["facts"]["attack"], record["facts"]["defence"]) == ("badnets", "mesa")
    ]
    assert f"of {len(expected)} found" in page.locator("#status").inner_text()
    page.get_by_label("Search").fill("erased DIGITS seed 1")
    page.wait_for_function("location.hash.includes('q=erased')")
    kept, rows = page.evaluate("location.hash"), column(page, "Seed")
    assert set(rows) == {"1"}
    page.goto("about:blank")
    again = tab.open(f"table.html{kept}")
    assert column(again, "Seed") == rows
    assert again.get_by_label("Attack", exact=True).input_value() == "badnets"
    key = sorted(defended_keys(store))[0]
    again.get_by_role("button", name="Clear filters").click()
    again.get_by_label("Search").fill(key[:12])
    assert again.locator("#cells tbody a").get_attribute("href") == f"cells/{key}.html"
    again.get_by_label("Search").fill("nothing has these words")
    assert "No row fits" in again.locator("#status").inner_text()
    again.get_by_role("button", name="Clear filters").click()
    assert again.locator("#cells tbody tr").count() == 50


def test_the_document_holds_one_page_of_rows(tab: Tab) -> None:
    page = tab.open("table.html")
    assert page.locator("#cells tbody tr").count() == 50
    first = page.locator("#cells tbody tr a").first.get_attribute("href")
    page.get_by_role("button", name="Next").click()
    assert page.locator("#page").inner_text().startswith("Page 2 of")
    assert page.locator("#cells tbody tr a").first.get_attribute("href") != first
    assert "page=2" in page.evaluate("location.hash")
    page.get_by_role("button", name="Previous").click()
    assert page.locator("#cells tbody tr a").first.get_attribute("href") == first


def test_a_row_opens_its_cell(tab: Tab) -> None:
    page = tab.open("table.html#defence=baeraser&attack=blended")
    page.locator("#cells tbody tr a").first.click()
    page.wait_for_url("**/cells/*.html")
    assert page.locator("h1").inner_text().startswith("baeraser against blended")
    assert page.locator(".plot path").count() > 0
    assert page.locator("img").count() > 0
    for picture in page.locator("img").all():
        picture.scroll_into_view_if_needed()
    page.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    page.get_by_role("link", name="The victim").click()
    page.wait_for_url("**/victims/*.html")
    assert page.locator("h1").inner_text().startswith("blended on")


def test_the_command_can_be_copied(tab: Tab, store: Store) -> None:
    key = sorted(defended_keys(store))[0]
    page = tab.open(f"cells/{key}.html")
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name=re.compile("Copied|Selected")).wait_for()
    page.get_by_role("button", name="Copy", exact=True).wait_for()


def test_a_filter_from_a_link_can_be_taken_away(tab: Tab, store: Store) -> None:
    victim = next(record["victim_key"] for record in defended(store))
    page = tab.open(f"table.html#victim_key={victim}")
    before = page.locator("#cells tbody tr").count()
    assert before == 2 * 8 + 1  # budgets, defences, and the victim itself
    page.locator("#chips button").click()
    assert page.locator("#cells tbody tr").count() == 50
    assert "victim_key" not in page.evaluate("location.hash")


def test_a_cell_of_the_heat_map_leads_to_its_runs(tab: Tab) -> None:
    page = tab.open("index.html")
    page.get_by_label("Measure").select_option("asr")
    link = page.locator("#heat").get_by_role("link", name=re.compile("^mesa against blended"))
    runs = int(re.search(r"(\d+) runs?$", link.get_attribute("aria-label"))[1])  # type: ignore[index]
    link.click()
    page.wait_for_url("**/table.html#*")
    assert page.locator("#cells tbody tr").count() == runs
    assert (set(column(page, "Attack")), set(column(page, "Defence"))) == ({"blended"}, {"mesa"})


def test_heat_maps_follow_their_selects_and_the_address(tab: Tab) -> None:
    page = tab.open("index.html#metric=asr&data=cifar10&order=best")
    assert page.get_by_label("Data set").input_value() == "cifar10"
    heads = page.locator("#heat thead th").all_inner_texts()
    assert heads[0] == "no defence"
    means = [number(text) for text in page.locator("#heat tfoot td b").all_inner_texts()]
    assert means[1:] == sorted(means[1:])  # the lowest success first
    page.get_by_label("Measure").select_option("correct")
    assert set(page.locator("#heat thead th").all_inner_texts()) == {"mask_area", "neural_cleanse"}
    page.get_by_label("Clean images").select_option("each")
    assert len(page.locator("#heat thead th").all_inner_texts()) == 4
    assert page.locator("#heat tfoot").count() == 0
    page.get_by_label("Measure").select_option("der")
    assert page.locator("#heat tbody tr").filter(has_text="sig").locator("a").count() == 0
    assert page.locator("#heat tbody tr").filter(has_text="sig").get_by_text("weak").count() > 0
    assert "metric=der" in page.evaluate("location.hash")


def test_colours_of_the_heat_map_keep_their_text_readable(browser: Any, site: Path) -> None:
    for scheme in ("light", "dark"):
        tab = Tab(browser, site, color_scheme=scheme)
        page = tab.open("index.html#metric=asr")
        least = page.evaluate(CONTRAST)
        page.context.close()
        assert least >= 4.5, scheme


CONTRAST = """() => {
  const pixel = (colour) => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => value / 255)
      .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
  };
  const light = (colour) => { const [r, g, b] = pixel(colour); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  return Math.min(...[...document.querySelectorAll("#heat a")].map((link) => {
    const style = getComputedStyle(link);
    const [a, b] = [light(style.color), light(style.backgroundColor)].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  }));
}"""


def test_dark_mode_is_remembered_from_page_to_page(tab: Tab) -> None:
    page = tab.open("index.html")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    button = page.get_by_role("button", name="Dark mode")
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    dark = page.evaluate(background)
    assert dark != light
    tab.open("methods.html")
    assert page.evaluate(background) == dark
    page.get_by_role("button", name="Dark mode").click()
    assert page.evaluate(background) == light


def test_the_systems_choice_comes_first(browser: Any, site: Path) -> None:
    tab = Tab(browser, site, color_scheme="dark")
    page = tab.open("index.html")
    assert page.get_by_role("button", name="Dark mode").get_attribute("aria-pressed") == "true"
    page.context.close()
    assert tab.complaints == []


def test_pages_work_where_storage_is_forbidden(browser: Any, site: Path) -> None:
    tab = Tab(browser, site)
    tab.page.add_init_script(
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } });"
    )
    page = tab.open("index.html")
    page.get_by_role("button", name="Dark mode").click()
    assert page.get_by_role("button", name="Dark mode").get_attribute("aria-pressed") == "true"
    page.context.close()
    assert tab.complaints == []


def tab_until(page: Any, selector: str, most: int = 40) -> None:
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{selector} was not reached by {most} presses of Tab")


def test_the_keyboard_reaches_everything_in_order(tab: Tab) -> None:
    page = tab.open("table.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    tab_until(page, "nav a")
    tab_until(page, "#theme")
    tab_until(page, "[name=q]")
    tab_until(page, "[name=attack]")
    tab_until(page, "#cells thead button")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) != "none"
    page.keyboard.press("Enter")
    assert heading(page, "Defence").get_attribute("aria-sort") == "ascending"
    tab_until(page, "#cells tbody a")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/(cells|victims)/"))


def test_the_skip_link_skips(tab: Tab) -> None:
    page = tab.open("index.html")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.getElementById('main').contains(document.activeElement)")


def test_arrows_walk_through_the_heat_map(tab: Tab) -> None:
    page = tab.open("index.html")
    tab_until(page, "#heat a")
    label = "document.activeElement.getAttribute('aria-label')"
    assert page.evaluate(label).startswith("anp against badnets")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(label).startswith("baeraser against badnets")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(label).startswith("baeraser against blended")
    page.keyboard.press("Home")
    assert page.evaluate(label).startswith("anp against blended")
    page.keyboard.press("End")
    assert page.evaluate(label).startswith("mesa against blended")
    page.keyboard.press("ArrowDown")  # over a row without numbers
    assert page.evaluate(label).startswith("mesa against ssba")
    assert page.locator("#heat a:not([tabindex='-1'])").count() == 1
    page.keyboard.press("Enter")
    page.wait_for_url("**/table.html#*")


def test_charts_answer_to_mouse_and_keyboard(tab: Tab) -> None:
    page = tab.open("charts.html#data=digits&unit=cells")
    chart, readout = page.locator("#scatter svg"), page.locator("#scatter-readout")
    tab_until(page, "#scatter svg", most=60)
    first = readout.inner_text()
    assert re.search(r"ACC [\d.]+% \([\d.]+% to [\d.]+%\), ASR [\d.]+% \([\d.]+% to [\d.]+%\)", first)
    page.keyboard.press("ArrowRight")
    second = readout.inner_text()
    assert second != first
    page.keyboard.press("Home")
    assert readout.inner_text() == first
    box = chart.bounding_box()
    for x in range(60, int(box["width"]), 12):
        page.mouse.move(box["x"] + x, box["y"] + 0.4 * box["height"])
        if readout.inner_text() != first:
            break
    else:
        raise AssertionError("no point was found by the mouse")
    target = readout.get_by_role("link").get_attribute("href")
    chart.focus()
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/{target}")


def test_the_frontier_marks_what_nothing_beats(tab: Tab) -> None:
    page = tab.open("charts.html#data=cifar10")
    page.locator("#frontier-details summary").click()
    rows = [line.split("\t") for line in page.locator("#frontier-rows tr").all_inner_texts()]
    points = [(seconds(row[1]), number(row[2].split()[0]), row[3]) for row in rows]
    assert len(points) == 6
    assert {mark for *_, mark in points} == {"yes", "no"}
    for time, der, mark in points:
        beaten = any(t <= time and d >= der and (t, d) != (time, der) for t, d, _ in points)
        assert mark == ("no" if beaten else "yes")
    page.get_by_label("Effect", exact=True).select_option("asr")
    assert "ASR" in page.locator("#frontier-details .y-name").inner_text()
    assert page.locator("#frontier path.front").count() == 1


def seconds(text: str) -> float:
    value, unit = text.split()[:2]
    return float(value) * {"s": 1, "min": 60, "h": 3600}[unit]


def test_defences_can_be_highlighted(tab: Tab) -> None:
    page = tab.open("charts.html")
    while page.locator("#legend input:checked").count():
        page.locator("#legend input:checked").first.click()
    assert page.locator("#scatter path.points").count() == 1  # all in grey
    page.locator("#legend").get_by_label("mesa").check()
    assert page.locator("#scatter path.points").count() == 2
    assert "show=mesa" in page.evaluate("location.hash")
    page.reload()
    page.locator("#legend input:checked").first.wait_for()
    assert page.locator("#legend input:checked").count() == 1


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_its_window(browser: Any, site: Path, store: Store, width: int) -> None:
    tab = Tab(browser, site, viewport={"width": width, "height": 844})
    result = next(record["key"] for record in defended(store) if "recovered.png" in record["files"])
    failed = next(record["key"] for record in store.records("failures") if record["kind"] != "victim")
    paths = [*PAGES, f"cells/{result}.html", f"cells/{failed}.html", "methods/baeraser.html", "methods/badnets.html"]
    paths += [f"victims/{next(iter(store.keys('victims')))}.html"]
    for path in paths:
        page = tab.open(path)
        page.wait_for_load_state("load")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    tab.page.context.close()
    assert tab.complaints == []


def test_hostile_text_does_nothing(browser: Any, tmp_path: Path) -> None:
    write_site(evil_store(tmp_path / "bench"), tmp_path / "site")
    tab = Tab(browser, tmp_path / "site")
    for path in sorted((tmp_path / "site").rglob("*.html")):
        page = tab.open(str(path.relative_to(tmp_path / "site")))
        page.wait_for_load_state("load")
        assert page.evaluate("window.evil") is None, path
        assert page.locator("img[src='x']").count() == 0
    page = tab.open("table.html#status=failed&q=onerror")
    assert page.locator("#cells tbody tr").count() == 1
    page.locator("#cells tbody a").click()
    assert "onerror" in page.locator("h1").inner_text()
    assert page.evaluate("window.evil") is None
    tab.page.context.close()
    assert tab.complaints == []


@pytest.mark.skipif(
    "LUSTRAL_SCREENSHOTS" not in os.environ, reason="writes pictures to the folder LUSTRAL_SCREENSHOTS names"
)
def test_screenshots(browser: Any, site: Path, store: Store) -> None:
    folder = Path(os.environ["LUSTRAL_SCREENSHOTS"])
    result = next(record["key"] for record in defended(store) if "recovered.png" in record["files"])
    for name, path, width, scheme in (
        ("index-light", "index.html", 1280, "light"),
        ("index-dark", "index.html", 1280, "dark"),
        ("table", "table.html#attack=badnets&sort=-der", 1280, "light"),
        ("charts", "charts.html", 1280, "light"),
        ("cell", f"cells/{result}.html", 1280, "light"),
        ("method", "methods/baeraser.html", 1280, "light"),
        ("narrow", "index.html", 390, "light"),
    ):
        tab = Tab(browser, site, viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = tab.open(path)
        page.wait_for_load_state("load")
        page.screenshot(path=folder / f"{name}.png", full_page=True)
        page.context.close()
