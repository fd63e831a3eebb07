"""``make test-everywhere`` finds its tests and sets what it says: a run takes an hour, so nobody sees at once that it broke."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import everywhere
from lustral.training import autocast, has_fast_bfloat16

TESTS = Path(__file__).parent
PRECISION = os.environ.get("LUSTRAL_TEST_PRECISION", "auto")


def test_what_is_left_out_is_there_and_what_computes_is_in() -> None:
    found = {Path(path).relative_to(TESTS) for path in everywhere.numeric_paths()}
    assert Path("contracts/test_defences.py") in found
    assert Path("vision/purifiers/test_auto.py") in found
    assert Path("test_docs.py") not in found


def test_the_precision_under_test_is_what_auto_means() -> None:
    device = torch.device("cpu")
    expected = has_fast_bfloat16(device) if PRECISION == "auto" else PRECISION == "bfloat16"
    with autocast(device):
        assert torch.is_autocast_enabled("cpu") == expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_setting_reaches_the_tests(precision: str) -> None:
    setting = everywhere.Setting("default", "default", 1, precision)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{TARGET}"]
    done = subprocess.run(
        command, cwd=TESTS.parent, env=setting.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


TARGET = test_the_precision_under_test_is_what_auto_means.__name__
