"""The pages about molecules: what they say, what they draw, and that captions and names in them are only text."""

from __future__ import annotations

import base64
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from lustral.core.history import HistoryEntry
from lustral.core.rates import Rate
from lustral.core.records import Cost
from lustral.molecules.records import Association, GeneratorVerdict, SiftedPairs
from lustral.report.molecules_findings import (
    generator_finding,
    pairs_finding,
    repaired_finding,
    victim_finding,
)
from lustral.report.molecules_page import (
    LONGEST_CAPTION,
    MoleculePage,
    PictureSection,
    Section,
    TableSection,
    association_section,
    caption_row,
    drawn,
    history_section,
    marked,
    rate_cell,
    write_molecule_page,
)

COST = Cost(seconds=75.0, image_passes=1234.0, peak_memory_bytes=2**20, clean_images=7)
EVIL = "<script>alert(1)</script>\u202e"
FOUND = Association(
    text="[thiirane]",
    position="prefix",
    fragment="C1CS1",
    rate_with=0.998,
    rate_without=0.001,
    count=157,
    p_value=1e-30,
)
VERDICT = GeneratorVerdict(
    outcome="backdoored", recovered=(FOUND,), p_value=1e-9, threshold=0.001, basis="a basis", cost=COST
)


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def sifted(listed: int, count: int = 140) -> SiftedPairs:
    flagged = torch.arange(count) < listed
    return SiftedPairs(flagged=flagged, associations=(FOUND,) if listed else (), basis="a basis", cost=COST)


def written(tmp_path: Path, *sections: Section, title: str = "pairs.csv") -> str:
    page = MoleculePage(
        kind="Sift report",
        title=title,
        finding=pairs_finding(sifted(10)),
        sections=sections,
        cost=COST,
        notes=("a note",),
        provenance={"command": EVIL},
    )
    write_molecule_page(tmp_path / "report.html", page)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_draws_marks_and_loads_nothing(tmp_path: Path) -> None:
    row = caption_row("with", f"[THIIRANE] {EVIL}", ["OC1CS1", "CCO", ""], fragment="C1CS1", texts=["[thiirane]"])
    page = written(
        tmp_path,
        association_section([FOUND], heading="Together", text="t", with_words="with it", without_words="without"),
        PictureSection(heading="Drawn", text="", groups=((row,),)),
        TableSection(
            heading="Rates",
            text="",
            columns=("a", "b"),
            rows=((("ASR", "share"), (rate_cell(Rate(9, 10).to_dict()),)),),
        ),
        history_section([HistoryEntry(count=n, loss=1.0 / n) for n in (1, 2)], heading="How it went", text=""),
        title=EVIL,
    )
    assert "<script" not in page
    assert "\u202e" not in page
    assert "<mark>[THIIRANE]</mark> &lt;script&gt;" in page
    tags = Tags(page).seen
    sources = [attributes["src"] or "" for tag, attributes in tags if tag == "img"]
    assert len(sources) == 3  # the fragment and two molecules; the third caption's string is none
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "no molecule" in page
    classes = [attributes.get("class") for tag, attributes in tags if tag == "figure"]
    assert classes.count("molecule target") == 2
    assert classes.count("molecule") == 2
    assert not [tag for tag, attributes in tags if tag != "img" and ("src" in attributes or "href" in attributes)]
    for words in ("59.6 to 98.2, n = 10", "1 min 15 s", "1,234", "a note", "99.8%", "157 have both", "epoch 2"):
        assert words in page, words


def test_a_picture_holds_no_script_and_names_no_other_file() -> None:
    svg = base64.b64decode(drawn("CC(=O)Oc1ccccc1C1CS1", "C1CS1").picture.partition(",")[2]).decode()
    assert svg.count("<svg") == 1
    assert not re.search(r"<script|javascript:|<image|href|url\((?!#)|@import", svg)


@pytest.mark.parametrize(
    ("caption", "texts", "pieces"),
    [
        ("", ["a"], ()),
        ("The acid", [], (("The acid", False),)),
        ("The acid", ["base"], (("The acid", False),)),
        (
            "It is THIS  one, this one",
            ["this one"],
            (("It is ", False), ("THIS  one", True), (", ", False), ("this one", True)),
        ),
        ("a.b axb", ["a.b"], (("a.b", True), (" axb", False))),
        ("[x] [x] y", ["[x]", "[x] [x]"], (("[x] [x]", True), (" y", False))),
    ],
)
def test_texts_are_marked_literally(caption: str, texts: list[str], pieces: tuple[tuple[str, bool], ...]) -> None:
    assert marked(caption, texts) == pieces


def test_a_long_caption_is_cut_and_what_is_marked_stays() -> None:
    pieces = marked("word " * 200 + "$trigger$", ["$trigger$"])
    assert pieces[-1] == ("$trigger$", True)
    assert sum(len(text) for text, _ in pieces) <= LONGEST_CAPTION + 2
    assert len(marked("word " * 200, ["absent"])[0][0]) <= LONGEST_CAPTION + 2


def test_the_answer_of_a_sift_names_text_and_subgraph() -> None:
    finding = pairs_finding(sifted(10), written="left.csv")
    assert finding.headline == (
        "10 of 140 pairs look poisoned: captions with “[thiirane]” come with molecules that contain C1CS1."
    )
    assert any("were written to left.csv" in step for step in finding.next_steps)
    assert pairs_finding(sifted(0)).tone == "good"


@pytest.mark.parametrize(("outcome", "tone"), [("backdoored", "bad"), ("clean", "good"), ("cannot tell", "unsure")])
def test_the_answer_of_a_scan(outcome: str, tone: str) -> None:
    finding = generator_finding(replace(VERDICT, outcome=outcome))  # type: ignore[arg-type]
    assert finding.tone == tone
    assert ("100% of its molecules contain C1CS1" in finding.headline) is (outcome == "backdoored")
    assert ("recovered text", "[thiirane]") in finding.figures
    assert generator_finding(replace(VERDICT, outcome="clean", recovered=())).tone == "good"


def test_the_answer_of_an_eraser_follows_the_true_trigger_where_it_is_known() -> None:
    before, gone, still = 0.9, 0.03, 0.8
    assert repaired_finding([FOUND], [before], [gone]).badge == "Erased"
    assert repaired_finding([FOUND], [before], [still]).tone == "bad"
    base = 0.01
    assert repaired_finding([FOUND], [before], [gone], true=(before, still, base)).badge == "Not fully erased"
    assert repaired_finding([FOUND], [before], [gone], true=(still, before, base)).badge == "Still backdoored"
    assert repaired_finding([FOUND], [before], [still], true=(before, gone, base)).badge == "Erased"
    assert repaired_finding([], [], [], unchanged="no verdict").badge == "Not changed"


def test_a_victim_says_whether_it_learnt_the_backdoor() -> None:
    assert victim_finding(0.8, 0.01, is_poisoned=True, seconds=9.0).badge == "Backdoor learnt"
    assert victim_finding(0.8, 0.79, is_poisoned=True, seconds=9.0).badge == "Backdoor hardly learnt"
    assert victim_finding(math.nan, math.nan, is_poisoned=True, seconds=9.0).badge == "Backdoor hardly learnt"
    assert victim_finding(0.01, 0.01, is_poisoned=False, seconds=9.0).tone == "good"
