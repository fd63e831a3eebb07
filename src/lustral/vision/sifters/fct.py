"""FCT: features of poisoned images give way under transformations (Chen, Wu, Wang, "Effective Backdoor Defense by Exploiting
Sensitivity of Poisoned Samples", NeurIPS 2022; section 3.2, the module for sample distinguishment).

    Delta(x; tau, f) = || f(x) - f(tau(x)) ||^2 / d                    (equation 1, over the d features as in the authors' code)

f is what goes into the last layer of a network that was trained briefly on the untrusted set, without augmentation, and then for
some epochs by L_intra alone, which pushes the centres of the classes apart. tau turns an image by any angle and then shifts it.
The share alpha_c of the least distances is called clean, the share alpha_p of the largest poisoned, the rest uncertain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.cost import CostMeter
from lustral.core.randomness import fork, on_device
from lustral.core.records import Batch, OnProgress, Progress
from lustral.training import EpochReport, Trainer, autocast, frozen
from lustral.vision.models.features import BATCH, Penultimate
from lustral.vision.models.wiring import trace
from lustral.vision.records import LabelledImages, Sifted, TrainingView
from lustral.vision.suspicion.lines import draw_line

COLLAPSED = 1e-6  # distance below which the features of an image say nothing
MANY_COLLAPSED = 0.05  # share of such images from which a note is due


def transformed(images: Tensor, angles: Tensor, shifts: Tensor) -> Tensor:
    """Return tau(x): images turned about their middle, then shifted; nearest pixel, black where nothing is.

    As when one picture is made after the other: what the turn moves out of the frame does not come back with the shift.

    Args:
        images: (B, C, H, W) float32.
        angles: (B,) radians, counter-clockwise.
        shifts: (B, 2) whole pixels, to the right and down.
    """
    height, width = images.shape[2:]
    axes = (torch.arange(height, device=images.device), torch.arange(width, device=images.device))
    rows, cols = torch.meshgrid(*axes, indexing="ij")
    x, y = cols - shifts[:, 0, None, None], rows - shifts[:, 1, None, None]  # (B, H, W): where in the turned image
    was_inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    across, down = x - (width - 1) / 2, y - (height - 1) / 2
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    source = torch.stack([(cos * across - sin * down) * 2 / width, (sin * across + cos * down) * 2 / height], -1)
    turned = F.grid_sample(images, source.to(images.dtype), mode="nearest", padding_mode="zeros", align_corners=False)
    return turned * was_inside[:, None]


def intra_class_loss(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return L_intra of a batch: the mean cosine of the centres of its C classes, over all C^2 pairs, a class with itself as 0.

    In spite of its name it looks at different classes: minimised, it pushes them apart.

    Args:
        features: (B, D) float32.
        labels: (B,) int64.
        num_classes: number of classes of the task; those absent from the batch do not count.
    """
    members = F.one_hot(labels, num_classes).to(features).T  # (K, B)
    counts = members.sum(1)
    centres = F.normalize(members @ features / counts.clamp_min(1)[:, None], dim=1)
    cosines = centres @ centres.T
    return (cosines.sum() - cosines.diagonal().sum()) / (counts > 0).sum().square()


