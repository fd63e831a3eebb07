"""Making backdoored models, and keeping them in folders that nobody has to trust (``lustral.vision.victim_files``).

A victim folder holds ``model.safetensors`` (weights and architecture), ``victim.json`` (attack and its settings, data,
training, seed, versions, metrics at birth, checksums), ``trigger.png`` (originals, triggered, residual x10) and, where the
trigger was learnt, ``trigger.safetensors``. The true trigger is made again from settings and tensors: nothing in the folder
is executed.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Generator, Tensor

import lustral
from lustral.catalog import ATTACKS
from lustral.core.allocation import AllocationLimit
from lustral.core.files import write_bytes_atomic
from lustral.core.randomness import child
from lustral.core.records import Assets, OnProgress
from lustral.core.settings import build, describe
from lustral.training import EpochReport, Trainer
from lustral.vision.evaluation.protocol import Evaluation, evaluate
from lustral.vision.figures import stamp_sheet
from lustral.vision.images import as_float, as_uint8, channel_statistics
from lustral.vision.interfaces import Attack, Crafted, CraftedAttack, HasProbes, SteersTraining
from lustral.vision.models import Architecture, Classifier, build_classifier, load_model, save_model
from lustral.vision.records import ImageSet, PoisonedSet, Probe, Trigger, Victim
from lustral.vision.victim_files import (
    MODEL_FILE,
    PICTURE_FILE,
    RECORD_FILE,
    TRIGGER_FILE,
    VICTIM_SCHEMA,
    read_record,
    read_trigger,
    write_folder,
)
from lustral.vision.victim_files import (
    VictimError as VictimError,
)

TRIGGER_FACTOR = 8  # a trigger is made again in at most so many times the bytes of its tensors and one image ...
SMALL_TRIGGER = 2**26  # ... and so many bytes more
NO_ATTACK = "none"
Normalisation = Literal["none", "half"]
_CONSTANTS: Mapping[Normalisation, tuple[float, float]] = {"none": (0.0, 1.0), "half": (0.5, 0.5)}  # mean and spread
STEERS = "controls training"  # begins the threat model of attacks that poison no data


@dataclass(frozen=True, kw_only=True)
class NoTrigger:
    """The trigger of a benign model: it changes nothing."""

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Return a copy of the images."""
        return images.clone()


def keep_labels(labels: Tensor, num_classes: int) -> Tensor:
    """Return the labels as they are: the label rule of a benign model, under which nothing is attackable."""
    return labels


def library_versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    return {"lustral": lustral.__version__, "torch": str(torch.__version__), "python": platform.python_version()}


