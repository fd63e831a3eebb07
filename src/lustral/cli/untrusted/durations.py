"""How long work on a training set will take, by a few steps of it."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.report.words import count, duration
from lustral.training.modes import autocast
from lustral.vision.records import TrainingView

TIMED_BATCH = 128
TIMED_SECONDS = 1.0  # of steps behind an estimate
LONG_SECONDS = 60.0  # from which it is said beforehand how long something takes
SHORT_WORK = 1e7  # numbers of images passed through a network that never take a minute: nothing is measured for them
LARGE_SIDE = 64  # pixels from which a smaller --image-size is suggested


def expected_passes(method: Any, num_images: int) -> float:
    """Return about how many image passes a method takes, by its own account."""
    own = getattr(method, "estimated_passes", None)
    return float(own(num_images)) if callable(own) else float(method.cost_passes) * num_images


def seconds_per_pass(view: TrainingView, *, seed: int) -> float:
    """Measure a training step of the view's network on a few of its images, forward and back; seconds per image."""
    model = view.build_model(child(seed, "trial"))
    device = next(model.parameters()).device
    batch = next(iter(view.untrusted.batches(TIMED_BATCH))).to(device)
    inputs = batch.inputs.contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last).train()
    started, steps = time.perf_counter(), -1  # the first step warms up
    while steps < 1 or time.perf_counter() - started < TIMED_SECONDS / 2:
        if steps == 0:
            started = time.perf_counter()
        with autocast(device):
            loss = F.cross_entropy(model(inputs).float(), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        float(loss.detach())  # waits for the device
        steps += 1
    return (time.perf_counter() - started) / (max(steps, 1) * len(batch.labels))


def estimate_sentence(seconds: float, passes: float, view: TrainingView) -> str | None:
    """Say how long work takes, where that is more than a minute; None where it is not worth a line."""
    if seconds < LONG_SECONDS:
        return None
    said = f"This takes about {duration(seconds)}: {count(passes)} image passes at {count(passes / seconds)} a second."
    side = max(view.untrusted.image_shape[1:])
    hint = (
        f" The images are {side} pixels wide: --image-size {LARGE_SIDE // 2} is much faster."
        if side >= LARGE_SIDE
        else ""
    )
    return said + hint
