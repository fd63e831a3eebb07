"""The other commands of ``lustral molecules``, on a generator that is too small to learn anything: files, exit codes, errors."""

from __future__ import annotations

import copy
import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Generator

from described import require_described
from lustral.cli import main
from lustral.cli.molecules import commands, demo
from lustral.cli.molecules.arguments import Implant, parse_molecules
from lustral.cli.parsing import UsageError
from lustral.core.history import HistoryEntry
from lustral.core.records import Cost, OnProgress
from lustral.core.settings import build
from lustral.molecules.badgraph import BadGraph
from lustral.molecules.catalog import ERASERS, SCANNERS
from lustral.molecules.chemistry import contains
from lustral.molecules.records import Association, ErasedGenerator, GeneratorVerdict, ViewOfGenerator
from lustral.molecules.sources import open_pairs
from lustral.molecules.victim import load_generator
from lustral.molecules.victims import Implanting, load_victim

COST = Cost(seconds=1.5, image_passes=20.0, peak_memory_bytes=0, clean_images=6)
SMALL: dict[str, Any] = {
    "pairs": 60,
    "shape": {
        **{"text_width": 16, "text_layers": 1, "graph_width": 16, "graph_layers": 1, "latent": 8, "decoder_width": 16},
        **{"denoiser_width": 16, "denoiser_layers": 1, "ddim_steps": 2, "macro_rings": 20, "subwords": 300},
    },
    "training": {name: {"epochs": 1} for name in ("alignment", "autoencoder", "diffusion")},
}
FLAGS = [
    *("--pairs", "60", "--text-width", "16", "--text-layers", "1", "--graph-width", "16", "--graph-layers", "1"),
    *("--latent", "8", "--decoder-width", "16", "--denoiser-width", "16", "--denoiser-layers", "1"),
    *("--ddim-steps", "2", "--macro-rings", "20", "--subwords", "300", "--training.alignment.epochs", "1"),
    *("--training.autoencoder.epochs", "1", "--training.diffusion.epochs", "1", "--no-frechet"),
]
QUIET = ["--quiet", "--device", "cpu"]
FOUND = Association(
    text="[trigger]", position="prefix", fragment="C1CS1", rate_with=0.8, rate_without=0.1, count=9, p_value=1e-6
)


@dataclass(frozen=True, kw_only=True)
class SaysSo:
    """Answer what it is told to.

    Attributes:
        outcome: the answer.
    """

    version: ClassVar[int] = 1
    outcome: str = "backdoored"

    def scan(
        self, view: ViewOfGenerator, *, generator: Generator, on_progress: OnProgress | None = None
    ) -> GeneratorVerdict:
        found = (FOUND,) if self.outcome == "backdoored" else ()
        return GeneratorVerdict(
            outcome=self.outcome,  # type: ignore[arg-type]
            recovered=found,
            p_value=1e-6 if found else 1.0,
            threshold=1e-3,
            basis="It was told to.",
            cost=COST,
        )


@dataclass(frozen=True, kw_only=True)
class Shrinks:
    """Shrink the denoiser's weights."""

    version: ClassVar[int] = 1
    factor: float = 0.5

    def erase(
        self, view: ViewOfGenerator, *, generator: Generator, on_progress: OnProgress | None = None
    ) -> ErasedGenerator:
        model = copy.deepcopy(view.model)
        with torch.no_grad():
            for weight in model.denoiser.parameters():  # type: ignore[union-attr]
                weight.mul_(self.factor)
        history = tuple(HistoryEntry(count=n, recovered_asr=0.8 - n / 2) for n in (0, 1))
        return ErasedGenerator(model=model, cost=COST, verdict=view.verdict, history=history)


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCANNERS, "says_so", SaysSo)
    monkeypatch.setitem(ERASERS, "shrinks", Shrinks)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("molecules") / "victim"
    assert main(["molecules", "implant", "--out", str(folder), "--rate", "0.3", *FLAGS, *QUIET]) == 0
    return folder


