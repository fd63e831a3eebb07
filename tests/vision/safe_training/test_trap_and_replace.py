"""Trap-and-Replace: the terms of its loss by hand, a stem that stage 2 leaves alone, and a toy network without its backdoor."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.training import Trainer
from lustral.vision.attacks import BadNets
from lustral.vision.evaluation import evaluate, evaluate_trap, reconstruction_error
from lustral.vision.images import as_float, as_uint8
from lustral.vision.models import Classifier, build_classifier
from lustral.vision.models.splitting import cut_points, split_at, tapped
from lustral.vision.records import ImageSet, TrainingView, Victim
from lustral.vision.safe_training import TrapAndReplace
from lustral.vision.safe_training.run import TrainingRun
from lustral.vision.safe_training.trap_and_replace import (
    Decoder,
    HeadInTraining,
    TrapTrained,
    cut_mix,
    dropout_places,
    head_recipe,
    total_variation,
)
from toy import NUM_CLASSES, as_batch, clean_images, toy_images, toy_trainer

ATTACK = BadNets(target_label=4, size=2, poison_rate=0.1)
SHAPE = (3, 12, 12)
HEAD = replace(head_recipe(flip=False), epochs=15, batch_size=32, augment=None)


def build(generator: Generator, arch: str = "small_cnn:width=16") -> Classifier:
    shape: dict[str, Any] = {"num_classes": NUM_CLASSES, "image_shape": SHAPE, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return build_classifier(arch, generator=generator, **shape)


def view(data: ImageSet, **changes: Any) -> TrainingView:
    return TrainingView(**{"untrusted": data, "build_model": build, "clean": clean_images(), **changes})


@pytest.fixture(scope="module")
def trained() -> TrapTrained:
    data = ATTACK.poison(toy_images(1400, seed=0), generator=child(0, "poison")).data
    method = TrapAndReplace(trainer=toy_trainer(), head_trainer=HEAD)
    return method.train(view(data), generator=child(0, "training"))


def victim(model: nn.Module) -> Victim:
    return Victim(
        model=model,
        trigger=ATTACK.trigger(SHAPE),
        relabel=ATTACK.relabel,
        poisoned=None,
        provenance={},
        metrics={},
    )


def test_the_trap_is_full_and_the_new_head_empty(trained: TrapTrained) -> None:
    test = toy_images(420, seed=1)
    case = victim(trained.model)
    new = evaluate(case, None, test, generator=child(1))
    trap = evaluate_trap(case, trained.trap_model, trained.reconstruct, test, generator=child(1))
    assert trap.old_head.asr.value > 0.95
    assert trap.old_head.acc.value > 0.95
    assert new.asr.value < 0.05
    assert new.acc.value > 0.95
    assert trap.clean_error is not None
    assert trap.triggered_error is not None
    assert trap.clean_error < 0.02  # the variance of these pixels is 0.06
    assert trap.triggered_error < 0.03
    record = trap.to_dict()
    assert record["clean_error"] == trap.clean_error
    assert record["old_head"]["asr"]["value"] == trap.old_head.asr.value


def test_the_new_model_has_the_stem_of_the_trap_and_another_head(trained: TrapTrained) -> None:
    """Bit by bit: parameters and running statistics, though stage 2 trained for hundreds of steps."""
    old, new = trained.trap_model.state_dict(), trained.model.state_dict()
    assert list(old) == list(new) == list(build(child(0)).state_dict())
    for name in old:
        is_kept = torch.equal(old[name], new[name])
        assert is_kept == (name not in trained.split.head_tensors), name
    assert not trained.model.training
    assert all(parameter.requires_grad for parameter in trained.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trained.model.modules())


def test_the_history_tells_both_stages(trained: TrapTrained) -> None:
    first = [entry for entry in trained.history if entry.parts == (("round", 1),)]
    second = [entry for entry in trained.history if entry.parts == (("round", 2),)]
    assert (len(first), len(second)) == (12, HEAD.epochs)
    errors = [entry.reconstruction_error for entry in first]
    assert all(error is not None for error in errors)
    assert errors[-1] < 0.5 * errors[0]  # type: ignore[operator]
    assert first[-1].clean_accuracy is not None
    assert first[-1].clean_accuracy > 0.95
    assert all(entry.reconstruction_error is None and entry.clean_accuracy is None for entry in second[:-1])
    assert second[-1].clean_accuracy is not None
    assert second[-1].clean_accuracy > 0.95
    passes = 12 * 21 * 64 + 13 * 280 / 3 + HEAD.epochs * 8 * 32  # whole batches, and looks at the clean images
    assert passes < trained.cost.image_passes < passes + 20  # a few of one image, to find where to cut


def test_without_a_trap_nothing_is_reconstructed() -> None:
    data = ATTACK.poison(toy_images(280, seed=0), generator=child(0)).data
    method = TrapAndReplace(no_trap=True, trainer=toy_trainer(epochs=1), head_trainer=replace(HEAD, epochs=1))
    out = method.train(view(data), generator=child(0))
    assert out.decoder is None
    assert all(entry.reconstruction_error is None for entry in out.history)
    with pytest.raises(ValueError, match="no_trap=True"):
        out.reconstruct(torch.zeros(1, *SHAPE))
    trap = evaluate_trap(victim(out.model), out.trap_model, None, toy_images(70, seed=1), generator=child(0))
    assert (trap.clean_error, trap.triggered_error) == (None, None)


def test_equal_seeds_give_equal_models() -> None:
    method = TrapAndReplace(trainer=toy_trainer(epochs=1), head_trainer=replace(HEAD, epochs=1))
    runs = [method.train(view(toy_images(140, seed=0)), generator=child(seed)).model.state_dict() for seed in (5, 5, 6)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_the_first_stage_minimises_the_published_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain formula, on one batch."""
    seen: list[tuple[Tensor, Tensor]] = []
    data = toy_images(16, seed=3)

    def fit(
        self: Trainer, model: nn.Module, given: ImageSet, *, objective: Any, companions: Any, **rest: Any
    ) -> nn.Module:
        batch = as_batch(as_float(given.images), given.labels)
        model.eval()
        (group, *_) = companions[0].param_groups
        with tapped(model, split.name) as maps:
            logits = model(batch.inputs)
        up = torch.relu(F.conv_transpose2d(maps[0], group["params"][0], None, 2, 1))  # biases are 0 below
        drawn = torch.sigmoid(F.conv_transpose2d(up, group["params"][1], None, 2, 1))
        with torch.no_grad():
            for vector in companions[0].param_groups[1]["params"]:
                vector.zero_()
        expected = F.cross_entropy(logits, batch.labels) + 7 * (drawn - batch.inputs).square().mean()
        rows = (drawn[:, :, 1:] - drawn[:, :, :-1]).square().sum() + (drawn[..., 1:] - drawn[..., :-1]).square().sum()
        seen.append((objective(model, batch, child(0)), expected + 3 * rows / drawn.numel()))
        return model

    run = TrainingRun(view=view(data), generator=child(0))
    split = split_at(run.start, as_float(data.images[:1]))
    monkeypatch.setattr(Trainer, "fit", fit)
    method = TrapAndReplace(reconstruction_weight=7, tv_weight=3)
    method.set_trap(run, split)
    ((found, wanted),) = seen
    assert split.shape == (32, 3, 3)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-2)  # reduced precision, where a test run has it


