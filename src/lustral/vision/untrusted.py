"""Work on a training set of unknown origin, with the same checks around every method: behind ``lustral sift`` and ``train``.

The labels and the clean set are checked first, cheaply and before any training. What a method says of its images is made fit to
be read: a score that is no number counts as most suspicious. The costs of the checks are part of the result's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lustral.core.characters import visible
from lustral.core.cost import CostMeter
from lustral.core.records import OnProgress, Progress
from lustral.training import Trainer
from lustral.vision.images import as_uint8
from lustral.vision.interfaces import SafeTrainer, Sifter
from lustral.vision.records import ImageSet, LabelledImages, Sifted, Trained, TrainingView

LEAST_IMAGES = 64  # a batch of the recipe for the smallest sets
HASH_BATCH = 512  # images in memory while the two sets are compared
NAMES_SHOWN = 3
COMPARING = "comparing with the clean set"


class OverlapError(ValueError):
    """Images of the clean set are in the untrusted set too, so nobody knows that they are clean.

    Attributes:
        indices: positions in the untrusted set.
    """

    def __init__(self, indices: Sequence[int], names: Sequence[str] = ()) -> None:
        """Name how many images there are, and the first few by their file, or their position where there are no files."""
        self.indices = tuple(indices)
        shown = ", ".join(visible(names[i]) if names else f"image {i}" for i in self.indices[:NAMES_SHOWN])
        more = ", ..." if len(self.indices) > NAMES_SHOWN else ""
        super().__init__(
            f"{len(self.indices):,} images of the untrusted set are in the clean set too ({shown}{more}); expected clean images "
            "from elsewhere, which nobody could have poisoned: take these out of one of the two sets"
        )


def sift(sifter: Sifter, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Sifted:
    """Find the suspicious images of a training set.

    Args:
        sifter: the method.
        view: the untrusted set, and a clean one where there is one.
        generator: stream of the run.
        on_progress: called on the way.

    Returns:
        Finite scores and flags on the CPU, with the cost of all that was done here. An image that is alone in its class is
        never flagged, because there is nothing to compare it with.

    Raises:
        OverlapError: images of the clean set are in the untrusted one.
        ValueError: the set cannot be sifted: one class, too few images, labels out of range.
    """
    with CostMeter(nn.Identity(), clean_images=0) as meter:
        notes = check(sifter, view, on_progress=on_progress)
    found = sifter.sift(view, generator=generator, on_progress=on_progress)
    found = _readable(found, view.untrusted, type(sifter).__name__)
    return replace(found, cost=meter.cost + found.cost, notes=(*notes, *found.notes))


def train(
    trainer: SafeTrainer, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None
) -> Trained:
    """Train a model on a set of unknown origin without learning a backdoor.

    Args:
        trainer: the method.
        view: the untrusted set, and a clean one where there is one.
        generator: stream of the run.
        on_progress: called on the way.

    Returns:
        The model in evaluation mode, with the cost of all that was done here.

    Raises:
        OverlapError: images of the clean set are in the untrusted one.
        ValueError: the set cannot be learnt from: one class, too few images, labels out of range.
        ArithmeticError: training came to nothing: the model's outputs are not finite.
    """
    with CostMeter(nn.Identity(), clean_images=0) as meter:
        notes = check(trainer, view, on_progress=on_progress)
    trained = trainer.train(view, generator=generator, on_progress=on_progress)
    _require_finite(trained.model.eval(), view.untrusted, type(trainer).__name__)
    sifted = None
    if trained.sifted is not None:
        sifted = _readable(trained.sifted, view.untrusted, type(trainer).__name__)
    return replace(trained, sifted=sifted, cost=meter.cost + trained.cost, notes=(*notes, *trained.notes))


def check(
    method: Sifter | SafeTrainer, view: TrainingView, *, on_progress: OnProgress | None = None
) -> tuple[str, ...]:
    """Check a view before any work; return what the user should know of it all the same.

    Raises:
        OverlapError: images of the clean set are in the untrusted one.
        ValueError: the set cannot be worked on.
    """
    notes = check_labels(method, view)
    if view.clean is not None and (overlap := find_overlap(view.untrusted, view.clean, on_progress=on_progress)):
        raise OverlapError(overlap, file_names(view.untrusted))
    return notes


def check_labels(method: Sifter | SafeTrainer, view: TrainingView) -> tuple[str, ...]:
    """Check what can be checked without looking at an image; see ``check``."""
    data = view.untrusted
    sizes = _class_sizes(data)
    if len(data) < (least := least_images(method)):
        raise ValueError(
            f"the untrusted set has {len(data)} images; {type(method).__name__} expects at least {least}, which is one batch: "
            "give more images, or set a smaller batch size"
        )
    if int(sizes.count_nonzero()) < 2:
        raise ValueError(
            f"all {len(data)} images of the untrusted set have the label {_class_name(data, int(sizes.argmax()))}; expected at "
            "least two classes: check how the labels are read"
        )
    if view.clean is not None:
        _check_clean(view.clean, data)
    alone = (sizes == 1).nonzero().flatten().tolist()
    if not alone:
        return ()
    names = ", ".join(_class_name(data, label) for label in alone[:NAMES_SHOWN])
    more = f" and {len(alone) - NAMES_SHOWN} more" if len(alone) > NAMES_SHOWN else ""
    return (f"One image only in class {names}{more}: there is nothing to compare it with, so it is kept.",)


def least_images(method: Sifter | SafeTrainer) -> int:
    """Return how many images a method asks for: what it states as ``least_images``, or its largest training batch."""
    stated = getattr(method, "least_images", None)
    return int(stated) if stated is not None else max([LEAST_IMAGES, *_batch_sizes(method)])


def find_overlap(data: LabelledImages, clean: ImageSet, *, on_progress: OnProgress | None = None) -> list[int]:
    """Return the positions in ``data`` of images that ``clean`` holds too, pixel for pixel; whatever the labels are.

    The hashes of the clean set are held in memory, and one batch of the other.
    """
    known = set(_hashes(clean.images))
    found: list[int] = []
    done = 0
    for batch in data.batches(HASH_BATCH):
        found += [done + row for row, digest in enumerate(_hashes(as_uint8(batch.inputs))) if digest in known]
        done += len(batch.labels)
        if on_progress is not None:
            on_progress(Progress(stage=COMPARING, done=done, total=len(data)))
    return found


def file_names(data: LabelledImages) -> tuple[str, ...]:
    """Return CLASS/FILE of each image of a set that has files; nothing of others."""
    paths: Sequence[str] = getattr(data, "paths", ())
    return tuple("/".join(PurePath(path).parts[-2:]) for path in paths)


def _class_sizes(data: LabelledImages) -> Tensor:
    """Return the number of images of each class, (K,) int64."""
    labels = data.labels.cpu()
    if not len(labels):
        raise ValueError("the untrusted set is empty; expected images of at least two classes")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= data.num_classes:
        raise ValueError(
            f"labels of the untrusted set out of range: expected 0 .. {data.num_classes - 1}, found {low} .. {high}"
        )
    return torch.bincount(labels, minlength=data.num_classes)


def _check_clean(clean: ImageSet, data: LabelledImages) -> None:
    given, wanted = (clean.image_shape, clean.num_classes), (data.image_shape, data.num_classes)
    if given != wanted:
        raise ValueError(
            f"expected clean images like the untrusted ones, {wanted[0]} in {wanted[1]} classes; got {given[0]} in {given[1]}: "
            "use the same image size, and a folder for every class"
        )
    if clean.class_names and data.class_names and tuple(clean.class_names) != tuple(data.class_names):
        pairs = zip(clean.class_names, data.class_names, strict=True)
        odd = next((mine, theirs) for mine, theirs in pairs if mine != theirs)
        raise ValueError(
            "expected the classes of the clean set to be those of the untrusted one, in that order; "
            f"found {odd[0]!r} for {odd[1]!r}"
        )
    if not len(clean):
        raise ValueError("the clean set is empty; leave it out, or give images of it")


def _class_name(data: LabelledImages, label: int) -> str:
    return visible(data.class_names[label]) if data.class_names else str(label)


def _hashes(images: Tensor) -> list[bytes]:
    """Return a digest for each uint8 image (N, C, H, W)."""
    rows = images.cpu().flatten(1).contiguous().numpy()
    return [hashlib.blake2b(row, digest_size=16).digest() for row in rows]


def _batch_sizes(settings: Any) -> list[int]:
    """Return the batch sizes of all trainings that a method's settings describe, at any depth."""
    if isinstance(settings, Trainer):
        return [settings.batch_size]
    if not dataclasses.is_dataclass(settings):
        return []
    return [size for part in dataclasses.fields(settings) for size in _batch_sizes(getattr(settings, part.name))]


