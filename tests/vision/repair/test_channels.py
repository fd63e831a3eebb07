"""Masks on channels, and what ANP, RNP and CLP do with them."""

from __future__ import annotations

from typing import Literal

import pytest
import timm
import torch
from torch import Generator, Tensor, nn

from lustral.core.history import HistoryEntry, Unit
from lustral.core.randomness import child
from lustral.core.records import Batch, Progress
from lustral.training import Trainer
from lustral.vision.models.wiring import trace
from lustral.vision.purifiers import ANP, CLP, RNP
from lustral.vision.purifiers.clp import channel_bounds, outliers
from lustral.vision.purifiers.rnp import mean
from lustral.vision.records import DefenderView
from lustral.vision.repair.channels import MaskedNorms, cut_in_order, require_norms, require_pairs, silence
from lustral.vision.repair.run import PurifyRun
from toy import toy_images


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 7)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]))
        model[1].bias.copy_(torch.tensor([0.1, -0.2, 0.3, 0.4]))
    return model


def test_masks_of_ones_change_nothing_and_zeros_silence() -> None:
    images = torch.rand(2, 3, 12, 12, generator=child(0))
    plain = network()
    masked = MaskedNorms(plain, ["1"])
    assert torch.allclose(masked(images), plain(images))
    with torch.no_grad():
        masked.masks[0][1] = 0.0
    zeroed = masked(images)
    plain[1].weight.data[1] = 0.0
    assert torch.allclose(zeroed, plain(images))
    plain[1].weight.data[1] = 2.0


def test_shifts_are_relative_to_weight_and_bias() -> None:
    images = torch.rand(2, 3, 12, 12, generator=child(0))
    plain = network()
    masked = MaskedNorms(plain, ["1"])
    shifted = masked(images, [torch.full((4,), 0.5)], [torch.full((4,), -0.5)])
    plain[1].weight.data *= 1.5
    plain[1].bias.data *= 0.5
    assert torch.allclose(shifted, plain(images), atol=1e-6)


def test_masks_take_the_gradient_and_the_network_none() -> None:
    masked = MaskedNorms(network(), ["1"])
    masked(torch.rand(2, 3, 12, 12, generator=child(0))).sum().backward()
    assert [name for name, p in masked.named_parameters() if p.grad is not None] == ["masks.0"]
    with torch.no_grad():
        masked.masks[0].copy_(torch.tensor([-1.0, 0.5, 2.0, 1.0]))
    masked.clip()
    assert masked.by_name()["1"].tolist() == [0.0, 0.5, 1.0, 1.0]


NORMS = ("network.features.1", "network.features.5")


def cut_channels(model: nn.Module) -> list[int]:
    """Return the number of cut channels of each of two normalisations."""
    return [int((model.get_submodule(name).weight == 0).sum()) for name in NORMS]  # type: ignore[operator]


def test_channels_are_cut_in_order_as_long_as_accuracy_lasts(
    toy_view: DefenderView, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (len(toy_view.model.get_submodule(name).weight) for name in NORMS)  # type: ignore[arg-type]
    scores = {NORMS[0]: torch.linspace(0.9, 0.1, first), NORMS[1]: torch.ones(second)}
    scores[NORMS[1]][[3, 5]] = torch.tensor([0.05, 0.11])
    whole = first + second
    monkeypatch.setattr(
        "lustral.vision.repair.channels.held_out_accuracy", lambda model, _: 1 - sum(cut_channels(model)) / 100
    )
    before = [toy_view.model.get_submodule(name).bias for name in NORMS]
    told: list[Progress] = []
    with PurifyRun(view=toy_view, holdout=0.2, generator=child(0), on_progress=told.append) as repair:
        model, note = cut_in_order(repair, scores, step=2 / whole, highest=0.5, floor=0.96)
        most = sum(int((score <= 0.5).sum()) for score in scores.values())
        assert [(report.done, report.total) for report in told] == [(2, most), (4, most), (most, most)]
        assert cut_channels(model) == [2, 2]
        assert [entry.count for entry in repair.history] == [0, 2, 4]
        assert [entry.clean_accuracy for entry in repair.history[1:]] == [0.98, 0.96]
        assert note == f"4 of {whole} channels were cut; 2 more would have cost more held-out accuracy than allowed."
        weights = [model.get_submodule(name).weight for name in NORMS]
        assert (weights[0] == 0).nonzero().flatten().tolist() == [first - 2, first - 1]
        assert (weights[1] == 0).nonzero().flatten().tolist() == [3, 5]
        assert all(torch.equal(model.get_submodule(n).bias, b) for n, b in zip(NORMS, before, strict=True))  # type: ignore[arg-type]
        model, note = cut_in_order(repair, scores, step=0.001, highest=0.1, floor=0.0)
        assert (cut_channels(model), note) == ([1, 1], f"2 of {whole} channels were cut.")
        model, note = cut_in_order(repair, scores, step=1.0, highest=0.95, floor=0.96)
        assert cut_channels(model) == [0, 0]
        assert note.startswith(f"0 of {whole} channels were cut; {first + 2} more")
        assert cut_in_order(repair, scores, step=1.0, highest=0.01, floor=0.96)[1] == f"0 of {whole} channels were cut."


def test_of_masks_that_end_at_zero_the_first_to_fall_goes_first() -> None:
    path = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.6, 0.9], [0.0, 0.0, 0.3]])
    found = mean([{"a": row[:2], "b": row[2:]} for row in path])
    assert found["a"].argsort().tolist() == [0, 1]
    assert found["a"].tolist() == pytest.approx([1 / 3, 1.6 / 3])
    assert found["b"].tolist() == pytest.approx([2.2 / 3])


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_masks_follow_the_batch_norm_of_their_trainer(batch_norm: Literal["train", "frozen"]) -> None:
    seen: list[bool] = []

    def objective(model: nn.Module, batch: Batch, generator: Generator) -> Tensor:
        assert isinstance(model, MaskedNorms)
        seen.append(model.get_submodule("network.1").training)
        return nn.functional.cross_entropy(model(batch.inputs).float(), batch.labels)

    masked = MaskedNorms(network(), ["1"])
    trainer = Trainer(epochs=2, batch_size=4, learning_rate=0.1, batch_norm=batch_norm)
    trained = trainer.fit(masked, toy_images(8, seed=0), generator=child(0), objective=objective)
    assert seen == [batch_norm == "train"] * 4
    assert torch.equal(
        trained.get_submodule("network.1").running_mean,
        masked.get_submodule("network.1").running_mean,  # type: ignore[arg-type]
    )


