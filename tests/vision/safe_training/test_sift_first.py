"""Sifting first: what is listed is not learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lustral.core.randomness import child
from lustral.core.records import Cost
from lustral.vision.evaluation import evaluate
from lustral.vision.records import Sifted, TrainingView, Victim
from lustral.vision.safe_training import SiftFirst
from toy import toy_images, toy_trainer
from vision.sifters.worlds import training_view


@dataclass(frozen=True)
class Listing:
    """A sifter that lists what it is told."""

    flagged: Tensor

    def sift(self, view: TrainingView, **rest: Any) -> Sifted:
        cost = Cost(seconds=0.0, image_passes=5.0, peak_memory_bytes=0, clean_images=0)
        return Sifted(scores=self.flagged.float(), flagged=self.flagged, threshold=0.5, basis="As told.", cost=cost)


def trained(view: TrainingView, flagged: Tensor, epochs: int = 12) -> Any:
    method = SiftFirst(sifter=Listing(flagged), trainer=toy_trainer(epochs=epochs))  # type: ignore[arg-type]
    return method.train(view, generator=child(3))


def test_what_is_listed_is_not_learnt_and_the_rest_is(backdoored: Victim) -> None:
    assert backdoored.poisoned is not None
    view, truth = training_view(backdoored), backdoored.poisoned.is_poisoned
    found = trained(view, truth)
    rates = evaluate(backdoored, found.model, toy_images(420, seed=5), generator=child(6))
    assert rates.asr.value < 0.2
    assert rates.acc.value > 0.9
    left = len(view.untrusted) - int(truth.sum())
    assert found.cost.image_passes == pytest.approx(5 + 12 * left, rel=0.1)
    assert f"{left:,} images" in found.notes[0]


def test_where_nothing_is_listed_it_is_plain_training(backdoored: Victim) -> None:
    view = training_view(backdoored)
    found = trained(view, torch.zeros(len(view.untrusted), dtype=torch.bool), epochs=1)
    assert found.notes == ("No image is listed as poisoned, so the model learnt from all of them.",)


def test_a_long_list_is_pointed_out_and_one_of_nearly_all_refused(backdoored: Victim) -> None:
    view = training_view(backdoored)
    labels = view.untrusted.labels
    assert "That is much" in trained(view, labels < 3, epochs=1).notes[0]
    with pytest.raises(ValueError, match="fewer than two classes"):
        trained(view, labels > 0, epochs=1)
