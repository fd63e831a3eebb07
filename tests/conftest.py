"""Shared worlds: built once for a test session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lustral.attacks import BadNets
from lustral.protocols import DefenderView, Victim
from lustral.victims import implant
from toy import toy_images, toy_trainer

torch.set_num_threads(2)


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
    return DefenderView(model=backdoored.model, clean=toy_images(280, seed=2))


@pytest.fixture
def benign_view(benign: Victim) -> DefenderView:
    """The same for the benign toy network."""
    return DefenderView(model=benign.model, clean=toy_images(280, seed=2))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets; tests that need it skip where there is none."""
    root = os.environ.get("LUSTRAL_DATA")
    if not root:
        pytest.skip("needs real data: set LUSTRAL_DATA to the folder that holds cifar10.npz")
    return Path(root)
