"""Unlearning: its terms, its published settings, its course."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import child, fork
from lustral.vision.erasing import TAKEN_OVER, erase
from lustral.vision.purifiers import BaEraser
from lustral.vision.purifiers.baeraser import capped_ascent, clean_importance, needed_area, other_areas, weighted_l1
from lustral.vision.records import DefenderView, ImageSet, RecoveredTrigger
from toy import gentle_trainer, mask_verdict, quick_detector, quick_inverter


def test_ascent_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert capped_ascent(logits, 0, cap=10.0).tolist() == pytest.approx([-math.log(2), -math.log(4 / 3)])
    assert capped_ascent(logits, 1, cap=10.0).tolist() == pytest.approx([-math.log(2), -math.log(4)])


def test_ascent_stops_at_the_cap_image_by_image() -> None:
    logits = torch.tensor([[0.0, 0.0], [-9.0, 0.0]], requires_grad=True)
    loss = capped_ascent(logits, 0, cap=2.0)
    assert loss.tolist() == pytest.approx([-math.log(2), -2.0])
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([0.5, -0.5])  # descent on the loss lowers the label's logit
    assert logits.grad[1].tolist() == [0.0, 0.0]


def linear_model() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=child(0)) - 0.5)
    return model


def test_weighted_l1_equals_a_slow_sum() -> None:
    model = linear_model()
    start = [p.detach() + 0.1 * torch.randn(p.shape, generator=child(1)) for p in model.parameters()]
    importance = [torch.rand(p.shape, generator=child(2)) for p in model.parameters()]
    plain = weighted = 0.0
    for parameter, origin, omega in zip(model.parameters(), start, importance, strict=True):
        for a, b, w in zip(
            parameter.flatten().tolist(), origin.flatten().tolist(), omega.flatten().tolist(), strict=True
        ):
            plain += abs(a - b)
            weighted += w * abs(a - b)
    assert weighted_l1(model, start, None).item() == pytest.approx(plain, rel=1e-5)
    assert weighted_l1(model, start, importance).item() == pytest.approx(weighted, rel=1e-5)
    assert weighted_l1(model, [p.detach() for p in model.parameters()], None).item() == 0.0


def tiny_set(count: int) -> ImageSet:
    images = torch.randint(256, (count, 3, 2, 2), generator=child(3)).to(torch.uint8)
    return ImageSet(images=images, labels=torch.arange(count) % 3, num_classes=3)


def test_importance_equals_a_slow_reference() -> None:
    model, data = linear_model(), tiny_set(300)  # batches of 128, 128 and 44
    totals = [torch.zeros_like(p) for p in model.parameters()]
    for start in range(0, 300, 128):
        x, y = data.images[start : start + 128] / 255, data.labels[start : start + 128]
        model.zero_grad()
        with torch.autocast("cpu", enabled=False):
            F.cross_entropy(model(x), y).backward()
        for total, parameter in zip(totals, model.parameters(), strict=True):
            assert parameter.grad is not None
            total += parameter.grad.abs()
    model.zero_grad()
    flat = torch.cat([t.flatten() for t in totals])
    expected = [t / flat.mean() for t in totals]
    importance = clean_importance(model, data)
    assert float(torch.cat([t.flatten() for t in importance]).mean()) == pytest.approx(1.0, rel=1e-4)
    for ours, reference in zip(importance, expected, strict=True):
        assert torch.allclose(ours, reference, rtol=0.1, atol=0.02)  # bfloat16 products where the hardware has them
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_importance_sees_all_classes_of_an_ordered_set() -> None:
    images = torch.zeros(1200, 3, 2, 2, dtype=torch.uint8)
    images[:600, 0] = 200
    images[600:, 2] = 200  # only the second class has anything in the last channel
    data = ImageSet(images=images, labels=torch.arange(2).repeat_interleave(600), num_classes=3)
    weight = clean_importance(linear_model(), data)[0]
    assert float(weight.view(len(weight), 3, 4)[:, 2].max()) > 0


@pytest.mark.parametrize(
    ("form", "clean_weight", "penalty", "penalty_weight"),
    [("code", 100.0, "l1", 1e-6), ("paper", 1.0, "dynamic", 1e-4)],
)
def test_published_settings(form: Any, clean_weight: float, penalty: str, penalty_weight: float) -> None:
    published = BaEraser(form=form, holdout=0.3).published()
    assert published.penalty_weight == penalty_weight
    assert published.form == form
    assert published.schedule == "published"
    assert (published.clean_weight, published.penalty) == (clean_weight, penalty)
    assert (published.ascent_weight, published.ascent_margin) == (1.0, math.inf)
    assert (published.relearn_weight, published.distil_weight) == (0.0, 0.0)
    assert (published.exclude_target, published.rounds) == (False, 1)
    assert (published.trainer.epochs, published.trainer.learning_rate) == (10, 1e-4)
    assert (published.trainer.augment, published.trainer.batch_norm) == (None, "train")
    assert published.holdout == 0.3  # what is not part of the method stays


def test_the_published_schedule_runs_one_round(toy_view: DefenderView) -> None:
    eraser = BaEraser(inverter=quick_inverter()).published()
    accused = replace(toy_view, verdict=mask_verdict([], suspects=[4]))  # without a trigger: one is recovered
    purified = eraser.purify(accused, generator=child(0))
    assert purified.audit is None
    assert [h.count for h in purified.history] == list(range(11))
    assert {h.parts for h in purified.history} == {(("round", 1),)}


def test_the_other_areas_are_those_of_unsuspected_finished_labels() -> None:
    scan = mask_verdict([2.0, 40.0, 60.0, math.inf, 900.0], suspects=[0], steps=[9, 9, 9, 9, 3])
    assert other_areas(scan, (0,)) == [40.0, 60.0]
    assert other_areas(scan, (0, 1, 2)) == []


def test_a_trigger_that_does_not_fire_needed_more() -> None:
    def trigger(rate: float) -> RecoveredTrigger:
        zeros = torch.zeros(1, 1, 2, 2)
        return RecoveredTrigger(
            target_label=0, masks=zeros, patterns=zeros, area=10.0, attack_success_rate=rate, entropy=0.0
        )

    assert [needed_area(trigger(rate)) for rate in (1.0, 0.5, 0.0)] == pytest.approx([10.0, 20.0, 200.0])


def test_a_clean_verdict_leaves_the_model_as_it_was(benign_view: DefenderView) -> None:
    purified = erase(BaEraser(), benign_view, detector=quick_detector(), generator=child(3))
    assert purified.selected is None
    assert purified.history == ()
    assert purified.audit is None
    assert "returned unchanged" in purified.notes[0]
    assert purified.model is not benign_view.model
    before, after = benign_view.model.state_dict(), purified.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_labels_that_anyone_names_are_erased(benign_view: DefenderView) -> None:
    eraser = BaEraser(inverter=quick_inverter(), rounds=1, trainer=gentle_trainer(epochs=1), least_steps=1)
    accused = replace(benign_view, verdict=mask_verdict([], suspects=[2]))
    purified = erase(eraser, accused, audit=False, generator=child(3))
    assert purified.selected is not None
    assert purified.audit is None
    with pytest.raises(ValueError, match="expected a detector, got None"):
        erase(eraser, accused, generator=child(3))


def test_with_too_few_labels_to_compare_every_round_is_run() -> None:
    labels = torch.arange(140) % 2  # dark and bright pictures
    noise = torch.randint(40, (140, 3, 12, 12), generator=child(1))
    clean = ImageSet(
        images=(60 + 100 * labels[:, None, None, None] + noise).to(torch.uint8), labels=labels, num_classes=2
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-0.1], [0.1]]).expand(2, 432))
        model[1].bias.copy_(torch.tensor([21.6, -21.6]))
    eraser = BaEraser(inverter=quick_inverter(), rounds=2, trainer=gentle_trainer(epochs=1), least_steps=1)
    view = DefenderView(model=model, clean=clean, verdict=mask_verdict([], suspects=[1]))
    purified = erase(eraser, view, detector=quick_detector(), generator=child(0))
    assert {dict(entry.parts)["round"] for entry in purified.history} == {1, 2}
    assert purified.notes[0] == TAKEN_OVER
    assert "Too few other labels" in purified.notes[1]
    assert purified.audit is not None
    assert purified.audit.outcome == "cannot tell"


def test_the_erasing_is_audited_and_told(toy_view: DefenderView) -> None:
    eraser = BaEraser(inverter=quick_inverter(), trainer=gentle_trainer(), least_steps=1, rounds=2)
    purified = erase(eraser, toy_view, detector=quick_detector(), generator=child(1))
    assert purified.verdict is not None
    assert purified.verdict.suspect_labels == (4,)
    assert purified.audit is not None
    assert 4 not in purified.audit.suspect_labels
    assert len(purified.notes) == 1
    assert purified.selected is not None
    chosen = purified.history[purified.selected]
    assert (chosen.recovered_asr or 0.0) < 0.2
    assert (chosen.area or 0.0) > 0
    assert purified.cost.image_passes > purified.verdict.cost.image_passes + purified.audit.cost.image_passes
    assert not purified.model.training


def test_a_verdict_handed_over_is_not_searched_for_again(toy_view: DefenderView) -> None:
    eraser = BaEraser(inverter=quick_inverter(), trainer=gentle_trainer(epochs=2), least_steps=1, rounds=1)
    detector, stages = quick_detector(), list[str]()
    whole = erase(eraser, toy_view, detector=detector, audit=False, generator=child(1))
    verdict = detector.inspect(toy_view, generator=fork(child(1), "scan"))
    given = erase(
        eraser,
        replace(toy_view, verdict=verdict),
        audit=False,
        generator=child(1),
        on_progress=lambda report: stages.append(report.stage),
    )
    assert stages[0] == "scan taken over"
    assert stages[1] == "unlearning"
    assert given.verdict is verdict
    assert whole.cost.image_passes == pytest.approx(given.cost.image_passes + verdict.cost.image_passes)
    assert given.history == whole.history
    assert given.notes == (TAKEN_OVER, *whole.notes)
    a, b = whole.model.state_dict(), given.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"ascent_weight": -1.0}, {"distil_weight": -0.1}, {"holdout": 1.0}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        BaEraser(**wrong)


def test_the_objective_is_the_equation(toy_view: DefenderView, monkeypatch: pytest.MonkeyPatch) -> None:
    """Form "code", without extras: alpha CE(f(x), y) - CE(f(x + G), c) + lambda |theta - theta_0|_1."""
    from lustral.training import Trainer

    caught: list[Any] = []
    monkeypatch.setattr(Trainer, "fit", lambda self, model, data, **rest: caught.append(rest["objective"]))
    zeros = torch.zeros(1, 1, 12, 12)
    mask = zeros.clone()
    mask[..., 10:, 10:] = 1
    trigger = RecoveredTrigger(
        target_label=4,
        masks=mask,
        patterns=torch.ones(1, 3, 12, 12),
        area=4.0,
        attack_success_rate=1.0,
        entropy=0.0,
    )
    eraser = BaEraser(
        clean_weight=3.0,
        penalty="l1",
        penalty_weight=0.01,
        ascent_weight=1.0,
        ascent_margin=math.inf,
        relearn_weight=0.0,
        distil_weight=0.0,
        exclude_target=False,
    )
    model = linear_model_for(toy_view.clean)
    student = linear_model_for(toy_view.clean)
    with torch.no_grad():
        student[1].bias += 0.5  # type: ignore[index]
    selection: Any = SimpleNamespace(admissible=True)
    eraser._unlearn(
        model, model, toy_view.clean, [trigger], selection, 1.0, index=0, generator=child(0), on_progress=None
    )
    batch = next(toy_view.clean.batches(16))
    x, y, _ = batch
    stamped = x.clone()
    stamped[..., 10:, 10:] = 1
    four = torch.full_like(y, 4)
    expected: Tensor = 3 * F.cross_entropy(student(x), y) - F.cross_entropy(student(stamped), four) + 0.01 * 0.5 * 7
    assert caught[0](student, batch, child(0)).item() == pytest.approx(expected.item(), rel=1e-4)


def linear_model_for(data: ImageSet) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(data.image_shape), data.num_classes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=child(5)))
    return model