@dataclass(frozen=True, kw_only=True)
class FCT:
    """Score images by how far their features move when they are turned and shifted.

    Attributes:
        trainer: the short training, without augmentation; 2 epochs of SGD at 0.01, of 50,000 images, in the paper.
        least_steps: small sets get more epochs of it, until there are this many steps; 780 are 2 epochs of 50,000 images.
        intra_epochs: epochs of L_intra, by the same optimiser; 10 in the paper.
        intra_least_steps: small sets get more epochs of these too.
        rotation: largest angle, degrees to both sides; 180 in the paper.
        translation: largest shift, as a fraction of the side; 0.2 in the paper.
        draws: of tau, whose distances are averaged; 1 in the paper.
        clean_share: alpha_c; 0.20 in the paper.
        poisoned_share: alpha_p; 0.05 in the paper.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing"
    cost_passes: ClassVar[float] = 12.7

    trainer: Trainer = field(
        default_factory=lambda: Trainer(
            epochs=2, batch_size=128, optimizer="heavy_ball", learning_rate=0.01, schedule="constant"
        )
    )
    least_steps: int = 780
    intra_epochs: int = 10
    intra_least_steps: int = 780
    rotation: float = 180.0
    translation: float = 0.2
    draws: int = 1
    clean_share: float = 0.20
    poisoned_share: float = 0.05

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.draws < 1 or self.intra_epochs < 0 or self.rotation < 0 or not 0 <= self.translation < 1:
            raise ValueError(f"expected draws >= 1, non-negative amounts and a translation below 1; got {self}")
        if min(self.clean_share, self.poisoned_share) <= 0 or self.clean_share + self.poisoned_share > 1:
            raise ValueError(
                "expected positive shares of clean and poisoned images of at most 1 together; got "
                f"{self.clean_share} and {self.poisoned_share}"
            )

    def estimated_passes(self, num_images: int) -> float:
        """Return how many passes a set of so many images takes."""
        short, intra = self.recipes(num_images)
        return num_images * (short.epochs + intra.epochs + (1 + self.draws) / 3)

    def recipes(self, num_images: int) -> tuple[Trainer, Trainer]:
        """Return the short training and L_intra's, with the epochs that a set of so many images gets."""
        short = self.trainer.fitted_to_size(num_images, self.least_steps)
        intra = replace(short, epochs=self.intra_epochs)
        return short, intra.fitted_to_size(num_images, self.intra_least_steps) if self.intra_epochs else intra

    def sift(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Sifted:
        """Return the distance of each image; see ``Sifter``. A model of the view is not looked at: it learnt too much."""
        data = view.untrusted
        if len(data) < 2:
            raise ValueError(f"expected at least 2 images to sift; the set has {len(data)}")
        model = view.build_model(fork(generator, "weights"))
        with CostMeter(model, clean_images=0 if view.clean is None else len(view.clean)) as meter:
            model = self.extractor(model, data, generator=fork(generator, "training"), on_progress=on_progress)
            drawing = fork(generator, "transformations")
            scores = self.distances(model, data, generator=drawing, on_progress=on_progress)
            clean = None
            if view.clean is not None and len(view.clean):
                clean = self.distances(model, view.clean, generator=fork(generator, "clean"))
            line = draw_line(logarithm(scores), None if clean is None else logarithm(clean))
        basis = (
            "The score is the mean squared distance between the features of an image and of a turned and shifted copy of it, in "
            f"a briefly trained network. {line.sentence}"
        )
        return Sifted(
            scores=scores,
            flagged=line.flagged,
            threshold=math.exp(line.threshold),
            basis=basis,
            cost=meter.cost,
            notes=collapse_notes(scores),
        )

    def extractor(
        self, model: nn.Module, data: LabelledImages, *, generator: Generator, on_progress: OnProgress | None = None
    ) -> nn.Module:
        """Return a copy of ``model`` after the short training and L_intra, one run of one optimiser."""
        first = next(iter(data.subset(torch.tensor([0])).batches(1))).inputs
        head = trace(model, first.to(next(model.parameters()).device)).head
        short, intra = self.recipes(len(data))
        finished = 0

        def objective(network: nn.Module, batch: Batch, stream: Generator) -> Tensor:
            if finished < short.epochs:
                return F.cross_entropy(network(batch.inputs).float(), batch.labels)
            with Penultimate.at(network, head) as tap:
                features, _ = tap(batch.inputs)
            return intra_class_loss(features, batch.labels, data.num_classes)

        def count(report: EpochReport) -> None:
            nonlocal finished
            finished = report.epoch

        return replace(short, epochs=short.epochs + intra.epochs).fit(
            model,
            data,
            generator=generator,
            objective=objective,
            on_epoch=count,
            on_progress=on_progress,
            stage="training features briefly",
        )

    @torch.no_grad()
    def distances(
        self, model: nn.Module, data: LabelledImages, *, generator: Generator, on_progress: OnProgress | None = None
    ) -> Tensor:
        """Return Delta of each image, (N,) float32 on the CPU, in evaluation mode, with a tau of its own for every image."""
        device = next(model.parameters()).device
        drawing, found, done = on_device(generator, device), list[Tensor](), 0
        first = next(iter(data.subset(torch.tensor([0])).batches(1))).inputs.to(device)
        with frozen(model), Penultimate.of(model, first) as tap, autocast(device):
            for batch in data.batches(BATCH):
                images = batch.inputs.to(device).contiguous(memory_format=torch.channels_last)
                features, _ = tap(images)
                moved = torch.zeros(len(images), device=device)
                for _ in range(self.draws):
                    copies = transformed(images, *self.draw(len(images), data.image_shape, drawing))
                    there, _ = tap(copies.contiguous(memory_format=torch.channels_last))
                    moved += (features - there).square().mean(1)
                found.append((moved / self.draws).cpu())
                done += len(images)
                if on_progress is not None:
                    on_progress(Progress(stage="turning and shifting images", done=done, total=len(data)))
        return torch.cat(found)

    def draw(self, count: int, image_shape: tuple[int, int, int], generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw tau for some images: angles (B,) in radians and shifts (B, 2) in whole pixels, to the right and down."""
        _, height, width = image_shape
        uniform = torch.rand(3, count, generator=generator, device=generator.device) * 2 - 1
        most = torch.tensor([width, height], device=generator.device) * self.translation
        return uniform[0] * math.radians(self.rotation), (uniform[1:].T * most).round()

    def split(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split a set by its scores, (N,) of any sifter, higher is worse.

        The published code draws tau anew before it compares with the thresholds, so that the shares are only nearly met; here the
        scores that gave the thresholds are the ones that are compared.

        Returns:
            (clean, poisoned, uncertain): int64 positions, ascending, every one of 0 .. N - 1 in one of them. The first holds the
            int(N alpha_c) images of the least scores, the second the int(N alpha_p) of the largest; of equal scores the earlier
            image counts as the smaller.
        """
        order = scores.argsort(stable=True)
        num_clean, num_poisoned = (int(len(scores) * share + 1e-9) for share in (self.clean_share, self.poisoned_share))
        stop = len(scores) - num_poisoned
        clean, uncertain, poisoned = order[:num_clean], order[num_clean:stop], order[stop:]
        return clean.sort().values, poisoned.sort().values, uncertain.sort().values


def logarithm(distances: Tensor) -> Tensor:
    """Return the logarithms of distances (N,), which are near symmetric where no image is poisoned; finite at 0 too."""
    return distances.clamp_min(torch.finfo(torch.float32).tiny).log()


def collapse_notes(distances: Tensor) -> tuple[str, ...]:
    """Return a note where L_intra left many features that move by nothing: their order is then chance."""
    share = int((distances < COLLAPSED).sum()) / len(distances)
    if share <= MANY_COLLAPSED:
        return ()
    return (
        f"The features of {100 * share:.0f} % of the images do not move at all: they collapsed in training. Lower "
        "`intra_epochs`, or use another sifter.",
    )
