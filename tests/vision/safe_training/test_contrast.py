from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.vision.safe_training.contrast import Labels, contrastive_loss, positives

LABELS = torch.tensor([0, 0, 1, 0, 1, 2])
IS_CLEAN = torch.tensor([True, True, True, False, False, True])
RULES: tuple[Labels, ...] = ("clean_only", "clean_only_official", "all", "none")


def are_drawn(anchor: int, other: int, rule: Labels) -> bool:
    """Say whether two different images are drawn together, as one reads it in the paper and its code."""
    alike = bool(LABELS[anchor] == LABELS[other])
    if rule == "clean_only":
        return alike and bool(IS_CLEAN[anchor]) and bool(IS_CLEAN[other])
    if rule == "clean_only_official":
        return alike and bool(IS_CLEAN[anchor])
    return alike and rule == "all"


def plain_loss(projections: Tensor, rule: Labels, temperature: float) -> float:
    """The loss as a double loop over views."""
    count, total = len(LABELS), 0.0
    views = [(view, image) for view in range(2) for image in range(count)]
    for i, (view, image) in enumerate(views):
        below = sum(math.exp(float(projections[i] @ projections[a]) / temperature) for a in range(2 * count) if a != i)
        logs = []
        for p, (other_view, other) in enumerate(views):
            if p != i and (
                (image == other and view != other_view) or (image != other and are_drawn(image, other, rule))
            ):
                logs.append(float(projections[i] @ projections[p]) / temperature - math.log(below))
        total += -sum(logs) / len(logs)
    return total / (2 * count)


@pytest.mark.parametrize("rule", RULES)
def test_the_loss_is_that_of_the_plain_double_loop(rule: Labels) -> None:
    projections = F.normalize(torch.randn(12, 5, generator=child(0), dtype=torch.float64), dim=1)
    found = contrastive_loss(projections, positives(LABELS, IS_CLEAN, rule).double(), 0.5)
    assert found.item() == pytest.approx(plain_loss(projections, rule, 0.5))


def test_the_rules_differ_in_whom_they_draw_together() -> None:
    masks = {rule: positives(LABELS, IS_CLEAN, rule) for rule in RULES}
    for rule, mask in masks.items():
        assert bool((mask.diagonal() == 1).all())
        for i in range(6):
            for j in range(6):
                assert i == j or bool(mask[i, j]) == are_drawn(i, j, rule)
    assert not torch.equal(masks["clean_only_official"], masks["clean_only_official"].T)  # the published trap
    assert torch.equal(masks["clean_only"], masks["clean_only"].T)


def test_the_gradient_is_finite_and_that_of_the_loop() -> None:
    start = torch.randn(12, 5, generator=child(1), dtype=torch.float64)
    leaf = start.clone().requires_grad_()
    pairs = positives(LABELS, IS_CLEAN, "clean_only").double()
    contrastive_loss(F.normalize(leaf, dim=1), pairs, 0.5).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    for place in ((0, 0), (7, 3), (11, 4)):
        step = torch.zeros_like(start)
        step[place] = 1e-5
        ends = [plain_loss(F.normalize(start + sign * step, dim=1), "clean_only", 0.5) for sign in (1, -1)]
        assert float(leaf.grad[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)
