"""Thousands of damaged victim folders: each opens or is refused with a ``ValueError``; none runs, hangs or takes much memory."""

from __future__ import annotations

import copy
import hashlib
import json
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lustral.attacks import InputAware, Ssba, WaNet
from lustral.attacks.steganography import EncoderRecipe
from lustral.protocols import CraftedAttack, Victim
from lustral.settings import describe
from lustral.victims import ATTACKS, attack_name, implant, load_victim, save_victim
from toy import toy_images, toy_trainer

ROUNDS = 1200  # of each attack
MOST_SECONDS = 10
MOST_GROWTH = 2**20  # KiB of the process's peak resident size
ATTACKS_TRIED = [
    InputAware(width=4, steps=2, mask_epochs=1),
    WaNet(),
    Ssba(encoder=EncoderRecipe(bits=4, width=2, steps=2, images=100), least_bit_accuracy=0, least_psnr=0),
    None,
]
ODD: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1,
        2,
        3.5,
        10**9,
        2**63,
        2**64,
        -(2**64),
        1e308,
        "",
        "x",
        "0",
        "\u202e",
        "evil.py:f",
        "/",
        "digits",
    ),
    *([], {}, [0], [[[]]], {"a": 1}, [10**9] * 3, "torchvision:CIFAR10", "conditioned:x\ny@evil.py:f", "x" * 5000),
]


@pytest.fixture(scope="module", params=range(len(ATTACKS_TRIED)), ids=["input_aware", "wanet", "ssba", "none"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    attack = ATTACKS_TRIED[request.param]
    train, test = toy_images(200, seed=0), toy_images(40, seed=1)
    arch, trainer = "small_cnn:width=2", toy_trainer(epochs=1)
    victim: Victim = implant(attack, train, test, arch=arch, trainer=trainer, seed=0, data_name="toy")
    folder = tmp_path_factory.mktemp("victim") / "whole"
    save_victim(folder, victim, test)
    assert isinstance(attack, CraftedAttack) == bool(victim.tensors)
    assert attack is None or (attack_name(attack) in ATTACKS and describe(attack))
    return folder


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the keys that lead to each value inside."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def damaged_record(record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Put odd values in place of some, or take some away."""
    changed = copy.deepcopy(record)
    for _ in range(rng.integers(1, 3)):
        found = list(places(changed))
        *outer, last = found[rng.integers(len(found))]
        inside = changed
        for key in outer:
            inside = inside[key]
        if rng.integers(5) == 0:
            del inside[last]
        else:
            inside[last] = ODD[rng.integers(len(ODD))]
    return changed


def damaged_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Change, cut or repeat some bytes, near the header more often than elsewhere."""
    broken = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        start = int(rng.integers(len(broken) if rng.integers(3) == 0 else min(len(broken), 600)))
        choice, length = rng.integers(4), int(rng.integers(1, 9))
        if choice == 0:
            broken[start] = int(rng.integers(256))
        elif choice == 1:
            broken[start : start + length] = b"9" * length
        elif choice == 2:
            del broken[start : start + length]
        else:
            broken[start:start] = broken[start : start + length]
    return bytes(broken)


@pytest.mark.parametrize("rounds", [40, pytest.param(ROUNDS, marks=pytest.mark.slow)])
def test_a_damaged_folder_opens_or_is_refused(
    original: Path, tmp_path: Path, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mark = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    (tmp_path / "y@evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    folder = Path(shutil.copytree(original, tmp_path / "victim"))
    rng = np.random.default_rng(5)
    names = [name for name in ("victim.json", "model.safetensors", "trigger.safetensors") if (folder / name).exists()]
    whole = {name: (folder / name).read_bytes() for name in names}
    record = json.loads(whole["victim.json"])
    load_victim(folder)
    opened, longest, before = 0, 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(rounds):
        name = names[rng.integers(len(names))]
        changed = record
        if name == "victim.json":
            changed = damaged_record(record, rng)
        else:  # the checksums are those of the damaged file: a stranger writes them too
            content = damaged_bytes(whole[name], rng)
            (folder / name).write_bytes(content)
            changed = {**record, "files": {**record["files"], name: hashlib.sha256(content).hexdigest()}}
        text = json.dumps(changed).encode()
        (folder / "victim.json").write_bytes(damaged_bytes(text, rng) if rng.integers(6) == 0 else text)
        start = time.process_time()
        try:
            load_victim(folder)
            opened += 1
        except ValueError as error:
            longest = max(longest, len(str(error)))
        assert time.process_time() - start < MOST_SECONDS
        (folder / name).write_bytes(whole[name])
    assert 0 < opened < rounds
    assert longest < 20_000
    assert not mark.exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH
