"""The command line, end to end on toys: what it understands, what it returns, what it prints, and how it fails."""

import errno
import json
import math
import os
import pickle
import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from lustral.api.opening import draw_clean, found_order
from lustral.api.progress import Bars, StageLines
from lustral.catalog import ATTACKS, DETECTORS, PURIFIERS, WHEN_TO_USE
from lustral.cli import main
from lustral.cli.arguments import (
    TOP_FLAGS,
    Benign,
    Demo,
    Erase,
    Evaluate,
    Implant,
    Scan,
    UsageError,
    parse,
    parse_implant,
    setting_names,
)
from lustral.core.randomness import child
from lustral.core.records import Cost, Progress
from lustral.training import Trainer
from lustral.vision.detectors import MaskArea
from lustral.vision.detectors.weighing import NULL, SearchedLabel
from lustral.vision.erasing import TAKEN_OVER, takes_untrusted
from lustral.vision.inverters import MaskSearch, MaxEntropy
from lustral.vision.models import Classifier, build_classifier, load_model, save_model
from lustral.vision.purifiers import Auto, BNRefresh, Mesa
from lustral.vision.records import Answer, DefenderView, ImageSet, RecoveredTrigger, Verdict, Victim
from lustral.vision.sources import load_source
from toy import clean_images, mask_evidence, mask_verdict, scans_are

CLASSES = 4
SHAPE = (3, 16, 16)
Inspect = Callable[..., Verdict]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write a toy set of 80 training and 24 test images whose brightness tells the class."""
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {"class_names": np.array(["ant", "bee", "cat", "dog"])}
    for split, count in (("train", 80), ("test", 24)):
        labels = np.arange(count) % CLASSES
        images = random.integers(0, 60, (count, 16, 16, 3)) + 60 * labels[:, None, None, None]
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    np.savez(tmp_path / "toy.npz", **arrays)
    return tmp_path / "toy.npz"


@pytest.fixture
def pool(data: Path) -> Path:
    """Write a plain toy set without a test split: all 80 images are the defender's."""
    arrays = np.load(data)
    plain = data.with_name("pool.npz")
    np.savez(plain, images=arrays["train_images"], labels=arrays["train_labels"], class_names=arrays["class_names"])
    return plain


@pytest.fixture(scope="session")
def skilled() -> Classifier:
    """A network that does the task of the toy set."""
    labels = torch.arange(80) % CLASSES
    images = (
        torch.randint(0, 60, (80, *SHAPE), generator=torch.Generator().manual_seed(1))
        + 60 * labels[:, None, None, None]
    )
    task = ImageSet(images=images.to(torch.uint8), labels=labels, num_classes=CLASSES)
    network = build_classifier("small_cnn:width=4", num_classes=CLASSES, image_shape=SHAPE, mean=[0.5] * 3)
    trainer = Trainer(epochs=30, batch_size=20, learning_rate=0.1, precision="float32")
    trained = trainer.fit(network, task, generator=child(0, "toy"))
    assert isinstance(trained, Classifier)
    return trained


@pytest.fixture
def model(tmp_path: Path, skilled: Classifier) -> Path:
    save_model(tmp_path / "model.safetensors", skilled, arch="small_cnn:width=4", image_shape=SHAPE)
    return tmp_path / "model.safetensors"


def write_model(path: Path, num_classes: int = CLASSES) -> Path:
    network = build_classifier("small_cnn:width=2", num_classes=num_classes, image_shape=SHAPE, mean=[0.5] * 3)
    save_model(path, network.eval(), arch="small_cnn:width=2", image_shape=SHAPE)
    return path


def answer(outcome: Answer) -> Verdict:
    labels = (2,) if outcome == "backdoored" else ()
    trigger = RecoveredTrigger(
        target_label=2,
        masks=torch.ones(3, 1, 16, 16),
        patterns=torch.zeros(3, 3, 16, 16),
        area=9.0,
        attack_success_rate=1.0,
        entropy=0.1,
    )
    evidence = mask_evidence(
        *(
            SearchedLabel(
                label=label,
                size=math.inf if label == 1 else 9.0,
                attack_success_rate=0.9,
                natural_rate=0.1,
                anomaly=1.0,
                p_value=0.5,
                entropy=math.nan,
                steps=10,
            )
            for label in range(CLASSES)
        )
    )
    return Verdict(
        outcome=outcome,
        suspect_labels=labels,
        score=1.0,
        threshold=2.0,
        basis="A toy says so.",
        evidence=evidence,
        triggers=(trigger,),
        cost=Cost(seconds=1.0, image_passes=2.0, peak_memory_bytes=3, clean_images=4),
    )


def replies(outcome: Answer) -> Inspect:
    def inspect(self: MaskArea, view: DefenderView, *, generator: torch.Generator, on_progress: Any = None) -> Verdict:
        if on_progress is not None:
            on_progress(Progress(stage="searching triggers", done=1, total=2))
        return answer(outcome)

    return inspect


