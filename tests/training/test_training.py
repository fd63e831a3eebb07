"""The one training loop."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from lustral.core.randomness import child
from lustral.core.records import Batch, Progress
from lustral.training import (
    Augment,
    EpochReport,
    Trainer,
    TrainingDiverged,
    adam_step_ratio,
    autocast,
    cross_entropy,
    frozen,
    learning_rate_factor,
    set_training_mode,
)
from lustral.vision.models import Classifier, SmallCNN, build_classifier
from lustral.vision.records import ImageSet
from toy import NUM_CLASSES, toy_images

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 16, "learning_rate": 0.05}


@pytest.fixture(scope="module")
def data() -> ImageSet:
    return toy_images(70, seed=3)


@pytest.fixture
def model() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(SmallCNN(NUM_CLASSES, width=4), mean=(0.5,) * 3, std=(0.25,) * 3)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_equal_seeds_give_equal_weights(model: Classifier, data: ImageSet) -> None:
    trainer = Trainer(**QUICK, augment=Augment(crop_padding=1, rotation=5, erasing=0.2))
    one, again, other = (trainer.fit(model, data, generator=child(seed)) for seed in (1, 1, 2))
    assert same(state(one), state(again))
    assert not same(state(one), state(other))


def test_the_given_model_is_not_changed(model: Classifier, data: ImageSet) -> None:
    model.network.features[0].eval()  # an odd mix of modes must come back as it was
    before, modes = state(model), [m.training for m in model.modules()]
    trained = Trainer(**QUICK).fit(model, data, generator=child(1))
    assert same(state(model), before)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert trained is not model
    assert not trained.training
    for name, value in trained.state_dict().items():
        assert not torch.equal(value, before[name]), f"{name} did not move"


def test_training_learns(model: Classifier, data: ImageSet) -> None:
    losses: list[float] = []
    Trainer(epochs=8, batch_size=16, learning_rate=0.05).fit(
        model, data, generator=child(1), on_epoch=lambda report: losses.append(report.loss)
    )
    assert losses[-1] < 0.75 * losses[0]


def test_the_objective_gets_model_batch_and_stream(model: Classifier, data: ImageSet) -> None:
    seen: list[tuple[tuple[int, ...], Tensor, float]] = []

    def objective(student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
        assert student is not model
        assert student.training
        assert batch.inputs.dtype == torch.float32
        assert 0 <= float(batch.inputs.min()) <= float(batch.inputs.max()) <= 1
        assert stream.device.type == "cpu"
        seen.append((tuple(batch.inputs.shape), batch.labels, float(torch.rand((), generator=stream))))
        return cross_entropy(student, batch, stream)

    Trainer(**QUICK).fit(model, data, generator=child(1), objective=objective)
    assert [shape for shape, _, _ in seen] == [(16, 3, 12, 12)] * 8  # 70 images: 4 full batches, the rest left out
    assert len({draw for _, _, draw in seen}) == 8
    assert not torch.equal(seen[0][1], seen[4][1])  # each epoch has its own order


def test_draws_of_the_objective_shift_nothing_else(model: Classifier, data: ImageSet) -> None:
    def greedy(student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
        torch.rand(100, generator=stream)
        return cross_entropy(student, batch, stream)

    trainer = Trainer(**QUICK, augment=Augment(crop_padding=1))
    plain = trainer.fit(model, data, generator=child(1), objective=cross_entropy)
    assert same(state(plain), state(trainer.fit(model, data, generator=child(1), objective=greedy)))
    assert same(state(plain), state(trainer.fit(model, data, generator=child(1))))


def test_an_objective_can_keep_a_loss_for_each_image(model: Classifier, data: ImageSet) -> None:
    steps, latest = [], torch.full((len(data),), math.nan)

    def remembering(student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
        assert torch.equal(batch.labels, data.labels[batch.index])
        each = nn.functional.cross_entropy(student(batch.inputs).float(), batch.labels, reduction="none")
        latest[batch.index] = each.detach()
        steps.append(batch.index)
        return each.mean()

    still = Trainer(epochs=1, batch_size=14, learning_rate=1e-12, precision="float32", batch_norm="frozen")
    still = replace(still, augment=Augment(flip=False, crop_padding=0))
    still.fit(model, data, generator=child(1), objective=remembering)
    assert sorted(torch.cat(steps).tolist()) == list(range(70))
    assert not torch.equal(torch.cat(steps), torch.arange(70))
    with torch.no_grad():
        logits = model.eval()(next(data.batches(70)).inputs)
    assert torch.allclose(latest, nn.functional.cross_entropy(logits, data.labels, reduction="none"), atol=1e-4)


def test_a_small_set_is_one_partial_batch(model: Classifier, data: ImageSet) -> None:
    sizes: list[int] = []

    def objective(student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
        sizes.append(len(batch.inputs))
        return cross_entropy(student, batch, stream)

    Trainer(**QUICK).fit(model, data.subset(torch.arange(5)), generator=child(1), objective=objective)
    assert sizes == [5, 5]


@pytest.mark.parametrize(
    ("schedule", "golden"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("one_cycle", [0.0, 0.5, 1.0, 0.5, 0.0]),
        ("cosine", [0.0, 0.5, 1.0, 0.5, 0.0]),
    ],
)
def test_schedules_by_hand(schedule: str, golden: list[float]) -> None:
    factors = [learning_rate_factor(progress, schedule, 0.2) for progress in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert factors == pytest.approx(golden)
    assert learning_rate_factor(0.4, "cosine", 0.2) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate_factor(0.0, "cosine", 0.0) == 1.0


def test_the_schedule_reaches_the_optimizer(model: Classifier, data: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step

    def recording(optimizer: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", recording)
    Trainer(epochs=1, batch_size=14, learning_rate=0.1, warmup=0.4).fit(model, data, generator=child(1))
    assert rates == pytest.approx([0.05, 0.1, 0.2 / 3, 0.1 / 3, 0.0])


@pytest.mark.parametrize("optimizer", ["sgd", "heavy_ball", "adam", "amsgrad", "adamw", "rmsprop"])
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
def test_every_optimizer_and_schedule_takes_a_step(
    model: Classifier, data: ImageSet, optimizer: Any, schedule: Any
) -> None:
    trainer = Trainer(epochs=1, batch_size=32, optimizer=optimizer, schedule=schedule, learning_rate=1e-2)
    trained = trainer.fit(model, data, generator=child(1))
    for before, after in zip(model.parameters(), trained.parameters(), strict=True):
        assert bool(after.isfinite().all())
        assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("optimizer", "kind", "settings"),
    [
        ("sgd", torch.optim.SGD, {"nesterov": True, "momentum": 0.9}),
        ("heavy_ball", torch.optim.SGD, {"nesterov": False, "momentum": 0.9}),
        ("adam", torch.optim.Adam, {"amsgrad": False, "betas": (0.9, 0.999)}),
        ("amsgrad", torch.optim.Adam, {"amsgrad": True, "betas": (0.9, 0.999)}),
        ("adamw", torch.optim.AdamW, {"amsgrad": False, "betas": (0.9, 0.999)}),
        ("rmsprop", torch.optim.RMSprop, {"alpha": 0.99, "momentum": 0.9}),
    ],
)
def test_an_optimizer_is_what_its_name_says(
    model: Classifier, optimizer: Any, kind: type, settings: dict[str, Any]
) -> None:
    made = Trainer(optimizer=optimizer).optimizer_for(model)
    assert type(made) is kind
    assert {name: made.defaults[name] for name in settings} == settings


@pytest.mark.parametrize("optimizer", ["sgd", "heavy_ball", "adam", "amsgrad", "adamw", "rmsprop"])
def test_weight_decay_is_for_matrices_and_kernels_only(model: Classifier, optimizer: Any) -> None:
    groups = Trainer(optimizer=optimizer, weight_decay=0.1).optimizer_for(model).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for parameter in model.parameters():
        assert decay[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0)


def test_weight_decay_shrinks_by_hand(model: Classifier, data: ImageSet) -> None:
    def nothing(student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
        return sum((p.sum() for p in student.parameters()), torch.zeros(())) * 0

    trainer = Trainer(epochs=1, batch_size=70, learning_rate=0.5, momentum=0.0, weight_decay=0.1, schedule="constant")
    trained = trainer.fit(model, data, generator=child(1), objective=nothing)
    for before, after in zip(model.parameters(), trained.parameters(), strict=True):
        assert torch.allclose(after, before * (0.95 if before.ndim > 1 else 1.0), atol=1e-7)


def test_parameters_without_gradient_stay(model: Classifier, data: ImageSet) -> None:
    model.network.linear.requires_grad_(False)
    trained = Trainer(**QUICK).fit(model, data, generator=child(1))
    assert torch.equal(trained.network.linear.weight, model.network.linear.weight)  # type: ignore[union-attr]
    assert not torch.equal(trained.network.features[0].weight, model.network.features[0].weight)  # type: ignore


def test_clip_norm_bounds_the_step(model: Classifier, data: ImageSet) -> None:
    trainer = Trainer(
        epochs=1, batch_size=70, learning_rate=1.0, momentum=0.0, weight_decay=0.0, schedule="constant", clip_norm=1e-3
    )
    trained = trainer.fit(model, data, generator=child(1))
    moved = [(a - b).detach().norm() ** 2 for a, b in zip(trained.parameters(), model.parameters(), strict=True)]
    assert float(torch.stack(moved).sum().sqrt()) == pytest.approx(1e-3, rel=1e-2)


def test_a_nan_loss_stops_with_advice(model: Classifier, data: ImageSet) -> None:
    def broken(student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
        return cross_entropy(student, batch, stream) * math.nan

    with pytest.raises(TrainingDiverged, match=r"became nan at step 1: lower the learning rate \(now 0.05\)"):
        Trainer(**QUICK).fit(model, data, generator=child(1), objective=broken)


def test_a_loss_that_breaks_later_is_noticed_within_its_epoch(model: Classifier, data: ImageSet) -> None:
    steps: list[int] = []

    def breaks_at_step_3(student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
        steps.append(1)
        return cross_entropy(student, batch, stream) * (math.inf if len(steps) == 3 else 1.0)

    reports: list[EpochReport] = []
    with pytest.raises(TrainingDiverged, match=r"at step [34]"):
        Trainer(**QUICK).fit(model, data, generator=child(1), objective=breaks_at_step_3, on_epoch=reports.append)
    assert reports == []


def test_an_empty_set_is_refused(model: Classifier, data: ImageSet) -> None:
    with pytest.raises(ValueError, match="at least one training image; the set is empty"):
        Trainer().fit(model, data.subset(torch.zeros(70, dtype=torch.bool)), generator=child(1))


def test_frozen_batch_norm_keeps_running_statistics_and_uses_them(model: Classifier, data: ImageSet) -> None:
    inputs: list[bool] = []

    def objective(student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
        inputs.append(any(m.training for m in student.modules() if isinstance(m, nn.BatchNorm2d)))
        return cross_entropy(student, batch, stream)

    def look(report: EpochReport) -> None:
        report.model.eval()  # a callback that forgets to switch back must not matter

    trained = Trainer(**QUICK, batch_norm="frozen").fit(
        model, data, generator=child(1), objective=objective, on_epoch=look
    )
    assert not any(inputs)
    before, after = state(model), state(trained)
    running = [name for name in before if "running" in name or "tracked" in name]
    assert running
    for name in before:
        assert torch.equal(before[name], after[name]) == (name in running)


def test_training_mode_is_restored_after_the_callback(model: Classifier, data: ImageSet) -> None:
    modes: list[bool] = []

    def objective(student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
        modes.append(all(m.training for m in student.modules()))
        return cross_entropy(student, batch, stream)

    def look(report: EpochReport) -> None:
        report.model.eval()

    Trainer(**QUICK).fit(model, data, generator=child(1), objective=objective, on_epoch=look)
    assert all(modes)
    set_training_mode(model, "frozen")
    assert model.training
    assert not model.network.features[1].training


def test_callbacks_tell_epochs_and_progress(model: Classifier, data: ImageSet) -> None:
    epochs: list[EpochReport] = []
    progress: list[Progress] = []
    Trainer(**QUICK).fit(
        model, data, generator=child(1), on_epoch=epochs.append, on_progress=progress.append, stage="unlearning"
    )
    assert [(report.epoch, report.epochs) for report in epochs] == [(1, 2), (2, 2)]
    assert all(report.images_per_second > 0 and report.loss > 0 for report in epochs)
    assert progress[0].done == 1
    assert progress[0].values.keys() == {"images_per_second", "loss"}
    assert (progress[-1].done, progress[-1].total) == (8, 8)
    assert {(report.stage, report.total) for report in progress} == {("unlearning", 8)}
    assert [report.done for report in progress] == sorted(report.done for report in progress)


def test_the_mean_loss_of_an_epoch_by_hand(model: Classifier, data: ImageSet) -> None:
    losses = iter([1.0, 2.0, 3.0, 6.0])

    def scripted(student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
        return cross_entropy(student, batch, stream) * 0 + next(losses)

    reports: list[EpochReport] = []
    Trainer(epochs=1, batch_size=16).fit(model, data, generator=child(1), objective=scripted, on_epoch=reports.append)
    assert reports[0].loss == pytest.approx(3.0)


def test_no_epochs_give_an_equal_model(model: Classifier, data: ImageSet) -> None:
    assert same(state(Trainer(epochs=0).fit(model, data, generator=child(1))), state(model))


def test_both_precisions_train_in_float32_weights(model: Classifier, data: ImageSet) -> None:
    seen: dict[str, torch.dtype] = {}
    for precision in ("float32", "bfloat16"):

        def objective(student: nn.Module, batch: Batch, stream: Generator, name: str = precision) -> Tensor:
            logits = student(batch.inputs)
            seen[name] = logits.dtype
            return nn.functional.cross_entropy(logits.float(), batch.labels)

        trainer = Trainer(**QUICK, precision=precision)  # type: ignore[arg-type]
        trained = trainer.fit(model, data, generator=child(1), objective=objective)
        assert {p.dtype for p in trained.parameters()} == {torch.float32}
        assert all(bool(p.isfinite().all()) for p in trained.parameters())
    assert seen == {"float32": torch.float32, "bfloat16": torch.bfloat16}


def test_autocast_can_be_forced_either_way() -> None:
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    with autocast(torch.device("cpu"), "bfloat16"):
        assert layer(x).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), "float32"):
        assert layer(x).dtype == torch.float32
    assert layer(x).dtype == torch.float32


def test_memory_layout_changes_nothing_but_rounding(model: Classifier, data: ImageSet) -> None:
    one, other = (
        Trainer(epochs=1, batch_size=35, learning_rate=0.01, channels_last=nhwc, precision="float32").fit(
            model, data, generator=child(1)
        )
        for nhwc in (True, False)
    )
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_label_smoothing_reaches_the_default_objective(model: Classifier, data: ImageSet) -> None:
    losses: dict[float, float] = {}
    for smoothing in (0.0, 0.5):
        reports: list[EpochReport] = []
        trainer = Trainer(epochs=1, batch_size=70, label_smoothing=smoothing, precision="float32")
        trainer.fit(model, data, generator=child(1), on_epoch=reports.append)
        losses[smoothing] = reports[0].loss
    student = copy.deepcopy(model).train()
    x, y, _ = next(data.batches(70))
    for smoothing, loss in losses.items():
        expected = nn.functional.cross_entropy(student(x), y, label_smoothing=smoothing)
        assert loss == pytest.approx(expected.item(), abs=1e-4)


def test_global_random_numbers_are_neither_used_nor_moved(data: ImageSet) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 8), nn.Dropout(0.5), nn.Linear(8, NUM_CLASSES))
    before = torch.random.get_rng_state()
    one = Trainer(**QUICK).fit(model, data, generator=child(1))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(10)
    assert same(state(one), state(Trainer(**QUICK).fit(model, data, generator=child(1))))  # dropout too is seeded


def test_frozen_restores_modes_and_gradients_even_after_an_error(model: Classifier) -> None:
    model.train()
    model.network.features[1].eval()
    model.network.linear.bias.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]

    def fail_while_frozen() -> None:
        with frozen(model) as held:
            assert held is model
            assert not any(m.training for m in model.modules())
            assert not any(p.requires_grad for p in model.parameters())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_while_frozen()
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == needs


@pytest.mark.parametrize(
    ("num_images", "least_steps", "batch_size", "epochs"),
    [(100, 40, 25, 10), (100, 1, 25, 6), (10_000, 40, 128, 6), (3, 9, 2, 9), (0, 5, 2, 6)],
)
def test_small_sets_stretch_the_recipe(num_images: int, least_steps: int, batch_size: int, epochs: int) -> None:
    recipe = Trainer(epochs=6, batch_size=128, learning_rate=0.03).fitted_to_size(num_images, least_steps)
    assert (recipe.batch_size, recipe.epochs, recipe.learning_rate) == (batch_size, epochs, 0.03)


def test_the_reach_by_hand() -> None:
    two = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(4, 6, 2, bias=False))
    nn.init.constant_(two[0].weight, -0.5)
    nn.init.constant_(two[1].weight, 0.25)
    assert adam_step_ratio(two) == pytest.approx((12 * 2 / 0.5 + 96 * 4 / 0.25) / 108)
    assert adam_step_ratio(nn.BatchNorm2d(3)) == 0
    nn.init.zeros_(two[0].weight)
    assert adam_step_ratio(two) == pytest.approx(4 / 0.25)  # what is all zero tells no size
    token = nn.Module()
    token.token = nn.Parameter(torch.full((1, 1, 9), 1e-6))
    assert adam_step_ratio(token) == 0


def test_the_rate_is_bounded_by_the_reach(model: Classifier) -> None:
    recipe, far = Trainer(learning_rate=0.01), adam_step_ratio(model)
    assert recipe.with_rate_cap(model, 0.005 * far).learning_rate == pytest.approx(0.005)
    assert recipe.with_rate_cap(model, 0.02 * far) == recipe
    assert recipe.with_rate_cap(model, None) == recipe
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.25)  # a quarter of the weights: a quarter of the rate
    assert recipe.with_rate_cap(model, 0.005 * far).learning_rate == pytest.approx(0.005 / 4)
    nn.init.zeros_(next(p for p in model.parameters() if p.ndim > 1))
    assert recipe.with_rate_cap(model, 0.005 * far).learning_rate < 0.005  # a pruned layer does not lift the bound
    assert recipe.with_rate_cap(nn.BatchNorm2d(3), 0.005 * far) == recipe


def test_wider_networks_get_lower_rates_in_inverse_proportion() -> None:
    rates = []
    for width in (8, 16, 32):
        network = build_classifier(
            f"preact_resnet18:width={width}",
            num_classes=10,
            image_shape=(3, 32, 32),
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            generator=child(0),
        )
        rates.append(Trainer(learning_rate=1.0).with_rate_cap(network, 0.7).learning_rate)
    assert rates[0] / rates[1] == pytest.approx(2, rel=0.05)
    assert rates[1] / rates[2] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"batch_size": 0}, {"learning_rate": 0.0}, {"warmup": 1.0}])
def test_impossible_trainers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Trainer(**wrong)
