"""The cost meter: counts by hand, and what it leaves behind."""

from __future__ import annotations

import copy
import platform
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from lustral.core.cost import CostMeter


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, images: torch.Tensor, fail: bool = False) -> torch.Tensor:
        features = self.features(images)
        if fail:
            raise ArithmeticError("broken on purpose")
        logits: torch.Tensor = self.head(features)
        return logits


def test_forward_is_a_third_and_forward_with_backward_is_one() -> None:
    model = Net()
    with CostMeter(model, clean_images=5) as meter:
        model(torch.zeros(10, 4)).sum().backward()  # 10
        with torch.no_grad():
            model(torch.zeros(6, 4))  # 2
        with torch.inference_mode():
            model(images=torch.zeros(3, 4))  # 1
    assert meter.cost.image_passes == 13
    assert meter.cost.clean_images == 5
    assert meter.cost.seconds > 0
    assert meter.cost.peak_memory_bytes >= 0


def test_frozen_model_counts_a_pass_only_when_the_images_need_gradients() -> None:
    model = Net().requires_grad_(False)
    with CostMeter(model, clean_images=0) as meter:
        model(torch.zeros(3, 4))  # 1
        model(torch.zeros(3, 4, requires_grad=True))  # 3
    assert meter.cost.image_passes == 4


def test_copies_count_only_once_they_are_watched() -> None:
    model = Net()
    with CostMeter(model, clean_images=0) as meter:
        duplicate = copy.deepcopy(model)
        duplicate(torch.zeros(8, 4))
        assert meter.cost.image_passes == 0
        meter.watch(duplicate)
        duplicate(torch.zeros(8, 4))
    assert meter.cost.image_passes == 8


def test_nested_watched_modules_count_once() -> None:
    model = Net()
    with CostMeter(model, clean_images=0) as meter:
        meter.watch(model.features)
        model(torch.zeros(2, 4))
        model.features(torch.zeros(5, 4))  # alone it counts
        meter.watch(nn.Sequential(model))
    assert meter.cost.image_passes == 7


def test_outer_meter_includes_the_inner_one() -> None:
    model = Net()
    with CostMeter(model, clean_images=0) as outer:
        model(torch.zeros(1, 4))
        with CostMeter(model, clean_images=0) as inner:
            model(torch.zeros(2, 4))
    assert inner.cost.image_passes == 2
    assert outer.cost.image_passes == 3


def test_nothing_is_left_behind_when_the_block_fails() -> None:
    model = Net()
    meter = CostMeter(model, clean_images=0)

    def measured_block() -> None:
        with meter:
            model(torch.zeros(4, 4))
            model(torch.zeros(4, 4), fail=True)

    with pytest.raises(ArithmeticError):
        measured_block()
    assert not module_hooks._global_forward_hooks
    assert not module_hooks._global_forward_pre_hooks
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert meter.cost.image_passes == 4
    model(torch.zeros(9, 4))
    assert meter.cost.image_passes == 4


def test_a_failed_call_does_not_upset_the_count_of_later_calls() -> None:
    model = Net()
    with CostMeter(model, clean_images=0) as meter:
        with pytest.raises(ArithmeticError):
            model(torch.zeros(4, 4), fail=True)
        model(torch.zeros(2, 4))
    assert meter.cost.image_passes == 2


def test_misuse_is_explained() -> None:
    meter = CostMeter(Net(), clean_images=1)
    with pytest.raises(RuntimeError, match="has not run"):
        _ = meter.cost
    with meter:
        pass
    with pytest.raises(RuntimeError, match="one block"), meter:
        pass
    with pytest.raises(ValueError, match="non-negative"):
        CostMeter(Net(), clean_images=-1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a process's peak")
def test_memory_is_counted_anew_for_each_method() -> None:
    model = nn.Linear(4, 2)
    peaks = []
    for _ in range(2):
        with CostMeter(model, clean_images=1) as meter:
            block = torch.ones(20_000_000)  # 80 MB
            del block
        peaks.append(meter.cost.peak_memory_bytes)
    assert min(peaks) > 60_000_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc returns what is freed")
def test_memory_that_an_earlier_method_has_freed_counts_again() -> None:
    model, peaks, kept = nn.Linear(4, 2), [], []
    for _ in range(4):
        with CostMeter(model, clean_images=1) as meter:
            blocks = []
            for _ in range(20):  # 80 MB, pinned between small blocks that stay: the allocator keeps it all
                blocks.append(torch.ones(1_000_000))
                kept.append(torch.ones(1000))
            del blocks
        peaks.append(meter.cost.peak_memory_bytes)
    assert min(peaks) > 60_000_000


def test_a_method_inside_another_does_not_hide_its_memory() -> None:
    model = nn.Linear(4, 2)
    with CostMeter(model, clean_images=1) as outer:
        block = torch.ones(20_000_000)
        del block
        with CostMeter(model, clean_images=1):
            pass
    assert outer.cost.peak_memory_bytes > 60_000_000
