"""The checks around every sifter and safe trainer, with methods whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image
from torch import Generator, Tensor, nn

from lustral.core.randomness import child
from lustral.core.records import Cost, OnProgress, Progress
from lustral.training import Trainer
from lustral.vision.records import ImageSet, Sifted, Trained, TrainingView
from lustral.vision.sources import FolderStream
from lustral.vision.untrusted import COMPARING, OverlapError, check, find_overlap, least_images, sift, train
from toy import toy_images

COST = Cost(seconds=1.0, image_passes=5.0, peak_memory_bytes=1, clean_images=7)


def never(_: Generator) -> nn.Module:
    raise AssertionError("nobody asked for a model")


@dataclass(frozen=True, kw_only=True)
class Scripted:
    """Says what it is told to."""

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing"
    cost_passes: ClassVar[float] = 1.0
    scores: Tensor
    flagged: Tensor
    trainer: Trainer = field(default_factory=lambda: Trainer(batch_size=64))

    def said(self) -> Sifted:
        part = Sifted(scores=self.scores, flagged=self.flagged, threshold=math.inf, basis="part", cost=COST)
        return replace(part, parts={"part": part}, notes=("its own note",))

    def sift(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Sifted:
        return self.said()

    def train(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Trained:
        model = nn.Sequential(nn.Flatten(), nn.Linear(432, 7))
        nn.init.constant_(model[1].weight, float(self.scores[0]))  # type: ignore[arg-type]
        return Trained(model=model, history=(), cost=COST, sifted=self.said(), notes=("its own note",))


def calm(count: int) -> Scripted:
    return Scripted(scores=torch.linspace(0, 1, count), flagged=torch.arange(count) == count - 1)


def of(data: ImageSet | FolderStream, clean: ImageSet | None = None) -> TrainingView:
    return TrainingView(untrusted=data, build_model=never, clean=clean)


def test_a_good_set_passes_through_unchanged_and_the_checks_are_in_the_cost() -> None:
    data = toy_images(84, seed=0)
    found = sift(calm(84), of(data, toy_images(30, seed=1)), generator=child(0))
    assert torch.equal(found.scores, torch.linspace(0, 1, 84))
    assert found.flagged.nonzero().flatten().tolist() == [83]
    assert found.notes == ("its own note",)
    assert found.cost.seconds > 1.0
    assert found.cost.image_passes == 5.0


def test_scores_that_are_no_numbers_are_the_most_suspicious_and_said() -> None:
    data = toy_images(84, seed=0)
    scores = torch.linspace(0, 1, 84)
    scores[3], scores[5], scores[7] = math.nan, math.inf, -math.inf
    found = sift(Scripted(scores=scores, flagged=torch.zeros(84, dtype=torch.bool)), of(data), generator=child(0))
    assert found.flagged.nonzero().flatten().tolist() == [3, 5, 7]
    assert found.scores.isfinite().all()
    assert found.scores[[3, 5, 7]].tolist() == [1.0, 1.0, 1.0]
    assert found.threshold < 1.0
    assert "3 images have no finite score" in found.notes[-1]
    assert found.parts["part"].scores.isfinite().all()


def test_scores_without_any_number_are_an_error() -> None:
    broken = Scripted(scores=torch.full((84,), math.nan), flagged=torch.zeros(84, dtype=torch.bool))
    with pytest.raises(ArithmeticError, match="no score is finite"):
        sift(broken, of(toy_images(84, seed=0)), generator=child(0))


def test_an_image_alone_in_its_class_is_kept_and_said() -> None:
    data = toy_images(84, seed=0)
    labels = data.labels.clone()
    labels[labels == 6] = 5
    labels[20] = 6
    scores = torch.linspace(0, 1, 84)
    scores[20] = math.nan
    method = Scripted(scores=scores, flagged=torch.ones(84, dtype=torch.bool))
    found = sift(method, of(replace(data, labels=labels)), generator=child(0))
    assert not found.flagged[20]
    assert found.flagged.sum() == 83
    assert 0 < found.scores[20] < 1
    assert found.notes[0].startswith("One image only in class 6:")


def test_all_labels_equal_is_refused() -> None:
    data = toy_images(84, seed=0)
    with pytest.raises(ValueError, match="all 84 images of the untrusted set have the label 2"):
        sift(calm(84), of(replace(data, labels=torch.full((84,), 2))), generator=child(0))


def test_fewer_images_than_a_batch_are_refused_with_the_batch_named() -> None:
    method = replace(calm(84), trainer=Trainer(batch_size=128))
    assert least_images(calm(84)) == 64
    assert least_images(method) == 128
    for verb in (sift, train):
        with pytest.raises(ValueError, match="has 84 images; Scripted expects at least 128"):
            verb(method, of(toy_images(84, seed=0)), generator=child(0))
    with pytest.raises(ValueError, match="the untrusted set is empty"):
        check(method, of(toy_images(84, seed=0).subset(torch.arange(0))))


def test_a_least_number_that_a_method_states_counts() -> None:
    class Modest(Scripted):
        least_images: ClassVar[int] = 10

    data = toy_images(14, seed=0)
    assert check(Modest(scores=torch.zeros(14), flagged=torch.zeros(14, dtype=torch.bool)), of(data)) == ()


def png_stream(folder: Path, data: ImageSet) -> FolderStream:
    paths = []
    for number, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        path = folder / str(label) / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(path)
        paths.append(str(path))
    return FolderStream(
        paths=tuple(paths),
        labels=data.labels,
        num_classes=7,
        class_names=tuple("abcdefg"),
        image_shape=data.image_shape,
    )


def test_labels_out_of_range_are_refused(tmp_path: Path) -> None:
    stream = replace(png_stream(tmp_path, toy_images(84, seed=0)), labels=torch.arange(84) % 8)
    with pytest.raises(ValueError, match=r"out of range: expected 0 .. 6, found 0 .. 7"):
        sift(calm(84), of(stream), generator=child(0))


def test_a_clean_set_that_overlaps_is_refused_by_name_and_the_overlap_counted(tmp_path: Path) -> None:
    data = toy_images(700, seed=0)  # more than one batch of hashes
    clean = toy_images(40, seed=1)
    mixed = replace(clean, images=torch.cat([clean.images[:35], data.images[[3, 69, 80, 600, 699]]]))
    for verb in (sift, train):
        with pytest.raises(OverlapError, match=r"5 images .* \(image 3, image 69, image 80, ...\)") as caught:
            verb(calm(700), of(data, mixed), generator=child(0))
        assert caught.value.indices == (3, 69, 80, 600, 699)
    stages: list[Progress] = []
    stream = png_stream(tmp_path, data.subset(torch.arange(84)))
    with pytest.raises(OverlapError, match=r"3 images .* \(3/003.png, 6/069.png, 3/080.png\)"):
        sift(calm(84), of(stream, mixed), generator=child(0), on_progress=stages.append)
    assert {stage.stage for stage in stages} == {COMPARING}
    one_pixel = data.images[[3]].clone()
    one_pixel[0, 0, 0, 0] ^= 1
    assert find_overlap(data, replace(clean.subset(torch.arange(1)), images=one_pixel)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda clean: clean.subset(torch.arange(0)), "the clean set is empty"),
        (lambda clean: replace(clean, num_classes=9), "in 7 classes; got .* in 9"),
        (lambda clean: replace(clean, images=clean.images[..., :8]), r"expected clean images like the untrusted ones"),
        (lambda clean: replace(clean, class_names=tuple("abcdxfg")), "found 'x' for 'e'"),
    ],
)
def test_a_clean_set_of_another_kind_is_refused(change: Callable[[ImageSet], ImageSet], message: str) -> None:
    data = replace(toy_images(84, seed=0), class_names=tuple("abcdefg"))
    with pytest.raises(ValueError, match=message):
        sift(calm(84), of(data, change(toy_images(40, seed=1))), generator=child(0))


def test_a_wrong_number_of_scores_names_the_method() -> None:
    with pytest.raises(ValueError, match=r"Scripted: expected one score and one bool flag per image, shape \(84,\)"):
        sift(calm(83), of(toy_images(84, seed=0)), generator=child(0))


def test_a_trained_model_comes_back_in_evaluation_mode_with_readable_scores() -> None:
    scores = torch.linspace(0, 1, 84)
    scores[3] = math.nan
    method = Scripted(scores=scores, flagged=torch.zeros(84, dtype=torch.bool))
    trained = train(method, of(toy_images(84, seed=0)), generator=child(0))
    assert not trained.model.training
    assert trained.sifted is not None
    assert trained.sifted.flagged.nonzero().flatten().tolist() == [3]
    assert trained.cost.seconds > 1.0
    assert trained.notes == ("its own note",)


def test_a_model_whose_outputs_are_no_numbers_is_an_error() -> None:
    scores = torch.zeros(84)
    scores[0] = math.nan
    broken = Scripted(scores=scores, flagged=torch.zeros(84, dtype=torch.bool))
    with pytest.raises(ArithmeticError, match="outputs of the trained model are not finite"):
        train(broken, of(toy_images(84, seed=0)), generator=child(0))
