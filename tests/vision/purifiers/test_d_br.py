"""D-BR: its rounds and losses, which images it takes, which round it keeps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lustral.core.cost import CostMeter
from lustral.core.randomness import child
from lustral.core.records import Cost
from lustral.vision.attacks import BadNets
from lustral.vision.evaluation import evaluate, oracle_round
from lustral.vision.purifiers import DBR
from lustral.vision.purifiers.d_br import NOTHING_FOUND, Rounds, unlearning_objective
from lustral.vision.records import DefenderView, ImageSet, Sifted, TrainingView, Victim
from lustral.vision.repair.selection import Selection
from lustral.vision.sifters import FCT, Combined
from lustral.vision.suspicion.scoring_model import untrained_copy
from toy import CornerSifter, as_batch, clean_images, gentle_trainer, toy_images

NO_COST = Cost(seconds=0.0, image_passes=0.0, peak_memory_bytes=0, clean_images=0)
QUICK = DBR(sifter=CornerSifter(), trainer=gentle_trainer(epochs=10, learning_rate=0.01), least_steps=60)


@pytest.fixture(scope="module")
def view(backdoored: Victim) -> DefenderView:
    """The backdoored toy network with part of a training set that has its trigger."""
    poisoned = BadNets(target_label=4, size=2, poison_rate=0.1).poison(toy_images(700, seed=0), generator=child(8))
    return DefenderView(model=backdoored.model, clean=clean_images(), untrusted=poisoned.data)


def sifted(scores: Tensor, above: float) -> Sifted:
    return Sifted(scores=scores, flagged=scores > above, threshold=above, basis="known", cost=NO_COST)


def test_a_round_is_one_pass_over_the_poisoned_and_then_one_over_the_clean() -> None:
    data = toy_images(50, seed=0)
    rounds = Rounds(poisoned=data.subset(torch.arange(20)), clean=data.subset(torch.arange(20, 50)))
    batches = list(rounds.batches(8, generator=child(0)))
    assert [len(batch.labels) for batch in batches] == [8, 8, 4, 8, 8, 8, 6]
    order = torch.cat([batch.index for batch in batches])
    assert sorted(order[:20].tolist()) == list(range(20))
    assert sorted(order[20:].tolist()) == list(range(20, 50))
    assert torch.equal(torch.cat([batch.labels for batch in batches]), data.labels[order])
    assert [len(batch.labels) for batch in rounds.batches(8, drop_last=True)] == [8, 8, 8, 8, 8]
    assert (len(rounds), rounds.num_classes) == (50, 7)


def test_the_loss_climbs_on_poisoned_images_up_to_a_cap_and_falls_on_clean_ones() -> None:
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0], [1.0, 0.0], [0.0, 2.0]], requires_grad=True)

    class Given(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return logits

    labels = torch.zeros(4, dtype=torch.int64)
    losses = F.cross_entropy(logits, labels, reduction="none").detach()
    cap = 2.0
    loss = unlearning_objective(2, cap)(Given(), as_batch(torch.zeros(4, 3, 2, 2), labels), child(0))
    assert float(losses[1]) > cap
    assert loss.item() == pytest.approx(float((-losses[0] - cap + losses[2] + losses[3]) / 4))
    (slope,) = torch.autograd.grad(loss, logits)
    assert float(slope[0, 0]) > 0  # a step down this gradient lowers the logit of a poisoned image's label
    assert float(slope[1].abs().max()) == 0.0
    assert float(slope[2, 0]) < 0


def test_the_default_sifter_can_take_the_place_of_fct(view: DefenderView) -> None:
    class Nothing(Combined):
        def sift(self, view: TrainingView, **given: Any) -> Sifted:
            return sifted(torch.zeros(len(view.untrusted)), above=1.0)

    result = DBR(combined=Nothing()).purify(view, generator=child(0))
    assert NOTHING_FOUND in result.notes


def test_quotas_bound_what_was_flagged_and_nothing_flagged_is_nothing_taken() -> None:
    scores = torch.arange(100.0)
    method = DBR(sifter=FCT())
    clean, poisoned = method.chosen(sifted(scores, 97.5))
    assert (clean.tolist(), poisoned.tolist()) == (list(range(20)), [98, 99])
    assert method.chosen(sifted(scores, 50.0))[1].tolist() == [95, 96, 97, 98, 99]
    published = DBR.published()
    assert published.chosen(sifted(scores, 97.5))[1].tolist() == [95, 96, 97, 98, 99]
    for each in (method, published):
        assert len(each.chosen(sifted(scores, math.inf))[1]) == 0
    assert method.chosen(sifted(-scores, -1000.0))[0].tolist() == []  # what is flagged is not relearned


@pytest.mark.parametrize(
    ("poisoned", "clean", "size", "epochs"),
    [(2500, 10000, 128, 20), (500, 2000, 125, 50), (40, 160, 16, 100), (3, 9, 3, 200)],
)
def test_small_sets_get_smaller_batches_and_more_rounds(poisoned: int, clean: int, size: int, epochs: int) -> None:
    recipe = DBR().recipe(poisoned, clean)
    assert (recipe.batch_size, recipe.epochs) == (size, epochs)
    published = DBR.published().recipe(poisoned, clean)
    assert (published.batch_size, published.epochs) == (min(128, poisoned), 20)
    assert published.learning_rate == 1e-4


def test_the_backdoor_goes_and_every_pass_is_counted(view: DefenderView, backdoored: Victim) -> None:
    test, seen = toy_images(420, seed=1), list[int]()
    purified = QUICK.purify_watched(view, generator=child(1), on_round=lambda model: seen.append(id(model)))
    assert len(seen) == len(purified.history) - 1  # the given model comes first
    record = evaluate(backdoored, purified.model, test, generator=child(0))
    assert record.asr.value < 0.3 < 0.95 < backdoored.metrics["asr"]["value"]
    assert record.acc.value > backdoored.metrics["acc"]["value"] - 0.08
    kept = purified.history[purified.selected or 0]
    assert kept.suspects_called is not None
    assert kept.suspects_called < 0.3 < (purified.history[0].suspects_called or 0.0)
    assert purified.cost.image_passes > 700 + 10 * 35
    assert torch.equal(
        QUICK.purify(view, generator=child(1)).model.network.linear.weight, purified.model.network.linear.weight
    )


def test_a_clean_training_set_leaves_the_model_as_it_is(benign: Victim) -> None:
    quiet = DefenderView(model=benign.model, clean=clean_images(), untrusted=toy_images(350, seed=0))
    purified = QUICK.purify(quiet, generator=child(1))
    assert purified.selected is None
    assert NOTHING_FOUND in purified.notes
    before, after = benign.model.state_dict(), purified.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(ValueError, match="at least one round"):
        oracle_round(
            lambda watch: QUICK.purify_watched(quiet, generator=child(1), on_round=watch),
            benign,
            toy_images(70, seed=1),
        )


def test_it_asks_for_the_training_set(toy_view: DefenderView) -> None:
    with pytest.raises(ValueError, match=r"untrusted=\.\.\."):
        DBR().purify(toy_view, generator=child(0))


class Answers(nn.Module):
    """Calls as many of the images by their true labels, and by the attacker's, as it is told to."""

    def __init__(self, right: int, fooled: int) -> None:
        super().__init__()
        self.right, self.fooled = right, fooled
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        is_suspect = bool(images.flatten(1).mean() > 0.9)
        hits = torch.arange(len(images)) < (self.fooled if is_suspect else self.right)
        return torch.stack([hits.float(), 1 - hits.float()], 1)


