"""Shared worlds: built once for a test session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lustral.vision.attacks import BadNets
from lustral.vision.records import DefenderView, Victim
from lustral.vision.victims import implant
from toy import clean_images, toy_images, toy_trainer

# One thread for each worker of pytest-xdist and for the processes that tests start: a second one costs on networks this small.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

PRECISION = os.environ.get("LUSTRAL_TEST_PRECISION", "auto")  # what "auto" means: tests/everywhere.py sets it


@pytest.fixture(scope="session", autouse=True)
def precision() -> Iterator[None]:
    """Let the library's "auto" be the precision that is under test, whatever this processor has."""
    if PRECISION not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"expected LUSTRAL_TEST_PRECISION to be auto, float32 or bfloat16; got {PRECISION!r}")
    with pytest.MonkeyPatch.context() as patch:
        if PRECISION != "auto":
            patch.setattr("lustral.training.modes.has_fast_bfloat16", lambda _: PRECISION == "bfloat16")
        yield


@pytest.fixture(autouse=True)
def global_stream() -> None:
    """Begin each test with one state of the global stream: layers that a test builds are then equal in any order of tests."""
    torch.manual_seed(0)


def make_victim(attack: BadNets | None) -> Victim:
    return implant(
        attack,
        toy_images(1400, seed=0),
        toy_images(420, seed=1),
        arch="small_cnn:width=16",
        trainer=toy_trainer(),
        seed=0,
        data_name="toy",
    )


@pytest.fixture(scope="session")
def backdoored() -> Victim:
    """A toy network with a 2x2 white patch in the bottom right corner that leads to class 4."""
    return make_victim(BadNets(target_label=4, size=2, poison_rate=0.1))


@pytest.fixture(scope="session")
def benign() -> Victim:
    """The same network trained on clean images."""
    return make_victim(None)


@pytest.fixture
def toy_view(backdoored: Victim) -> DefenderView:
    """What a defender of the backdoored toy network has: 280 clean images it was not trained on."""
    return DefenderView(model=backdoored.model, clean=clean_images())


@pytest.fixture
def benign_view(benign: Victim) -> DefenderView:
    """The same for the benign toy network."""
    return DefenderView(model=benign.model, clean=clean_images())


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets; tests that need it skip where there is none."""
    root = os.environ.get("LUSTRAL_DATA")
    if not root:
        pytest.skip("needs real data: set LUSTRAL_DATA to the folder that holds cifar10.npz")
    return Path(root)
