"""The nouns and verbs of the library: records that methods exchange, and the interfaces they implement.

Nothing here computes anything beyond checking its fields, and nothing of ours is imported. Image batches at every
public boundary are float32 ``(B, C, H, W)`` in [0, 1]; sets at rest are uint8. Rates are fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor, nn

from lustral.core.history import HistoryEntry
from lustral.core.records import Batch, Cost, Evidence


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Labelled images held in memory.

    Attributes:
        images: (N, C, H, W) uint8, on any device.
        labels: (N,) int64 in ``0 .. num_classes - 1``, same device.
        num_classes: number of classes K of the task, including classes absent from this set.
        class_names: K names, or empty.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check shapes, dtypes and the label range, once, for everything downstream."""
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise ValueError(
                f"expected images of shape (N, C, H, W) and dtype uint8; got {tuple(self.images.shape)} "
                f"{self.images.dtype}; convert floats in [0, 1] with lustral.vision.images.as_uint8"
            )
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise ValueError(
                f"expected one int64 label per image, shape ({len(self.images)},); got {tuple(self.labels.shape)} "
                f"{self.labels.dtype}"
            )
        if self.num_classes < 2:
            raise ValueError(f"expected at least 2 classes; got {self.num_classes}")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"expected {self.num_classes} class names; got {len(self.class_names)}")
        if len(self.labels):
            low, high = int(self.labels.min()), int(self.labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"labels out of range: expected 0 .. {self.num_classes - 1}, found {low} .. {high}; "
                    "labels must start at 0 and the number of classes must cover them all"
                )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return (C, H, W)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def device(self) -> torch.device:
        """Return the device of the images."""
        return self.images.device

    def subset(self, indices: Tensor) -> ImageSet:
        """Return the images at ``indices`` ((M,) int64, or (N,) bool mask), in that order."""
        indices = indices.to(self.device)
        return ImageSet(
            images=self.images[indices],
            labels=self.labels[indices],
            num_classes=self.num_classes,
            class_names=self.class_names,
        )

    def to(self, device: torch.device | str) -> ImageSet:
        """Return the set on another device."""
        return ImageSet(
            images=self.images.to(device),
            labels=self.labels.to(device),
            num_classes=self.num_classes,
            class_names=self.class_names,
        )

    def batches(
        self, batch_size: int, *, generator: Generator | None = None, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Yield batches of float32 images (B, C, H, W) in [0, 1], all on the set's device.

        Args:
            batch_size: images per batch; the last batch may be smaller.
            generator: CPU stream that shuffles; None keeps the order.
            drop_last: leave out a last batch that is not full.
        """
        if batch_size < 1:
            raise ValueError(f"expected a batch size of at least 1; got {batch_size}")
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        order = order.to(self.device)
        stop = len(self) - len(self) % batch_size if drop_last else len(self)
        for start in range(0, stop, batch_size):
            index = order[start : start + batch_size]
            chunk = slice(start, start + batch_size) if generator is None else index  # a slice copies no image
            yield Batch(self.images[chunk].float().div_(255), self.labels[chunk], index)


class LabelledImages(Protocol):
    """Labelled images, in memory (``ImageSet``) or decoded from disk when a batch asks for them (``FolderStream``)."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64 in ``0 .. num_classes - 1``."""

    @property
    def num_classes(self) -> int:
        """Number of classes of the task."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, or empty."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""

    def __len__(self) -> int:
        """Return the number of images."""

    def subset(self, indices: Tensor) -> LabelledImages:
        """Return the images at ``indices`` ((M,) int64, or (N,) bool mask), in that order."""

    def batches(
        self, batch_size: int, *, generator: Generator | None = None, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Yield batches of float32 images (B, C, H, W) in [0, 1]: in order, or shuffled by ``generator``."""


class Trigger(Protocol):
    """Stamps images. Attacks have a true one, inverters recover one."""

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Return triggered images: same shape, dtype, device and range; the input is not modified."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One more rate that tells how an attack behaves: noise accuracy, cross-trigger accuracy, false activation.

    Attributes:
        trigger: stamps the test images.
        expect: maps ((N,) true labels, K) to the label whose prediction counts as a hit, -1 to leave an image out.
    """

    trigger: Trigger
    expect: Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class PoisonedSet:
    """A poisoned training set and, for the evaluator only, which images are poisoned.

    Attributes:
        data: the poisoned set, 8-bit as an attacker would have to deliver it.
        is_poisoned: (N,) bool: stamped, and called by the attacker's label (which a clean-label attack leaves as it is).
        is_cover: (N,) bool: stamped with the label kept, to hide the poisoned ones; None where an attack has none.
    """

    data: ImageSet
    is_poisoned: Tensor
    is_cover: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A backdoored classifier with its provenance.

    Attributes:
        model: the backdoored classifier, float32 (B, C, H, W) in [0, 1] to logits (B, K).
        trigger: the true trigger; never shown to a defence.
        relabel: maps (true labels, number of classes) to the attacker's labels; equal labels are not attackable.
        poisoned: the training set it learnt from, or None when it was loaded from a folder.
        provenance: everything needed to make it again: attack, settings, data, architecture, training, seed, versions.
        metrics: clean accuracy, attack success rate and robust accuracy at birth.
        tensors: what the trigger needs beyond its settings (a learnt pattern, an encoder), saved with the victim.
        probes: further rates that the evaluator reports, by name.
    """

    model: nn.Module
    trigger: Trigger
    relabel: Callable[[Tensor, int], Tensor]
    poisoned: PoisonedSet | None
    provenance: Mapping[str, Any]
    metrics: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    probes: Mapping[str, Probe] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DefenderView:
    """Everything a defence may look at, and nothing else.

    Attributes:
        model: the classifier to examine or to repair.
        clean: the small trusted set.
        untrusted: the training set of unknown origin, where the setting grants it.
        verdict: what a scan of this model said, so that nobody searches again.
    """

    model: nn.Module
    clean: ImageSet
    untrusted: LabelledImages | None = None
    verdict: Verdict | None = None

    def require_verdict(self) -> Verdict:
        """Return the verdict; raise ``ValueError`` where none was handed over."""
        if self.verdict is None:
            raise ValueError(
                "this method starts from a scan, and the view has no verdict: scan the model first and give what a detector's "
                "`inspect` returns as DefenderView(verdict=...), or call lustral.vision.erasing.erase, which scans where it must"
            )
        return self.verdict

    def require_untrusted(self) -> LabelledImages:
        """Return the training set; raise ``ValueError`` where none was granted."""
        if self.untrusted is None:
            raise ValueError(
                "this method learns from the training set that the model was trained on, and the view has none: give "
                "DefenderView(untrusted=...), or use a method that needs clean images only"
            )
        return self.untrusted


@dataclass(frozen=True, kw_only=True)
class TrainingView:
    """Everything that a sifter or a safe trainer may look at: a training set of unknown origin.

    Attributes:
        untrusted: the training set; some of its images may be poisoned.
        build_model: makes an untrained classifier of the wanted architecture, its weights drawn from the given CPU stream.
        clean: a small trusted set, where the setting grants one; none of its images is in ``untrusted``.
        flip: whether a horizontal flip keeps an image's meaning.
        model: a classifier trained plainly on ``untrusted``, where the caller has one: a sifter that looks at a trained model
            takes it instead of training its own.
    """

    untrusted: LabelledImages
    build_model: Callable[[Generator], nn.Module]
    clean: ImageSet | None = None
    flip: bool = False
    model: nn.Module | None = None


TriggerKind = Literal["patch", "faint"]


@dataclass(frozen=True, kw_only=True)
class RecoveredTrigger:
    """A distribution of triggers for one target label, held as samples. It is a ``Trigger`` itself.

    Attributes:
        target_label: the class the samples lead to.
        masks: (S, 1, H, W) float32 opacity in [0, 1].
        patterns: (S, C, H, W) float32 in [0, 1].
        area: pixels of opacity that the smallest search result needed (sum of its mask).
        attack_success_rate: fraction of held-out non-target images that the samples send to the target label.
        entropy: mean pairwise distance of the stamped samples, in pixels of full contrast: 0 means one point.
        kind: "patch", searched as the smallest mask, or "faint", as the faintest change of the whole image.
    """

    target_label: int
    masks: Tensor
    patterns: Tensor
    area: float
    attack_success_rate: float
    entropy: float
    kind: TriggerKind = "patch"

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Stamp each image with a sample drawn by ``generator`` (None: samples in turn)."""
        count = len(self.masks)
        if generator is None:
            pick = torch.arange(len(images)) % count
        else:
            pick = torch.randint(count, (len(images),), generator=generator)
        pick = pick.to(self.masks.device)
        mask, pattern = self.masks[pick].to(images), self.patterns[pick].to(images)
        return images + mask * (pattern - images)

    def to(self, device: torch.device | str) -> RecoveredTrigger:
        """Return the samples on another device."""
        return replace(self, masks=self.masks.to(device), patterns=self.patterns.to(device))


Answer = Literal["backdoored", "clean", "cannot tell"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer to: is this model backdoored?

    Attributes:
        outcome: "backdoored", "clean" or "cannot tell".
        suspect_labels: target labels named, most suspicious first.
        score: higher is more suspicious; the decision compares it with ``threshold``.
        threshold: the score above which the model is called backdoored.
        basis: one or two sentences: which null or reference the score rests on, and why the outcome is what it is.
        evidence: the figures it rests on, in the order to show them; empty where nothing was measured, because no answer could
            come of it.
        triggers: recovered triggers of the suspect labels (or of the most suspicious one).
        cost: what the scan used.
        clean_accuracy: of the model on the clean images, as a fraction; None where it was not measured.
        notes: sentences that limit what the answer is worth, e.g. that the model is often wrong on the clean images.
    """

    outcome: Answer
    suspect_labels: tuple[int, ...]
    score: float
    threshold: float
    basis: str
    evidence: tuple[Evidence, ...]
    triggers: tuple[RecoveredTrigger, ...]
    cost: Cost
    clean_accuracy: float | None = None
    notes: tuple[str, ...] = ()

    def figures(self, label: int | None) -> dict[str, float]:
        """Return what was measured of a label, by measure; None: of the whole model."""
        return {entry.measure: entry.value for entry in self.evidence if entry.label == label}

    def by_label(self, measure: str) -> dict[int, float]:
        """Return the values of one measure, by label; empty where the detector does not measure it."""
        return {e.label: e.value for e in self.evidence if e.measure == measure and e.label is not None}

    def p_values(self) -> dict[int | None, float]:
        """Return the least p-value of each label that was tested; None stands for the whole model."""
        found: dict[int | None, float] = {}
        for entry in self.evidence:
            if entry.p_value is not None:
                found[entry.label] = min(entry.p_value, found.get(entry.label, 1.0))
        return found


@dataclass(frozen=True, kw_only=True)
class Purified:
    """A model after erasing, and how it came about.

    Attributes:
        model: the new classifier; the given one is unchanged.
        history: what was measured on the held-out part of the clean set, epoch by epoch or cut by cut.
        selected: index into ``history`` of the weights that were kept; None when the model was returned unchanged.
        cost: what it used.
        verdict: the scan that it started from, or None.
        audit: a fresh scan of the new model, or None where none was made.
        notes: sentences the user should read (what was not done, and why).
    """

    model: nn.Module
    history: tuple[HistoryEntry, ...]
    selected: int | None
    cost: Cost
    verdict: Verdict | None = None
    audit: Verdict | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def given(self) -> HistoryEntry | None:
        """What the history says of the given model; None where it starts later, e.g. after the first epoch."""
        return self.history[0] if self.history and self.history[0].is_given else None


@dataclass(frozen=True, kw_only=True)
class Sifted:
    """Which images of a training set are suspicious.

    Attributes:
        scores: (N,) float32, one per image in the set's order; higher is more suspicious.
        flagged: (N,) bool: the images that the method would take away.
        threshold: the score from which an image is listed; infinite where none is.
        basis: one or two sentences: what the scores measure, and where the line was drawn.
        cost: what it used.
        parts: what each method said, by its name in the catalog, where several were combined.
        notes: sentences the user should read.
    """

    scores: Tensor
    flagged: Tensor
    threshold: float
    basis: str
    cost: Cost
    parts: Mapping[str, Sifted] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model trained safely on a set of unknown origin.

    Attributes:
        model: the classifier, in evaluation mode.
        history: what each epoch measured.
        cost: what it used.
        sifted: what was found suspicious on the way, where the method sifts.
        notes: sentences the user should read.
    """

    model: nn.Module
    history: tuple[HistoryEntry, ...]
    cost: Cost
    sifted: Sifted | None = None
    notes: tuple[str, ...] = ()
