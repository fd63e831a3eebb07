"""The page: complete for every kind of result, self-contained, safe against hostile names."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Generator, Tensor, nn

from lustral.cli.tables import verdict_table
from lustral.core.history import HistoryEntry
from lustral.core.rates import Rate
from lustral.core.records import Cost, Evidence
from lustral.report.findings import erase_finding
from lustral.report.page import ReportData, write_erase_report, write_scan_report
from lustral.vision.detectors.weighing import SearchedLabel
from lustral.vision.evaluation import Evaluation
from lustral.vision.measures import MASK_AREA
from lustral.vision.records import Answer, ImageSet, Purified, RecoveredTrigger, Verdict
from toy import mask_evidence

COST = Cost(seconds=95.2, image_passes=123_456.0, peak_memory_bytes=900 * 2**20, clean_images=500)
TARGET = 3
VOID = {"meta", "img", "br", "path", "line", "rect", "circle"}


def make_clean(num_classes: int, class_names: tuple[str, ...] = (), channels: int = 3, side: int = 32) -> ImageSet:
    """Return one smooth made-up image per class, three times over."""
    labels = torch.arange(3 * num_classes) % num_classes
    ramp = torch.linspace(0, 1, side)
    hue = torch.arange(channels)[:, None, None] / channels
    waves = [
        ((ramp[:, None] * (1 + label % 5) + ramp[None, :] * (1 + label % 7) + hue).sin().square() * 200).byte()
        for label in labels.tolist()
    ]
    return ImageSet(images=torch.stack(waves), labels=labels, num_classes=num_classes, class_names=class_names)


def make_trigger(target_label: int, channels: int = 3, side: int = 32, samples: int = 8) -> RecoveredTrigger:
    """Return patches near the lower right corner."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(samples, 1, side, side)
    masks[:, :, -4:-1, -4:-1] = 0.6 + 0.4 * torch.rand(samples, 1, 3, 3, generator=generator)
    patterns = torch.rand(samples, channels, side, side, generator=generator)
    return RecoveredTrigger(
        target_label=target_label, masks=masks, patterns=patterns, area=6.1, attack_success_rate=0.983, entropy=1.3
    )


def true_trigger(images: Tensor, *, generator: Generator | None = None) -> Tensor:
    triggered = images.clone()
    triggered[..., -4:-1, -4:-1] = 1
    return triggered


def make_verdict(num_classes: int, outcome: Answer = "backdoored", channels: int = 3, side: int = 32) -> Verdict:
    def entry(label: int) -> SearchedLabel:
        is_small = label == TARGET and outcome == "backdoored"
        area = 6.1 if is_small else 48.0 + 37 * math.sin(label) + label
        return SearchedLabel(
            label=label,
            size=math.inf if label == 0 else area,
            attack_success_rate=0.983 if is_small else 0.91,
            natural_rate=0.012,
            anomaly=5.4 if is_small else 0.3 * math.cos(label),
            p_value=2.3e-5 if is_small else 0.8,
            entropy=1.3 if is_small else math.nan,
            steps=400 if is_small else 100,
        )

    return Verdict(
        outcome=outcome,
        suspect_labels=(TARGET,) if outcome == "backdoored" else (),
        score=5.4 if outcome == "backdoored" else 0.8,
        threshold=3.0,
        basis="The smallest class lies 5.4 robust standard deviations below the others on the logarithmic scale; "
        "benign models exceed 3.0 in fewer than 5% of cases.",
        evidence=mask_evidence(*map(entry, range(num_classes))),
        triggers=() if outcome == "cannot tell" else (make_trigger(TARGET, channels, side),),
        cost=COST,
    )


def make_evaluation(acc: float, asr: float, ra: float, num_classes: int) -> Evaluation:
    return Evaluation(
        acc=Rate(round(acc * 10_000), 10_000),
        asr=Rate(round(asr * 9_000), 9_000),
        ra=Rate(round(ra * 9_000), 9_000),
        natural_rate=Rate(81, 9_000),
        per_class=(Rate(0, 0), *(Rate(round(acc * 1000) - 3 * label, 1000) for label in range(1, num_classes))),
        num_non_finite=0,
    )


