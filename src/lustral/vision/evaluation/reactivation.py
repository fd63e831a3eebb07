"""Is the backdoor gone, or asleep? What wakes a purified model up, beside two controls that have nothing to wake.

A low attack success rate after purification can hide a dormant backdoor: a few poisoned images, or a small push on the input,
bring it back (Min, Qin, Zhang, Shen, Cheng, "Uncovering, Explaining, and Mitigating the Superficial Safety of Backdoor Defense",
NeurIPS 2024, arXiv 2410.09838: retuning attack, query-based reactivation; linear mode paths as in their section 5).

Only an evaluator can run this: it needs the true trigger. The controls are a benign model and an exact purification, the
backdoored model fine-tuned on truly triggered images under their true labels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lustral.core.cost import CostMeter
from lustral.core.randomness import fork
from lustral.core.records import Batch, OnProgress
from lustral.training import Augment, Trainer, frozen
from lustral.vision.evaluation.metrics import attack_metrics, clean_accuracy, json_number
from lustral.vision.images import as_float, as_uint8, at_most, split
from lustral.vision.records import ImageSet, Victim

UNTELLING = 0.9  # success of the attack on a retuned benign model above which retuning tells nothing


def triggered_images(victim: Victim, clean: ImageSet, *, poisoned: bool, generator: Generator) -> ImageSet:
    """Return the attackable images of a set with the true trigger, 8-bit, under the attacker's or their true labels."""
    labels = victim.relabel(clean.labels, clean.num_classes)
    rows = (labels != clean.labels).nonzero()[:, 0]
    chosen = clean.subset(rows)
    stamped = as_uint8(victim.trigger(as_float(chosen.images), generator=generator))
    return replace(chosen, images=stamped, labels=labels[rows] if poisoned else chosen.labels)


def joined(*sets: ImageSet) -> ImageSet:
    """Return several sets as one."""
    first = sets[0]
    return replace(first, images=torch.cat([s.images for s in sets]), labels=torch.cat([s.labels for s in sets]))


def resistance(asr: float, benign_asr: float) -> float:
    """Return 1 - (ASR - ASR of the benign model) / (1 - ASR of the benign model), after equal retuning; NaN if it tells nothing.

    >>> resistance(0.1, 0.1), resistance(1.0, 0.1), resistance(0.5, 0.95)
    (1.0, 0.0, nan)
    """
    if math.isnan(benign_asr) or benign_asr > UNTELLING:
        return math.nan
    return 1 - (asr - benign_asr) / (1 - benign_asr)


def are_alike(one: nn.Module, other: nn.Module) -> bool:
    """Say whether two models have the same parameters but for their values, so that there is a straight line between them."""
    mine, theirs = ({name: p.shape for name, p in model.named_parameters()} for model in (one, other))
    return mine == theirs