def run(*words: object) -> int:
    return main([str(word) for word in words])


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must fail with exit code 2, one line on standard error, and nothing on standard output."""
    code = run(*words, "--quiet")
    out, err = capsys.readouterr()
    assert code == 2, (code, out, err)
    assert out == ""
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


# What it understands


def understand(line: str) -> Any:
    return parse(line.split())


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("implant badnets --data digits --out v", Implant),
        ("implant blended --out v --data cifar10 --alpha 0.1 --trainer.epochs 3 --start clean --seed 4", Implant),
        ("implant none --data digits --out v --arch small_cnn:width=8", Implant),
        ("scan model.pth --data digits", Scan),
        (
            "scan victim --data x.npz --out o --patches.inverter.search.steps 9 --arch net.py:build --mean 0.5 0.4 0.3",
            Scan,
        ),
        ("scan m.pt --data digits --json --seed 3 --device cpu --clean 100 --quiet --debug --image-size 32", Scan),
        ("erase m.pt --data cifar10 --out o --method baeraser", Erase),
        ("erase m.pt --data cifar10 --out o", Erase),
        ("erase m.pt --method mesa --data cifar10 --out o --epochs 5 --json", Erase),
        ("erase m.pt --data cifar10 --out o --verdict s/result.json --no-audit", Erase),
        ("erase m.pt --data cifar10 --out o --method mesa --detector.inverter.steps 9 --false-alarm-rate 0.02", Erase),
        ("erase m.pt --data cifar10 --out o --method auto --anyway --reactivate --rounds 1 --epochs 3", Erase),
        ("evaluate victim", Evaluate),
        ("evaluate victim --model erased/model.safetensors --data digits --json", Evaluate),
        ("demo", Demo),
        ("demo --out here --clean 100 --seed 2 --device cpu --json", Demo),
    ],
)
def test_the_documented_forms_are_understood(line: str, kind: type) -> None:
    assert isinstance(parse(line.split()), kind)


def test_values_reach_their_places() -> None:
    command = parse(
        [
            "implant",
            "badnets",
            "--data",
            "d",
            "--out",
            "o",
            "--target-label",
            "7",
            "--corner",
            "top_left",
            "--seed",
            "3",
        ]
    )
    assert isinstance(command, Implant)
    assert (command.attack.target_label, command.attack.corner, command.common.seed) == (7, "top_left", 3)
    assert isinstance(understand("implant none --data d --out o").attack, Benign)
    scan = parse(
        ["scan", "m.pt", "--data", "d", "--clean", "50", "--std", "0.2", "0.2", "0.2", "--false-alarm-rate", "0.02"]
    )
    assert isinstance(scan, Scan)
    assert (scan.suspect.model, scan.suspect.clean, scan.suspect.format.std) == (Path("m.pt"), 50, (0.2, 0.2, 0.2))
    assert scan.settings.false_alarm_rate == 0.02


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_attack_has_a_command(name: str) -> None:
    command = parse(["implant", name, "--data", "digits", "--out", "v"])
    assert isinstance(command, Implant)
    assert command.attack == ATTACKS[name]()


@pytest.mark.parametrize("name", sorted(PURIFIERS))
def test_every_purifier_has_its_own_flags(name: str) -> None:
    line = ["erase", "m.pt", "--data", "digits", "--out", "o", f"--method={name}"]
    command = parse([*line, "--untrusted", "set"] if takes_untrusted(PURIFIERS[name]) else line)
    assert isinstance(command, Erase)
    assert command.settings == PURIFIERS[name]()


@pytest.mark.parametrize("kind", [*DETECTORS.values(), *PURIFIERS.values(), *ATTACKS.values()])
def test_no_setting_hides_behind_a_common_flag(kind: type) -> None:
    assert not TOP_FLAGS & set(setting_names(kind))


def test_the_last_part_of_a_settings_name_is_enough() -> None:
    command = parse(
        ["erase", "m.pt", "--data", "d", "--out", "o", "--method", "mesa", "--epochs", "5", "--learning_rate=0.5"]
    )
    assert isinstance(command, Erase)
    assert isinstance(command.settings, Mesa)
    assert (command.settings.trainer.epochs, command.settings.trainer.learning_rate) == (5, 0.5)


def test_the_scan_of_an_eraser_follows_its_inverter() -> None:
    line = (
        "erase m.pt --data d --out o --method mesa --batch-size 7 --hidden 9 --search.steps 3 --false-alarm-rate 0.02"
    )
    command = understand(line)
    inverter, trainer = command.settings.inverter, command.settings.trainer
    assert (trainer.batch_size, inverter.batch_size) == (7, MaxEntropy().batch_size)
    assert (inverter.hidden, inverter.search.steps) == (9, 3)
    assert command.scanning.detector == MaskArea(inverter=inverter, false_alarm_rate=0.02)
    apart = understand(f"{line} --detector.inverter.hidden 5").scanning.detector.inverter
    assert apart == MaxEntropy(hidden=5)


def test_short_flags_of_auto_are_of_its_rounds() -> None:
    settings = understand("erase m.pt --data d --out o --method auto --anyway --epochs 3 --rho 1").settings
    assert (settings.anyway, settings.trainer.epochs, settings.generic.rho) == (True, 3, 1.0)
    assert settings.generic.trainer.epochs == Auto().generic.trainer.epochs


def test_the_data_sets_recipe_is_the_trainers_default() -> None:
    line = ["implant", "badnets", "--data", "d", "--out", "o", "--epochs", "3", "--size", "2"]
    command = parse_implant(line, Trainer(epochs=77, batch_size=9))
    assert (command.trainer.epochs, command.trainer.batch_size, command.attack.size) == (3, 9, 2)


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("", "scan"),
        ("scna", "scan"),
        ("scan", "--data"),
        ("scan m.pt --data d --sed 3", "--sed"),
        ("scan m.pt --data d --seed three", "three"),
        ("erase m.pt --data d --out o --method baeresar", "did you mean 'baeraser'"),
        ("erase m.pt --data d --out o --method baeraser --form prose", "prose"),
        ("erase m.pt --data d --out o --method sau --verdict=s", "sau starts from no scan.*auto or baeraser or mesa"),
        ("erase m.pt --data d --out o --target-labels 3", "target-labels"),
        ("erase m.pt --data d --out o --batch-norm none", "none"),
        ("implant badnet --data d --out o", "badnet"),
        ("implant badnets --data d --out o --poison-rate 2", "poison rate"),
    ],
)
def test_a_line_that_is_not_understood(line: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=hint):
        parse(line.split())
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("erase", "--method", "mesa", "--help") == 0
    out, err = capsys.readouterr()
    assert "--trigger-rate" in out
    assert err == ""


def test_purifiers_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("erase", "--list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)["methods"]
    assert sorted(listed) == sorted(PURIFIERS)
    assert all(entry["does"] for entry in listed.values())
    assert {name: entry["needs"] for name, entry in listed.items()} == {n: kind.needs for n, kind in PURIFIERS.items()}
    assert listed["sau"]["passes"] == PURIFIERS["sau"].cost_passes
    assert set(WHEN_TO_USE) <= set(PURIFIERS)
    assert {name: entry["when"] for name, entry in listed.items() if entry["when"]} == WHEN_TO_USE
    assert run("erase", "--list") == 0
    assert "baeraser" in capsys.readouterr().out


def test_attacks_are_listed_with_what_their_attacker_controls(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("implant", "--list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)["attacks"]
    assert sorted(listed) == sorted(ATTACKS)
    assert all(entry["does"] for entry in listed.values())
    assert listed["badnets"]["attacker"] == ATTACKS["badnets"].threat_model
    assert run("implant", "--list") == 0
    assert "badnets" in capsys.readouterr().out


def test_assets_are_kept_for_the_next_victim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "implant trojan_nn --data digits --arch small_cnn:width=4 --epochs 1 --steps 2 --quiet"
    line += " --surrogate.arch small_cnn:width=4 --surrogate.epochs 1"
    folder = tmp_path / "assets"
    for seed in ("0", "1"):
        out = tmp_path / seed
        assert run(*line.split(), "--assets", str(folder), "--seed", seed, "--out", str(out)) == 0
        assert (out / "trigger.safetensors").is_file()
    kept = sorted(path.name for path in (folder / "assets").rglob("*.json"))
    assert len(kept) == 2  # the surrogate and the patch, both of the first run
    capsys.readouterr()


# What it returns and prints


@pytest.mark.parametrize(("outcome", "code"), [("clean", 0), ("backdoored", 1), ("cannot tell", 3)])
def test_the_exit_code_of_a_scan_is_the_answer(
    outcome: str,
    code: int,
    model: Path,
    pool: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scans_are(monkeypatch, replies(outcome))
    assert run("scan", model, "--data", pool) == code
    out, err = capsys.readouterr()
    assert "A toy says so." in " ".join(out.split())
    assert err == "searching triggers ...\n"


@pytest.mark.parametrize("can_draw", [True, False])
def test_a_terminal_with_colours_shows_the_trigger(
    can_draw: bool, model: Path, pool: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scans_are(monkeypatch, replies("backdoored"))
    monkeypatch.setattr("lustral.report.figures.half_blocks.can_draw", lambda console: can_draw)
    assert run("scan", model, "--data", pool) == 1
    out = capsys.readouterr().out
    assert ("Recovered trigger towards “cat”: a patch" in out) == can_draw
    assert out.count("▀") == can_draw * 2 * 32 * 16  # 16 pixels, doubled, and the mask beside
    assert run("scan", model, "--data", pool, "--quiet") == 1
    assert "▀" not in capsys.readouterr().out


def test_json_is_alone_on_standard_output(
    model: Path, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scans_are(monkeypatch, replies("backdoored"))
    out = tmp_path / "out"
    assert run("scan", model, "--data", pool, "--json", "--clean", 12, "--out", out) == 1
    printed = capsys.readouterr().out
    record = json.loads(printed)
    assert (record["verdict"]["outcome"], record["clean_images"], record["seed"]) == ("backdoored", 12, 0)
    assert {"label": 1, "measure": "mask_area", "value": None, "null": NULL, "p_value": 0.5} in record["verdict"][
        "evidence"
    ]  # infinity
    assert "NaN" not in printed
    assert "Infinity" not in printed
    assert json.loads((out / "result.json").read_text()) == record
    assert sorted(path.name for path in out.iterdir()) == [
        "report.html",
        "result.json",
        "trigger-class-2.png",
        "triggers.safetensors",
    ]


@pytest.mark.parametrize("change", ["labels", "mean"])
def test_a_scan_that_could_mean_nothing_is_not_made(
    change: str, model: Path, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = dict(np.load(pool))
    moved = tmp_path / "moved.npz"
    np.savez(moved, **{**arrays, "labels": (arrays["labels"] + (change == "labels")) % CLASSES})
    wrong = ["--mean", 9, 9, 9] if change == "mean" else []
    out = tmp_path / "out"
    assert run("scan", model, "--data", moved, "--out", out, "--json", *wrong) == 3
    record = json.loads(capsys.readouterr().out)
    verdict = record["verdict"]
    assert (verdict["outcome"], verdict["evidence"], record) == (
        "cannot tell",
        [],
        json.loads((out / "result.json").read_text()),
    )
    assert verdict["clean_accuracy"] < 0.3
    assert "wrong normalisation, class order or data?" in verdict["basis"]
    assert ("bee, cat, dog, ant" in verdict["basis"]) == (change == "labels")  # the names in the model's order
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "wrong normalisation, class order or data?" in page
    assert "of the 80 clean images" in page

    assert run("scan", model, "--data", moved, "--quiet", *wrong) == 3
    shown = " ".join(capsys.readouterr().out.split())
    assert "Cannot tell" in shown
    assert "of the 80 clean images" in shown
    line = ["erase", model, "--data", moved, "--out", tmp_path / "e", *wrong]
    for method in ("fine_tuning", "baeraser"):
        assert "nothing was changed" in error_of(capsys, *line, "--method", method)
    assert list((tmp_path / "e").iterdir()) == []


def test_classes_in_another_order_are_found_by_name(
    model: Path, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays, moved, names = dict(np.load(pool)), tmp_path / "moved.npz", tmp_path / "names.txt"
    order = np.array([2, 0, 3, 1])  # where the data have the model's classes
    listed = arrays["class_names"][np.argsort(order)]
    np.savez(moved, images=arrays["images"], labels=order[arrays["labels"]], class_names=listed)
    names.write_text("ant\nbee\ncat\ndog\n")
    line = ["erase", model, "--data", moved, "--method", "bn_refresh", "--out", tmp_path / "out"]
    message = error_of(capsys, *line)
    assert "ant, bee, cat, dog" in message
    assert "--classes" in message
    assert run(*line, "--quiet", "--classes", names) == 0
    assert (
        json.loads((tmp_path / "out" / "result.json").read_text())["accuracy"]["clean images"]["before"]["value"] > 0.9
    )
    capsys.readouterr()

    scans_are(monkeypatch, replies("backdoored"))
    assert run("scan", model, "--data", moved, "--quiet", "--classes", names) == 1
    assert "turns other images into “cat”" in " ".join(capsys.readouterr().out.split())  # the model's class 2
    names.write_text("ant\nbee\ncow\n")
    assert "only the data have: dog, cat" in error_of(capsys, "scan", model, "--data", moved, "--classes", names)


HOSTILE = ["[/red]", "\x1b[2J\x9b31m", "gnp\u202e\u2066", "a\nNo backdoor found\u200b"]


def test_names_are_only_text(
    model: Path, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scans_are(monkeypatch, replies("backdoored"))
    arrays = np.load(pool)
    named = tmp_path / "\x1b[1m[red]\u202e.npz"
    np.savez(named, images=arrays["images"], labels=arrays["labels"], class_names=np.array(HOSTILE))
    out = tmp_path / "o\x1b[5mut"
    assert run("scan", model, "--data", named, "--out", out) == 1
    printed = "".join(capsys.readouterr())
    page, record = (out / "report.html").read_text(encoding="utf-8"), (out / "result.json").read_text(encoding="utf-8")
    for text in (printed, page, record):
        assert not [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf")]
        assert "\nNo backdoor" not in text
    assert "[/red]" in printed
    assert "gnp\\u202e\\u2066" in printed
    assert "gnp\\u202e\\u2066" in page


def test_a_failing_terminal_loses_no_result(
    model: Path, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scans_are(monkeypatch, replies("backdoored"))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "<stdout>")

    monkeypatch.setattr("lustral.cli.console.SafeConsole.print", full)
    assert run("scan", model, "--data", pool, "--quiet", "--out", tmp_path / "out") == 2
    assert json.loads((tmp_path / "out" / "result.json").read_text())["verdict"]["outcome"] == "backdoored"
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_report_that_cannot_be_written_loses_no_answer(
    model: Path, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scans_are(monkeypatch, replies("backdoored"))

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lustral.core.files.os.fsync", full)
    assert run("scan", model, "--data", pool, "--quiet", "--out", tmp_path / "out") == 2
    out, err = capsys.readouterr()
    assert "This model is backdoored" in " ".join(out.split())
    assert "No space left" in err


def test_quiet_shows_no_progress(
    model: Path, pool: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scans_are(monkeypatch, replies("clean"))
    assert run("scan", model, "--data", pool, "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_erase_with_a_method_that_recovers_no_trigger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim, out = tmp_path / "victim", tmp_path / "erased"
    small = ["--arch", "small_cnn:width=8", "--epochs", 4]
    assert run("implant", "badnets", "--data", "digits", "--out", victim, *small) == 0
    capsys.readouterr()
    assert run("erase", victim, "--method", "clp", "--data", "digits", "--out", out) == 0
    shown = capsys.readouterr().out
    assert "clean accuracy (held-out)" in shown
    assert "recovered trigger works" not in shown
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "report.html", "result.json"}


def test_implant_erase_evaluate(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim, out = tmp_path / "victim", tmp_path / "erased"
    line = [
        "implant",
        "badnets",
        "--data",
        data,
        "--out",
        victim,
        "--epochs",
        30,
        "--arch",
        "small_cnn:width=4",
        "--json",
    ]
    assert run(*line) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["attack"], record["trainer"]["epochs"], record["metrics"]["acc"]["n"]) == ("badnets", 30, 24)
    assert {"model.safetensors", "victim.json", "trigger.png"} <= {path.name for path in victim.iterdir()}

    assert run("erase", victim, "--method", "bn_refresh", "--data", data, "--out", out, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["settings"] == {"batch_size": BNRefresh().batch_size, "passes": BNRefresh().passes}
    assert {"acc", "asr", "ra"} <= record["before"].keys() & record["after"].keys()
    assert "der" in record["change"]
    given, new = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (victim, out))
    assert {key: value.shape for key, value in given.items()} == {key: value.shape for key, value in new.items()}
    assert any(not torch.equal(given[key], new[key]) for key in given)
    assert (out / "report.html").is_file()

    assert run("evaluate", victim, "--data", data, "--model", out / "model.safetensors") == 0
    shown = capsys.readouterr().out
    assert "ASR, attack success rate" in shown
    assert "DER" in shown
    assert run("evaluate", victim, "--data", data, "--model", out, "--json") == 2  # without victim.json: no model
    assert "victim.json" in capsys.readouterr().err


def test_a_scan_is_made_once(
    backdoored: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clean, model = clean_images(), tmp_path / "model.safetensors"
    np.savez(tmp_path / "clean.npz", images=clean.images.permute(0, 2, 3, 1).numpy(), labels=clean.labels.numpy())
    assert isinstance(backdoored.model, Classifier)
    save_model(model, backdoored.model, arch="small_cnn:width=16", image_shape=clean.image_shape)
    searched, search = list[int](), MaskSearch.run

    def counting(self: MaskSearch, network: Any, images: Any, labels: Any, **rest: Any) -> Any:
        searched.append(len(labels))
        return search(self, network, images, labels, **rest)

    monkeypatch.setattr(MaskSearch, "run", counting)
    common = ["--data", tmp_path / "clean.npz", "--json", "--hidden", 32, "--samples", 48, "--search.steps", 150]
    common += ["--inverter.batch-size", 16, "--search.batch-size", 16, "--inverter.steps", 15]
    assert run("scan", model, "--method", "mask_area", "--out", tmp_path / "s", *common) == 1
    scanned = json.loads(capsys.readouterr().out)["verdict"]
    assert searched == [7]

    erase = [
        "erase",
        model,
        "--method",
        "baeraser",
        *common,
        "--rounds",
        1,
        "--epochs",
        1,
        "--least-steps",
        1,
        "--no-audit",
    ]
    found = {}
    for name, verdict in (("whole", []), ("given", ["--verdict", tmp_path / "s" / "result.json"])):
        searched.clear()
        assert run(*erase, "--out", tmp_path / name, *verdict) == 0
        found[name] = json.loads(capsys.readouterr().out)
        assert searched == ([7, 1] if name == "whole" else [1])  # a round ends with a search for what it unlearned
    passes = {name: record["purified"]["cost"]["image_passes"] for name, record in found.items()}
    assert passes["whole"] == pytest.approx(passes["given"] + scanned["cost"]["image_passes"])
    assert TAKEN_OVER in found["given"]["purified"]["notes"]
    assert TAKEN_OVER not in found["whole"]["purified"]["notes"]
    assert found["given"]["purified"]["verdict"] == scanned
    assert found["given"]["scanning"]["verdict"] == str(tmp_path / "s" / "result.json")
    assert TAKEN_OVER in (tmp_path / "given" / "report.html").read_text(encoding="utf-8")

    changed = tmp_path / "given" / "model.safetensors"
    line = ["erase", changed, *common[:2], "--out", tmp_path / "x"]
    assert "another model" in error_of(capsys, *line, "--verdict", tmp_path / "s")
    assert not (tmp_path / "x").exists()
    line[1] = model
    assert "no such file" in error_of(capsys, *line, "--verdict", tmp_path / "none")


def test_the_demo_tells_the_whole_story(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lustral.cli.commands.BaEraser", BNRefresh)  # the real one takes a minute
    scans_are(monkeypatch, lambda *_, **__: mask_verdict([9.0] * 10))  # and so does a scan
    monkeypatch.setattr("lustral.cli.commands.default_trainer", lambda **facts: Trainer(epochs=4, batch_size=64))
    assert run("demo", "--out", tmp_path / "out", "--clean", 60, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["clean_images"] == 60
    assert record["before"]["asr"]["n"] > 0
    assert record["after"]["asr"]["n"] > 0
    assert {"victim", "scan", "model.safetensors", "report.html", "result.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    scanned = json.loads((tmp_path / "out" / "scan" / "result.json").read_text())
    assert record["scanning"]["verdict"] == str(tmp_path / "out" / "scan" / "result.json")
    assert scanned["clean_images"] == 60
    assert scanned["seed"] == record["seed"]
    victim = json.loads((tmp_path / "out" / "victim" / "victim.json").read_text())
    assert (victim["settings"]["target_label"], victim["settings"]["size"]) == (3, 3)


def test_a_benign_model_can_be_the_start_of_a_victim(data: Path, tmp_path: Path) -> None:
    common = ["--data", data, "--epochs", 1, "--quiet"]
    assert run("implant", "none", *common, "--out", tmp_path / "clean", "--arch", "small_cnn:width=2") == 0
    assert run("implant", "blended", *common, "--out", tmp_path / "b", "--start", tmp_path / "clean") == 0
    record = json.loads((tmp_path / "b" / "victim.json").read_text())
    assert (record["fine_tuned_from_clean"], record["arch"]) == (True, "small_cnn:width=2")


def test_keys_of_a_wrapped_network_are_kept(model: Path, pool: Path, tmp_path: Path) -> None:
    weights = {f"module.{key}": value for key, value in safetensors.torch.load_file(model).items()}
    torch.save({"state_dict": weights}, tmp_path / "theirs.pth")
    line = ["erase", tmp_path / "theirs.pth", "--arch", "small_cnn:width=4", "--mean", 0.5, 0.5, 0.5, "--std", 1, 1, 1]
    assert run(*line, "--data", pool, "--method", "bn_refresh", "--out", tmp_path / "out", "--quiet") == 0
    written = torch.load(tmp_path / "out" / "model.pth", weights_only=True)  # what came in goes out
    assert written["state_dict"].keys() == weights.keys()


def test_which_weights_were_read_is_always_said(
    model: Path, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = safetensors.torch.load_file(model)
    averaged = {key: value * 2 if value.is_floating_point() else value.clone() for key, value in state.items()}
    torch.save({"epoch": 9, "state_dict": state, "state_dict_ema": averaged}, tmp_path / "ema.pth.tar")
    arch = ["--arch", "small_cnn:width=4", "--mean", 0.5, 0.5, 0.5, "--std", 1, 1, 1, "--data", pool]
    line = ["erase", tmp_path / "ema.pth.tar", *arch, "--method", "bn_refresh", "--out", tmp_path / "out"]
    assert "they differ: state_dict, state_dict_ema; name the one" in error_of(capsys, *line)
    assert run(*line, "--weights", "state_dict_ema") == 0
    said = capsys.readouterr()
    assert "Read: the weights state_dict_ema in" in said.out
    written = torch.load(tmp_path / "out" / "model.pth.tar", weights_only=True)
    assert all(torch.equal(written["state_dict"][key], value) for key, value in state.items())
    assert not torch.equal(written["state_dict_ema"]["features.1.running_mean"], averaged["features.1.running_mean"])
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (record["weights"], record["other_weights"]) == ("state_dict_ema", ["state_dict"])
    assert record["written"].endswith("model.pth.tar")
    assert "state_dict_ema" in (tmp_path / "out" / "report.html").read_text()


def test_a_file_that_changes_meanwhile_costs_no_work(
    model: Path, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "theirs.pth"
    torch.save(safetensors.torch.load_file(model), theirs)
    whole = BNRefresh.purify

    def purify(self: BNRefresh, *arguments: Any, **more: Any) -> Any:
        purified = whole(self, *arguments, **more)
        theirs.write_bytes(b"something else")
        return purified

    monkeypatch.setattr(BNRefresh, "purify", purify)
    line = ["erase", theirs, "--arch", "small_cnn:width=4", "--mean", 0.5, 0.5, 0.5, "--std", 1, 1, 1, "--data", pool]
    assert run(*line, "--method", "bn_refresh", "--out", tmp_path / "out", "--quiet") == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_progress_is_a_bar_or_a_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

    reports = [
        Progress(stage="training", done=1, total=2, values={"images_per_second": 1900.0}),
        Progress(stage="training", done=2, total=2),
        Progress(stage="auditing", done=1, total=1),
    ]
    lines = StageLines(Console(stderr=True))
    bars = RichProgress(disable=True)
    show = Bars(bars)
    for report in reports:
        lines(report)
        show(report)
    assert capsys.readouterr().err == "training ...\nauditing ...\n"
    assert [(task.description, task.completed) for task in bars.tasks] == [("training", 2), ("auditing", 1)]


def test_a_clean_set_is_drawn_by_class(pool: Path) -> None:
    source = load_source(str(pool))
    drawn = draw_clean(source, 20, seed=3)
    assert torch.bincount(drawn.labels).tolist() == [5] * CLASSES
    assert torch.equal(drawn.images, draw_clean(source, 20, seed=3).images)
    assert not torch.equal(drawn.images, draw_clean(source, 20, seed=4).images)
    assert len(draw_clean(source, None, seed=0)) == 80


# How it fails


class RunsCode:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "ran"))


def test_a_pickle_does_not_run(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = tmp_path / "hostile.pth"
    hostile.write_bytes(pickle.dumps({"state_dict": RunsCode(tmp_path / "proof")}))
    assert "run code" in error_of(capsys, "scan", hostile, "--data", pool, "--arch", "small_cnn")
    assert not (tmp_path / "proof").exists()


def test_unusable_model_files(model: Path, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(model.read_bytes()[:-200])
    assert "damaged" in error_of(capsys, "scan", cut, "--data", pool)
    assert "missing" in error_of(capsys, "scan", model, "--data", pool, "--arch", "vgg11_bn:width=2")
    assert "small_cnn" in error_of(capsys, "scan", model, "--data", pool, "--arch", "smal_cnn")
    assert "no such" in error_of(capsys, "scan", tmp_path / "none.pth", "--data", pool)
    assert "victim.json" in error_of(capsys, "scan", tmp_path, "--data", pool)

    weights = safetensors.torch.load_file(model)
    weights["linear.bias"][0] = math.nan
    safetensors.torch.save_file(weights, tmp_path / "nan.safetensors")
    assert "NaN" in error_of(
        capsys, "scan", tmp_path / "nan.safetensors", "--data", pool, "--arch", "small_cnn:width=4"
    )

    other = write_model(tmp_path / "six.safetensors", num_classes=6)
    message = error_of(capsys, "scan", other, "--data", pool)
    assert "6" in message
    assert "4" in message


def test_unusable_clean_sets(
    model: Path, pool: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = dict(np.load(pool))

    def saved(name: str, **changes: Any) -> Path:
        np.savez(tmp_path / name, **{**arrays, **changes})
        return tmp_path / name

    single = saved("single.npz", labels=np.zeros(80, np.int64))
    assert "at least 2 classes" in error_of(capsys, "scan", model, "--data", single)
    empty = saved("empty.npz", images=arrays["images"][:0], labels=arrays["labels"][:0])
    assert "no images" in error_of(capsys, "scan", model, "--data", empty)
    outside = saved("outside.npz", labels=arrays["labels"] + 3)
    assert "labels out of range" in error_of(capsys, "scan", model, "--data", outside)
    assert "got 0" in error_of(capsys, "scan", model, "--data", pool, "--clean", 0)
    assert "between 1 and 80" in error_of(capsys, "scan", model, "--data", pool, "--clean", 81)
    assert "(3, 16, 16)" in error_of(capsys, "scan", model, "--data", pool, "--image-size", 24)
    assert "digits" in error_of(capsys, "scan", model, "--data", "digit")
    assert "no test set" in error_of(capsys, "implant", "none", "--data", pool, "--out", tmp_path / "v")
    (tmp_path / "cut.npz").write_bytes(pool.read_bytes()[:500])
    assert "truncated" in error_of(capsys, "scan", model, "--data", tmp_path / "cut.npz")


def test_unusable_image_folders(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in "abcd":
        (tmp_path / "folder" / label).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "folder" / label / "1.png")
    odd = tmp_path / "folder" / "c" / "2.png"
    Image.new("RGB", (20, 16)).save(odd)
    assert "2.png" in error_of(capsys, "scan", model, "--data", tmp_path / "folder")
    odd.write_text("no picture")
    assert "unreadable" in error_of(capsys, "scan", model, "--data", tmp_path / "folder")


def test_devices(model: Path, pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device cpu" in error_of(capsys, "scan", model, "--data", pool, "--device", "abacus")
    if not torch.cuda.is_available():
        assert "'cuda' cannot be used" in error_of(capsys, "scan", model, "--data", pool, "--device", "cuda")


def test_a_full_disk_leaves_the_old_files(
    model: Path, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("old")

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lustral.core.files.os.fsync", full)
    message = error_of(capsys, "erase", model, "--method", "bn_refresh", "--data", pool, "--out", out)
    assert "No space left on device" in message
    assert "model.safetensors" in message
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("model.safetensors", "old")]


def test_an_output_folder_that_cannot_be(
    model: Path, pool: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "model.safetensors" in error_of(capsys, "scan", model, "--data", pool, "--out", model)


def test_interruption_and_divergence(
    model: Path, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Verdict:
        raise KeyboardInterrupt

    scans_are(monkeypatch, interrupted)
    assert run("scan", model, "--data", pool, "--out", tmp_path / "out") == 130
    assert list((tmp_path / "out").iterdir()) == []
    capsys.readouterr()

    def diverged(*args: Any, **kwargs: Any) -> Verdict:
        from lustral.training import TrainingDiverged

        raise TrainingDiverged("the loss became nan at step 5:\nlower the learning rate")

    scans_are(monkeypatch, diverged)
    assert "nan at step 5: lower" in error_of(capsys, "scan", model, "--data", pool)
    assert run("scan", model, "--data", pool, "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


# The README


def test_the_readmes_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    example = readme.partition("```python\n")[2].partition("```")[0]
    assert example.count("\n") > 4
    line = ["implant", "badnets", "--data", "digits", "--out", tmp_path / "victim", "--epochs", 4, "--quiet"]
    assert run(*line, "--arch", "small_cnn:width=8") == 0
    quick: dict[type, dict[str, object]] = {
        MaskSearch: {"steps": 4, "batch_size": 4},
        MaxEntropy: {"steps": 2, "hidden": 4, "samples": 3, "batch_size": 4},
    }
    for kind, changes in quick.items():
        initialise: Any = vars(kind)["__init__"]
        monkeypatch.setattr(initialise, "__kwdefaults__", {**initialise.__kwdefaults__, **changes})
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert {path.name for path in (tmp_path / "erased").iterdir()} == {
        "model.safetensors",
        "report.html",
        "result.json",
    }


def commands_shown() -> dict[tuple[str, ...], set[str]]:
    """Return the flags that README and docs show, by command ("bench" with its own)."""
    root, found = Path(__file__).parents[2], dict[tuple[str, ...], set[str]]()
    for page in (root / "README.md", *(root / "docs").rglob("*.md")):
        for line in re.findall(r"(?:^|`)lustral ([a-z][^`\n#]*)", page.read_text(encoding="utf-8"), re.MULTILINE):
            first, *rest = line.split()
            command = (first, *rest[:1]) if first in ("bench", "implant", "molecules") else (first,)
            found.setdefault(command, set()).update(re.findall(r"--[a-z-]+", line))
    return {
        command: flags for command, flags in found.items() if command not in (("bench",), ("implant",), ("molecules",))
    }


@pytest.mark.parametrize(("command", "flags"), commands_shown().items(), ids=lambda part: " ".join(sorted(part)))
def test_every_command_and_flag_that_the_docs_show_exists(
    command: tuple[str, ...], flags: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*command, "--help") == 0
    text = capsys.readouterr().out
    assert [flag for flag in sorted(flags) if not re.search(rf"{flag}(?![a-z-])", text)] == []


def test_the_order_that_a_models_file_tells_is_taken(model: Path, pool: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded, clean = load_model(model), load_source(str(pool)).draw_clean(20, generator=child(0))
    assert found_order(loaded, clean) is None
    theirs = ("dog", "ant", "cat", "bee")
    assert found_order(replace(loaded, class_names=theirs), clean) == theirs
    assert found_order(replace(loaded, class_names=("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")), clean) is None
    assert caplog.records == []
    assert found_order(replace(loaded, class_names=("dog", "ant", "cat", "cow")), clean) is None
    assert "only the data have: bee" in caplog.text
