"""Commands on what a stranger wrote: nothing of it runs, no place that it names is opened, and the answer is one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch

from lustral.cli.entry import main
from lustral.vision.models import build_classifier, save_model

SHAPE = (3, 32, 32)
NET = """
from pathlib import Path
from lustral.vision.models import SmallCNN

Path({mark!r}).touch()

def net(num_classes):
    return SmallCNN(num_classes, width=4)
"""


def run(*words: object) -> int:
    return main([*map(str, words), "--quiet", "--device", "cpu"])


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must fail with one line."""
    capsys.readouterr()
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "form",
    ["{file}:net", "conditioned:linear@{file}:net", "conditioned:x\ny@{file}:net", "{file}:net\n", "\n{file}:net"],
)
def test_a_model_file_runs_nothing(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    mark, file, path = tmp_path / "mark", tmp_path / "net.py", tmp_path / "model.safetensors"
    file.write_text(NET.format(mark=str(mark)))
    model = build_classifier("small_cnn:width=4", num_classes=10, image_shape=SHAPE, mean=[0.5] * 3, std=[0.5] * 3)
    save_model(path, model, arch="small_cnn:width=4", image_shape=SHAPE)
    with safetensors.safe_open(path, framework="pt") as opened:
        metadata = {**opened.metadata(), "arch": form.format(file=file)}
    safetensors.torch.save_file(model.network.state_dict(), path, metadata)
    for words in (
        ("scan", path),
        ("erase", path, "--out", tmp_path / "out", "--method", "bn_refresh"),
        ("implant", "badnets", "--start", path, "--out", tmp_path / "victim"),
    ):
        error = refusal(capsys, *words, "--data", "digits", *(["--clean", 20] if words[0] != "implant" else []))
        assert "not run because a file names it" in error or "damaged metadata" in error
    assert not mark.exists()


def test_a_users_own_network_lives_through_all_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark, victim, out = tmp_path / "mark", tmp_path / "victim", tmp_path / "out"
    (tmp_path / "net.py").write_text(NET.format(mark=str(mark)))
    arch = ("--arch", f"{tmp_path / 'net.py'}:net")
    assert run("implant", "badnets", "--data", "digits", "--out", victim, "--epochs", 8, *arch) == 0
    assert mark.exists()
    mark.unlink()
    for words in (("evaluate", victim), ("scan", victim, "--data", "digits", "--clean", 40)):
        assert "is Python code and is not run because a file names it" in refusal(capsys, *words)
    assert not mark.exists()
    erase = ("erase", victim, "--data", "digits", "--clean", 40, "--method", "bn_refresh", "--out", out)
    assert run(*erase, *arch) == 0
    assert run("evaluate", victim, "--model", out / "model.safetensors", *arch) == 0
    assert mark.exists()


@pytest.mark.parametrize("data", ["/", "fifo", ".", "~", "torchvision:CIFAR10", "file.npz", "/dev/zero"])
def test_a_victim_folder_chooses_no_place(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    assert (
        run("implant", "none", "--data", "digits", "--out", "victim", "--arch", "small_cnn:width=2", "--epochs", 1) == 0
    )
    assert run("evaluate", "victim") == 0
    record = json.loads(Path("victim/victim.json").read_text())
    Path("victim/victim.json").write_text(json.dumps({**record, "data": data}))
    assert "pass it as --data" in refusal(capsys, "evaluate", "victim")
    assert run("evaluate", "victim", "--data", "digits") == 0


def test_a_model_exchanged_in_a_victim_folder_gives_no_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        words = ("implant", "badnets", "--data", "digits", "--out", tmp_path / str(seed), "--arch", "small_cnn:width=2")
        assert run(*words, "--epochs", 1, "--seed", seed) == 0
    os.replace(tmp_path / "1" / "model.safetensors", tmp_path / "0" / "model.safetensors")
    for words in (
        ("evaluate", tmp_path / "0"),
        ("scan", tmp_path / "0", "--data", "digits"),
        ("evaluate", tmp_path / "0", "--model", tmp_path / "0"),
        ("implant", "none", "--start", tmp_path / "0", "--data", "digits", "--out", tmp_path / "2"),
    ):
        assert "not the file that victim.json was written with" in refusal(capsys, *words)
