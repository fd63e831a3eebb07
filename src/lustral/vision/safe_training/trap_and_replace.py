"""Trap and Replace: bait the backdoor into the head, then throw the head away (Wang, Hong, Zhang, Zhou, Wang, "Trap and Replace:
Defending Backdoor Attacks by Trapping Them into an Easy-to-Replace Subnetwork", NeurIPS 2022, arXiv 2210.06428).

A classifier is a stem f_s and a head f_c. A decoder f_r draws the image from the stem's features, which keeps these low-level.
Stage 1, on the untrusted set, all three together (* the last term and the weights are those of the authors' code):

    L = CE(f_c(f_s(x)), y) + 10 MSE(f_r(f_s(x)), x) + 1 TV(f_r(f_s(x)))

Stage 2, on a small clean set: the stem is frozen, its statistics too, and a head that is drawn anew learns from images mixed by
CutMix, with smoothed labels and dropout. What is returned is the stem with the new head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.history import HistoryEntry
from lustral.core.randomness import fork
from lustral.core.records import Batch, OnProgress
from lustral.training import Augment, EpochReport, Trainer, default_trainer, frozen
from lustral.vision.evaluation.metrics import clean_accuracy
from lustral.vision.images import require_usable
from lustral.vision.models.splitting import Split, copy_stem, last_block, split_at, tapped
from lustral.vision.models.wiring import trace
from lustral.vision.records import ImageSet, Trained, TrainingView
from lustral.vision.safe_training.run import TrainingRun

LEAST_CHANNELS = 32  # of the decoder's hidden layers, as in the authors' code
TRAP_STAGE = "setting the trap"
REPLACE_STAGE = "training a new head"


class Decoder(nn.Module):
    """Draw the image from a feature map: an up-convolution for each halving, ReLU between them, and a sigmoid.

    From 64 x 8 x 8 to 3 x 32 x 32 it is the authors' decoder: 64 to 32 to 3 channels, kernels of 4, strides of 2. Channels halve
    from layer to layer, down to 32. With less than two halvings a 3x3 convolution ends it, as for the authors' stem 4. What does
    not come out at the image's size, as with odd sizes, is interpolated to it.
    """

    def __init__(self, shape: tuple[int, int, int], image_shape: tuple[int, int, int]) -> None:
        """Build it for feature maps of ``shape`` (C, H, W) and images of ``image_shape``; weights come from the global stream."""
        super().__init__()
        channels, *size = shape
        wanted, *self.size = image_shape
        ratio = max(large / small for large, small in zip(self.size, size, strict=True))
        doublings = max(round(math.log2(ratio)), 0)
        layers: list[nn.Module] = []
        for index in range(max(doublings, 2)):
            is_last = index == max(doublings, 2) - 1
            out = wanted if is_last else max(channels // 2, LEAST_CHANNELS)
            if index < doublings:
                layers.append(nn.ConvTranspose2d(channels, out, 4, 2, 1))
            else:
                layers.append(nn.Conv2d(channels, out, 3, 1, 1))
            if not is_last:
                layers.append(nn.ReLU())
            channels = out
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, C, H, W) to images of the right size, float32 in [0, 1]."""
        images: Tensor = self.layers(features).float().sigmoid()
        if list(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", align_corners=False)
        return images


def total_variation(images: Tensor) -> Tensor:
    """Return the squared differences of vertical and horizontal neighbours of (B, C, H, W), summed, per element of the batch.

    >>> total_variation(torch.full((2, 3, 4, 4), 0.3)).item()
    0.0
    """
    vertical, horizontal = images.diff(dim=2).square().sum(), images.diff(dim=3).square().sum()
    return (vertical + horizontal) / images.numel()


def cut_mix(images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor, float]:
    """Paste one random box of other images of a batch into each (Yun et al., ICCV 2019).

    With r ~ Beta(1, 1), which is uniform, the box has sides sqrt(1 - r) of the image's and a random centre, cut at the border.

    Args:
        images: (B, C, H, W), unchanged.
        labels: (B,) int64.
        generator: CPU stream.

    Returns:
        The mixed images, the labels of what was pasted, and the share of the area that was kept.
    """
    height, width = images.shape[2:]
    draws = torch.rand(3, generator=generator).tolist()
    side = math.sqrt(1 - draws[0])
    row, col = int(draws[1] * height), int(draws[2] * width)
    tall, wide = int(height * side) // 2, int(width * side) // 2
    top, bottom = max(row - tall, 0), min(row + tall, height)
    left, right = max(col - wide, 0), min(col + wide, width)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[order, :, top:bottom, left:right]
    return mixed, labels[order], 1 - (bottom - top) * (right - left) / (height * width)


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """Where a new head drops out: the published places, found in any network.

    Attributes:
        inputs: layers whose input is dropped: in each block, 3x3 and larger convolutions but the first; and where the last
            block is not in the head or is a single layer, the layer that gives the logits.
        output: the last block, whose output is dropped; None where it is not in the head, or a single layer.
    """

    inputs: tuple[str, ...]
    output: str | None


def dropout_places(model: nn.Module, images: Tensor, split: Split) -> Dropped:
    """Find them by watching a pass of images (B, C, H, W); one is enough."""
    wiring = trace(model, images)
    inputs, blocks = list[str](), set[str]()
    for name in wiring.layers:
        layer, block = model.get_submodule(name), name.rpartition(".")[0]
        if name in split.head_modules and isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1:
            if block in blocks:
                inputs.append(name)
            blocks.add(block)
    last = last_block(model, wiring)
    if last not in split.head_modules or last in wiring.layers:
        return Dropped(inputs=(*inputs, wiring.head), output=None)
    return Dropped(inputs=tuple(inputs), output=last)


class HeadInTraining(nn.Module):
    """A network whose stem is frozen for good: no gradients, and evaluation mode whatever mode the whole is put in."""

    def __init__(self, network: nn.Module, split: Split, dropped: Dropped, dropout: float) -> None:
        """Take the network, in place: its stem gets no gradients any more."""
        super().__init__()
        self.network, self.split, self.dropped, self.dropout = network, split, dropped, dropout
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in split.head_tensors)

    def train(self, mode: bool = True) -> Self:
        """Put the head into a mode; the stem stays as it is used."""
        super().train(mode)
        for name, module in self.network.named_modules():
            module.training = mode and name in self.split.head_modules
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K), with dropout in training."""
        if not self.training or not self.dropout:
            logits: Tensor = self.network(images)
            return logits
        with self._dropping():
            logits = self.network(images)
        return logits

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (F.dropout(inputs[0], self.dropout), *inputs[1:])

        def after(_: nn.Module, inputs: object, output: Tensor) -> Tensor:
            return F.dropout(output, self.dropout)

        layers = [self.network.get_submodule(name) for name in self.dropped.inputs]
        handles = [layer.register_forward_pre_hook(before) for layer in layers]
        if self.dropped.output is not None:
            handles.append(self.network.get_submodule(self.dropped.output).register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True, kw_only=True)
class TrapTrained(Trained):
    """What Trap-and-Replace made: ``model`` is the stem with the new head, and the trap is kept for the evaluator.

    Attributes:
        trap_model: the stem with the old head, which holds the backdoor: never use it but to measure how full the trap is.
        decoder: draws images from the stem's features; None without a trap.
        split: where the network was cut.
    """

    trap_model: nn.Module
    decoder: nn.Module | None
    split: Split

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return what the decoder draws of images (B, C, H, W) float32 in [0, 1], same shape and range; without gradients.

        Raises:
            ValueError: there is no decoder.
        """
        if self.decoder is None:
            raise ValueError("nothing was reconstructed in this training: it ran with no_trap=True")
        with torch.no_grad(), frozen(self.trap_model), tapped(self.trap_model, self.split.name) as seen:
            self.trap_model(images)
            drawn: Tensor = self.decoder(seen[-1])
        return drawn


