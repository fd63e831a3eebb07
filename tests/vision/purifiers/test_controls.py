"""The controls: refreshed statistics and plain fine-tuning; and MESA's retraining."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lustral.core.randomness import child, fork
from lustral.core.records import Progress
from lustral.training import Trainer
from lustral.vision.erasing import erase
from lustral.vision.images import split
from lustral.vision.purifiers import BNRefresh, FineTuning, Mesa
from lustral.vision.records import DefenderView, ImageSet
from lustral.vision.repair.selection import held_out_accuracy
from toy import gentle_trainer, quick_detector, quick_inverter, scripted_fit


def noise_set(count: int = 40) -> ImageSet:
    images = torch.randint(256, (count, 2, 3, 3), generator=child(0)).to(torch.uint8)
    return ImageSet(images=images, labels=torch.arange(count) % 2, num_classes=2)


class TinyNet(nn.Module):
    """One batch normalisation on the pixels themselves, so that its statistics are those of the images."""

    def __init__(self, momentum: float = 0.3) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2, momentum=momentum)
        self.norm.running_mean.fill_(7.0)  # type: ignore[union-attr, operator]
        self.head = nn.Linear(18, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(x).flatten(1))
        return out


def test_refreshed_statistics_are_plain_averages() -> None:
    data, model = noise_set(), TinyNet()
    purified = BNRefresh(batch_size=10, passes=1).purify(DefenderView(model=model, clean=data), generator=child(1))
    new = purified.model.norm
    pixels = (data.images / 255).transpose(0, 1).flatten(1)
    # four full batches of ten: the mean over batches is the mean over all images
    assert new.running_mean.tolist() == pytest.approx(pixels.mean(1).tolist(), abs=1e-5)  # type: ignore[union-attr, operator]
    # the variance is averaged within batches, so that it differs a little from the variance of all
    assert new.running_var.tolist() == pytest.approx(pixels.var(1).tolist(), rel=0.05)  # type: ignore[union-attr, operator]
    assert new.momentum == 0.3
    assert bool((model.norm.running_mean == 7.0).all())  # type: ignore[union-attr, operator]
    for name, value in purified.model.named_parameters():
        assert torch.equal(value, model.get_parameter(name))
    assert purified.notes == ()


def test_every_pass_counts_the_same() -> None:
    data, reports = noise_set(), list[Progress]()
    view = DefenderView(model=TinyNet(), clean=data)
    purified = BNRefresh(batch_size=10, passes=3).purify(view, generator=child(1), on_progress=reports.append)
    assert int(purified.model.norm.num_batches_tracked) == 12  # type: ignore[union-attr, arg-type]
    assert [(report.done, report.total) for report in reports] == [(1, 3), (2, 3), (3, 3)]
    assert purified.cost.image_passes == pytest.approx(40.0)  # three forward passes count a third each


def test_a_model_without_batch_norm_comes_back_with_a_note() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 2))
    purified = BNRefresh().purify(DefenderView(model=model, clean=noise_set()), generator=child(1))
    assert "no batch normalisation" in purified.notes[0]
    assert torch.equal(purified.model[1].weight, model[1].weight)  # type: ignore[index]


@pytest.mark.parametrize("wrong", [{"batch_size": 1}, {"passes": 0}])
def test_impossible_refreshes_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        BNRefresh(**wrong)


def test_fine_tuning_keeps_the_last_epoch(toy_view: DefenderView) -> None:
    trainer = gentle_trainer(epochs=3)
    purified = FineTuning(trainer=trainer, least_steps=1).purify(toy_view, generator=child(0))
    assert [h.count for h in purified.history] == [0, 1, 2, 3]
    assert purified.selected == 3
    assert not purified.model.training
    assert purified.verdict is None
    assert purified.cost.clean_images == 280
    held_out, _ = split(toy_view.clean, 0.2, generator=fork(child(0), "holdout"))
    assert held_out_accuracy(purified.model, held_out) == purified.history[3].clean_accuracy


def test_fine_tuning_can_keep_the_most_accurate_epoch(toy_view: DefenderView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "fit", scripted_fit(lambda rate: [False, True, False], []))
    last, kept = (
        FineTuning(choose=choose).purify(toy_view, generator=child(0))  # type: ignore[arg-type]
        for choose in ("last", "held_out")
    )
    accuracies = [h.clean_accuracy or 0.0 for h in kept.history]
    assert kept.history == last.history, "one training, two choices"
    assert accuracies[2] == accuracies[0] > 0.5 > max(accuracies[1], accuracies[3])
    assert (last.selected, kept.selected) == (3, 2), "the given model is not one to choose"
    assert "Held-out accuracy fell by" in last.notes[0]
    assert kept.notes == ()
    held_out, _ = split(toy_view.clean, 0.2, generator=fork(child(0), "holdout"))
    for purified, accuracy in ((last, accuracies[3]), (kept, accuracies[2])):
        assert not purified.model.training
        assert held_out_accuracy(purified.model, held_out) == accuracy
    with pytest.raises(ValueError, match="expected choose to be one of last, held_out; got 'first'"):
        FineTuning(choose="first")  # type: ignore[arg-type]


def test_mesa_retrains_what_the_scan_names(toy_view: DefenderView) -> None:
    mesa = Mesa(inverter=quick_inverter(), trainer=gentle_trainer(epochs=2), least_steps=1)
    purified = erase(mesa, toy_view, detector=quick_detector(), audit=False, generator=child(1))
    assert purified.audit is None
    assert purified.verdict is not None
    assert purified.verdict.suspect_labels == (4,)
    assert [h.count for h in purified.history] == [0, 1, 2]


def test_mesa_leaves_a_clean_model_as_it_was(benign_view: DefenderView) -> None:
    purified = erase(Mesa(), benign_view, detector=quick_detector(), generator=child(3))
    assert purified.selected is None
    assert "returned unchanged" in purified.notes[0]
    before, after = benign_view.model.state_dict(), purified.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("wrong", [{"trigger_rate": 0.0}, {"trigger_rate": 1.5}, {"holdout": 0.0}])
def test_impossible_retraining_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Mesa(**wrong)
