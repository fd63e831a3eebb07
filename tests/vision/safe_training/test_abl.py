from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Generator, Tensor, nn

from lustral.core.randomness import child
from lustral.core.records import OnProgress
from lustral.vision.evaluation import evaluate
from lustral.vision.models import build_classifier
from lustral.vision.records import Sifted, TrainingView, Victim
from lustral.vision.safe_training import ABL
from lustral.vision.safe_training.abl import ascent, isolated
from lustral.vision.safe_training.run import TrainingRun
from lustral.vision.sifters import EarlyLoss
from toy import toy_images, toy_trainer


@dataclass(frozen=True, kw_only=True)
class KnownScores(EarlyLoss):
    """The first stage with scores that are given: what ABL makes of them is then no matter of the toys."""

    scores: Tensor = field(default_factory=lambda: torch.zeros(0))

    def isolate(
        self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None
    ) -> tuple[nn.Module, Sifted]:
        model, sifted = super().isolate(view, generator=generator, on_progress=on_progress)
        return model, replace(sifted, scores=self.scores)


def network(generator: Generator) -> nn.Module:
    return build_classifier("small_cnn:width=16", num_classes=7, image_shape=(3, 12, 12), generator=generator)


def run(victim: Victim, scores: Tensor) -> tuple[float, float]:
    assert victim.poisoned is not None
    view = TrainingView(untrusted=victim.poisoned.data, build_model=network)
    early = toy_trainer(epochs=2, augment=None)
    sifter = KnownScores(scores=scores, trainer=early, least_steps=1)
    method = ABL(
        sifter=sifter,
        trainer=toy_trainer(epochs=5),
        isolation=0.05,
        unlearner=replace(ABL().unlearner, learning_rate=2e-3),
    )
    trained = method.train(view, generator=child(0))
    assert trained.sifted is not None
    assert int(trained.sifted.flagged.sum()) == 70
    assert torch.equal(trained.sifted.scores >= trained.sifted.threshold, trained.sifted.flagged)
    record = evaluate(victim, trained.model, toy_images(420, seed=1), generator=child(0))
    assert {dict(entry.parts)["stage"] for entry in trained.history} == {2, 3}
    return record.asr.value, record.acc.value


def test_what_is_isolated_is_unlearnt(backdoored: Victim) -> None:
    assert backdoored.poisoned is not None
    scores = backdoored.poisoned.is_poisoned.float() + 0.1 * torch.rand(1400, generator=child(0))
    success, accuracy = run(backdoored, scores)
    assert success < 0.3  # before the ascent, and after plain training: > 0.9
    assert accuracy > 0.7


@pytest.mark.parametrize(("stop_at_chance", "epochs"), [(True, 1), (False, 3)])
def test_the_ascent_ends_where_the_labels_are_forgotten(stop_at_chance: bool, epochs: int) -> None:
    data, model = toy_images(140, seed=0), network(child(0)).eval()
    wrong = (model(data.images.float() / 255).argmax(1) != data.labels).nonzero().flatten()
    unlearner = toy_trainer(epochs=3, learning_rate=1e-9, batch_norm="frozen", augment=None)
    method = ABL(stop_at_chance=stop_at_chance, unlearner=unlearner)
    training = TrainingRun(view=TrainingView(untrusted=data, build_model=network), generator=child(0), given=model)
    with training:
        method.unlearn(training, model, wrong)
    assert len(training.history) == epochs


def test_the_ascent_ends_at_the_cap_of_each_image() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, 99.0], [0.0, 1.0]], requires_grad=True)
    loss = ascent(logits, torch.tensor([0, 0, 0]), 3.0)
    wanted = (math.log(2) + 3 * math.log(2) + math.log(1 + math.e)) / 3
    assert loss.item() == pytest.approx(-wanted)
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert (logits.grad.abs().sum(1) > 0).tolist() == [True, False, True]
    assert float(logits.grad[0, 0]) > 0  # descent along it lowers the logit of the label


def test_the_largest_scores_are_isolated() -> None:
    suspects, others = isolated(torch.tensor([0.1, 0.9, 0.3, 0.8, 0.2]), 0.4)
    assert (suspects.tolist(), others.tolist()) == ([1, 3], [0, 2, 4])
    assert isolated(torch.rand(50), 0.001)[0].shape == (1,)
    assert len(isolated(torch.rand(1000), 0.07)[0]) == 70


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="isolated share"):
        ABL(isolation=1.0)
    with pytest.raises(ValueError, match="cap"):
        ABL(loss_cap=0.0)


def test_the_passes_said_beforehand() -> None:
    assert ABL().estimated_passes(50_000) == pytest.approx(50_000 * (ABL().sifter.cost_passes + 12 + 0.2))