def pictures(value: int) -> ImageSet:
    return ImageSet(
        images=torch.full((100, 3, 4, 4), value, dtype=torch.uint8),
        labels=torch.zeros(100, dtype=torch.int64),
        num_classes=2,
    )


def test_the_last_of_the_most_forgetful_rounds_above_the_floor_is_kept() -> None:
    selection = Selection(held_out=pictures(0), triggers=(), floor=0.80, suspects=pictures(255))
    course = [(95, 90), (90, 20), (85, 5), (84, 5), (60, 0), (92, 30)]
    selection.note_given(Answers(95, 100))
    for right, fooled in course:
        selection.measure(Answers(right, fooled), replace(selection.history[0], count=1))
    assert isinstance(selection.best_model, Answers)
    assert (selection.best_model.right, selection.best_model.fooled) == (84, 5)
    assert [entry.suspects_called for entry in selection.history] == [1.0, 0.9, 0.2, 0.05, 0.05, 0.0, 0.3]
    assert all(entry.recovered_asr is None for entry in selection.history)


def test_an_oracle_picks_the_largest_accuracy_minus_success(backdoored: Victim) -> None:
    test, given = toy_images(140, seed=1), backdoored.model
    blank = untrained_copy(given, generator=child(0)).eval()
    number, found = oracle_round(lambda watch: [watch(blank), watch(given), watch(blank)], backdoored, test)
    chances = [evaluate(backdoored, model, test, generator=child(0)) for model in (blank, given)]
    worth = [record.acc.value - record.asr.value for record in chances]
    assert number == (1 if worth[0] > worth[1] else 2)
    assert found.acc.value == chances[number - 1].acc.value


def test_an_untrained_copy_forgets_weights_and_statistics_and_nothing_else(backdoored: Victim) -> None:
    given, state = backdoored.model, torch.random.get_rng_state()
    one, other, again = (untrained_copy(given, generator=child(seed)) for seed in (1, 2, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    own, new = dict(given.named_parameters()), dict(one.named_parameters())
    assert own.keys() == new.keys()
    assert not any(torch.equal(own[name], value) for name, value in new.items())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    norms = [module for module in one.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(float(norm.running_mean.abs().max()) == 0.0 for norm in norms if norm.running_mean is not None)
    assert torch.equal(one.normalise.mean, given.normalise.mean)
    with CostMeter(given, clean_images=0) as meter:
        one(torch.zeros(2, 3, 12, 12))
    assert meter.cost.image_passes == 0
    with pytest.raises(ValueError, match="draw new weights"):
        untrained_copy(nn.Flatten(), generator=child(0))
