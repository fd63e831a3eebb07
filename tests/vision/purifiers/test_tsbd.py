"""TSBD: what is ranked, what is reset, how much."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lustral.core.history import HistoryEntry
from lustral.core.randomness import child
from lustral.training import Trainer
from lustral.vision.purifiers import TSBD
from lustral.vision.purifiers.tsbd import most_moved, reset, weight_changes
from lustral.vision.records import DefenderView
from lustral.vision.repair.clean_unlearning import forgotten, unlearn_clean
from lustral.vision.repair.run import PurifyRun
from lustral.vision.repair.selection import held_out_accuracy


def changes(seed: int) -> dict[str, torch.Tensor]:
    stream = child(seed)
    return {"a": torch.rand(6, 9, generator=stream), "b": torch.rand(4, 20, generator=stream)}


@given(st.integers(0, 1000), st.floats(0.05, 1), st.floats(0.05, 1))
@settings(max_examples=50, deadline=None)
def test_the_most_moved_weights_of_the_most_moved_neurons(seed: int, neurons: float, weights: float) -> None:
    moved = changes(seed)
    chosen = most_moved(moved, neurons, weights)
    totals = sorted(((float(row.sum()), name, k) for name, m in moved.items() for k, row in enumerate(m)), reverse=True)
    rows = {(name, k) for _, name, k in totals[: int(neurons * len(totals))]}
    touched = {(name, k) for name, m in chosen.items() for k, row in enumerate(m) if bool(row.any())}
    assert touched <= rows
    pool = torch.cat([moved[name][k] for name, k in sorted(rows)]) if rows else torch.zeros(0)
    keep = int(weights * len(pool))
    assert sum(int(m.sum()) for m in chosen.values()) == keep  # draws have no ties
    if keep:
        least = min(float(moved[name][mask].min()) for name, mask in chosen.items() if bool(mask.any()))
        left = [float(v) for name, k in rows for v in moved[name][k][~chosen[name][k]]]
        assert all(value <= least for value in left)


def test_reset_touches_nothing_else() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    before = copy.deepcopy(model.state_dict())
    mask = torch.zeros(4, 27, dtype=torch.bool)
    mask[1, 3:7] = True
    reset(model, {"0": mask})
    after = model.state_dict()
    assert torch.equal(after["0.weight"].flatten(1)[mask], torch.zeros(4))
    assert torch.equal(after["0.weight"].flatten(1)[~mask], before["0.weight"].flatten(1)[~mask])
    assert all(torch.equal(after[name], before[name]) for name in before if name != "0.weight")


def test_changes_are_absolute_and_by_neuron() -> None:
    one, other = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        one[0].weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
        other[0].weight.copy_(torch.tensor([[0.0, 4.0], [0.0, 0.0]]))
    assert weight_changes(one, other, ("0",))["0"].tolist() == [[1.0, 2.0], [0.0, 0.0]]


def test_forgetting_fits_any_number_of_classes() -> None:
    assert forgotten(0.9, 10, 0.0) == 0.1  # the published bound
    assert forgotten(0.9, 5, 0.0) == 0.2
    assert forgotten(0.6, 200, 0.05) == pytest.approx(0.005 + 0.05 * 0.595)
    assert forgotten(0.1, 5, 0.05) == 0.2  # below chance already


def test_unlearning_stops_when_the_task_is_forgotten(toy_view: DefenderView) -> None:
    trainer = Trainer(
        epochs=30, batch_size=64, learning_rate=1e-3, schedule="constant", weight_decay=0.0, clip_norm=10.0
    )
    model, accuracy, epochs = unlearn_clean(
        toy_view.model, toy_view.clean, trainer, share_left=0.05, generator=child(0)
    )
    assert accuracy == held_out_accuracy(model, toy_view.clean) <= forgotten(1.0, 7, 0.05)
    assert 1 <= epochs <= 150
    assert held_out_accuracy(toy_view.model, toy_view.clean) > 0.9


@pytest.mark.parametrize(("admissible", "wanted"), [(0, 0.1), (1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)])
def test_bisection_finds_the_largest_admissible_share(
    admissible: int, wanted: float, toy_view: DefenderView, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios, tried = (0.1, 0.2, 0.3, 0.4), []

    def repaired(self: TSBD, repair: PurifyRun, moved: Any, ratio: float) -> nn.Module:
        tried.append(ratio)
        accuracy = 0.9 if ratios.index(ratio) < admissible else 0.5
        repair.history.append(HistoryEntry(count=1, parts=(("neuron_ratio", ratio),), clean_accuracy=accuracy))
        return nn.Identity()

    monkeypatch.setattr(TSBD, "repaired", repaired)
    monkeypatch.setattr(
        PurifyRun,
        "note",
        lambda self, model, entry: self.history.append(dataclasses.replace(entry, clean_accuracy=0.9)),
    )
    repair = PurifyRun(view=toy_view, holdout=0.2, generator=child(0))
    _, ratio, met = TSBD(neuron_ratios=ratios)._choose(repair, {}, floor=0.8)
    assert (ratio, met) == (wanted, admissible > 0)
    assert len(tried) == len(set(tried)) <= 3
    assert repair.history[-1].parts == (("neuron_ratio", wanted),)


def test_impossible_settings_are_refused() -> None:
    for wrong in ({"neuron_ratios": ()}, {"neuron_ratios": (1.5,)}, {"weight_ratio": 0.0}, {"radius": 0.0}):
        with pytest.raises(ValueError, match="expected"):
            TSBD(**wrong)
