"""Thousands of damaged model files: each opens or is refused with a ``ValueError``; none runs, hangs or takes much memory."""

from __future__ import annotations

import io
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from lustral.models import build_classifier, load_model

ARCH = "small_cnn:width=2"
SHAPE = (3, 8, 8)
ROUNDS = 1500  # of each kind
MOST_SECONDS = 10
MOST_GROWTH = 2**20  # KiB of the process's peak resident size
NUMBERS = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff" * 8, b"\0" * 8]
CALLS = [
    b"cposix\nsystem\n",
    b"cbuiltins\nbytearray\n",
    b"ctorch\nTensor\n",
    b"c_codecs\nencode\n",
    b"cbuiltins\nexec\n",
]
ENDINGS = {"archive": ".pt", "legacy": ".pth", "safetensors": ".safetensors", "folder": "", "bin": ""}


def sample(kind: str) -> dict[str, bytes]:
    """Return the files of a small model by name."""
    state = build_classifier(ARCH, num_classes=4, image_shape=SHAPE).network.state_dict()
    content = {
        "model": state,
        "accuracy": np.float64(0.5),
        "indices": np.arange(6).reshape(2, 3),
        "optimizer": torch.optim.Adam([torch.ones(2, requires_grad=True)]).state_dict(),
    }
    file = io.BytesIO()
    if kind in ("archive", "legacy"):
        torch.save(content, file, _use_new_zipfile_serialization=kind == "archive")
        return {"": file.getvalue()}
    tensors = safetensors.torch.save(state, {"format": "pt"})
    if kind == "safetensors":
        return {"": tensors}
    recipe = {"input_size": list(SHAPE), "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {
        "architecture": "test_resnet",
        "num_classes": 4,
        "pretrained_cfg": recipe,
        "label_names": ["a", "b", "c", "d"],
    }
    index = {"weight_map": dict.fromkeys(state, "model-1.safetensors" if kind == "folder" else "model-1.bin")}
    stem = "model.safetensors" if kind == "folder" else "pytorch_model.bin"
    torch.save(state, file)
    return {
        "config.json": json.dumps(config).encode(),
        f"{stem}.index.json": json.dumps(index).encode(),
        f"model-1.{stem.rpartition('.')[2]}": tensors if kind == "folder" else file.getvalue(),
    }


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Change, cut, repeat or exchange bytes, or put numbers and calls among them; mostly where no weights are."""
    broken = bytearray(content)
    telling = [
        place for word in (b"data.pkl", b"PK\x01\x02", b"PK\x05\x06", b"model") if (place := content.find(word)) >= 0
    ]
    for _ in range(rng.integers(1, 4)):
        near = telling[rng.integers(len(telling))] if telling and rng.integers(2) else 0
        start = (
            int(rng.integers(len(broken))) if rng.integers(4) == 0 else min(len(broken), near + int(rng.integers(1500)))
        )
        length, choice = int(rng.integers(1, 9)), rng.integers(7)
        if choice == 0:
            broken[start : start + 1] = bytes([rng.integers(256)])
        elif choice == 1:
            broken[start : start + length] = b"9" * length
        elif choice == 2:
            del broken[start : start + length]
        elif choice == 3:
            broken[start:start] = broken[start : start + length]
        elif choice == 4:
            number = NUMBERS[rng.integers(len(NUMBERS))]
            broken[start : start + len(number)] = number
        elif choice == 5:
            call = CALLS[rng.integers(len(CALLS))] + b"X\x04\0\0\0trueq\0\x85R"
            broken[start : start + len(call) * int(rng.integers(2))] = call
        elif rng.integers(10) == 0:
            del broken[start:]
    return bytes(broken)


@pytest.mark.parametrize("kind", ENDINGS)
@pytest.mark.parametrize("rounds", [60, pytest.param(ROUNDS, marks=pytest.mark.slow)])
def test_a_damaged_model_opens_or_is_refused(
    kind: str, rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    run: Callable[[str], int] = lambda command: ran.append(command) or 0  # type: ignore[func-returns-value]  # noqa: E731
    monkeypatch.setattr(os, "system", run)
    files = sample(kind)
    path = tmp_path / f"model{ENDINGS[kind]}"
    if "" not in files:
        path.mkdir()
    for name, content in files.items():
        (path / name if name else path).write_bytes(content)
    load_model(path, arch=ARCH, image_shape=SHAPE)
    rng = np.random.default_rng(11)
    opened, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = list(files)
    for _ in range(rounds):
        name = names[rng.integers(len(names))]
        target = path / name if name else path
        target.write_bytes(damaged(files[name], rng))
        start = time.process_time()
        try:
            load_model(path, arch=None if rng.integers(4) == 0 else ARCH, image_shape=SHAPE)
            opened += 1
        except ValueError as error:
            assert len(str(error)) < 20_000  # noqa: PT017
        assert time.process_time() - start < MOST_SECONDS
        target.write_bytes(files[name])
    assert 0 < opened < rounds
    assert not ran
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH
