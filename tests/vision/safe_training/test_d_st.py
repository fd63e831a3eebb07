from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.core.records import Cost, OnProgress
from lustral.vision.evaluation import evaluate
from lustral.vision.models import build_classifier
from lustral.vision.records import ImageSet, Sifted, TrainingView, Victim
from lustral.vision.safe_training import DST
from lustral.vision.safe_training.cached_features import CachedFeatures, cache
from lustral.vision.safe_training.d_st import Projected, Split, mixed_cross_entropy
from lustral.vision.sifters import FCT, Combined
from toy import clean_images, toy_images


def build(generator: Generator) -> nn.Module:
    return build_classifier("small_cnn:width=8", num_classes=7, image_shape=(3, 12, 12), generator=generator)


@dataclass(frozen=True, kw_only=True)
class KnownSplit(FCT):
    """Scores that are given: what D-ST makes of a split is then no matter of how well FCT does on toys."""

    scores: Tensor = field(default_factory=lambda: torch.zeros(0))

    def sift(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Sifted:
        none = Cost(seconds=0.0, image_passes=0.0, peak_memory_bytes=0, clean_images=0)
        return Sifted(scores=self.scores, flagged=self.scores > 0.5, threshold=0.5, basis="known", cost=none)


def known(victim: Victim) -> KnownSplit:
    assert victim.poisoned is not None
    is_poisoned = victim.poisoned.is_poisoned.float()
    return KnownSplit(scores=is_poisoned + 0.3 * torch.randn(len(is_poisoned), generator=child(0)))


def view_of(data: ImageSet, **changes: Any) -> TrainingView:
    return TrainingView(untrusted=data, build_model=build, **changes)


def test_the_mixed_loss_is_its_formula_and_needs_neither_kind() -> None:
    logits, labels = torch.randn(6, 3, generator=child(0)), torch.tensor([0, 1, 2, 0, 1, 2])
    losses = F.cross_entropy(logits, labels, reduction="none")
    bad = torch.tensor([False, True, False, False, True, False])
    wanted = losses[~bad].mean() - 0.1 * losses[bad].mean()
    torch.testing.assert_close(mixed_cross_entropy(logits, labels, bad, 0.1), wanted)
    torch.testing.assert_close(mixed_cross_entropy(logits, labels, bad & False, 0.1), losses.mean())
    torch.testing.assert_close(mixed_cross_entropy(logits, labels, bad | True, 0.1), -0.1 * losses.mean())


@pytest.mark.parametrize("labels", ["clean_only", "all"])
def test_the_backdoor_is_not_learnt_where_the_split_is_good(labels: Any, backdoored: Victim) -> None:
    assert backdoored.poisoned is not None
    method = DST(sifter=known(backdoored), labels=labels, epochs=1, least_steps=80, projection=32, head_least_steps=120)
    trained = method.train(view_of(backdoored.poisoned.data, clean=clean_images(140)), generator=child(0))
    record = evaluate(backdoored, trained.model, toy_images(420, seed=1), generator=child(0))
    assert record.asr.value < 0.1  # plain training: > 0.9
    assert record.acc.value > 0.9
    assert trained.history[-1].clean_accuracy == pytest.approx(record.acc.value, abs=0.08)
    stages = [dict(entry.parts)["stage"] for entry in trained.history]
    assert stages == sorted(stages)
    assert set(stages) == {1, 2}
    assert trained.notes == ()


def test_the_returned_head_is_the_one_that_the_second_stage_trained(backdoored: Victim) -> None:
    """The features are scaled while the head is trained; the scale belongs into the returned weights."""
    assert backdoored.poisoned is not None
    data = backdoored.poisoned.data
    method = DST(sifter=known(backdoored), epochs=1, least_steps=1, projection=8, head_least_steps=200)
    trained = method.train(view_of(data), generator=child(0))
    clean, _, _ = known(backdoored).split(known(backdoored).scores)
    with torch.no_grad():
        logits = trained.model(data.subset(clean).images.float() / 255)
    loss = float(F.cross_entropy(logits, data.labels[clean]))
    assert trained.history[-1].loss is not None
    assert loss == pytest.approx(trained.history[-1].loss, abs=0.15)


def test_projections_have_unit_length_and_come_from_the_features() -> None:
    classifier = build(child(0)).eval()
    wrapped = Projected(classifier, "network.linear", 16, 4)
    images = torch.rand(5, 3, 12, 12)
    found = wrapped(images)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    network = classifier.network
    assert isinstance(network, nn.Module)
    features = network.pool(network.features(classifier.normalise(images))).flatten(1)  # type: ignore[operator]
    torch.testing.assert_close(found, F.normalize(wrapped.projection(features), dim=1))


def test_cached_features_are_those_of_the_views_in_order() -> None:
    data, classifier = toy_images(30, seed=0), build(child(0))

    def keep(images: Tensor, *, generator: Generator) -> Tensor:
        return images

    found = cache(data, classifier, "network.linear", keep, most_views=2, generator=child(0))
    assert found.features.shape == (2, 30, 16)
    assert torch.equal(found.features[0], found.features[1])
    head = classifier.get_submodule("network.linear")
    with torch.no_grad():
        logits = classifier.eval()(data.images.float() / 255)
    torch.testing.assert_close(head(found.features[0]), logits)
    with pytest.raises(TypeError, match="linear layer"):
        cache(data, classifier, "network.pool", keep, most_views=2, generator=child(0))


def test_a_pass_over_cached_features_takes_one_view_of_each_image() -> None:
    features = torch.arange(3 * 40).view(3, 40, 1).float()  # view v of image m is 40 v + m
    data = CachedFeatures(features=features, labels=torch.arange(40) % 4, num_classes=4)
    batches = list(data.batches(16, generator=child(0)))
    index = torch.cat([batch.index for batch in batches])
    values = torch.cat([batch.inputs for batch in batches])[:, 0].long()
    assert index.sort().values.tolist() == list(range(40))
    assert torch.equal(values % 40, index)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), index % 4)
    assert set((values // 40).tolist()) == {0, 1, 2}
    assert [len(batch.labels) for batch in data.batches(16, drop_last=True)] == [16, 16]


def test_a_class_that_the_split_left_out_gets_its_least_suspicious_images() -> None:
    labels = torch.tensor([0] * 5 + [1] * 10 + [2] * 5)
    scores = torch.linspace(0, 1, 20)
    split = Split(clean=torch.arange(5), poisoned=torch.arange(13, 20)).completed(scores, labels, 4, 0.2)
    assert split.clean.tolist() == [0, 1, 2, 3, 4, 5, 6, 15]
    assert split.poisoned.tolist() == [13, 14, 16, 17, 18, 19]
    assert len(split.notes) == 3
    assert "class 1" in split.notes[0]
    assert "2 least suspicious of 10" in split.notes[0]
    assert "class 2" in split.notes[1]
    assert "class 3 is in the set" in split.notes[2]


def test_sets_and_networks_that_cannot_serve_are_refused() -> None:
    few = toy_images(14, seed=0)
    with pytest.raises(ValueError, match="of 14 images, 2 are called clean and 0 poisoned"):
        DST(sifter=KnownSplit(scores=torch.rand(14)), epochs=1).train(view_of(few), generator=child(0))

    def convolutional(generator: Generator) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    view = TrainingView(untrusted=toy_images(70, seed=0), build_model=convolutional)
    with pytest.raises(ValueError, match="expected a linear layer with 7 outputs"):
        DST(sifter=KnownSplit(scores=torch.rand(70)), epochs=1).train(view, generator=child(0))


def test_a_network_of_one_size_gets_crops_of_that_size_and_a_note() -> None:
    def fixed(generator: Generator) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(100, 16), nn.ReLU(), nn.Linear(16, 7)
        )

    view = TrainingView(untrusted=toy_images(70, seed=0), build_model=fixed)
    method = DST(sifter=KnownSplit(scores=torch.rand(70)), epochs=1, least_steps=1, head_least_steps=1, projection=4)
    trained = method.train(view, generator=child(0))
    assert "takes no crops of 9 x 9" in trained.notes[0]
    assert trained.model(torch.rand(2, 3, 12, 12)).shape == (2, 7)


def test_images_are_only_mirrored_where_the_view_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for flip in (False, True):
        method = DST(sifter=KnownSplit(scores=torch.rand(70, generator=child(0))), epochs=1, least_steps=1)
        made = method.objective

        def note(clean: Tensor, num_images: int, augment: Any, device: Any, flip: bool = flip, made: Any = made) -> Any:
            seen.add((flip, augment.flip))
            return made(clean, num_images, augment, device)

        monkeypatch.setattr(DST, "objective", lambda self, *given: note(*given))
        replace(method, head_least_steps=1).train(view_of(toy_images(70, seed=0), flip=flip), generator=child(0))
        monkeypatch.undo()
    assert seen == {(False, False), (True, True)}


def test_the_passes_said_beforehand_follow_the_epochs_and_the_crops() -> None:
    method = DST()
    assert method.recipe(20_000).epochs == 60
    assert method.recipe(50_000).epochs == 40
    assert method.recipe(400).epochs * (400 // method.recipe(400).batch_size) >= method.least_steps
    each = method.sifter.cost_passes + 2 * 40 * 0.75**2 + 0.25 * 4 / 3
    assert method.estimated_passes(50_000) == pytest.approx(50_000 * each)
    ours = DST(combined=Combined())
    saved = 50_000 * FCT.cost_passes - Combined().estimated_passes(50_000)
    assert saved > 0
    assert ours.estimated_passes(50_000) == pytest.approx(50_000 * each - saved)


def test_the_default_sifter_can_take_the_place_of_fct(backdoored: Victim) -> None:
    assert backdoored.poisoned is not None
    data, scores, asked = backdoored.poisoned.data, known(backdoored).scores, list[int]()

    class Listed(Combined):
        def sift(self, view: TrainingView, **given: Any) -> Sifted:
            asked.append(len(view.untrusted))
            return KnownSplit(scores=scores).sift(view, **given)

    method = DST(combined=Listed(), epochs=1, least_steps=1, projection=8, head_least_steps=1)
    trained = method.train(view_of(data), generator=child(0))
    assert asked == [len(data)]
    assert trained.sifted is not None
    assert torch.equal(trained.sifted.scores, scores)


@pytest.mark.parametrize(
    "wrong", [{"labels": "some"}, {"temperature": 0.0}, {"epochs": 0}, {"head_views": 0}, {"poisoned_weight": -1.0}]
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        DST(**wrong)
