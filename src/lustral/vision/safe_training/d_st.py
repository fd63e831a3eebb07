"""D-ST: contrastive learning that trusts few labels, then a head that unlearns the suspicious ones (Chen, Wu, Wang, "Effective
Backdoor Defense by Exploiting Sensitivity of Poisoned Samples", NeurIPS 2022, section 3.3).

FCT splits the set into D_c (clean), D_p (poisoned) and D_u (uncertain).

1. SS-CTL (equation 2): the extractor f draws two views of each image together, and images of one label where both are in D_c.
2. MCE (equation 3), the head h over the finished extractor:

    L = mean over D_c of CE(h(f(x)), y)  -  lambda_p  mean over D_p of CE(h(f(x)), y)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import fork
from lustral.core.records import Batch, Objective, OnProgress
from lustral.training import Augment, Trainer, frozen
from lustral.training.crops import StrongAugment
from lustral.vision.models.features import Penultimate
from lustral.vision.models.wiring import trace
from lustral.vision.records import Trained, TrainingView
from lustral.vision.safe_training.cached_features import cache
from lustral.vision.safe_training.contrast import Labels, contrastive_loss, positives
from lustral.vision.safe_training.run import TrainingRun, require_trainable
from lustral.vision.sifters import FCT, Combined

LARGE_SET = 30_000  # images from which fewer epochs do


def mixed_cross_entropy(logits: Tensor, labels: Tensor, is_poisoned: Tensor, weight: float) -> Tensor:
    """Return L of equation 3; a term without an image in the batch is 0.

    Args:
        logits: (B, K) float32.
        labels: (B,) int64, as given.
        is_poisoned: (B,) bool: in D_p; the rest is in D_c.
        weight: lambda_p.
    """
    losses, bad = F.cross_entropy(logits, labels, reduction="none"), is_poisoned.to(logits.dtype)
    kept = (losses * (1 - bad)).sum() / (1 - bad).sum().clamp_min(1)
    return kept - weight * (losses * bad).sum() / bad.sum().clamp_min(1)


class Projected(nn.Module):
    """A classifier's features behind a projection: (B, D) float32 of unit length, for the contrastive loss."""

    def __init__(self, classifier: nn.Module, head: str, features: int, width: int) -> None:
        """Wrap a classifier whose head has this name and takes (B, features)."""
        super().__init__()
        self.classifier = classifier
        self.projection = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, width))
        self._head = head

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to projections (B, width)."""
        with Penultimate.at(self.classifier, self._head) as tap:
            features, _ = tap(images)
        return F.normalize(self.projection(features).float(), dim=1)


@dataclass(frozen=True, kw_only=True)
class Split:
    """What the second stage learns from and what it unlearns.

    Attributes:
        clean: positions of D_c, int64, ascending.
        poisoned: those of D_p.
        notes: sentences on classes that the split left out.
    """

    clean: Tensor
    poisoned: Tensor
    notes: tuple[str, ...] = ()

    def completed(self, scores: Tensor, labels: Tensor, num_classes: int, share: float) -> Split:
        """Return the split with the least suspicious images of each class that D_c left out.

        Args:
            scores: (N,) float32, higher is worse.
            labels: (N,) int64.
            num_classes: K.
            share: of the class's images that are taken, at least one.
        """
        counts = torch.bincount(labels, minlength=num_classes)
        missing = (torch.bincount(labels[self.clean], minlength=num_classes) == 0) & (counts > 0)
        notes, added = list[str](), [self.clean]
        for label in missing.nonzero().flatten().tolist():
            members = (labels == label).nonzero().flatten()
            best = members[scores[members].argsort(stable=True)[: max(int(share * len(members)), 1)]]
            added.append(best)
            notes.append(
                f"No image of class {label} was among those called clean: its {len(best)} least suspicious of {len(members)} "
                "were taken. If many of them are poisoned, so is the class."
            )
        if absent := (counts == 0).nonzero().flatten().tolist():
            notes.append(
                f"No image of class {', '.join(map(str, absent))} is in the set: the model will never answer so."
            )
        clean = torch.cat(added).sort().values
        return Split(clean=clean, poisoned=self.poisoned[~torch.isin(self.poisoned, clean)], notes=tuple(notes))


@dataclass(frozen=True, kw_only=True)
class DST:
    """Learn features by contrast and a head from the images that are surely clean.

    Attributes:
        sifter: makes the split.
        combined: scores by the default sifter in place of FCT, ours; the split keeps the shares of ``sifter``.
        labels: which labels the features are learnt by. "clean_only" is the paper's SS-CTL and safe for clean-label attacks;
            "all" is its S-CTL, more accurate and as safe for attacks that change labels; "none" is its CTL. The default is
            the first, since nobody knows the attack. "clean_only_official" is what the published code computes: a clean image
            is drawn to all images of its label, the poisoned ones too.
        epochs: of the first stage, 200 in the paper; None: 60, and 40 of more than 30,000 images.
        trainer: of the first stage; its epochs are those above. SGD at 0.5 with batches of 512 in the paper.
        least_steps: small sets get more epochs of the first stage, until there are this many steps.
        augment: makes the two views; its flips are left out where the view forbids them.
        temperature: 0.1 in the paper's code.
        projection: width of the projections; 128 there.
        poisoned_weight: lambda_p; 0.001 in the paper.
        head_trainer: of the second stage, 10 epochs of SGD at 5 with batches of 512 in the paper. The features are scaled to a
            mean square length of 1, so that this rate serves any network.
        head_least_steps: small sets get more epochs of the second stage; 240 are 10 epochs of 12,500 images.
        head_augment: views of the second stage: "weak" crops with a margin, of the whole image, as it is seen later; or the
            "strong" ones of the first stage, as in the paper.
        head_views: views of each image whose features are kept.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "a last linear layer"
    cost_passes: ClassVar[float] = 93

    sifter: FCT = field(default_factory=FCT)
    combined: Combined | None = None
    labels: Labels = "clean_only"
    epochs: int | None = None
    trainer: Trainer = field(
        default_factory=lambda: Trainer(batch_size=512, optimizer="heavy_ball", learning_rate=0.5, weight_decay=1e-4)
    )
    least_steps: int = 600
    augment: StrongAugment = field(default_factory=StrongAugment)
    temperature: float = 0.1
    projection: int = 128
    poisoned_weight: float = 0.001
    head_trainer: Trainer = field(
        default_factory=lambda: Trainer(
            epochs=10,
            batch_size=512,
            optimizer="heavy_ball",
            learning_rate=5.0,
            weight_decay=0.0,
            precision="float32",
            channels_last=False,
        )
    )
    head_least_steps: int = 240
    head_augment: Literal["weak", "strong"] = "weak"
    head_views: int = 4

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.labels not in get_args(Labels):
            raise ValueError(f"expected labels to be one of {', '.join(get_args(Labels))}; got {self.labels!r}")
        if self.temperature <= 0 or self.poisoned_weight < 0:
            raise ValueError(
                "expected a temperature > 0 and a weight >= 0 of the poisoned images; got "
                f"{self.temperature} and {self.poisoned_weight}"
            )
        if min(self.projection, self.head_views) < 1 or (self.epochs is not None and self.epochs < 1):
            raise ValueError(
                "expected at least 1 epoch, 1 view and a projection of 1 number; got "
                f"{self.epochs}, {self.head_views} and {self.projection}"
            )

    def estimated_passes(self, num_images: int) -> float:
        """Return about how many passes of whole images training on a set of that size takes; a crop counts by its pixels."""
        crop = self.augment.side**2
        split = self.sifter.clean_share + self.sifter.poisoned_share
        steps = self.recipe(num_images)
        scoring = num_images * FCT.cost_passes if self.combined is None else self.combined.estimated_passes(num_images)
        return scoring + num_images * (2 * crop * steps.epochs + split * self.head_views / 3)

    def recipe(self, num_images: int) -> Trainer:
        """Return how the first stage trains on a set of that size."""
        epochs = self.epochs or (40 if num_images > LARGE_SET else 60)
        return replace(self.trainer, epochs=epochs, augment=None).fitted_to_size(num_images, self.least_steps)

    def train(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Trained:
        """Return the model; see ``SafeTrainer``.

        Raises:
            ValueError: the set is too small to be split, or the network does not end in a linear layer.
        """
        require_trainable(view)
        sifted = (self.combined or self.sifter).sift(
            view, generator=fork(generator, "sifting"), on_progress=on_progress
        )
        split = self.split(sifted.scores, view)
        with TrainingRun(view=view, generator=generator, on_progress=on_progress) as run:
            head, notes, augment = self.look_at(run)
            wrapped = self.project(run, head)
            model = run.train(
                wrapped,
                self.recipe(len(view.untrusted)),
                view.untrusted,
                stage="learning features by contrast",
                objective=self.objective(split.clean, len(view.untrusted), augment, run.device),
                parts=(("stage", 1),),
                classifier=lambda _: None,
            )
            assert isinstance(model, Projected)
            classifier = run.watch(model.classifier)
            self.fit_head(run, classifier, head, split, augment)
            run.measure(classifier)
        return run.result(classifier, *sifted.notes, *split.notes, *notes, sifted=sifted)

    def split(self, scores: Tensor, view: TrainingView) -> Split:
        """Return D_c and D_p of the scores of the untrusted images."""
        data = view.untrusted
        clean, poisoned, _ = self.sifter.split(scores)
        if len(clean) < 2 or not len(poisoned):
            raise ValueError(
                f"of {len(data)} images, {len(clean)} are called clean and {len(poisoned)} poisoned; at least 2 and 1 are needed"
                ": give more images, or raise `sifter.clean_share` and `sifter.poisoned_share`"
            )
        found = Split(clean=clean, poisoned=poisoned)
        return found.completed(scores, data.labels.cpu(), data.num_classes, self.sifter.clean_share)

    def look_at(self, run: TrainingRun) -> tuple[str, tuple[str, ...], StrongAugment]:
        """Return the name of the network's head, notes, and the augmentation that the network can take."""
        channels, height, width = run.view.untrusted.image_shape
        head = trace(run.start, torch.zeros(1, channels, height, width, device=run.device)).head
        layer = run.start.get_submodule(head)
        if not isinstance(layer, nn.Linear) or layer.out_features != run.view.untrusted.num_classes:
            raise ValueError(
                f"D-ST trains the last layer of a network by itself: expected a linear layer with "
                f"{run.view.untrusted.num_classes} outputs; {head!r} is {layer}"
            )
        augment = replace(self.augment, flip=self.augment.flip and run.view.flip)
        tall, wide = augment.output_size(height, width)
        try:
            with frozen(run.start), torch.no_grad():
                run.start(torch.zeros(1, channels, tall, wide, device=run.device))
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).split("\n")[0][:120]
            note = f"The network takes no crops of {tall} x {wide} ({reason}): they were made as large as the images."
            return head, (note,), replace(augment, side=1.0)
        return head, (), augment

    def project(self, run: TrainingRun, head: str) -> Projected:
        """Return the untrained network behind an untrained projection."""
        layer = run.start.get_submodule(head)
        assert isinstance(layer, nn.Linear)
        with torch.random.fork_rng([]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=fork(run.generator, "projection"))))
            wrapped = Projected(run.start, head, layer.in_features, self.projection).to(run.device)
        run.watch(wrapped)
        return wrapped

    def objective(self, clean: Tensor, num_images: int, augment: StrongAugment, device: torch.device) -> Objective:
        """Return equation 2 over the two views of a batch."""
        is_clean = torch.zeros(num_images, dtype=torch.bool, device=device)
        is_clean[clean.to(device)] = True

        def objective(model: nn.Module, batch: Batch, stream: Generator) -> Tensor:
            images = batch.inputs
            views = torch.cat([augment(images, generator=stream), augment(images, generator=stream)])
            projections = model(views.contiguous(memory_format=torch.channels_last))
            with torch.autocast(images.device.type, enabled=False):
                pairs = positives(batch.labels, is_clean[batch.index], self.labels)
                return contrastive_loss(projections.float(), pairs, self.temperature)

        return objective

    def fit_head(
        self, run: TrainingRun, classifier: nn.Module, head: str, split: Split, augment: StrongAugment
    ) -> None:
        """Train the last layer of a classifier by equation 3, in place."""
        layer = classifier.get_submodule(head)
        assert isinstance(layer, nn.Linear)
        chosen = torch.cat([split.clean, split.poisoned])
        cached = cache(
            run.view.untrusted.subset(chosen),
            classifier,
            head,
            augment if self.head_augment == "strong" else Augment(crop_padding=2, flip=augment.flip),
            most_views=self.head_views,
            generator=fork(run.generator, "head views"),
            on_progress=run.on_progress,
        )
        length = cached.features.square().sum(2).mean().sqrt().clamp_min(1e-12)
        scaled = replace(cached, features=cached.features / length)
        start = copy.deepcopy(layer)
        for parameter in start.parameters():
            nn.init.zeros_(parameter)

        def objective(model: nn.Module, batch: Batch, stream: Generator) -> Tensor:
            is_poisoned = batch.index >= len(split.clean)
            return mixed_cross_entropy(model(batch.inputs).float(), batch.labels, is_poisoned, self.poisoned_weight)

        found = run.train(
            start,
            self.head_trainer.fitted_to_size(len(chosen), self.head_least_steps),
            scaled,
            stage="training the head",
            objective=objective,
            parts=(("stage", 2),),
            classifier=lambda _: None,
        )
        assert isinstance(found, nn.Linear)
        with torch.no_grad():
            layer.weight.copy_(found.weight / length)
            if layer.bias is not None:
                layer.bias.copy_(found.bias)