class NoAssets:
    """Keeps nothing: builds what an attack asks for, each time."""

    def get(self, spec: Mapping[str, Any], build: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Build; see ``Assets``."""
        return build()


def prepare(
    attack: Attack | CraftedAttack | None,
    train: ImageSet,
    *,
    assets: Assets,
    generator: Generator,
    on_progress: OnProgress | None = None,
) -> Attack | None:
    """Return the attack with its trigger computed, where it has to be."""
    if isinstance(attack, CraftedAttack):
        return attack.craft(train, assets=assets, generator=generator, on_progress=on_progress)
    return attack


def poisons_data(name: str) -> bool:
    """Say whether an attack of the catalog poisons training data; others steer training on clean data.

    >>> poisons_data("badnets"), poisons_data("wanet"), poisons_data(NO_ATTACK)
    (True, False, False)
    """
    return name != NO_ATTACK and not ATTACKS[name].threat_model.startswith(STEERS)


def poison_training_set(
    attack: Attack | CraftedAttack | None,
    train: ImageSet,
    *,
    seed: int,
    assets: Assets = NoAssets(),  # noqa: B008
    on_progress: OnProgress | None = None,
) -> tuple[Attack | None, PoisonedSet | None]:
    """Return an attack with its trigger computed, and the training set that it poisons: the same for equal seeds, always.

    Args:
        attack: None: a benign model's.
        train: clean training set.
        seed: of the victim.
        assets: keeps what the attack builds once.
        on_progress: called a few times a second.

    Returns:
        The attack, and the poisoned set; None where it poisons none: without an attack, or where it steers training.

    Raises:
        ValueError: the attack is impossible on this data; raised before any work.
    """
    if attack is not None:
        attack.require_possible(train)
    ready = prepare(attack, train, assets=assets, generator=child(seed, "craft"), on_progress=on_progress)
    if ready is None or isinstance(ready, SteersTraining):
        return ready, None
    return ready, ready.poison(train, generator=child(seed, "poison"))


def implant(
    attack: Attack | CraftedAttack | None,
    train: ImageSet,
    test: ImageSet,
    *,
    arch: str | Architecture,
    trainer: Trainer,
    seed: int,
    data_name: str,
    start: Classifier | None = None,
    normalisation: Normalisation | None = None,
    assets: Assets = NoAssets(),  # noqa: B008
    on_epoch: Callable[[EpochReport], None] | None = None,
    on_progress: OnProgress | None = None,
) -> Victim:
    """Train a backdoored model, or a benign one.

    Args:
        attack: what poisons the training set; None trains a benign model the same way.
        train: clean training set on the device to train on.
        test: clean test set for the metrics at birth.
        arch: architecture, as ``lustral.vision.models.build_classifier`` takes it.
        trainer: how to train.
        seed: of the poisoning, the starting weights and the training.
        data_name: for the provenance.
        assets: keeps what the attack builds once (a surrogate, an encoder) for the next victim.
        start: a trained model to fine-tune on the poisoned set (the way MESA's victims are made), or None for new
            weights.
        normalisation: of the network: "none", or "half" for [-1, 1]; None: by the mean and spread of each channel.
        on_epoch: called after each epoch.
        on_progress: called a few times a second.

    Raises:
        ValueError: the attack is impossible on this data; raised before any training.
    """
    recipe, steering = trainer, None
    ready, poisoned = poison_training_set(attack, train, seed=seed, assets=assets, on_progress=on_progress)
    if isinstance(ready, SteersTraining):
        steering = ready.steer(train, augment=trainer.augment, generator=child(seed, "steer"))
        trainer = dataclasses.replace(trainer, augment=None)
    data = train if poisoned is None else poisoned.data
    model = new_classifier(arch, train, seed, normalisation) if start is None else start.to(train.device)
    trained = trainer.fit(
        model,
        data,
        generator=child(seed, "training"),
        objective=None if steering is None else steering.objective,
        companions=() if steering is None else steering.companions,
        on_epoch=on_epoch,
        on_progress=on_progress,
    )
    provenance = _provenance(
        attack,
        train,
        poisoned,
        arch=arch,
        trainer=recipe,
        seed=seed,
        data_name=data_name,
        fine_tuned=start is not None,
    )
    victim = Victim(
        model=trained,
        trigger=NoTrigger() if ready is None else ready.trigger(train.image_shape),
        relabel=keep_labels if ready is None else ready.relabel,
        poisoned=poisoned,
        provenance=provenance,
        metrics={},
        tensors=ready.tensors() if isinstance(ready, Crafted) else {},
        probes=ready.probes(train.image_shape) if isinstance(ready, HasProbes) else {},
    )
    metrics = evaluate(victim, None, test, generator=child(seed, "evaluation")).to_dict()
    return dataclasses.replace(victim, metrics=metrics)


def _provenance(
    attack: Attack | CraftedAttack | None,
    train: ImageSet,
    poisoned: PoisonedSet | None,
    *,
    arch: str | Architecture,
    trainer: Trainer,
    seed: int,
    data_name: str,
    fine_tuned: bool,
) -> dict[str, Any]:
    """Return everything needed to make a victim again."""
    return {
        "schema": VICTIM_SCHEMA,
        "attack": NO_ATTACK if attack is None else attack_name(attack),
        "settings": {} if attack is None else describe(attack),
        "data": data_name,
        "arch": str(arch),
        "trainer": describe(trainer),
        "fine_tuned_from_clean": fine_tuned,
        "seed": seed,
        "num_training_images": len(train),
        "num_poisoned": 0 if poisoned is None else int(poisoned.is_poisoned.sum()),
        "num_cover": 0 if poisoned is None or poisoned.is_cover is None else int(poisoned.is_cover.sum()),
        "image_shape": list(train.image_shape),
        "num_classes": train.num_classes,
        "class_names": list(train.class_names),
        "versions": library_versions(),
    }


def new_classifier(
    arch: str | Architecture, train: ImageSet, seed: int, normalisation: Normalisation | None = None
) -> Classifier:
    """Return an untrained classifier for a training set, on its device: the one that victims of a seed start from."""
    return untrained_classifier(arch, train, generator=child(seed, "weights"), normalisation=normalisation)


def untrained_classifier(
    arch: str | Architecture, train: ImageSet, *, generator: Generator, normalisation: Normalisation | None = None
) -> Classifier:
    """Return an untrained classifier for a training set, on its device; its weights are drawn from ``generator``."""
    if normalisation is None:
        mean, std = channel_statistics(train)
    else:
        mean, std = ((value,) * train.image_shape[0] for value in _CONSTANTS[normalisation])
    return build_classifier(
        arch,
        num_classes=train.num_classes,
        image_shape=train.image_shape,
        mean=mean,
        std=std,
        generator=generator,
    ).to(train.device)


def attack_name(attack: Attack | CraftedAttack) -> str:
    """Return the catalog name of an attack."""
    for name, kind in ATTACKS.items():
        if type(attack) is kind:
            return name
    raise ValueError(f"{type(attack).__name__} is not in the catalog; expected one of {', '.join(sorted(ATTACKS))}")


def save_victim(folder: Path, victim: Victim, examples: ImageSet) -> None:
    """Write a victim folder; ``examples`` are clean images for the trigger picture."""
    model = victim.model
    assert isinstance(model, Classifier)

    def write(new: Path) -> None:
        save_model(
            new / MODEL_FILE, model, arch=victim.provenance["arch"], image_shape=tuple(victim.provenance["image_shape"])
        )
        write_bytes_atomic(new / PICTURE_FILE, trigger_picture(victim, examples))
        if victim.tensors:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in victim.tensors.items()}
            write_bytes_atomic(new / TRIGGER_FILE, save(tensors))

    write_folder(folder, write, {**victim.provenance, "metrics": victim.metrics})


def trigger_picture(victim: Victim, examples: ImageSet) -> bytes:
    """Return a PNG of eight attackable images: originals, triggered, residual x10."""
    labels = examples.labels.cpu()
    changed = (victim.relabel(labels, examples.num_classes) != labels).nonzero()[:, 0]
    chosen = (changed if len(changed) else torch.arange(len(labels)))[:8]
    originals = examples.images[chosen.to(examples.device)].cpu()
    triggered = as_uint8(victim.trigger(as_float(originals), generator=child(0, "picture")))
    return stamp_sheet(originals, triggered)


def load_victim(folder: str | os.PathLike[str], *, arch: str | None = None, allow_code: bool = False) -> Victim:
    """Read a victim folder.

    Args:
        folder: as ``save_victim`` writes it.
        arch: the model's architecture, instead of the recorded one; see ``load_model``.
        allow_code: whether the recorded architecture may be Python code; see ``load_model``.

    Raises:
        VictimError: the folder does not hold a victim, or its record does not fit this version.
        ModelFileError: the model file is not usable.
    """
    folder = Path(folder)
    record, record_path = read_record(folder), folder / RECORD_FILE
    name = record["attack"]
    if name not in [NO_ATTACK, *ATTACKS]:
        raise VictimError(f"{record_path}: unknown attack {name!r}; this version knows {', '.join(sorted(ATTACKS))}")
    channels, height, width = record["image_shape"]
    image_shape, tensors = (channels, height, width), read_trigger(folder)
    held = sum(tensor.nbytes for tensor in tensors.values()) + 4 * math.prod(image_shape)
    try:
        Evaluation.from_dict(record["metrics"])
    except Exception as error:  # it may be anything
        raise VictimError(
            f"{record_path}: its metrics are no evaluation ({type(error).__name__}); make the victim again"
        ) from error
    try:
        with AllocationLimit(TRIGGER_FACTOR * held + SMALL_TRIGGER):
            settings = None if name == NO_ATTACK else build(ATTACKS[name], record["settings"])
            attack: Attack | CraftedAttack | None = settings
            if isinstance(attack, CraftedAttack):
                attack = attack.restore(tensors, image_shape)
            trigger: Trigger = NoTrigger() if attack is None else attack.trigger(image_shape)
            probes: Mapping[str, Probe] = attack.probes(image_shape) if isinstance(attack, HasProbes) else {}
    except Exception as error:  # settings and tensors may be anyone's
        raise VictimError(
            f"{record_path}: settings do not fit the attack {name!r} on images of shape {image_shape} "
            f"({type(error).__name__}: {str(error)[:1000]}); make the victim again"
        ) from error
    loaded = load_model(folder / "model.safetensors", arch=arch, allow_code=allow_code)
    if (loaded.num_classes, loaded.image_shape) != (record["num_classes"], image_shape):
        raise VictimError(
            f"{record_path}: it tells of {record['num_classes']} classes of images {image_shape}, the model beside it knows "
            f"{loaded.num_classes} of {loaded.image_shape}; make the victim again"
        )
    return Victim(
        model=loaded.model,
        trigger=trigger,
        relabel=keep_labels if attack is None else attack.relabel,
        poisoned=None,
        # the architecture that the keys tell: a record of before may call another network by that name
        provenance={**{key: value for key, value in record.items() if key != "metrics"}, "arch": loaded.arch},
        metrics=record["metrics"],
        tensors=tensors,
        probes=probes,
    )
