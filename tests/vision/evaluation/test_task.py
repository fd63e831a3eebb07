"""Whether a model does its task is asked before anything is searched or trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lustral.catalog import PURIFIERS
from lustral.core.randomness import child
from lustral.core.rates import Rate
from lustral.training import Trainer
from lustral.vision.detectors import weighing
from lustral.vision.erasing import erase
from lustral.vision.evaluation import TaskCheck, UnfitModel, check_task
from lustral.vision.evaluation.task import find_order, looks_untrained
from lustral.vision.inverters.mask_search import FoundMasks
from lustral.vision.inverters.sampling import SampleImages
from lustral.vision.models import Classifier
from lustral.vision.purifiers import BNRefresh, FineTuning
from lustral.vision.records import DefenderView
from toy import quick_detector, toy_images

ORDER = (3, 0, 4, 1, 6, 2, 5)  # class k of the toy world stands at label ORDER[k]


class Changed(nn.Module):
    """A network whose images or logits go through a function."""

    def __init__(
        self,
        network: nn.Module,
        before: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x if self.before is None else self.before(x))
        return logits if self.after is None else self.after(logits)


def misread(view: DefenderView) -> dict[str, DefenderView]:
    """Return the same model and images, taken wrongly in several ways."""
    model, clean = view.model, view.clean
    assert isinstance(model, Classifier)
    moved = torch.tensor(ORDER)[clean.labels]
    return {
        "another mean and std": DefenderView(
            model=Classifier(model.network, [-2.0] * 3, [0.1] * 3).eval(), clean=clean
        ),
        "images in 0 to 1/255": DefenderView(model=model, clean=replace(clean, images=clean.images // 255)),
        "classes in another order": DefenderView(model=model, clean=replace(clean, labels=moved)),
        "labels shuffled": DefenderView(
            model=model,
            clean=replace(clean, labels=clean.labels[torch.randperm(len(clean), generator=child(0, "shuffle"))]),
        ),
        "other images": DefenderView(
            model=model,
            clean=replace(
                clean,
                images=torch.randint(0, 256, clean.images.shape, generator=child(0, "noise")).to(torch.uint8),
            ),
        ),
        "answers that are not finite": DefenderView(model=Changed(model, after=lambda z: z * torch.nan), clean=clean),
    }


WAYS = (
    "another mean and std",
    "images in 0 to 1/255",
    "classes in another order",
    "labels shuffled",
    "other images",
    "answers that are not finite",
)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_is_read_wrongly_is_not_judged(
    way: str, benign_view: DefenderView, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = misread(benign_view)[way]
    check = check_task(view.model, view.clean)
    assert check.is_lost
    detector = quick_detector()

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("searched")

    monkeypatch.setattr(type(detector.inverter.search), "run", never)
    verdict = detector.inspect(view, generator=child(0))
    assert (verdict.outcome, verdict.suspect_labels, verdict.evidence) == ("cannot tell", (), ())
    assert verdict.clean_accuracy == check.accuracy.value
    assert f"right on {100 * check.accuracy.value:.1f} % of the 280 clean images" in verdict.basis
    assert "wrong normalisation, class order or data?" in verdict.basis
    assert ("another order" in verdict.basis) == (way == "classes in another order")


def test_a_good_model_is_measured(benign_view: DefenderView) -> None:
    check = check_task(benign_view.model, benign_view.clean)
    assert not check.is_weak
    assert check.accuracy.value > 0.9
    assert check.chance == pytest.approx(1 / 7, abs=0.01)
    assert (check.order, check.has_gradient, check.num_not_finite) == (None, True, 0)


@pytest.mark.parametrize("name", sorted(PURIFIERS))
def test_no_purifier_trains_a_model_that_is_wrong(name: str, benign_view: DefenderView) -> None:
    for way in ("classes in another order", "other images"):
        view = misread(benign_view)[way]
        view = replace(view, untrusted=view.clean)  # for those that ask for one
        before = {key: value.clone() for key, value in view.model.state_dict().items()}
        with pytest.raises(UnfitModel, match="nothing was changed: the model is right on"):
            erase(PURIFIERS[name](), view, detector=quick_detector(), generator=child(0))
        assert all(torch.equal(value, before[key]) for key, value in view.model.state_dict().items())


def untrained(kind: str) -> nn.Module:
    layers: dict[str, list[nn.Module]] = {
        "batch norm": [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, 7)],
        "group norm": [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(400, 7)],
        "no norm": [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 7)],
    }
    return Classifier(nn.Sequential(*layers[kind]), [0.0] * 3, [1.0] * 3).eval()


@pytest.mark.parametrize("kind", ["batch norm", "group norm", "no norm"])
def test_a_network_that_was_never_trained_has_nothing_to_lose(kind: str, benign_view: DefenderView) -> None:
    clean = benign_view.clean
    view = DefenderView(model=untrained(kind), clean=replace(clean, labels=clean.labels.roll(1)))
    found = check_task(view.model, view.clean)
    assert found.is_lost
    assert found.never_trained
    trainer = Trainer(epochs=1, batch_size=64, learning_rate=0.05, precision="float32")
    purified = erase(FineTuning(trainer=trainer), view, generator=child(0))
    assert "were they ever trained?" in " ".join(purified.notes)
    assert not looks_untrained(purified.model)


def test_a_trained_network_looks_trained(benign_view: DefenderView) -> None:
    assert not check_task(benign_view.model, benign_view.clean).never_trained


def check(hits: float, chance: float = 0.1, total: int = 1000) -> TaskCheck:

    return TaskCheck(accuracy=Rate(round(hits * total), total), chance=chance, num_not_finite=0)


@pytest.mark.parametrize(
    ("found", "lost", "weak"),
    [
        (check(0.1), True, True),
        (check(0.3), True, True),  # far more than chance, and useless
        (check(0.4), False, True),
        (check(0.6), False, False),
        (check(0.9, chance=0.9), True, True),  # always the class that nine of ten images show
        (check(0.4, chance=0.005), False, True),
        (check(0.7, chance=0.5, total=10), True, True),  # seven of ten coins
        (check(0.9, chance=0.5, total=10), False, False),
        (check(1.0, chance=1.0), True, True),  # one class, one answer
    ],
)
def test_where_the_lines_are(found: TaskCheck, lost: bool, weak: bool) -> None:
    assert (found.is_lost, found.is_weak) == (lost, weak)


def test_an_answer_about_a_weak_model_is_held_back() -> None:
    images = toy_images(70, seed=0)
    for outcome in ("backdoored", "clean", "cannot tell"):
        kept, notes = weighing.held_back(outcome, check(0.4), images)
        assert kept == "cannot tell"
        assert "40.0 %" in notes[0]
        assert weighing.held_back(outcome, check(0.9), images) == (outcome, ())
    swapped = replace(check(0.7), order=(1, 0, 2, 3, 4, 5, 6), ordered_accuracy=0.95)
    kept, notes = weighing.held_back("backdoored", swapped, replace(images, class_names=tuple("abcdefg")))
    assert kept == "backdoored"
    assert "b, a, c, d, e, f, g" in notes[0]
    assert "70.0 %" in notes[0]


def test_an_order_is_found_only_where_it_explains_new_images() -> None:
    labels = torch.arange(70) % 7
    answers = torch.tensor([ORDER.index(k) for k in range(7)])[labels]
    order, accuracy = find_order(answers, labels, 7)
    assert order == ORDER
    assert accuracy == 1.0
    assert find_order(labels, labels, 7) == (None, 1.0)
    guesses = torch.randint(0, 7, (70,), generator=child(0, "guesses"))
    assert find_order(guesses, labels, 7)[1] < 0.35  # though some order fits the same images better
    assert find_order(torch.full((70,), -1), labels, 7) == (None, 0.0)


def test_images_that_have_the_label_already_do_not_count_as_reached(benign_view: DefenderView) -> None:

    clean = benign_view.clean

    def soak(logits: Tensor) -> Tensor:  # everything but two classes is called 5
        called = logits.argmax(1)
        return torch.where(((called == 1) | (called == 2))[:, None], logits, logits + 1e3 * torch.eye(7)[5])

    view = DefenderView(model=Changed(benign_view.model, after=soak), clean=clean)
    nothing = torch.zeros(1, 1, 12, 12)
    found = FoundMasks(
        labels=(5,),
        masks=nothing,
        patterns=torch.zeros(1, 3, 12, 12),
        areas=nothing.sum((1, 2, 3)),
        energies=nothing.sum((1, 2, 3)),
        success=torch.ones(1),
        steps=torch.tensor([9]),
    )
    success, natural = weighing.held_out_rates(view, clean, found, "float32")
    assert success == [0.0]
    assert natural[0] > 0.6


def test_images_that_are_called_a_label_are_not_drawn_for_it() -> None:
    images = replace(
        toy_images(14, seed=0), images=torch.arange(14).to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    )
    called = torch.tensor([5] * 10 + [1] * 4)
    feed = SampleImages(images, torch.tensor([5, 0]), generator=child(0), called=called)
    for_5, for_0 = (
        feed.draw(torch.tensor([row]), 200)[0, :, 0, 0, 0].mul(255).round().unique().tolist() for row in (0, 1)
    )
    assert for_5 == [10.0, 11.0, 13.0]  # 12 shows class 5
    assert len(for_0) == 12
    everywhere = SampleImages(images, torch.tensor([5]), generator=child(0), called=torch.full((14,), 5))
    assert everywhere.draw(torch.tensor([0]), 3).shape == (1, 3, 3, 2, 2)  # none is left: all of other classes


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (lambda z: z.detach(), "cannot be differentiated"),
        (lambda z: z.argmax(1), "expected float logits"),
        (lambda z: z.round().long(), "expected float logits"),
        (lambda z: z[:, :3], r"expected float logits of shape \(280, 7\)"),
        (lambda z: z.round(), "no gradient"),
        (lambda z: [z], "expected float logits"),
    ],
)
def test_networks_that_cannot_be_searched(
    after: Callable[[Tensor], Tensor], said: str, benign_view: DefenderView
) -> None:
    view = DefenderView(model=Changed(benign_view.model, after=after), clean=benign_view.clean)
    with pytest.raises(ValueError, match=said):
        quick_detector().inspect(view, generator=child(0))


def test_a_label_that_soaks_up_images_is_not_accused(
    benign_view: DefenderView, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evidence(natural: float) -> list[weighing.SearchedLabel]:
        areas = (1.0, *(60.0 + label for label in range(1, 7)))
        return [
            weighing.SearchedLabel(
                label=label,
                size=area,
                attack_success_rate=1.0,
                natural_rate=natural if label == 0 else 0.03,
                anomaly=5.0 if label == 0 else 0.0,
                p_value=1e-4 if label == 0 else 1.0,
                entropy=0.0,
                steps=150,
            )
            for label, area in enumerate(areas)
        ]

    detector = quick_detector()
    for natural, outcome in ((0.02, "backdoored"), (0.3, "cannot tell")):
        found = evidence(natural)
        monkeypatch.setattr(type(detector), "score_labels", lambda *args, found=found: found)
        verdict = detector.inspect(benign_view, generator=child(0))
        assert (verdict.outcome, verdict.suspect_labels) == (outcome, (0,))
        assert any("30 % of the other images" in note for note in verdict.notes) == (outcome == "cannot tell")


def test_weak_models_are_erased_with_a_word(benign_view: DefenderView) -> None:
    images = replace(benign_view.clean, class_names=tuple("abcdefg"))
    assert check(0.9).notes(images.class_names) == ()
    assert "right on 40.0 %" in check(0.4).notes(images.class_names)[0]
    labels = torch.where(
        torch.arange(len(images)) % 20 < 9, images.labels, (images.labels + 1 + torch.arange(len(images)) % 5) % 7
    )
    view = DefenderView(model=benign_view.model, clean=replace(images, labels=labels))
    assert check_task(view.model, view.clean).is_weak
    purified = erase(BNRefresh(batch_size=64, passes=1), view, generator=child(0))
    assert "wrong normalisation, class order or data?" in purified.notes[0]