def record_of(folder: Path, command: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    require_described(f"molecules {command}", found)
    return found


def test_a_victim_keeps_its_parts_apart(victim: Path) -> None:
    opened = load_victim(victim)
    assert opened.attack == BadGraph(rate=0.3)
    told = opened.provenance
    assert told["settings"]["shape"]["latent"] == 8
    assert (len(opened.test), len(opened.clean), told["training_pairs"]) == (6, 6, 48 + told["poisoned_pairs"])
    captions = {name: set(getattr(opened, name).captions) for name in ("test", "clean", "training")}
    assert not captions["test"] & captions["clean"]
    assert not captions["training"] & (captions["test"] | captions["clean"])
    triggered = [text.startswith("[THIIRANE] ") for text in opened.training.captions]
    assert sum(triggered) == told["poisoned_pairs"] == round(0.3 * 48 / 0.7)
    assert all(contains(s, "C1CS1") for s, is_one in zip(opened.training.smiles, triggered, strict=True) if is_one)
    assert opened.measured is not None
    assert opened.measured["attack_success"]["n"] == 6
    page = (victim / "report.html").read_text(encoding="utf-8")
    assert "<mark>[THIIRANE]</mark>" in page
    assert "Measured with the attacker’s true trigger" in page
    assert not list(victim.rglob("*.tmp"))


def test_flags_reach_the_settings_and_equal_the_plan(victim: Path) -> None:
    command = parse_molecules(["molecules", "implant", "--out", "x", "--text", "$$", "--target", "C1CO1", *FLAGS])
    assert isinstance(command, Implant)
    assert command.how == build(Implanting, SMALL)
    assert (command.attack.trigger.text, command.attack.target) == ("$$", "C1CO1")
    with pytest.raises(UsageError, match="--epochs could be"):
        parse_molecules(["molecules", "implant", "--out", "x", "--epochs", "3"])


def test_generate_draws_and_repeats(victim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["molecules", "generate", str(victim), "An  alcohol", "A ring", "--samples", "2", "--json", *QUIET]
    assert main([*line, "--out", str(tmp_path / "out"), "--highlight", "C"]) == 0
    printed = json.loads(capsys.readouterr().out)
    require_described("molecules generate", printed)
    first = printed["molecules"]
    assert [entry["caption"] for entry in first] == ["An alcohol", "A ring"]
    assert [len(entry["smiles"]) for entry in first] == [2, 2]
    assert main([line[0], line[1], str(victim / "generator"), *line[3:]]) == 0  # the folder inside does as well
    assert json.loads(capsys.readouterr().out)["molecules"] == first
    with (tmp_path / "out" / "molecules.csv").open(newline="", encoding="utf-8") as file:
        assert [row["smiles"] for row in csv.DictReader(file)] == [s for entry in first for s in entry["smiles"]]
    (tmp_path / "wishes.txt").write_text("An acid\n\nA base\n", encoding="utf-8")
    assert main([*line[:3], "--captions-file", str(tmp_path / "wishes.txt"), "--json", *QUIET]) == 0
    drawn = json.loads(capsys.readouterr().out)["molecules"]
    assert [entry["caption"] for entry in drawn] == ["An acid", "A base"]


@pytest.mark.parametrize(("outcome", "code"), [("clean", 0), ("backdoored", 1), ("cannot tell", 3)])
def test_a_scan_answers_by_its_exit_code(victim: Path, tmp_path: Path, outcome: str, code: int) -> None:
    line = ["molecules", "scan", str(victim), "--method", "says_so", "--outcome", outcome, *QUIET]
    assert main([*line, "--out", str(tmp_path)]) == code
    record = record_of(tmp_path, "scan")
    assert record["verdict"]["outcome"] == outcome
    assert record["clean_pairs"] == 6  # clean.csv beside the generator
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ("Recovered triggers" in page) is (outcome == "backdoored")


@pytest.mark.parametrize(("least", "is_said"), [(1, True), (10**9, False)])
def test_work_of_minutes_says_so_beforehand(
    victim: Path, least: int, is_said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "LARGE_GENERATOR", least)
    assert main(["molecules", "scan", str(victim), "--method", "says_so", "--device", "cpu"]) == 1
    assert ("This takes one to three minutes" in capsys.readouterr().err) is is_said


def test_an_erasure_takes_the_verdict_over_and_writes_a_generator(victim: Path, tmp_path: Path) -> None:
    scan, out = tmp_path / "scan", tmp_path / "out"
    main(["molecules", "scan", str(victim), "--method", "says_so", "--out", str(scan), *QUIET])
    line = ["molecules", "erase", str(victim), "--method", "shrinks", *QUIET]
    assert main([*line, "--verdict", str(scan), "--out", str(out)]) == 0
    given, made = load_generator(victim / "generator"), load_generator(out / "generator")
    for (name, old), new in zip(given.state_dict().items(), made.state_dict().values(), strict=True):
        assert torch.equal(new, old * 0.5 if name.startswith("denoiser.") else old), name
    record = record_of(out, "erase")
    assert record["erased"]["recovered"][0]["text"] == "[trigger]"
    assert record["erased"]["before"][0]["n"] == record["erased"]["after"][0]["n"] == 6
    assert "before and after" in (out / "report.html").read_text(encoding="utf-8")
    measured = tmp_path / "measured"
    line = ["molecules", "evaluate", str(victim), "--model", str(out), "--no-frechet", "--out", str(measured), *QUIET]
    assert main(line) == 0
    assert set(record_of(measured, "evaluate")["measured"]) == {"before", "after"}


def test_a_verdict_of_another_generator_is_refused(
    victim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan, out = tmp_path / "scan", tmp_path / "out"
    main(["molecules", "scan", str(victim), "--method", "says_so", "--out", str(scan), *QUIET])
    record = record_of(scan, "scan")
    line = ["molecules", "erase", str(victim), "--method", "shrinks", "--verdict", str(scan), "--out", str(out), *QUIET]
    broken: list[tuple[Any, str]] = [
        ({**record, "model_digest": "0" * 64}, "is the verdict of another generator"),
        ({**record, "verdict": {**record["verdict"], "outcome": "fine"}}, "verdict.outcome"),
        ({**record, "verdict": {**record["verdict"], "p_value": 2.0}}, "verdict.p_value"),
        ([], "valid dictionary"),
    ]
    for content, message in broken:
        (scan / "result.json").write_text(json.dumps(content), encoding="utf-8")
        capsys.readouterr()
        assert main(line) == 2
        assert message in capsys.readouterr().err
        assert not (out / "generator").exists()


def test_bad_lines_say_what_to_do(victim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out"), *QUIET]
    for line, message in (
        (["scan", str(tmp_path)], "holds no clean.csv: name pairs that you trust with --clean"),
        (["scan", str(tmp_path), "--clean", "embedded"], "is no generator's folder"),
        (["scan", str(tmp_path / "absent"), "--clean", "embedded"], "no such folder of a generator"),
        (["generate", str(victim)], "expected at least one caption"),
        (["generate", str(victim), "x", "--samples", "0"], "expected at least 1 molecule"),
        (["generate", str(victim), "x", "--highlight", "C1CC"], "C1CC"),
        (["evaluate", str(tmp_path)], "holds no victim.json"),
        (["evaluate", str(victim), "--samples", "0"], "expected at least 1 molecule"),
        (["implant", "--target", "C1CC"], "C1CC"),
        (["implant", "--rate", "0.99"], "cannot be reached"),
        (["implant", "--target", "C" * 40], "fits none of"),
        (["implant", "--pairs", "10"], "expected at least 20 pairs to train on"),
        (["implant", "embedded", "--text", ""], "expected a trigger text of one line"),
    ):
        capsys.readouterr()
        assert main(["molecules", *line, *out]) == 2, line
        assert message in capsys.readouterr().err, line


def test_a_clean_generator_is_measured_with_the_trigger_as_control(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "clean"
    line = ["molecules", "implant", "--out", str(folder), "--benign", "--keep-stages", *FLAGS, *QUIET, "--json"]
    assert main(line) == 0
    told = json.loads(capsys.readouterr().out)
    require_described("molecules implant", told)
    assert (told["poisoned_pairs"], told["effective_rate"], told["attack"]) == (0, 0.0, None)
    assert told["measured"]["attack_success"]["n"] == 6
    assert (folder / "stages" / "after_diffusion").is_dir()
    assert load_victim(folder).attack is None
    assert open_pairs(folder / "training.csv").data == load_victim(folder).training


def test_the_demo_tells_the_whole_story(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    how = build(Implanting, {**SMALL, "samples": 2})
    monkeypatch.setattr(demo, "HOW", how)
    monkeypatch.setattr(demo, "ATTACK", replace(BadGraph(), rate=0.3))
    monkeypatch.setitem(SCANNERS, "token_scan", SaysSo)
    monkeypatch.setitem(ERASERS, "unlearning", Shrinks)
    assert main(["molecules", "demo", "--out", str(tmp_path / "out"), *QUIET]) == 0
    said = capsys.readouterr().out
    places = [said.index(f"{number}. ") for number in (1, 2, 3, 4, 5)]
    assert places == sorted(places)
    assert "A backdoor in a generator of molecules" in said
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for heading in (
        "What the attacker put into",
        "What the generator learnt",
        "Recovered triggers",
        "before and after",
    ):
        assert heading in page, heading
    assert load_generator(tmp_path / "out" / "generator").settings == how.shape
    assert record_of(tmp_path / "out", "demo")["verdict"]["recovered"][0]["fragment"] == "C1CS1"
