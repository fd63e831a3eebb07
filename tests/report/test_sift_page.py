"""The pages about training sets: what they say, what they show, and that names in them are only text."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from lustral.core.history import HistoryEntry
from lustral.core.records import Cost
from lustral.report.figures.histogram import NUM_BINS, histogram
from lustral.report.sift_page import SiftReport, write_sift_report, write_train_report
from lustral.report.untrusted_findings import sift_finding, train_finding
from lustral.vision.figures import contact_sheet
from lustral.vision.records import ImageSet, Sifted, Trained
from toy import toy_images

COST = Cost(seconds=75.0, image_passes=1234.0, peak_memory_bytes=2**20, clean_images=0)
EVIL = "<script>alert(1)</script>\u202e"


def answer(listed: int, count: int = 140, label: int = 4) -> tuple[ImageSet, Sifted]:
    data = toy_images(count, seed=0)
    flagged = torch.zeros(count, dtype=torch.bool)
    flagged[(data.labels == label).nonzero().flatten()[:listed]] = True
    scores = torch.linspace(0, 1, count) + 5 * flagged
    part = Sifted(scores=scores, flagged=flagged, threshold=4.0, basis="a basis", cost=COST)
    other = replace(part, flagged=torch.zeros_like(flagged))
    return data, replace(part, parts={"first": part, "second": other}, notes=("a note",))


def report(data: ImageSet, **changes: object) -> SiftReport:
    names = tuple(f"{EVIL}{number}.png" for number in range(len(data)))
    whole = SiftReport(
        title=EVIL, data=data, names=names, class_names=(EVIL, *"abcdef"), method="combined", unreadable=[(EVIL, EVIL)]
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_page_shows_pictures_lists_files_and_loads_nothing(tmp_path: Path) -> None:
    data, sifted = answer(10)
    write_sift_report(tmp_path / "report.html", report(data, written="left"), sifted)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "10 of 140 images look poisoned, all of them in the class “d”." in page
    assert "<script" not in page
    assert "\u202e" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\u202e4.png" in page
    tags = Tags(page).seen
    images = [attributes["src"] or "" for tag, attributes in tags if tag == "img"]
    assert len(images) == 10 + 4 + 3 * 6  # suspects, what they have in common, nearest pairs
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert not [tag for tag, attributes in tags if tag != "img" and ("src" in attributes or "href" in attributes)]
    for words in ("a basis", "a note", "1 of 2 methods", "10 listed images", "were written to left", "1 min 15 s"):
        assert words in page, words
    assert page.count("<h2>") >= 5


def test_a_clean_set_says_so_and_shows_the_highest_scores(tmp_path: Path) -> None:
    data, sifted = answer(0)
    write_sift_report(tmp_path / "report.html", report(data, unreadable=()), replace(sifted, threshold=math.inf))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No poisoned image was found among 140." in page
    assert "The images with the highest scores" in page
    assert "could not be read" not in page
    assert page.count("<img") == 12


def test_a_class_listed_whole_has_nothing_to_compare_with(tmp_path: Path) -> None:
    data, sifted = answer(140)
    assert int(sifted.flagged.sum()) == 20
    write_sift_report(tmp_path / "report.html", report(data), sifted)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "20 of its 20 images are listed. None is left to compare them with." in page
    assert "What they have in common" not in page


def test_classes_with_few_listed_images_share_a_row(tmp_path: Path) -> None:
    data, sifted = answer(10)
    flagged = sifted.flagged.clone()
    flagged[(data.labels == 2).nonzero().flatten()[:2]] = True
    write_sift_report(tmp_path / "report.html", report(data), replace(sifted, flagged=flagged))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "12 of 140 images look poisoned, 10 of them in the class “d”." in page
    assert page.count("What they have in common") == 1
    assert "Other classes, a few images each" in page
    assert page.count("<img") == 10 + 4 + 3 * 6 + 2


def test_the_training_page_has_the_accuracy_the_history_and_what_was_sifted(tmp_path: Path) -> None:
    data, sifted = answer(10)
    history = tuple(HistoryEntry(count=n, loss=1.0 / n, clean_accuracy=0.8 + n / 100) for n in (1, 2, 3))
    trained = Trained(model=nn.Linear(1, 1), history=history, cost=COST, sifted=sifted, notes=("a note",))
    write_train_report(tmp_path / "report.html", report(data, method="d_st"), trained, 0.912)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for words in ("by d_st. It is right on 91.2% of the test images", "epoch 3", "a note", "What the method found"):
        assert words in page, words
    write_train_report(tmp_path / "plain.html", report(data, method="plain"), replace(trained, sifted=None), None)
    page = (tmp_path / "plain.html").read_text(encoding="utf-8")
    assert "If there is a backdoor among them, it was learnt too." in page
    assert "There was no test set" in page
    assert "What the method found" not in page


@pytest.mark.parametrize(("count", "words"), [(10, "all of them in"), (24, "mostly in the classes “b” and “a”")])
def test_the_headline_says_where(count: int, words: str) -> None:
    labels = [1] * 60 + [0] * 60
    flagged = torch.zeros(120, dtype=torch.bool)
    flagged[:count] = True
    if count == 24:
        flagged[10:24] = False
        flagged[60:68] = True
    sifted = Sifted(scores=flagged.float(), flagged=flagged, threshold=0.5, basis="", cost=COST)
    finding = sift_finding(sifted, labels, ["a", "b"], num_unreadable=2)
    assert words in finding.headline
    assert "2 pictures could not be read" in finding.details[0]
    assert (finding.tone, finding.badge) == ("bad", "Poisoned images listed")


def test_a_model_is_never_called_safe() -> None:
    trained = Trained(model=nn.Linear(1, 1), history=(), cost=COST)
    for method in ("plain", "d_st"):
        finding = train_finding(trained, 0.99, method=method, num_images=10)
        assert finding.tone == "unsure"
        assert "99.0%" in f"{finding.headline} {finding.details}"


def test_every_image_is_counted_once_and_the_line_is_within() -> None:
    scores = [0.01 * n for n in range(900)] + [20.0, 21.0, 5000.0]
    flagged = [False] * 900 + [True] * 3
    chart = histogram(scores, flagged, 15.0)
    counted = [int(re.search(r": (\d+) images, (\d+) listed", bar.text).group(1)) for bar in chart.bars]  # type: ignore[union-attr]
    assert sum(counted) == 903
    assert chart.beyond == 1
    assert chart.line is not None
    assert 0 < chart.line < 100
    last = chart.bars[-1]
    assert last.listed == last.height > 0
    assert last.left + last.width <= 100.001
    assert all(bar.listed == 0 for bar in chart.bars if bar.left + bar.width < chart.line)
    for constant in (histogram([1.0, 1.0], [False, False], math.inf), histogram([3.0], [True], 3.0)):
        assert len(constant.bars) == 1
    assert histogram(scores, flagged, math.inf).line is None
    assert len(histogram(list(map(float, range(1000))), [False] * 1000, math.inf).bars) == NUM_BINS


def test_a_contact_sheet_is_a_picture_and_bad_arguments_are_refused() -> None:
    images = toy_images(10, seed=0).images
    assert contact_sheet(images, ["é" * 99] * 10, [True] * 10).startswith(b"\x89PNG")
    assert contact_sheet(images[:1].repeat(1, 1, 30, 30), ["x"], [False]).startswith(b"\x89PNG")
    for bad in ((images[:0], [], []), (images, ["x"], [True] * 10), (images.float(), ["x"] * 10, [True] * 10)):
        with pytest.raises(ValueError, match="expected uint8 images"):
            contact_sheet(*bad)
