"""A verdict on disk: kept to the bit, and refused wherever it is not what a scan of this model wrote."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

from lustral.core.digests import weights_digest
from lustral.core.randomness import child
from lustral.vision import verdict_files
from lustral.vision.records import DefenderView, ImageSet, RecoveredTrigger, Verdict
from lustral.vision.verdict_files import (
    RESULT_FILE,
    TRIGGERS_FILE,
    VerdictError,
    read_verdict,
    verdict_record,
    write_verdict,
)
from toy import mask_verdict, toy_images

ABOUT: dict[str, Any] = {"method": "mask_area", "settings": {"holdout": 0.2}, "seed": 3, "command": "lustral scan m.pt"}


def trigger(label: int = 4, samples: int = 3) -> RecoveredTrigger:
    stream = child(label, "trigger")
    return RecoveredTrigger(
        target_label=label,
        masks=torch.rand(samples, 1, 12, 12, generator=stream),
        patterns=torch.rand(samples, 3, 12, 12, generator=stream),
        area=4.25,
        attack_success_rate=0.97,
        entropy=0.1,
    )


@pytest.fixture
def verdict() -> Verdict:
    found = mask_verdict([40.0, math.inf, 50.0, 41.5, 4.25, 60.0, 39.0], suspects=[4], triggers=[trigger()])
    return replace(found, clean_accuracy=0.98, notes=("A note.",))


@pytest.fixture
def view() -> DefenderView:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 7), nn.BatchNorm1d(7))
    return DefenderView(model=model.eval(), clean=toy_images(70, seed=0))


@pytest.fixture
def folder(tmp_path: Path, verdict: Verdict, view: DefenderView) -> Path:
    write_verdict(tmp_path, verdict, model=view.model, clean=view.clean, about=ABOUT)
    return tmp_path


def change(folder: Path, alter: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((folder / RESULT_FILE).read_text())
    alter(record)
    (folder / RESULT_FILE).write_text(json.dumps(record))


def put_triggers(folder: Path, content: bytes) -> None:
    """Exchange the triggers, and say so in the record: what is left to find is what is wrong with them."""
    (folder / TRIGGERS_FILE).write_bytes(content)
    change(folder, lambda record: record["handover"].update(triggers=hashlib.sha256(content).hexdigest()))


def refusal(folder: Path, view: DefenderView) -> str:
    with pytest.raises(VerdictError) as caught:
        read_verdict(folder / RESULT_FILE, view)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def test_a_verdict_comes_back_to_the_bit(folder: Path, verdict: Verdict, view: DefenderView) -> None:
    for path in (folder, folder / RESULT_FILE):
        again = read_verdict(path, view)
        assert replace(again, triggers=()) == replace(verdict, triggers=())
        assert again.by_label("mask_area")[1] == math.inf
        (there,), (here,) = again.triggers, verdict.triggers
        assert torch.equal(there.masks, here.masks)
        assert torch.equal(there.patterns, here.patterns)
        assert verdict_record(again) == verdict_record(verdict)
    assert sorted(path.name for path in folder.iterdir()) == [RESULT_FILE, TRIGGERS_FILE]


def test_the_record_is_what_was_written(tmp_path: Path, verdict: Verdict, view: DefenderView) -> None:
    record = write_verdict(tmp_path, verdict, model=view.model, clean=view.clean, about=ABOUT)
    assert record.items() >= ABOUT.items()
    written = json.loads((tmp_path / RESULT_FILE).read_text())
    assert (written["handover"], written["command"]) == (record["handover"], ABOUT["command"])


def test_a_scan_without_triggers_takes_those_of_the_scan_before_away(
    folder: Path, verdict: Verdict, view: DefenderView
) -> None:
    none = replace(verdict, triggers=(), outcome="clean", suspect_labels=())
    write_verdict(folder, none, model=view.model, clean=view.clean, about=ABOUT)
    assert read_verdict(folder, view) == none
    assert [path.name for path in folder.iterdir()] == [RESULT_FILE]


def test_triggers_too_large_to_keep_are_left_out(
    folder: Path, verdict: Verdict, view: DefenderView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict_files, "LARGEST_TRIGGERS", 3 * 4 * 144 * 4 - 1)
    assert "its triggers take 6,912 bytes" in refusal(folder, view)
    write_verdict(folder, verdict, model=view.model, clean=view.clean, about=ABOUT)
    again = read_verdict(folder, view)
    assert (again.triggers, again.suspect_labels) == ((), (4,))


def test_a_verdict_of_another_model_is_refused(folder: Path, view: DefenderView) -> None:
    other = copy.deepcopy(view.model)
    with torch.no_grad():
        other[1].bias[0] += 1e-6  # type: ignore[index]
    assert "another model" in refusal(folder, replace(view, model=other))
    large = view.clean.images.repeat(1, 1, 2, 2)
    assert "(3, 24, 24)" in refusal(folder, replace(view, clean=replace(view.clean, images=large)))
    assert "8 of (3, 12, 12)" in refusal(folder, replace(view, clean=replace(view.clean, num_classes=8)))


def test_the_digest_is_of_all_weights_and_of_nothing_else(view: DefenderView) -> None:
    given = weights_digest(view.model)
    assert weights_digest(copy.deepcopy(view.model).train().requires_grad_(False)) == given
    for name, value in view.model.state_dict().items():
        other = copy.deepcopy(view.model)
        other.state_dict()[name].add_(1)
        assert weights_digest(other) != given, name
        assert value.shape == other.state_dict()[name].shape


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", [RESULT_FILE, TRIGGERS_FILE])
def test_cut_files_are_refused(name: str, share: float, folder: Path, view: DefenderView) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    refusal(folder, view)


def test_files_that_do_not_belong_together_are_refused(folder: Path, verdict: Verdict, view: DefenderView) -> None:
    (folder / TRIGGERS_FILE).write_bytes(save({"masks.4": torch.zeros(3, 1, 12, 12)}))
    assert "by its SHA-256" in refusal(folder, view)
    (folder / TRIGGERS_FILE).unlink()
    assert "no such file" in refusal(folder, view)


def test_a_kill_between_the_files_is_noticed(
    folder: Path, verdict: Verdict, view: DefenderView, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verdict_files, "write_json_atomic", killed)
    second = replace(verdict, triggers=(trigger(4, samples=5),))
    with pytest.raises(KeyboardInterrupt):
        write_verdict(folder, second, model=view.model, clean=view.clean, about=ABOUT)
    refusal(folder, view)


def test_files_without_end_are_not_read(folder: Path, view: DefenderView, monkeypatch: pytest.MonkeyPatch) -> None:
    with (folder / TRIGGERS_FILE).open("r+b") as file:
        file.truncate(2**40)  # sparse: it takes no room on the disk
    assert "larger than" in refusal(folder, view)
    monkeypatch.setattr(verdict_files, "LARGEST_VERDICT", 100)
    assert "larger than the 100 bytes" in refusal(folder, view)
    (folder / RESULT_FILE).unlink()
    assert "no such file" in refusal(folder, view)
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / RESULT_FILE)
        assert "regular file" in refusal(folder, view)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not readable JSON"),
        (b"\xff\xfe", "not readable JSON"),
        (b"[" * 200_000, "not readable JSON"),
        (b"[]", "holds no verdict"),
        (b'{"schema": 2, "purified": {}}', "holds no verdict"),
        (b'{"schema": 1, "verdict": {}}', "another version of lustral"),
        (b'{"verdict": {}}', "another version of lustral"),
        (b'{"schema": 2, "verdict": {}}', "printed and not written"),
        (b'{"schema": 2, "verdict": {}, "handover": {}}', "Field required"),
    ],
)
def test_other_files_are_refused(content: bytes, said: str, folder: Path, view: DefenderView) -> None:
    (folder / RESULT_FILE).write_bytes(content)
    assert said in refusal(folder, view)


WRONG: list[tuple[tuple[str | int, ...], Any]] = [
    (("verdict", "outcome"), "dirty"),
    (("verdict", "suspect_labels"), [7]),
    (("verdict", "suspect_labels"), [-1]),
    (("verdict", "suspect_labels"), [True]),
    (("verdict", "suspect_labels"), [4, 4]),
    (("verdict", "suspect_labels"), "4"),
    (("verdict", "suspect_labels"), [10**400]),
    (("verdict", "score"), None),
    (("verdict", "score"), "1.0"),
    (("verdict", "threshold"), math.nan),
    (("verdict", "basis"), 5),
    (("verdict", "basis"), "x" * 20_000),
    (("verdict", "notes"), ["x"] * 1000),
    (("verdict", "clean_accuracy"), 1.5),
    (("verdict", "cost"), {"seconds": 1.0}),
    (("verdict", "cost", "seconds"), -1.0),
    (("verdict", "cost", "peak_memory_bytes"), 10**30),
    (("verdict", "evidence"), None),
    (("verdict", "evidence", 0), {}),
    (("verdict", "evidence", 0, "label"), 7),
    (("verdict", "evidence", 0, "label"), 1.5),
    (("verdict", "evidence", 0, "label"), 1),  # which has such a figure already
    (("verdict", "evidence", 0, "measure"), ""),
    (("verdict", "evidence", 0, "measure"), ["mask_area"]),
    (("verdict", "evidence", 0, "value"), "inf"),
    (("verdict", "evidence", 0, "value"), True),
    (("verdict", "evidence", 0, "p_value"), 2.0),
    (("verdict", "evidence", 0, "null"), None),
    (("verdict", "triggers", 0, "target_label"), 5),
    (("verdict", "triggers", 0, "num_samples"), 2),
    (("verdict", "triggers", 0, "num_samples"), 4),
    (("verdict", "triggers", 0, "num_samples"), 2**60),
    (("verdict", "triggers", 0, "area"), -1.0),
    (("verdict", "triggers", 0, "file"), "/etc/passwd"),
    (("verdict", "triggers"), []),
    (("verdict", "more"), 1),
    (("handover", "triggers"), "../../secret"),
    (("handover", "triggers"), "0" * 64),
    (("handover", "model"), "0" * 64),
    (("handover", "scan"), "0" * 64),
    (("handover", "image_shape"), [3, 12]),
    (("handover", "num_classes"), "7"),
    (("handover", "path"), "/etc"),
    (("seed",), 4),
    (("seed",), "3"),
    (("settings", "holdout"), 0.3),
    (("settings", "holdout"), math.inf),
    (("method",), None),
]


@pytest.mark.parametrize(("place", "value"), WRONG, ids=lambda part: str(part)[:40])
def test_wrong_values_are_refused(place: tuple[str | int, ...], value: Any, folder: Path, view: DefenderView) -> None:
    def alter(record: Any) -> None:
        for step in place[:-1]:
            record = record[step]
        record[place[-1]] = value

    change(folder, alter)
    refusal(folder, view)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("masks.4", torch.zeros(3, 3, 12, 12)),
        ("masks.4", torch.zeros(3, 1, 12, 12, dtype=torch.float64)),
        ("masks.4", torch.full((3, 1, 12, 12), math.nan)),
        ("patterns.4", torch.full((3, 3, 12, 12), 1.5)),
        ("patterns.4", torch.full((3, 3, 12, 12), -0.1)),
        ("patterns.4", torch.zeros(4, 3, 12, 12)),
        ("patterns.5", torch.zeros(1)),
        ("../masks", torch.zeros(1)),
    ],
)
def test_wrong_triggers_are_refused(name: str, value: torch.Tensor, folder: Path, view: DefenderView) -> None:
    tensors = load_file(folder / TRIGGERS_FILE)
    put_triggers(folder, save({**tensors, name: value}))
    refusal(folder, view)


def test_damaged_triggers_are_refused_with_the_right_checksum_too(folder: Path, view: DefenderView) -> None:
    content = (folder / TRIGGERS_FILE).read_bytes()
    for damaged in (b"", content[:4], content[:-1], b"\xff" * 8 + content[8:], content[:8] + b"x" * (len(content) - 8)):
        put_triggers(folder, damaged)
        assert "is damaged" in refusal(folder, view)


def test_texts_of_a_verdict_cannot_command_a_terminal(folder: Path, view: DefenderView) -> None:
    def alter(record: dict[str, Any]) -> None:
        record["verdict"]["basis"] = "\x1b[2J"
        record["verdict"]["notes"] = ["a\nNo backdoor found"]
        record["verdict"]["evidence"][0] |= {"measure": "\x1b[31m", "null": "\u202e"}

    change(folder, alter)
    found = read_verdict(folder, view)
    texts = (found.basis, *found.notes, found.evidence[0].measure, found.evidence[0].null)
    assert all(text.isprintable() for text in texts)


def test_grey_images_have_grey_triggers(tmp_path: Path, verdict: Verdict) -> None:
    images = torch.zeros(14, 1, 12, 12, dtype=torch.uint8)
    clean = ImageSet(images=images, labels=torch.arange(14) % 7, num_classes=7)
    view = DefenderView(model=nn.Linear(2, 2), clean=clean)
    grey = replace(trigger(), patterns=torch.rand(3, 1, 12, 12, generator=child(0)))
    write_verdict(tmp_path, replace(verdict, triggers=(grey,)), model=view.model, clean=clean, about=ABOUT)
    assert torch.equal(read_verdict(tmp_path, view).triggers[0].patterns, grey.patterns)