@dataclass(frozen=True, kw_only=True)
class TrapAndReplace:
    """Train with a decoder beside the head on the untrusted set, then train a new head on clean images.

    Attributes:
        stem: name of the module that the stem ends with; None: what comes before the last block. That is the authors' stem 5 of
            WRN-16-1 and 31 of ResNet-34.
        no_trap: leave the decoder out of the first stage: the ablation that carries the paper's claim.
        reconstruction_weight: of the mean squared error in stage 1; 10 in the authors' code.
        tv_weight: of the reconstruction's total variation; 1 there.
        cutmix: mix the images of stage 2; always there.
        label_smoothing: in stage 2; 0.1 there.
        dropout: in the new head, between the convolutions of a block and behind the last block; 0.5 there.
        trainer: stage 1; None is the library's recipe for a set of that size. Adam at 0.001, 200 epochs, cosine there.
        head_trainer: stage 2; None is Adam at 0.003 for 100 epochs, cosine. Adam at 0.03 there, which is large.
        decoder_rate: of the decoder's own Adam, at the same share of it as the trainer's rate has; 0.001 there.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "clean images; a network that passes through one feature map before its last block"
    cost_passes: ClassVar[float] = 18

    stem: str | None = None
    no_trap: bool = False
    reconstruction_weight: float = 10.0
    tv_weight: float = 1.0
    cutmix: bool = True
    label_smoothing: float = 0.1
    dropout: float = 0.5
    trainer: Trainer | None = None
    head_trainer: Trainer | None = None
    decoder_rate: float = 1e-3

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.reconstruction_weight < 0 or self.tv_weight < 0 or self.decoder_rate <= 0:
            raise ValueError(
                "expected reconstruction_weight >= 0, tv_weight >= 0 and decoder_rate > 0; got "
                f"{self.reconstruction_weight}, {self.tv_weight} and {self.decoder_rate}"
            )
        if not 0 <= self.label_smoothing < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"expected label_smoothing and dropout in [0, 1); got {self.label_smoothing} and {self.dropout}"
            )

    @classmethod
    def published(cls, *, flip: bool = True) -> TrapAndReplace:
        """Return the settings of the authors' code for CIFAR-10, made for ``wrn16`` and 5 % clean images.

        Args:
            flip: mirror images; the authors do so for GTSRB as well, where it changes what some signs mean.
        """
        augment = Augment(crop_padding=4, flip=flip)
        first = Trainer(
            epochs=200,
            batch_size=256,
            optimizer="adam",
            learning_rate=1e-3,
            schedule="cosine",
            warmup=0.0,
            augment=augment,
        )
        return cls(trainer=first, head_trainer=replace(first, epochs=100, batch_size=64, learning_rate=0.03))

    def estimated_passes(self, num_images: int) -> float:
        """Return about how many image passes training on a set of that size takes, with 5 % as many clean images."""
        first = self.trainer or default_trainer(flip=False, num_images=num_images)
        second = self.head_trainer or head_recipe(flip=False)
        return (first.epochs + 0.05 * (first.epochs / 3 + second.epochs)) * num_images

    def train(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> TrapTrained:
        """Return the stem with a new head, and the trap beside it; see ``SafeTrainer``.

        Raises:
            ValueError: there are no clean images, too few (10, of two classes), or of another task than the untrusted ones; or
                the network cannot be cut.
        """
        clean = require_clean(view)
        with TrainingRun(view=view, generator=generator, on_progress=on_progress) as run:
            image = next(clean.batches(1)).inputs.to(run.device)
            split = split_at(run.start, image, self.stem)
            dropped = dropout_places(run.start, image, split)
            trap_model, decoder = self.set_trap(run, split)
            fresh = view.build_model(fork(generator, "new head")).to(run.device)
            copy_stem(trap_model, fresh, split)
            model = self.replace_head(run, clean, HeadInTraining(fresh, split, dropped, self.dropout))
        said = f"The stem ends with {split.name}; all behind it was learnt from {len(clean):,} clean images."
        result = run.result(model, said)
        shared = {item.name: getattr(result, item.name) for item in fields(Trained)}
        return TrapTrained(**shared, trap_model=trap_model, decoder=decoder, split=split)

    def set_trap(self, run: TrainingRun, split: Split) -> tuple[nn.Module, Decoder | None]:
        """Run stage 1: return the trained network and its decoder. The history's accuracies are those on the clean images."""
        view = run.view
        trainer = self.trainer or default_trainer(flip=view.flip, num_images=len(view.untrusted))
        if self.no_trap:
            stage = "training without a trap"
            return run.train(run.start, trainer, view.untrusted, stage=stage, parts=(("round", 1),)), None
        decoder = new_decoder(split, view.untrusted.image_shape, fork(run.generator, "decoder")).to(run.device)
        errors: list[Tensor] = []  # of each step

        def objective(model: nn.Module, batch: Batch, stream: Generator) -> Tensor:
            with tapped(model, split.name) as seen:
                logits = model(batch.inputs).float()
            drawn = decoder(seen[-1])
            error = F.mse_loss(drawn, batch.inputs)
            errors.append(error.detach())
            smoothness = self.tv_weight * total_variation(drawn)
            return F.cross_entropy(logits, batch.labels) + self.reconstruction_weight * error + smoothness

        recipe = Trainer(optimizer="adam", learning_rate=self.decoder_rate)  # with the published weight decay
        trained = trainer.fit(
            run.start,
            view.untrusted,
            generator=fork(run.generator, TRAP_STAGE),
            objective=objective,
            companions=[recipe.optimizer_for(decoder)],
            on_epoch=lambda report: self._note_trap(run, report, errors),
            on_progress=run.on_progress,
            stage=TRAP_STAGE,
        )
        return trained, decoder.requires_grad_(False).eval()

    def _note_trap(self, run: TrainingRun, report: EpochReport, errors: list[Tensor]) -> None:
        """Note an epoch with the mean error of its steps, and begin to collect anew."""
        error = torch.stack(errors).mean().item()
        errors.clear()
        entry = HistoryEntry(
            count=report.epoch,
            parts=(("round", 1),),
            loss=report.loss,
            reconstruction_error=error,
            images_per_second=report.images_per_second,
        )
        run.note(report.model, entry)

    def replace_head(self, run: TrainingRun, clean: ImageSet, head: HeadInTraining) -> nn.Module:
        """Run stage 2: return the network with its new head. The last accuracy is that on the images it learnt from."""
        recipe = self.head_trainer or head_recipe(flip=run.view.flip)
        trained = run.train(
            run.watch(head),
            recipe.fitted_to_size(len(clean), least_steps=0),
            clean,
            stage=REPLACE_STAGE,
            objective=self.mixed_loss,
            parts=(("round", 2),),
            classifier=lambda _: None,
        )
        assert isinstance(trained, HeadInTraining)
        if run.history:
            run.history[-1] = replace(run.history[-1], clean_accuracy=clean_accuracy(trained, clean).value)
        return trained.network.requires_grad_(True)

    def mixed_loss(self, model: nn.Module, batch: Batch, generator: Generator) -> Tensor:
        """Return r LS(p, y) + (1 - r) LS(p, y') of a mixed batch with the labels y of what was kept and y' of what was pasted."""
        loss: Callable[[Tensor, Tensor], Tensor] = nn.CrossEntropyLoss(label_smoothing=self.label_smoothing)
        if not self.cutmix:
            return loss(model(batch.inputs).float(), batch.labels)
        mixed, others, kept = cut_mix(batch.inputs, batch.labels, generator)
        logits = model(mixed).float()
        return kept * loss(logits, batch.labels) + (1 - kept) * loss(logits, others)


