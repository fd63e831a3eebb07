"""What a command ends with when things go wrong: never with a code that reads as a verdict."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lustral.cli import exits, main
from lustral.vision.models import build_classifier, save_model
from toy import scans_are

SHAPE = (3, 16, 16)
VERDICTS = (0, 1, 3)

NETWORKS = """
import sys
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3 * 16 * 16, num_classes)
    def forward(self, x):
        return self.fc(x.flatten(1))

class Exits(Net):
    def forward(self, x):
        if len(x) > 1:
            sys.exit(0)
        return super().forward(x)

class Deep(Net):
    def forward(self, x):
        return self.forward(x) if len(x) > 1 else super().forward(x)

class Raises(Net):
    def forward(self, x):
        if len(x) > 1:
            raise KeyError("a\\x1b[2J")
        return super().forward(x)

class Hungry(Net):
    def forward(self, x):
        if len(x) > 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return super().forward(x)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with networks of the user's own, weights that fit them, and images, as the current one."""
    (tmp_path / "net.py").write_text(NETWORKS)
    torch.save({"fc.weight": torch.zeros(4, 768), "fc.bias": torch.zeros(4)}, tmp_path / "m.pth")
    labels = np.arange(40) % 4
    images = np.random.default_rng(0).integers(0, 60, (40, 16, 16, 3)) + 60 * labels[:, None, None, None]
    np.savez(tmp_path / "d.npz", images=images.astype(np.uint8), labels=labels)
    network = build_classifier("small_cnn:width=2", num_classes=4, image_shape=SHAPE, mean=[0.5] * 3)
    save_model(tmp_path / "m.safetensors", network.eval(), arch="small_cnn:width=2", image_shape=SHAPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scan(*words: str) -> int:
    return main(["scan", *words, "--data", "d.npz", "--quiet"])


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "no mean and std" not in line]
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ("Exits", "sys.exit(0)"),
        ("Deep", "RecursionError"),
        ("Raises", "KeyError: 'a\\x1b[2J'"),
        ("Hungry", "not enough memory"),
    ],
)
def test_errors_of_the_users_own_network(
    network: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scan("m.pth", "--arch", f"net.py:{network}") == exits.ERROR
    message = one_error(capsys)
    assert said in message.replace("\\\\x1b", "\\x1b")
    assert "\x1b" not in message


def test_a_file_that_exits_while_it_is_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "quits.py").write_text("raise SystemExit(0)")
    assert scan("m.pth", "--arch", "quits.py:Net") == exits.ERROR
    assert "sys.exit(0)" in one_error(capsys)


class Odd(BaseException):
    """An error that no `except Exception` sees."""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (AssertionError("never"), exits.CRASHED, "unforeseen AssertionError: never"),
        (RuntimeError("ours\nin two lines \u202e"), exits.CRASHED, "ours; in two lines \\u202e"),
        (RecursionError("maximum recursion depth exceeded"), exits.CRASHED, "RecursionError"),
        (Odd(), exits.CRASHED, "unforeseen Odd"),
        (DeprecationWarning("a warning made an error"), exits.CRASHED, "DeprecationWarning"),
        (SystemExit(1), exits.ERROR, "sys.exit(1)"),
        (MemoryError(), exits.ERROR, "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), exits.ERROR, "not enough memory"),
        (ImportError("libcudart.so.12: cannot open"), exits.ERROR, "libcudart"),
    ],
)
def test_no_error_reads_as_a_verdict(
    error: BaseException,
    code: int,
    said: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    scans_are(monkeypatch, fail)
    assert scan("m.safetensors") == code
    assert said in one_error(capsys)
    assert scan("m.safetensors", "--debug") == code
    assert "Traceback" in capsys.readouterr().err


def test_an_interruption_and_a_reader_that_went_away(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, code, said in (
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
    ):

        def fail(*args: Any, cause: BaseException = error, **kwargs: Any) -> Any:
            raise cause

        scans_are(monkeypatch, fail)
        assert scan("m.safetensors") == code
        assert capsys.readouterr().err == said


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stream", [None, Full()])
def test_an_error_that_cannot_be_said_keeps_its_code(
    stream: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    assert scan("none.pth") == exits.ERROR


def test_a_full_terminal_is_an_error_and_no_verdict(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["erase", "--list"]) == exits.ERROR
    assert "No space left" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of another kind")
@pytest.mark.parametrize("flags", [["--json"], []])
def test_a_pipe_that_closes_early(flags: list[str]) -> None:
    """`| head` must not turn the answer into 1, as rich's own handling does."""
    line = [sys.executable, "-m", "lustral", "erase", "--list", *flags]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait() == exits.BROKEN_PIPE
    assert said == b""


def test_an_environment_without_torch_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: cannot open shared object file')")
    (tmp_path / "rich.py").write_text("raise RuntimeError('built for another Python')")
    for blocked, code in (("torch", exits.ERROR), ("rich", exits.CRASHED)):
        place = tmp_path / blocked
        place.mkdir()
        (tmp_path / f"{blocked}.py").rename(place / f"{blocked}.py")
        program = (
            f"import sys; sys.path.insert(0, {str(place)!r}); from lustral.cli import main; sys.exit(main(['demo']))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_characters_that_the_terminal_lacks_lose_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["implant", "--list"]) == 0
    assert b"badnets" in raw.getvalue()