def test_the_error_of_the_reconstruction_falls_without_the_labels() -> None:
    """The decoder and the stem learn to draw though the labels mean nothing."""
    data = toy_images(560, seed=0)
    blind = ImageSet(images=data.images, labels=torch.randint(7, (560,), generator=child(0)), num_classes=7)
    method = TrapAndReplace(
        reconstruction_weight=1000, trainer=toy_trainer(epochs=5, optimizer="adam", learning_rate=1e-3)
    )
    run = TrainingRun(view=view(blind), generator=child(0))
    split = split_at(run.start, as_float(data.images[:1]))
    method.set_trap(run, split)
    errors = [entry.reconstruction_error or 0.0 for entry in run.history]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 13, 17), (3, 45, 30), (4, 9, 8)])
@pytest.mark.parametrize("arch", ["small_cnn:width=4", "wrn16", "resnet20:width=4", "vgg11_bn:width=4"])
def test_reconstructions_have_the_images_shape_behind_every_cut(arch: str, shape: tuple[int, int, int]) -> None:
    model = build_classifier(arch, num_classes=4, image_shape=shape).eval()
    images = torch.rand(2, *shape, generator=child(0))
    for name in cut_points(model, images[:1])[::3]:
        split = split_at(model, images[:1], name)
        with torch.no_grad(), tapped(model, name) as seen:
            model(images)
            drawn = Decoder(split.shape, shape)(seen[0])
        assert drawn.shape == images.shape
        assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1


def test_the_decoders_of_wrn_16_1_are_the_published_ones() -> None:
    def layers(decoder: Decoder) -> list[tuple[int, ...]]:
        parts = [layer for layer in decoder.layers if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]
        return [(part.in_channels, part.out_channels, part.kernel_size[0], part.stride[0]) for part in parts]

    stem_5 = Decoder((64, 8, 8), (3, 32, 32))
    assert layers(stem_5) == [(64, 32, 4, 2), (32, 3, 4, 2)]
    assert sum(p.numel() for p in stem_5.parameters()) == 34_339  # "about 34.3 k" in our note on the authors' code
    assert layers(Decoder((32, 16, 16), (3, 32, 32))) == [(32, 32, 4, 2), (32, 3, 3, 1)]  # stem 4
    channels = [channels for channels, *_ in layers(Decoder((512, 7, 7), (3, 224, 224)))]
    assert channels == [512, 256, 128, 64, 32]  # ResNet-34