def new_decoder(split: Split, image_shape: tuple[int, int, int], generator: Generator) -> Decoder:
    """Return an untrained decoder of the stem's features, on the CPU, with weights drawn from a CPU stream."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(split.shape, image_shape)


def head_recipe(*, flip: bool) -> Trainer:
    """Return how a new head is trained by default: as published, but at a tenth of the rate and with smaller crops."""
    return Trainer(
        epochs=100,
        batch_size=64,
        optimizer="adam",
        learning_rate=0.003,
        schedule="cosine",
        warmup=0.1,
        augment=Augment(crop_padding=2, flip=flip),
    )


def require_clean(view: TrainingView) -> ImageSet:
    """Return the clean images.

    Raises:
        ValueError: there are none, too few, or they are of another task than the untrusted ones.
    """
    if view.clean is None:
        raise ValueError(
            "Trap-and-Replace trains its new head on clean images, and the view has none: give at least 10, of every class "
            "(the paper has 5 % of the training set), as TrainingView(clean=...)"
        )
    require_usable(view.clean)
    asked, found = ((data.num_classes, tuple(data.image_shape)) for data in (view.untrusted, view.clean))
    if asked != found:
        raise ValueError(
            f"expected clean images of the untrusted set's task, {asked[0]} classes and shape {asked[1]}; got {found[0]} and "
            f"{found[1]}"
        )
    return view.clean