@torch.no_grad()
def interpolated(one: nn.Module, other: nn.Module, share: float, clean: ImageSet) -> nn.Module:
    """Return the model at (1 - share) one + share other, its batch-norm statistics estimated anew on clean images."""
    model = copy.deepcopy(one).eval()
    CostMeter.follow(one, model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.lerp_(theirs, share)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average over all batches
        norm.train()  # and nothing else: what dropout leaves has other statistics
    for images, *_ in clean.batches(256, drop_last=len(clean) >= 256) if norms else ():
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


class Push(nn.Module):
    """A change of at most epsilon for every image: epsilon tanh(MLP(x)), with three hidden layers."""

    def __init__(self, image_shape: tuple[int, int, int], epsilon: float, hidden: int, seed: int) -> None:
        """Build it with weights drawn from ``seed``; 1024 hidden units published."""
        super().__init__()
        size, self.epsilon = math.prod(image_shape), epsilon
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            sizes = (size, hidden, hidden, hidden, size)
            layers: list[nn.Module] = [nn.Flatten()]
            for number, (inputs, outputs) in enumerate(pairwise(sizes)):
                layers += [*([nn.ReLU()] if number else []), nn.Linear(inputs, outputs)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return pushed images (B, C, H, W) in [0, 1]."""
        change: Tensor = self.layers(images).tanh().view_as(images)
        return (images + self.epsilon * change).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Controls:
    """What the audits of one victim have in common, whichever model was purified.

    Attributes:
        few: the attacker's training images that models are retuned on.
        tuning: training set by check: "retuned" with a few poisoned images, "retuned_clean" without.
        models: "benign" and "exact", the exact purification.
        rates: by check ("before" too), by model: ACC, ASR and RA.
    """

    few: ImageSet
    tuning: Mapping[str, ImageSet]
    models: Mapping[str, nn.Module]
    rates: Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Reactivation:
    """The checks, with the published settings as defaults.

    Attributes:
        clean_share: of the attacker's training images used for retuning; 0.02 in the paper.
        poisoned_images: added to them; 5 in the paper.
        trainer: of the retuning: 5 epochs of SGD at 0.01, batches of 128, as in the paper.
        clean_epochs: of the retuning on clean images alone.
        epsilon: of the push on triggered images; 16/255 in the paper.
        push_images: clean and triggered ones each; 500 in the paper.
        push_trainer: 50 epochs of SGD at 0.1, momentum 0.9, batches of 128 in the paper.
        push_weight: alpha, of the divergence from the retuned model's answers; 0.2 in the paper.
        hidden: units of the push's hidden layers; 1024 in the paper.
        path: shares of the way back to the backdoored model at which accuracy and attack are measured.
        path_images: test images drawn for that.
    """

    version: ClassVar[int] = 1

    clean_share: float = 0.02
    poisoned_images: int = 5
    trainer: Trainer = field(
        default_factory=lambda: Trainer(
            epochs=5,
            batch_size=128,
            learning_rate=0.01,
            schedule="constant",
            augment=Augment(crop_padding=2, flip=False),
        )
    )
    clean_epochs: int = 10
    epsilon: float = 16 / 255
    push_images: int = 500
    push_trainer: Trainer = field(
        default_factory=lambda: Trainer(
            epochs=50, batch_size=128, learning_rate=0.1, schedule="constant", weight_decay=0.0, channels_last=False
        )
    )
    push_weight: float = 0.2
    hidden: int = 1024
    path: tuple[float, ...] = tuple(round(0.1 * step, 1) for step in range(11))
    path_images: int = 2000

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.clean_share <= 1 or min(self.poisoned_images, self.push_images, self.path_images) < 1:
            raise ValueError(
                "expected clean_share in (0, 1], poisoned_images, push_images and path_images >= 1; got "
                f"{self.clean_share}, {self.poisoned_images}, {self.push_images} and {self.path_images}"
            )

    def audit(
        self,
        victim: Victim,
        purified: nn.Module,
        *,
        benign: nn.Module,
        train: ImageSet,
        test: ImageSet,
        generator: Generator,
        controls: Controls | None = None,
        on_progress: OnProgress | None = None,
    ) -> dict[str, Any]:
        """Try to wake a purified model up.

        Args:
            victim: the backdoored model with its true trigger.
            purified: the model after the defence.
            benign: a benign model of the same task and architecture, for comparison.
            train: the attacker's training images, of which shares are drawn.
            test: test images that no defence has seen.
            generator: CPU stream.
            controls: of ``controls``, where several models of one victim are audited; None: made here.
            on_progress: called a few times a second.

        Returns:
            For each check its ACC, ASR and RA on the purified model, the benign one and an exact purification; "resistance"
            in [0, 1] or a little above, 1 where the purified model is no easier to retune than the benign one. "path" is empty
            where the purified model is of another architecture than the backdoored one.
        """
        stream = fork(generator, "controls")
        if controls is None:
            controls = self.controls(
                victim, benign=benign, train=train, test=test, generator=stream, on_progress=on_progress
            )

        def with_controls(check: str, model: nn.Module) -> dict[str, Mapping[str, Any]]:
            return {"purified": self.rates(victim, model, test, generator), **controls.rates[check]}

        checks: dict[str, Any] = {"before": with_controls("before", purified)}
        retuned = {
            check: self.tune(purified, check, controls.tuning[check], generator, on_progress, "retuning purified")
            for check in controls.tuning
        }
        for check, model in retuned.items():
            checks[check] = with_controls(check, model)
        checks["resistance"] = json_number(
            resistance(checks["retuned"]["purified"]["asr"], checks["retuned"]["benign"]["asr"])
        )
        checks["pushed"] = self.pushed(
            victim, purified, retuned["retuned"], benign, controls.models["exact"], train, test, generator
        )
        seen, _ = split(test, min(1.0, self.path_images / len(test)), generator=fork(generator, "path"))
        shares = self.path if are_alike(purified, victim.model) else ()
        checks["path"] = [
            {
                "share": share,
                **self.rates(victim, interpolated(purified, victim.model, share, controls.few), seen, generator),
            }
            for share in shares
        ]
        return checks

    def controls(
        self,
        victim: Victim,
        *,
        benign: nn.Module,
        train: ImageSet,
        test: ImageSet,
        generator: Generator,
        on_progress: OnProgress | None = None,
    ) -> Controls:
        """Return what does not depend on the purified model: the sets to retune on, and both controls, retuned and measured.

        ``audit`` makes them of the stream ``fork(generator, "controls")``; given ones of that stream give the same audit.
        """
        few, _ = split(train, self.clean_share, generator=fork(generator, "few"))
        exact = self.exact_purification(victim, few, generator=fork(generator, "exact"), on_progress=on_progress)
        poison = triggered_images(victim, few, poisoned=True, generator=fork(generator, "poison"))
        seeds = torch.randperm(len(poison), generator=fork(generator, "which"))[: self.poisoned_images]
        tuning = {"retuned": joined(few, poison.subset(seeds)), "retuned_clean": few}
        models = {"benign": benign, "exact": exact}
        rates = {"before": {name: self.rates(victim, model, test, generator) for name, model in models.items()}}
        for check, data in tuning.items():
            rates[check] = {}
            for name, model in models.items():
                tuned = self.tune(model, check, data, generator, on_progress, f"retuning {name}")
                rates[check][name] = self.rates(victim, tuned, test, generator)
        return Controls(few=few, tuning=tuning, models=models, rates=rates)

    def tune(
        self,
        model: nn.Module,
        check: str,
        data: ImageSet,
        generator: Generator,
        on_progress: OnProgress | None,
        stage: str,
    ) -> nn.Module:
        """Return a model after the retuning of a check, "retuned" or "retuned_clean"."""
        epochs = self.trainer.epochs if check == "retuned" else self.clean_epochs
        return replace(self.trainer, epochs=epochs).fit(
            model, data, generator=fork(generator, check), on_progress=on_progress, stage=stage
        )

    def exact_purification(
        self, victim: Victim, clean: ImageSet, *, generator: Generator, on_progress: OnProgress | None = None
    ) -> nn.Module:
        """Return the backdoored model fine-tuned on clean images and truly triggered ones, all under their true labels.

        Images of the target class are triggered too, or the model would learn to avoid that class.
        """
        cured = replace(
            clean, images=as_uint8(victim.trigger(as_float(clean.images), generator=fork(generator, "stamp")))
        )
        trainer = replace(self.trainer, epochs=max(self.clean_epochs, self.trainer.epochs))
        return trainer.fit(
            victim.model,
            joined(clean, cured),
            generator=fork(generator, "training"),
            on_progress=on_progress,
            stage="exact purification",
        )

    def pushed(
        self,
        victim: Victim,
        purified: nn.Module,
        retuned: nn.Module,
        benign: nn.Module,
        exact: nn.Module,
        train: ImageSet,
        test: ImageSet,
        generator: Generator,
    ) -> dict[str, Any]:
        """Learn a small push on triggered images that wakes the purified model and leaves the benign one right.

        It is a reactivation only as far as the same push does not lead the controls to the attacker's label too.
        """
        share = min(1.0, 2 * self.push_images / len(train))
        pool, _ = split(train, share, generator=fork(generator, "push"))
        clean = at_most(pool, self.push_images)
        stamped = triggered_images(victim, pool, poisoned=False, generator=fork(generator, "stamp"))
        stamped = at_most(stamped, self.push_images)
        seed = int(torch.randint(2**31, (), generator=generator))
        push = Push(train.image_shape, self.epsilon, self.hidden, seed).to(train.device)

        def objective(pushing: nn.Module, batch: Batch, stream: Generator) -> Tensor:
            x, y = batch.inputs, batch.labels
            with torch.no_grad(), frozen(retuned):
                wanted = retuned(x).float().log_softmax(1)
            moved = pushing(x)
            with frozen(purified), frozen(benign):
                said, right = purified(moved).float().log_softmax(1), benign(moved).float()
            apart = F.kl_div(said, wanted, log_target=True, reduction="batchmean")
            return self.push_weight * apart + F.cross_entropy(right, y)

        learnt = self.push_trainer.fit(
            push,
            joined(clean, stamped),
            generator=fork(generator, "push training"),
            objective=objective,
            stage="pushing",
        )

        def trigger(images: Tensor, *, generator: Generator | None = None) -> Tensor:
            with torch.no_grad():
                moved: Tensor = learnt(victim.trigger(images, generator=generator).float())
            return moved

        awake = replace(victim, trigger=trigger, probes={})
        models = {"purified": purified, "benign": benign, "exact": exact}
        return {name: self.rates(awake, model, test, generator) for name, model in models.items()}

    @staticmethod
    def rates(victim: Victim, model: nn.Module, test: ImageSet, generator: Generator) -> Mapping[str, Any]:
        """Return ACC, ASR and RA as plain numbers."""
        attack = attack_metrics(model, test, victim.trigger, victim.relabel, generator=fork(generator, "rates"))
        return {
            "acc": clean_accuracy(model, test).value,
            "asr": attack.attack_success_rate.value,
            "ra": attack.robust_accuracy.value,
        }