def test_total_variation_by_hand() -> None:
    assert total_variation(torch.full((2, 3, 5, 4), 0.7)).item() == 0
    images = torch.tensor([[[[0.0, 1.0], [3.0, 1.0]]]])  # squared differences: 9 and 0 down, 1 and 4 across
    assert total_variation(images).item() == pytest.approx(14 / 4)


@pytest.mark.parametrize("shape", [(12, 12), (7, 20)])
def test_cut_mix_keeps_the_share_that_it_says(shape: tuple[int, int]) -> None:
    """Each image has a value of its own: what is not it came from the partner whose label is returned."""
    values, labels = torch.arange(16.0), torch.arange(16)
    images = values.view(-1, 1, 1, 1).expand(16, 2, *shape).contiguous()
    shares = []
    for seed in range(40):
        mixed, others, kept = cut_mix(images, labels, child(seed))
        is_own = mixed == images
        moved = others != labels
        assert is_own[moved].float().mean().item() == pytest.approx(kept)
        assert torch.equal(torch.where(is_own, images, others.view(-1, 1, 1, 1).float()), mixed)
        shares.append(kept)
    assert torch.equal(images, values.view(-1, 1, 1, 1).expand_as(images))
    assert 0.5 < sum(shares) / 40 < 0.85  # 1/2 before boxes are cut at the border
    assert min(shares) < 0.4