def make_purified(num_classes: int, audit: Answer | None = "clean", selected: int | None = 9) -> Purified:
    history = tuple(
        HistoryEntry(
            count=i % 6,
            parts=(("round", 1 + i // 6),),
            clean_accuracy=0.93 - 0.09 * math.exp(-(i % 6)) * (i > 0),
            recovered_asr=0.99 * math.exp(-0.9 * (i % 6)) * (1 if i < 6 else 0.5),
            area=6.0 * 1.35**i,
        )
        for i in range(12)
    )
    return Purified(
        model=nn.Identity(),
        history=history,
        selected=selected,
        cost=COST,
        verdict=make_verdict(num_classes),
        audit=None if audit is None else make_verdict(num_classes, audit),
        notes=("Batch normalisation statistics were kept, because fewer than 100 clean images were given.",),
    )


CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIGNS = tuple(f"Speed limit ({10 * i} km/h) zone sign" if i % 4 == 0 else f"sign {i}" for i in range(43))
NAMES = {10: CIFAR, 43: SIGNS}


def scan_data(num_classes: int = 10, outcome: Answer = "backdoored", channels: int = 3, side: int = 32) -> ReportData:
    return ReportData(
        title="model_from_the_internet.pt",
        clean=make_clean(num_classes, NAMES.get(num_classes, ()), channels, side),
        verdict=make_verdict(num_classes, outcome, channels, side),
        provenance={"command": "lustral scan model.pt", "seed": 7, "versions": {"torch": "2.9"}},
    )


def erase_data(num_classes: int = 10, audit: Answer | None = "clean", *, measured: bool = True) -> ReportData:
    return ReportData(
        title="model_from_the_internet.pt",
        clean=make_clean(num_classes, NAMES.get(num_classes, ())),
        purified=make_purified(num_classes, audit),
        before=make_evaluation(0.921, 0.9953, 0.004, num_classes) if measured else None,
        after=make_evaluation(0.914, 0.011, 0.893, num_classes) if measured else None,
        true_trigger=true_trigger if measured else None,
        controls={
            "fine-tuning": make_evaluation(0.917, 0.84, 0.13, num_classes),
            "batch-norm refresh": make_evaluation(0.905, 0.97, 0.02, num_classes),
        }
        if measured
        else {},
        provenance={"command": "lustral erase model.pt", "seed": 7, "versions": {"torch": "2.9"}},
    )


class Outline(HTMLParser):
    """Collects tags, attributes and text, and fails on tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def check(path: Path) -> Outline:
    """Check what must hold of every page, and return its outline."""
    page = path.read_text()
    outline = Outline(page)
    names = {tag for tag, _ in outline.tags}
    assert not names & {"script", "link", "iframe", "object", "form", "base"}
    assert not re.search(r"https?://|@import|url\(", page)
    for tag, attributes in outline.tags:
        assert not attributes.get("href")
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/png;base64,")
            assert attributes["alt"]
    assert any(attributes.get("name") == "viewport" for attributes in outline.attributes("meta"))
    assert all(attributes.get("scope") in ("row", "col") for attributes in outline.attributes("th"))
    assert all("aria-label" in a or a.get("aria-hidden") == "true" for a in outline.attributes("svg"))
    assert len(outline.attributes("h1")) == 1
    assert "nan" not in re.findall(r"[a-z]+", outline.text)
    assert not [tag for tag in ("</td>", "</svg>", "</figure>") if tag in outline.text], "markup of ours became text"
    return outline


@pytest.mark.parametrize("num_classes", [4, 10, 43])
@pytest.mark.parametrize(
    ("outcome", "badge"), [("backdoored", "Backdoored"), ("clean", "No backdoor found"), ("cannot tell", "Cannot tell")]
)
def test_scan_page(tmp_path: Path, num_classes: int, outcome: str, badge: str) -> None:
    data = scan_data(num_classes, outcome)
    write_scan_report(tmp_path / "report.html", data)
    outline = check(tmp_path / "report.html")
    assert badge in outline.text
    assert ("28 more classes" in outline.text) == (num_classes == 43)
    assert "123,456" in outline.text
    assert "lustral scan model.pt" in outline.text
    assert "true trigger" not in outline.text
    assert len(outline.attributes("img")) == (0 if outcome == "cannot tell" else 24)
    if outcome == "backdoored":
        assert f"turns other images into “{data.class_names[3]}”" in outline.text
        assert "6.1 px" in outline.text
        assert "1 in 43,000" in outline.text


@pytest.mark.parametrize("num_classes", [4, 10, 43])
def test_erase_page_with_measurements(tmp_path: Path, num_classes: int) -> None:
    write_erase_report(tmp_path / "report.html", erase_data(num_classes))
    outline = check(tmp_path / "report.html")
    assert "The backdoor is erased" in outline.text
    for text in ("99.5% → 1.1%", "0.989", "0.941", "−0.7 points", "99.4–99.7", "fine-tuning", "true trigger"):
        assert text in outline.text
    assert "Batch normalisation statistics were kept" in outline.text
    assert "weights that were kept" in outline.text
    assert "6.1 px before, 56.2 px after" in outline.text


@pytest.mark.parametrize(
    ("audit", "measured", "badge"),
    [
        ("clean", False, "Erased"),
        ("backdoored", False, "Still backdoored"),
        ("backdoored", True, "Not fully erased"),
        ("cannot tell", False, "Cannot tell"),
        ("cannot tell", True, "Erased"),
        (None, False, "Cannot tell"),
        (None, True, "Erased"),
    ],
)
def test_erase_page_answers(tmp_path: Path, audit: str | None, measured: bool, badge: str) -> None:
    write_erase_report(tmp_path / "report.html", erase_data(10, audit, measured=measured))
    outline = check(tmp_path / "report.html")
    assert f"<title>{badge}" in (tmp_path / "report.html").read_text()
    assert ("Audit" in outline.text) == (audit is not None)
    assert ("true trigger" in outline.text) == measured


def test_a_failed_erasure_says_why(tmp_path: Path) -> None:
    data = erase_data(10)
    assert data.after is not None
    after = dataclasses.replace(data.after, asr=Rate(3000, 9000), acc=Rate(8000, 10_000), ra=Rate(900, 9000))
    write_erase_report(tmp_path / "report.html", dataclasses.replace(data, after=after))
    outline = check(tmp_path / "report.html")
    assert "<title>Not fully erased" in (tmp_path / "report.html").read_text()
    assert "The trigger still works on 33.3% of images" in outline.text
    assert "clean accuracy changed by −12.1 points" in outline.text
    assert "only 10.0% of triggered images" in outline.text


def test_a_trigger_that_works_as_before_is_called_still_there(tmp_path: Path) -> None:
    data = erase_data(10)
    assert data.after is not None
    after = dataclasses.replace(data.after, asr=Rate(8800, 9000), ra=Rate(100, 9000))
    write_erase_report(tmp_path / "report.html", dataclasses.replace(data, after=after))
    assert "<title>Still backdoored" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("history", "said"),
    [
        ([{"channels": n, "clean_accuracy": 0.9} for n in (0, 2, 4)], ["0 cut", "4 cut"]),
        (
            [{"epoch": 0, "clean_accuracy": 0.9}]
            + [{"epoch": n, "neuron_ratio": r, "clean_accuracy": 0.9} for r in (0.3, 0.05) for n in (1, 2)]
            + [{"epoch": 2, "neuron_ratio": 0.3, "clean_accuracy": 0.9}],
            ["epoch 0", "epoch 2", "30% of neurons reset", "5% of neurons reset"],
        ),
        (
            [{"round": 1, "epoch": 1, "clean_accuracy": 0.3}]
            + [{"round": n, "rate_divisor": 4.0, "epoch": 1, "clean_accuracy": 0.9} for n in (1, 2)],
            ["round 1", "round 1, rate / 4", "round 2, rate / 4"],
        ),
        (
            [{"round": 1, "rate_divisor": 4.0 * n, "epoch": 1, "clean_accuracy": 0.9} for n in (1, 4)],
            ["rate / 4", "rate / 16"],
        ),
    ],
)
def test_the_chart_says_what_a_history_counts(tmp_path: Path, history: list[dict[str, float]], said: list[str]) -> None:
    purified = erase_data(10).purified
    assert purified is not None
    purified = dataclasses.replace(
        purified, history=tuple(map(HistoryEntry.from_dict, history)), selected=len(history) - 1
    )
    write_erase_report(tmp_path / "report.html", dataclasses.replace(erase_data(10), purified=purified))
    outline = check(tmp_path / "report.html")
    assert all(text in outline.text for text in said)
    assert "None" not in outline.text
    assert "triggers recovered" not in outline.text


def test_an_erasure_that_cost_accuracy_alone_says_so(tmp_path: Path) -> None:
    data = erase_data(10)
    assert data.after is not None
    after = dataclasses.replace(data.after, acc=Rate(8800, 10_000))
    write_erase_report(tmp_path / "report.html", dataclasses.replace(data, after=after))
    outline = check(tmp_path / "report.html")
    assert "<title>Erased at a price" in (tmp_path / "report.html").read_text()
    assert "The trigger no longer works, but the model lost 4.1 points" in outline.text


def test_a_damaged_model_is_not_called_erased(tmp_path: Path) -> None:
    data = erase_data(10)
    assert data.after is not None
    damaged = dataclasses.replace(data, after=dataclasses.replace(data.after, num_non_finite=12))
    write_erase_report(tmp_path / "report.html", damaged)
    assert "The new model is damaged" in check(tmp_path / "report.html").text
    assert "<title>Damaged" in (tmp_path / "report.html").read_text()


def test_erase_page_with_almost_nothing(tmp_path: Path) -> None:
    full = erase_data(10, None, measured=False)
    assert full.purified is not None
    bare = dataclasses.replace(full.purified, verdict=None, history=(), selected=None, notes=())
    write_erase_report(tmp_path / "report.html", ReportData(title="m", clean=full.clean, purified=bare))
    outline = check(tmp_path / "report.html")
    assert "returned as it was" in outline.text
    assert not outline.attributes("table")


def test_nothing_attackable_is_shown_as_such(tmp_path: Path) -> None:
    data = erase_data(10)
    none = Rate(0, 0)
    records: dict[str, Evaluation] = {
        name: dataclasses.replace(record, asr=none, ra=none, natural_rate=none)
        for name, record in (("before", data.before), ("after", data.after))
        if record is not None
    }
    write_erase_report(tmp_path / "report.html", dataclasses.replace(data, **records))  # type: ignore[arg-type]
    assert "no images" in check(tmp_path / "report.html").text


@pytest.mark.parametrize("history", [{"epoch": 1}, {"epoch": 0, "clean_accuracy": 0.9, "recovered_asr": None}])
def test_incomplete_history(tmp_path: Path, history: dict[str, Any]) -> None:
    data = erase_data(10)
    assert data.purified is not None
    purified = dataclasses.replace(data.purified, history=(HistoryEntry.from_dict(history),), selected=0)
    write_erase_report(tmp_path / "report.html", dataclasses.replace(data, purified=purified))
    check(tmp_path / "report.html")


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    data = scan_data(10)
    hostile = "<script>alert('x')</script>\"><img src=x onerror=y>"
    clean = dataclasses.replace(data.clean, class_names=(hostile,) * 10)
    basis = dataclasses.replace(data.verdict, basis=hostile) if data.verdict else None
    write_scan_report(
        tmp_path / "report.html",
        dataclasses.replace(data, title=hostile, clean=clean, verdict=basis, provenance={"</pre>": hostile}),
    )
    outline = check(tmp_path / "report.html")
    assert hostile in outline.text


def test_tiny_grey_images(tmp_path: Path) -> None:
    data = dataclasses.replace(scan_data(7, channels=1, side=8), title="digits")
    write_scan_report(tmp_path / "report.html", data)
    assert "“class 3”" in check(tmp_path / "report.html").text


def test_few_or_no_images_of_other_classes(tmp_path: Path) -> None:
    data = scan_data(10)
    only_target = data.clean.subset(data.clean.labels == 3)
    write_scan_report(tmp_path / "report.html", dataclasses.replace(data, clean=only_target))
    assert len(check(tmp_path / "report.html").attributes("img")) == 12
    empty = data.clean.subset(torch.tensor([], dtype=torch.int64))
    write_scan_report(tmp_path / "report.html", dataclasses.replace(data, clean=empty))
    check(tmp_path / "report.html")


def test_no_search_succeeded(tmp_path: Path) -> None:
    data = scan_data(10, "cannot tell")
    assert data.verdict is not None
    evidence = tuple(
        dataclasses.replace(e, value=math.inf, p_value=None) for e in data.verdict.evidence if e.measure == MASK_AREA
    )
    verdict: Verdict = dataclasses.replace(data.verdict, evidence=evidence)
    write_scan_report(tmp_path / "report.html", dataclasses.replace(data, verdict=verdict))
    assert "not reached" in check(tmp_path / "report.html").text


def odd_detector(outcome: Answer = "backdoored") -> Verdict:
    """Return what a detector says that looks at weights and at one statistic per class, and knows no pixels."""
    null = "in a benign model the gaps come from one exponential distribution"
    evidence = [Evidence(label=None, measure="weight_norm", value=0.0042)]
    for label in range(10):
        p_value = 3e-4 if label == TARGET and outcome == "backdoored" else 0.6
        evidence.append(Evidence(label=label, measure="activation_gap", value=1.5 + label, null=null, p_value=p_value))
    return Verdict(
        outcome=outcome,
        suspect_labels=(TARGET,) if outcome == "backdoored" else (),
        score=3.5,
        threshold=2.0,
        basis="The gap of one class is out of proportion.",
        evidence=tuple(evidence),
        triggers=(),
        cost=COST,
    )


@pytest.mark.parametrize("outcome", ["backdoored", "clean", "cannot tell"])
def test_a_detector_with_measures_of_its_own_gets_a_table(tmp_path: Path, outcome: Answer) -> None:
    data = dataclasses.replace(scan_data(10), verdict=odd_detector(outcome))
    write_scan_report(tmp_path / "report.html", data)
    outline = check(tmp_path / "report.html")
    for text in ("Activation gap", "Weight norm", "Chance if benign", "whole model", "0.0042", "4.50", "60%"):
        assert text in outline.text
    for text in ("Pixels needed", "pixels", "small pattern"):
        assert text not in outline.text
    assert ("1 in 3,333" in outline.text) == (outcome == "backdoored")
    shown = Console(width=120, record=True, file=io.StringIO())
    shown.print(verdict_table(odd_detector(outcome), CIFAR))
    assert "activation gap" in (text := shown.export_text())
    assert text.index("3 (cat)") < text.index("0 (airplane)") or outcome != "backdoored"


def test_an_audit_with_measures_of_its_own_gets_a_table(tmp_path: Path) -> None:
    data = erase_data(10, measured=False)
    assert data.purified is not None
    for outcome, said in (("clean", "appears to be erased: a fresh scan"), ("backdoored", "fresh scan calls")):
        audited = dataclasses.replace(data.purified, audit=odd_detector(outcome))  # type: ignore[arg-type]
        write_erase_report(tmp_path / "report.html", dataclasses.replace(data, purified=audited))
        outline = check(tmp_path / "report.html")
        assert said in outline.text
        assert "Activation gap" in outline.text


@pytest.mark.parametrize(
    ("scanned", "said"),
    [
        ("backdoored", "The backdoor appears to be erased: a fresh"),
        ("cannot tell", "A backdoor was in doubt, and what was in doubt appears to be erased: a fresh"),
        ("clean", "No backdoor found, neither before nor after: a fresh"),
    ],
)
def test_what_was_erased_is_called_what_the_scan_called_it(scanned: str, said: str) -> None:
    purified = erase_data(10, measured=False).purified
    assert purified is not None
    purified = dataclasses.replace(purified, audit=odd_detector("clean"))
    assert erase_finding(purified, odd_detector(scanned), None, None, CIFAR).headline.startswith(said)


def test_missing_parts_are_explained(tmp_path: Path) -> None:
    data = dataclasses.replace(scan_data(4), verdict=None)
    with pytest.raises(ValueError, match="verdict"):
        write_scan_report(tmp_path / "report.html", data)
    with pytest.raises(ValueError, match="purified"):
        write_erase_report(tmp_path / "report.html", data)
    assert not list(tmp_path.iterdir())


def test_equal_data_make_equal_pages(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_erase_report(tmp_path / name, erase_data(10))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
