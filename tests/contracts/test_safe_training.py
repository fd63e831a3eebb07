"""What every safe trainer keeps, whatever it is.

A trainer new in the catalog is tested with its defaults; ``SMALL`` gives settings that are quicker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from lustral.catalog import SAFE_TRAINERS
from lustral.core.history import HistoryEntry
from lustral.core.randomness import child
from lustral.core.records import Progress
from lustral.vision.models.classifier import Classifier
from lustral.vision.models.networks.small_cnn import SmallCNN
from lustral.vision.records import ImageSet, Sifted, Trained, TrainingView
from lustral.vision.safe_training import ABL, DST, PlainTraining, SiftFirst, TrapAndReplace
from lustral.vision.sifters import FCT, Combined, EarlyLoss
from passes import counting
from toy import clean_images, toy_images, toy_trainer

SMALL: dict[str, Callable[[], Any]] = {
    "abl": lambda: ABL(
        sifter=EarlyLoss(trainer=toy_trainer(epochs=1, augment=None), least_steps=1),
        trainer=toy_trainer(epochs=1),
        unlearner=toy_trainer(epochs=2, learning_rate=1e-3),
    ),
    "d_st": lambda: DST(
        sifter=FCT(trainer=toy_trainer(epochs=1, augment=None), least_steps=1, intra_epochs=1, intra_least_steps=1),
        epochs=1,
        least_steps=1,
        projection=16,
        head_least_steps=1,
    ),
    "plain": lambda: PlainTraining(trainer=toy_trainer(epochs=1)),
    "sift_first": lambda: SiftFirst(sifter=Combined(trainer=toy_trainer(epochs=1)), trainer=toy_trainer(epochs=1)),
    "trap_and_replace": lambda: TrapAndReplace(
        trainer=toy_trainer(epochs=1), head_trainer=toy_trainer(epochs=1, batch_size=16)
    ),
}


def build(generator: Generator) -> nn.Module:
    """Build a network without trying it on an image, as ``build_classifier`` does: that pass would be counted."""
    with torch.random.fork_rng([]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        return Classifier(SmallCNN(7, 3, 8), [0.5] * 3, [0.25] * 3, num_classes=7)


def view_of(data: ImageSet | None = None, **changes: Any) -> TrainingView:
    settings = {
        "untrusted": toy_images(280, seed=0) if data is None else data,
        "clean": clean_images(70),
        "build_model": build,
    }
    return TrainingView(**{**settings, **changes})


def train(name: str, view: TrainingView, *, seed: int = 1, on_progress: Any = None) -> Trained:
    method = SMALL.get(name, SAFE_TRAINERS[name])()
    found: Trained = method.train(view, generator=child(seed), on_progress=on_progress)
    return found


@dataclasses.dataclass(kw_only=True)
class Run:
    """What one run of a trainer returned, what it reported on the way, and the image passes it took."""

    result: Trained
    reports: list[Progress]
    passes: float


@pytest.fixture(scope="module")
def observed() -> Callable[[str], Run]:
    """Give each trainer's run on clean toy images; run once and kept."""
    kept: dict[str, Run] = {}

    def result(name: str) -> Run:
        if name not in kept:
            reports: list[Progress] = []
            with counting((3, 12, 12), any_size=True) as thirds:
                found = train(name, view_of(), on_progress=reports.append)
            kept[name] = Run(result=found, reports=reports, passes=thirds[0] / 3)
        return kept[name]

    return result


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", sorted(SAFE_TRAINERS))
def test_equal_seeds_give_equal_weights_and_others_do_not(name: str, observed: Callable[[str], Run]) -> None:
    one = weights(observed(name).result.model)
    again, other = weights(train(name, view_of()).model), weights(train(name, view_of(), seed=2).model)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", sorted(SAFE_TRAINERS))
def test_the_model_is_the_wanted_network_ready_for_use(name: str, observed: Callable[[str], Run]) -> None:
    model = observed(name).result.model
    wanted = build(child(0))
    assert type(model) is type(wanted)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in wanted.state_dict().items()}
    assert not any(module.training for module in model.modules())
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cpu")}
    for parameter in model.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
        assert bool(torch.isfinite(parameter).all())
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert model(torch.rand(2, 3, 12, 12)).shape == (2, 7)


@pytest.mark.parametrize("name", sorted(SAFE_TRAINERS))
def test_the_history_tells_of_every_epoch(name: str, observed: Callable[[str], Run]) -> None:
    history = observed(name).result.history
    assert history
    for entry in history:
        assert HistoryEntry.from_dict(entry.to_dict()) == entry
        assert entry.loss is not None
    assert history[-1].clean_accuracy is not None
    assert 0 <= history[-1].clean_accuracy <= 1


@pytest.mark.parametrize("name", sorted(SAFE_TRAINERS))
def test_progress_is_reported(name: str, observed: Callable[[str], Run]) -> None:
    reports = observed(name).reports
    assert reports
    for report in reports:
        assert report.stage
        assert 0 <= report.done <= report.total
    assert reports[-1].done == reports[-1].total


@pytest.mark.parametrize("name", sorted(SAFE_TRAINERS))
def test_every_pass_of_every_network_is_counted(name: str, observed: Callable[[str], Run]) -> None:
    seen = observed(name)
    assert seen.passes > 0
    assert seen.result.cost.image_passes == pytest.approx(seen.passes)
    assert seen.result.cost.seconds > 0
    assert seen.result.cost.clean_images == 70


@pytest.mark.parametrize("name", sorted(SAFE_TRAINERS))
def test_what_it_found_has_an_entry_for_each_image(name: str, observed: Callable[[str], Run]) -> None:
    sifted: Sifted | None = observed(name).result.sifted
    if sifted is not None:
        assert sifted.scores.shape == sifted.flagged.shape == (280,)
        assert sifted.flagged.dtype == torch.bool


@pytest.mark.parametrize("name", sorted(SAFE_TRAINERS))
def test_the_view_and_the_global_stream_are_left_alone(name: str) -> None:
    model = build(child(5)).train()
    view = view_of(model=model)
    sets = [view.untrusted, view.clean]
    before = [tensor.clone() for data in sets if isinstance(data, ImageSet) for tensor in (data.images, data.labels)]
    given, random_state = weights(model), torch.random.get_rng_state()
    trained = train(name, view)
    after = [tensor for data in sets if isinstance(data, ImageSet) for tensor in (data.images, data.labels)]
    assert len(before) == 4
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert all(torch.equal(given[key], value) for key, value in model.state_dict().items())
    assert model.training
    assert trained.model is not model
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("name", sorted(SAFE_TRAINERS))
@pytest.mark.parametrize(("count", "message"), [(0, "at least|empty"), (1, "at least"), (20, "single class|at least")])
def test_useless_sets_are_refused(name: str, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(name, view_of(clean_images(280).subset(torch.arange(count))))


@pytest.mark.parametrize("name", sorted(SAFE_TRAINERS))
def test_settings_show_in_the_repr_and_are_frozen(name: str) -> None:
    method = SAFE_TRAINERS[name]()
    for item in dataclasses.fields(method):  # type: ignore[arg-type]
        assert f"{item.name}=" in repr(method)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, item.name, None)
    assert SAFE_TRAINERS[name]() == method


@pytest.mark.parametrize("name", sorted(SAFE_TRAINERS))
def test_the_passes_are_said_beforehand(name: str) -> None:
    method: Any = SAFE_TRAINERS[name]()
    assert method.estimated_passes(20_000) > method.estimated_passes(2_000) > 0