def test_the_second_loss_weighs_both_labels_by_area(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    labels, others = torch.tensor([0, 1]), torch.tensor([1, 0])
    monkeypatch.setattr(
        "lustral.vision.safe_training.trap_and_replace.cut_mix", lambda images, labels, _: (images, others, 0.7)
    )
    batch = as_batch(torch.zeros(2, 3, 4, 4), labels)
    model = partial(lambda images: logits)
    smoothed = partial(F.cross_entropy, label_smoothing=0.1)
    expected = 0.7 * smoothed(logits, labels) + 0.3 * smoothed(logits, others)
    assert TrapAndReplace().mixed_loss(model, batch, child(0)).item() == pytest.approx(expected.item())  # type: ignore[arg-type]
    plain = TrapAndReplace(cutmix=False, label_smoothing=0.0).mixed_loss(model, batch, child(0))  # type: ignore[arg-type]
    assert plain.item() == pytest.approx(F.cross_entropy(logits, labels).item())


@pytest.mark.parametrize(
    ("arch", "stem", "inputs", "output"),
    [
        ("wrn16", None, ("block3.layer.1.conv2",), "block3.layer.1"),  # the published places
        ("wrn16", "block2", ("block3.layer.0.conv2", "block3.layer.1.conv2"), "block3.layer.1"),
        ("wrn16", "block3", ("fc",), None),
        ("small_cnn:width=4", None, ("linear",), None),
        ("vgg11_bn:width=4", "features.20", ("features.25", "linear"), None),
    ],
)
def test_the_new_head_drops_out_where_published(
    arch: str, stem: str | None, inputs: tuple[str, ...], output: str | None
) -> None:
    model, images = build(child(0), arch), torch.rand(1, *SHAPE, generator=child(0))
    found = dropout_places(model, images, split_at(model, images, stem))
    assert found.inputs == tuple(f"network.{name}" for name in inputs)
    assert found.output == (None if output is None else f"network.{output}")


def test_a_head_in_training_has_a_stem_that_is_frozen_in_every_mode() -> None:
    model, images = build(child(0), "wrn16"), torch.rand(8, *SHAPE, generator=child(0))
    split = split_at(model, images[:1])
    head = HeadInTraining(model, split, dropout_places(model, images[:1], split), 0.5)
    for mode in (True, False, True):
        head.train(mode)
        training = {name for name, module in model.named_modules() if module.training}
        assert training == (set(split.head_modules) if mode else set())
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= split.head_tensors
    with tapped(model, split.name) as maps:
        first, second = head(images), head(images)
    assert torch.equal(*maps)  # no dropout in the stem
    assert not torch.equal(first, second)  # but in the head
    head.eval()
    assert torch.equal(head(images), head(images))


def test_a_new_head_starts_elsewhere_than_the_old_one() -> None:
    method = TrapAndReplace(trainer=toy_trainer(epochs=0), head_trainer=replace(HEAD, epochs=0))
    out = method.train(view(toy_images(70, seed=0)), generator=child(0))
    old, new = out.trap_model.state_dict(), out.model.state_dict()
    drawn = [name for name in out.split.head_tensors if name.endswith("weight") and old[name].ndim > 1]
    assert len(drawn) == 2
    assert not any(torch.equal(old[name], new[name]) for name in drawn)
    assert out.history == ()


def test_reconstruction_errors_by_hand() -> None:
    data = ImageSet(images=torch.full((5, 1, 2, 2), 51, dtype=torch.uint8), labels=torch.arange(5) % 2, num_classes=2)
    assert reconstruction_error(torch.zeros_like, data, batch_size=2) == pytest.approx(0.04)
    brighter = partial(torch.add, other=0.1)
    assert reconstruction_error(torch.zeros_like, data, transform=brighter) == pytest.approx(0.09)
    nothing = data.subset(torch.zeros(5, dtype=torch.bool))
    assert reconstruction_error(torch.zeros_like, nothing) != reconstruction_error(torch.zeros_like, nothing)  # NaN


def test_what_the_method_cannot_do_without_is_named() -> None:
    data = toy_images(70, seed=0)
    method = TrapAndReplace(trainer=toy_trainer(epochs=0), head_trainer=replace(HEAD, epochs=0))
    with pytest.raises(ValueError, match=r"clean images, and the view has none: give at least 10"):
        method.train(view(data, clean=None), generator=child(0))
    with pytest.raises(ValueError, match="at least 10 clean images; got 7"):
        method.train(view(data, clean=clean_images(7)), generator=child(0))
    small = ImageSet(images=data.images[..., :8, :8].contiguous(), labels=data.labels, num_classes=7)
    with pytest.raises(ValueError, match=r"shape \(3, 12, 12\); got 7 and \(3, 8, 8\)"):
        method.train(view(data, clean=small), generator=child(0))
    with pytest.raises(ValueError, match=r"got 'layer9'\. This network can be cut behind: network.features.0"):
        replace(method, stem="layer9").train(view(data), generator=child(0))


class Flattening(nn.Module):
    """Flattens maps by ``view``, as many public networks do, which channels-last memory does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.last = nn.Linear(72, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = torch.relu(self.second(torch.relu(self.first(images))))
        logits: Tensor = self.last(maps.view(len(maps), -1))
        return logits


def test_a_network_that_cannot_work_in_channels_last_memory_is_split_all_the_same() -> None:
    def flattening(generator: Generator) -> Classifier:
        with torch.random.fork_rng([]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            return Classifier(Flattening(), (0.5,) * 3, (0.25,) * 3, num_classes=NUM_CLASSES)

    method = TrapAndReplace(trainer=toy_trainer(epochs=1), head_trainer=replace(HEAD, epochs=1))
    out = method.train(view(toy_images(140, seed=0), build_model=flattening), generator=child(0))
    assert out.split.name == "network.first"
    assert out.reconstruct(torch.rand(2, *SHAPE, generator=child(0))).shape == (2, *SHAPE)
    old, new = out.trap_model.state_dict(), out.model.state_dict()
    assert {name for name in old if torch.equal(old[name], new[name])} == {"network.first.weight", "network.first.bias"}


def test_few_clean_images_will_do() -> None:
    method = TrapAndReplace(trainer=toy_trainer(epochs=1), head_trainer=replace(HEAD, epochs=2, batch_size=64))
    out = method.train(view(toy_images(70, seed=0), clean=clean_images(14)), generator=child(0))
    logits = out.model(as_float(as_uint8(torch.rand(2, *SHAPE, generator=child(0)))))
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize(
    "wrong",
    [{"reconstruction_weight": -1}, {"tv_weight": -1}, {"decoder_rate": 0}, {"label_smoothing": 1}, {"dropout": 1.0}],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected .*; got"):
        TrapAndReplace(**wrong)


def test_the_published_settings() -> None:
    method = TrapAndReplace.published()
    first, second = method.trainer, method.head_trainer
    assert first is not None
    assert second is not None
    assert (first.optimizer, first.learning_rate, first.epochs, first.batch_size) == ("adam", 1e-3, 200, 256)
    assert (second.optimizer, second.learning_rate, second.epochs, second.batch_size) == ("adam", 0.03, 100, 64)
    assert (first.schedule, first.warmup, first.weight_decay, second.weight_decay) == ("cosine", 0.0, 5e-4, 5e-4)
    assert (method.reconstruction_weight, method.tv_weight, method.label_smoothing, method.dropout) == (10, 1, 0.1, 0.5)
    assert first.augment is not None
    assert (first.augment.crop_padding, first.augment.flip) == (4, True)
    unflipped = TrapAndReplace.published(flip=False).trainer
    assert unflipped is not None
    assert unflipped.augment is not None
    assert not unflipped.augment.flip