def _readable(found: Sifted, data: LabelledImages, method: str) -> Sifted:
    """Return scores and flags on the CPU, all finite, with nobody flagged who is alone in a class."""
    scores, flagged = found.scores.detach().cpu().float(), found.flagged.detach().cpu()
    if scores.shape != (len(data),) or flagged.shape != (len(data),) or flagged.dtype != torch.bool:
        raise ValueError(
            f"{method}: expected one score and one bool flag per image, shape ({len(data)},); got {tuple(scores.shape)} and "
            f"{tuple(flagged.shape)} {flagged.dtype}"
        )
    labels = data.labels.cpu()
    is_alone = torch.bincount(labels, minlength=data.num_classes)[labels] == 1
    is_finite = scores.isfinite()
    if not is_finite.any():
        raise ArithmeticError(
            f"{method}: no score is finite, so its training came to nothing; lower its learning rate, or change the seed"
        )
    notes, threshold = found.notes, found.threshold
    broken = ~is_finite & ~is_alone
    highest = float(scores[is_finite].max())
    scores = torch.where(is_finite, scores, torch.where(is_alone, scores[is_finite].median(), highest))
    if broken.any():
        flagged = flagged | broken
        threshold = min(threshold, math.nextafter(highest, -math.inf))
        notes = (
            *notes,
            f"{int(broken.sum()):,} images have no finite score: they are counted as the most suspicious and listed.",
        )
    parts = {name: _readable(part, data, name) for name, part in found.parts.items()}
    return replace(
        found, scores=scores, flagged=flagged & ~is_alone, threshold=threshold, parts=parts, notes=tuple(notes)
    )


def _require_finite(model: nn.Module, data: LabelledImages, method: str) -> None:
    """Raise ``ArithmeticError`` where a model gives no numbers for the first images."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = next(iter(data.batches(8)))
    with torch.inference_mode():
        logits = model(batch.inputs.to(device))
    if not bool(logits.isfinite().all()):
        raise ArithmeticError(
            f"{method}: the outputs of the trained model are not finite, so its training came to nothing; lower its learning "
            "rate, or change the seed"
        )