def test_masks_are_learnt_on_the_statistics_of_the_batch_and_stored_ones_stay() -> None:
    masked = MaskedNorms(network(), ["1"])
    images = 3 * torch.rand(4, 3, 12, 12, generator=child(0)) - 5
    norm = masked.network[1]
    stored = norm.running_mean.clone(), norm.running_var.clone()
    masked.train()
    masked(images)
    assert norm.training
    assert torch.equal(norm.running_mean, stored[0])
    assert torch.equal(norm.running_var, stored[1])
    in_training = masked.network[:2](images)
    assert torch.allclose(in_training.mean((0, 2, 3)), norm.bias, atol=1e-5)


@pytest.mark.parametrize("method", [ANP, RNP])
def test_masks_refuse_shares_out_of_range(method: type[ANP] | type[RNP]) -> None:
    with pytest.raises(ValueError, match=r"cut at a time, in \(0, 1\]; got 0"):
        method(step=0.0)
    with pytest.raises(ValueError, match="highest_mask"):
        method(highest_mask=1.5)


def test_bounds_equal_a_singular_value_at_a_time() -> None:
    model = network()
    model[1].running_var.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    found = channel_bounds(model[0], model[1])
    for k in range(4):
        sigma = torch.linalg.svdvals(model[0].weight[k].reshape(3, 9))[0]
        expected = sigma * model[1].weight[k].abs() / (model[1].running_var[k] + 1e-5).sqrt()
        assert float(found[k]) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_outliers_stand_out_of_their_own_layer() -> None:
    assert outliers(torch.tensor([1.0] * 15 + [9.0]), 3.0).nonzero().tolist() == [[15]]
    assert not bool(outliers(torch.ones(5), 3.0).any())


def test_silence_stops_a_channel() -> None:
    norm = nn.BatchNorm2d(3).eval()
    silence(norm, torch.tensor([False, True, False]))
    out = norm(torch.rand(2, 3, 4, 4, generator=child(0))).detach()
    assert float(out[:, 1].abs().max()) == 0 < float(out[:, 0].abs().max())


def test_networks_without_what_is_needed_are_refused_before_any_work() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7)
    clean = toy_images(70, seed=0)
    big = type(clean)(
        images=clean.images.repeat(1, 1, 3, 3)[:, :, :32, :32], labels=clean.labels, num_classes=clean.num_classes
    )
    for method, name in ((ANP(), "ANP"), (RNP(), "RNP"), (CLP(), "CLP")):
        with pytest.raises(ValueError, match=f"{name} .*this network has none"):
            method.purify(DefenderView(model=vit, clean=big), generator=child(0))
    with pytest.raises(ValueError, match="none"):
        require_norms("X", vit)
    with pytest.raises(ValueError, match="none"):
        require_pairs("X", vit, trace(vit, torch.rand(1, 3, 32, 32)))


def test_clp_raises_its_bound_where_cutting_costs_too_much(
    toy_view: DefenderView, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []
    plain = CLP.cut

    def cut(model: nn.Module, wiring: object, u: float) -> tuple[nn.Module, int]:
        tried.append(u)
        return plain(model, wiring, u)  # type: ignore[arg-type]

    monkeypatch.setattr(CLP, "cut", staticmethod(cut))
    monkeypatch.setattr("lustral.vision.purifiers.clp.held_out_accuracy", lambda *_: 0.0)
    purified = CLP(u=0.5).purify(toy_view, generator=child(0))
    assert tried[0] == 0.5
    assert len(tried) > 1
    assert any("would have cost more" in note for note in purified.notes)
    tried.clear()
    CLP(u=0.5, u_step=0.0).purify(toy_view, generator=child(0))
    assert tried == [0.5]


@pytest.mark.parametrize("counted", ["epoch", "channels"])
def test_the_history_begins_with_the_given_model(counted: Unit, toy_view: DefenderView) -> None:
    with PurifyRun(view=toy_view, holdout=0.2, generator=child(0)) as repair:
        repair.note(toy_view.model, HistoryEntry(count=3, unit=counted))
    purified = repair.result(toy_view.model)
    assert [(entry.unit, entry.count) for entry in purified.history] == [(counted, 0), (counted, 3)]
    assert purified.given == HistoryEntry(count=0, unit=counted, clean_accuracy=repair.before)
    assert purified.selected == 1
