"""The default sifter: three looks at one model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lustral.core.randomness import child
from lustral.core.records import Cost
from lustral.vision.records import ImageSet, Sifted, TrainingView, Victim
from lustral.vision.sifters import ActivationClustering, BNLikelihood, Combined
from lustral.vision.sifters.combined import Mirrored, combine, lowered, only_agreed
from toy import clean_images, toy_images
from vision.sifters.worlds import auroc, training_view


def test_no_way_needs_a_scale() -> None:
    first, second = torch.randn(50, generator=child(0, "first")), torch.randn(50, generator=child(0, "second"))
    plain, stretched = {"a": first, "b": second}, {"a": 3 * first - 7, "b": second}
    assert torch.allclose(combine(plain, plain), combine(stretched, stretched), atol=1e-4)


def test_a_way_that_is_sure_outweighs_two_that_are_not() -> None:
    among = {name: torch.arange(1001.0) for name in "abc"}
    sure = {"a": torch.tensor([3000.0]), "b": torch.tensor([500.0]), "c": torch.tensor([500.0])}
    unsure = {name: torch.tensor([900.0]) for name in "abc"}
    assert combine(sure, among) > combine(unsure, among)


def test_many_poisoned_images_do_not_make_each_other_common() -> None:
    scores = torch.cat([torch.randn(700, generator=child(0)), 8 + torch.randn(300, generator=child(1))])
    found = combine({"a": scores, "b": torch.randn(1000, generator=child(2))}, {"a": scores, "b": scores})
    assert float(found[700:].min()) > float(found[:700].quantile(0.99))


def test_a_symmetric_image_does_not_move_when_it_is_mirrored(backdoored: Victim) -> None:
    view = training_view(backdoored)
    batch = next(Mirrored(view.untrusted).batches(5))
    assert torch.equal(batch.inputs.flip(3), next(view.untrusted.batches(5)).inputs)
    assert isinstance(view.untrusted, ImageSet)
    images = view.untrusted.images
    even = replace(view.untrusted, images=torch.maximum(images, images.flip(3)))
    scores = Combined().sift(replace(view, untrusted=even), generator=child(1)).parts["mirror"].scores
    assert float(scores.max()) < math.log(1e-6)


def test_parts_are_what_each_method_says_alone(backdoored: Victim) -> None:
    view = training_view(backdoored, clean=clean_images())
    found = Combined().sift(view, generator=child(1))
    alone = {"activation_clustering": ActivationClustering(), "bn_likelihood": BNLikelihood()}
    assert set(found.parts) == {"activation_clustering", "bn_likelihood", "mirror"}
    for name, method in alone.items():
        assert torch.equal(found.parts[name].scores, method.sift(view, generator=child(1)).scores)


def test_it_finds_the_poison_and_says_who_agrees(backdoored: Victim) -> None:
    assert backdoored.poisoned is not None
    view, truth = training_view(backdoored, clean=clean_images()), backdoored.poisoned.is_poisoned
    found = Combined().sift(view, generator=child(1))
    assert auroc(found.scores, truth) > 0.9
    assert found.flagged[truth].float().mean() > 0.5
    assert any("each way lists by itself" in note for note in found.notes)


def test_without_batch_normalisation_two_looks_are_left(backdoored: Victim) -> None:
    view = training_view(backdoored)
    side = view.untrusted.image_shape[1]
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * side * side, 16), nn.ReLU(), nn.Linear(16, view.untrusted.num_classes)
    )
    found = Combined().sift(replace(view, model=model), generator=child(1))
    assert set(found.parts) == {"activation_clustering", "mirror"}
    assert bool(found.scores.isfinite().all())


@pytest.mark.parametrize("with_clean", [True, False])
def test_a_clean_set_comes_out_as_clean(benign: Victim, with_clean: bool) -> None:
    view = TrainingView(
        untrusted=toy_images(700, seed=1),
        build_model=lambda _: benign.model,
        clean=clean_images() if with_clean else None,
        model=benign.model,
    )
    found = Combined().sift(view, generator=child(1))
    assert not found.flagged.any()
    assert found.threshold == math.inf


@pytest.mark.parametrize(("votes", "by_clean", "kept"), [(1, False, 0), (2, False, 3), (1, True, 3), (0, True, 0)])
def test_without_clean_images_one_way_alone_lists_nothing(votes: int, by_clean: bool, kept: int) -> None:
    scores = torch.tensor([1.0, 2.0, 9.0, 8.0, 7.0])
    cost = Cost(seconds=0.0, image_passes=0.0, peak_memory_bytes=0, clean_images=0)
    found = Sifted(scores=scores, flagged=scores > 5, threshold=5.0, basis="Known.", cost=cost)
    kind = only_agreed(found, torch.where(scores > 5, votes, 0), by_clean=by_clean, ways=3)
    assert int(kind.flagged.sum()) == kept
    assert (kind.threshold == math.inf) == (kept == 0)
    assert bool((kind.scores[kind.flagged] > 5).all())


def test_an_image_that_one_way_lists_stays_on_the_line() -> None:
    scores = torch.tensor([1.0, 9.0, 8.0])
    cost = Cost(seconds=0.0, image_passes=0.0, peak_memory_bytes=0, clean_images=0)
    found = Sifted(scores=scores, flagged=scores > 5, threshold=5.0, basis="Known.", cost=cost)
    kept = only_agreed(found, torch.tensor([0, 2, 1]), by_clean=False, ways=3)
    assert kept.flagged.tolist() == [False, True, False]
    assert kept.scores.tolist() == [1.0, 9.0, 5.0]
    alone = only_agreed(found, torch.tensor([0, 1, 1]), by_clean=False, ways=1)
    assert alone.flagged.tolist() == [False, True, True]


def known(scores: Tensor, threshold: float) -> Sifted:
    cost = Cost(seconds=0.0, image_passes=0.0, peak_memory_bytes=0, clean_images=0)
    return Sifted(scores=scores, flagged=scores > threshold, threshold=threshold, basis="Known.", cost=cost)


CLEAN = torch.arange(200.0) / 100  # of 200 the 197th, 1.96, is exceeded by 2 %


def test_in_a_poisoned_class_the_line_is_lower() -> None:
    labels = torch.tensor([0] * 10 + [1] * 10)
    scores = torch.tensor([9.0, 3.0, 1.98, 1.9, *[0.0] * 6, 1.98, 1.9, *[0.0] * 8])
    found = lowered(known(scores, 5.0), CLEAN, labels, ("cat", "dog"))
    assert found.flagged.nonzero().flatten().tolist() == [0, 1, 2]  # a tenth of the cats is listed by the first line
    assert found.threshold == pytest.approx(1.96)
    assert torch.equal(found.flagged, found.scores > found.threshold)
    assert found.scores[10].item() == pytest.approx(1.96)  # between the lines, of another class: on the line
    assert torch.equal(found.scores[11:], scores[11:])
    assert "Class cat is shown to be poisoned" in found.basis
    assert "2 % of clean images" in found.basis


@pytest.mark.parametrize(
    ("scores", "clean"),
    [
        ([*[0.0] * 19, 9.0], CLEAN),  # one of 20: no more than 5 %
        ([*[0.0] * 20], CLEAN),
        ([9.0, 9.0, *[0.0] * 18], None),
        ([9.0, 9.0, *[0.0] * 18], CLEAN[:99]),  # too few draw no line
        ([9.0, 9.0, *[0.0] * 18], CLEAN + 4),  # its line is no lower
    ],
)
def test_elsewhere_there_is_one_line(scores: list[float], clean: Tensor | None) -> None:
    found = known(torch.tensor(scores), 5.0)
    assert lowered(found, clean, torch.zeros(20, dtype=torch.int64), ()) is found
