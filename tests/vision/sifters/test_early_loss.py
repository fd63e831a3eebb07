"""Early loss: its loss beside the formula, its score where losses vanish."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.training import Trainer
from lustral.vision.models import build_classifier
from lustral.vision.records import TrainingView
from lustral.vision.sifters import EarlyLoss
from lustral.vision.sifters.early_loss import lga, lga_objective, log_losses
from toy import as_batch, toy_images


@pytest.mark.parametrize("gamma", [0.2, 0.5, 5.0])
def test_the_gradient_climbs_below_gamma_and_falls_above(gamma: float) -> None:
    logits = torch.randn(12, 4, generator=child(0), requires_grad=True)
    labels = torch.arange(12) % 4

    class Given(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return logits

    batch = as_batch(torch.zeros(12, 3, 2, 2), labels)
    losses = F.cross_entropy(logits, labels, reduction="none")
    (plain,) = torch.autograd.grad(losses.mean(), logits, retain_graph=True)
    (found,) = torch.autograd.grad(lga_objective(gamma)(Given(), batch, child(0)), logits, retain_graph=True)
    assert torch.allclose(found, plain if float(losses.detach().mean()) > gamma else -plain)
    (each,) = torch.autograd.grad(losses.sum() / 12, logits, retain_graph=True)
    signs = torch.where(losses.detach() > gamma, 1.0, -1.0)
    (by_image,) = torch.autograd.grad(lga_objective(gamma, per_image=True)(Given(), batch, child(0)), logits)
    assert torch.allclose(by_image, each * signs[:, None], atol=1e-7)


def test_a_loss_at_gamma_stands_still() -> None:
    assert lga(torch.full((4,), 0.5), 0.5).item() == 0.0


def test_log_losses_are_those_of_the_cross_entropy_and_go_on_where_it_is_zero() -> None:
    logits = torch.randn(50, 6, generator=child(1)) * 3
    labels = torch.randint(6, (50,), generator=child(2))
    expected = F.cross_entropy(logits.double(), labels, reduction="none").log()
    torch.testing.assert_close(log_losses(logits, labels).double(), expected, rtol=1e-4, atol=1e-5)
    sure = torch.tensor([[200.0, 0.0, 0.0], [120.0, 0.0, 0.0]])
    zero = torch.zeros(2, dtype=torch.int64)
    assert F.cross_entropy(sure, zero).item() == 0.0
    assert log_losses(sure, zero).tolist() == pytest.approx([-200 + 0.6931, -120 + 0.6931], abs=1e-3)


def test_isolate_gives_the_model_that_the_scores_come_from() -> None:
    data = toy_images(70, seed=0)
    view = TrainingView(
        untrusted=data,
        build_model=lambda g: build_classifier(
            "small_cnn:width=4", num_classes=7, image_shape=(3, 12, 12), generator=g
        ),
    )
    method = EarlyLoss(trainer=Trainer(epochs=1, batch_size=35, precision="float32"), least_steps=0)
    model, sifted = method.isolate(view, generator=child(1))
    with torch.no_grad():
        losses = F.cross_entropy(model(data.images.float() / 255), data.labels, reduction="none")
    assert sifted.scores.argsort().tolist() == (-losses).argsort().tolist()
    assert torch.equal(method.sift(view, generator=child(1)).scores, sifted.scores)
    assert not model.training
    assert sifted.cost.image_passes > 70


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="gamma >= 0"):
        EarlyLoss(gamma=-0.1)
