"""The verbs of the library, as interfaces that methods implement; what they exchange is in ``lustral.vision.records``.

Image batches at every public boundary are float32 ``(B, C, H, W)`` in [0, 1]; sets at rest are uint8. Rates are fractions
in [0, 1].

A class that the catalog lists says in class variables what a reader weighs before using it: its ``version`` (an int that
changes with what the class computes) and, by its kind, its threat model, or what it needs and costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from lustral.core.records import Assets, Augmentation, Objective, OnProgress
from lustral.vision.records import (
    DefenderView,
    ImageSet,
    PoisonedSet,
    Probe,
    Purified,
    RecoveredTrigger,
    Sifted,
    Trained,
    TrainingView,
    Trigger,
    Verdict,
)


class Attack(Protocol):
    """A trigger and a rule for labels, and how they poison a training set."""

    def require_possible(self, clean: ImageSet) -> None:
        """Raise ``ValueError`` if this training set cannot be poisoned so. Cheap: called before any work.

        A rate that is too large is refused with the largest possible one named.
        """

    def trigger(self, image_shape: tuple[int, int, int]) -> Trigger:
        """Return the trigger for images of (C, H, W), as it is used against the finished model."""

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the attacker's label for each true label, (N,) int64; an equal label: not attackable."""

    def poison(self, clean: ImageSet, *, generator: Generator) -> PoisonedSet:
        """Return a poisoned copy of a training set."""


class ReadyAttack(Attack, Protocol):
    """An attack whose settings alone give its trigger.

    Attributes:
        version: counts changes of what the class computes.
        threat_model: what the attacker controls, in a few words.
    """

    version: ClassVar[int]
    threat_model: ClassVar[str]


@runtime_checkable
class CraftedAttack(Protocol):
    """An attack whose trigger is computed or learnt from data: its settings, from which ``craft`` makes the attack itself.

    Attributes:
        version: counts changes of what the class computes.
        threat_model: what the attacker controls, in a few words.
    """

    version: ClassVar[int]
    threat_model: ClassVar[str]

    def require_possible(self, clean: ImageSet) -> None:
        """As ``Attack.require_possible``; asks for no asset."""

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """As ``Attack.relabel``."""

    def craft(
        self, clean: ImageSet, *, assets: Assets, generator: Generator, on_progress: OnProgress | None = None
    ) -> Crafted:
        """Compute the trigger on the attacker's training images and return the attack."""

    def restore(self, tensors: Mapping[str, Tensor], image_shape: tuple[int, int, int]) -> Crafted:
        """Return the attack that ``Crafted.tensors`` described; raises ``ValueError`` where they do not fit."""


@runtime_checkable
class Crafted(Attack, Protocol):
    """An attack that carries tensors which its settings alone do not give."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Return what ``CraftedAttack.restore`` needs; after training, as training left it."""


@dataclass(frozen=True, kw_only=True)
class Steering:
    """How an attack that controls training steers it.

    Attributes:
        objective: replaces the plain loss; stamps, augments and relabels inside each batch.
        companions: optimizers of networks that are trained along (a trigger generator); the loop clears and steps them
            with the model's, at the same share of their own learning rate.
    """

    objective: Objective
    companions: tuple[torch.optim.Optimizer, ...] = ()


@runtime_checkable
class SteersTraining(Protocol):
    """An attack that controls training; ``poison`` is not called, the model is trained on the clean set."""

    def steer(self, clean: ImageSet, *, augment: Augmentation | None, generator: Generator) -> Steering:
        """Return how to train; the loop does not augment, the objective does, after stamping."""


@runtime_checkable
class HasProbes(Protocol):
    """An attack with further rates to report."""

    def probes(self, image_shape: tuple[int, int, int]) -> Mapping[str, Probe]:
        """Return probes by name, e.g. "noise_accuracy"."""


class Inverter(Protocol):
    """Recovers trigger distributions.

    Attributes:
        version: counts changes of what the class computes.
    """

    version: ClassVar[int]

    def invert(
        self,
        view: DefenderView,
        target_labels: Sequence[int],
        *,
        generator: Generator,
        held_out: ImageSet | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[RecoveredTrigger]:
        """Return one recovered distribution per target label.

        Success is measured on ``held_out``, clean images apart from ``view.clean``; None: on some of the view's that are
        kept from the recovery.
        """


class Detector(Protocol):
    """Decides whether a model is backdoored. ``lustral.vision.scanning`` runs one within a time, and beside benign references.

    A class that can end early says so with ``takes_deadline: ClassVar[bool] = True``; its ``inspect`` takes ``deadline`` too.

    Attributes:
        version: counts changes of what the class computes.
    """

    version: ClassVar[int]

    def inspect(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Verdict:
        """Return a verdict with its evidence."""


class InputDetector(Protocol):
    """Tells triggered inputs of a model from others, one by one."""

    def score(
        self, view: DefenderView, images: Tensor, *, generator: Generator, on_progress: OnProgress | None = None
    ) -> Tensor:
        """Score images.

        Args:
            view: the model that the images are meant for, and trusted images to compare with.
            images: (N, C, H, W) float32 in [0, 1].
            generator: stream of every draw.
            on_progress: called on the way.

        Returns:
            (N,) float32 scores, higher is more suspicious; the caller applies the threshold.
        """


class Sifter(Protocol):
    """Finds the suspicious images of a training set of unknown origin. ``lustral.vision.untrusted.sift`` runs one.

    Attributes:
        version: counts changes of what the class computes.
        needs: what it asks for beyond the training set, in a few words; "nothing" too.
        cost_passes: passes of each of 50,000 untrusted images through the network, forward and back, by default; > 0. Fewer
            images take more passes each, because training has a least number of steps.
    """

    version: ClassVar[int]
    needs: ClassVar[str]
    cost_passes: ClassVar[float]

    def sift(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Sifted:
        """Return a score for each image of ``view.untrusted``, in its order."""


class SafeTrainer(Protocol):
    """Trains a model on a set of unknown origin without learning the backdoor. ``lustral.vision.untrusted.train`` runs one.

    Attributes:
        version: counts changes of what the class computes.
        needs: what it asks for beyond the training set, in a few words; "nothing" too.
        cost_passes: passes of each untrusted image through the network, forward and back, by default; > 0.
    """

    version: ClassVar[int]
    needs: ClassVar[str]
    cost_passes: ClassVar[float]

    def train(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Trained:
        """Return a trained model."""


class Purifier(Protocol):
    """Erases a backdoor. ``lustral.vision.erasing.erase`` runs one with everything around it.

    A class that starts from a scan says so with ``takes_verdict: ClassVar[bool] = True``; its ``purify`` needs
    ``view.verdict``. ``scans_by: ClassVar[str]`` names the detector, where it is not "mask_area". One that learns from the
    training set says so with ``takes_untrusted: ClassVar[bool] = True``, and needs ``view.untrusted``.

    Attributes:
        version: counts changes of what the class computes.
        needs: what it asks of the model or the backdoor beyond clean images, in a few words; "nothing" too.
        cost_passes: passes of each clean image through the network, forward and back, with 2,500 clean images and the
            default settings; > 0. Measured by ``benchmarks/eraser_costs.py``.
    """

    version: ClassVar[int]
    needs: ClassVar[str]
    cost_passes: ClassVar[float]

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return a new, cleaned model; the one given is not changed.

        Raises:
            ValueError: the view lacks what the method needs, or its clean images are too few.
        """
