"""BaEraser: recover the trigger distribution, then run the poisoning backwards by gradient ascent.

Liu, Fan, Chen, Liu, Ma, Wang, Ma, "Backdoor Defense with Machine Unlearning", IEEE INFOCOM 2022 (arXiv 2201.09538). With
clean images (x, y), recovered triggers G, target label c and received weights theta_0, stage 2 minimises

    form "code":   alpha CE(f(x), y) - CE(f(x + G), c) + lambda |theta - theta_0|_1          (the authors' code)
    form "paper":  alpha [CE(f(x), y) - CE(f(x + G), c)] + lambda sum_k omega_k |theta_k - theta_0k|

where omega_k, the dynamic penalty, is the mean absolute gradient of the clean loss, computed again every epoch. The paper's
text after its abstract was not at hand; form "paper" follows the one public re-implementation.

Two things differ from the published schedule, which is kept as ``schedule="published"``. One recovered distribution erases
itself and not always the backdoor, and the published step hardly moves a model; so ``schedule="alternating"`` recovers and
unlearns in turn until a freshly started search needs a mask as large as for any other label. And ascent says only "not c":
what triggered images should be instead is asked for too (``relearn_weight``), while the received model's answers on clean
images are held by distillation (``distil_weight``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.cost import CostMeter
from lustral.core.history import HistoryEntry
from lustral.core.randomness import fork
from lustral.core.records import Batch, OnProgress
from lustral.training import EpochReport, Trainer, autocast, fine_tuning_recipe, frozen, set_training_mode
from lustral.vision.detectors.small_areas import ordinary_area
from lustral.vision.images import at_most, check_holdout, require_usable, split
from lustral.vision.inverters.max_entropy import MaxEntropy
from lustral.vision.measures import MASK_AREA, SEARCH_STEPS
from lustral.vision.records import DefenderView, ImageSet, Purified, RecoveredTrigger, Verdict
from lustral.vision.repair.run import NOTHING_TO_ERASE, returned_unchanged
from lustral.vision.repair.selection import (
    Selection,
    accuracy_floor,
    needed_area,
    retry_at_lower_rates,
    retry_notes,
)


def capped_ascent(logits: Tensor, label: int, cap: float) -> Tensor:
    """Return the ascent loss -CE(logits, label), per image, without gradient once the cross-entropy exceeds ``cap``.

    >>> round(capped_ascent(torch.tensor([[0.0, 0.0]]), 0, cap=10.0).item(), 4)  # -ln 2
    -0.6931
    """
    return -F.cross_entropy(logits, torch.full((len(logits),), label, device=logits.device), reduction="none").clamp(
        max=cap
    )


def weighted_l1(model: nn.Module, start: Sequence[Tensor], importance: Sequence[Tensor] | None) -> Tensor:
    """Return sum_k omega_k |theta_k - theta_0k|; without importance every omega is 1."""
    terms = []
    for index, (parameter, origin) in enumerate(zip(model.parameters(), start, strict=True)):
        distance = (parameter - origin).abs()
        terms.append((distance if importance is None else importance[index] * distance).sum())
    return torch.stack(terms).sum()


def clean_importance(model: nn.Module, data: ImageSet, most: int = 512) -> list[Tensor]:
    """Return omega: the mean over clean batches of |d CE / d theta|, scaled to a mean of 1 over all weights.

    At most ``most`` images are used, so that the estimate does not cost as much as the epoch it serves.
    """
    totals = [torch.zeros_like(p) for p in model.parameters()]
    positions = [index for index, p in enumerate(model.parameters()) if p.requires_grad]
    trainable = [p for p in model.parameters() if p.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for x, labels, _ in at_most(data, most).batches(128):
        with autocast(x.device):
            logits = model(x.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels)
        gradients = torch.autograd.grad(loss, trainable, allow_unused=True)
        for index, gradient in zip(positions, gradients, strict=True):
            if gradient is not None:
                totals[index] += gradient.abs()
    for module, mode in modes:
        module.training = mode
    scale = sum(float(t.sum()) for t in totals) / max(sum(t.numel() for t in totals), 1)
    return [t / max(scale, 1e-30) for t in totals]


@dataclass(frozen=True, kw_only=True)
class BaEraser:
    """Erase a backdoor by unlearning the recovered trigger distribution.

    Attributes:
        inverter: recovers the triggers of the suspect labels anew after every round.
        schedule: "alternating" rounds, or "published": one recovery, one unlearning, with the published weights and step
            whatever the fields below say.
        form: "code" or "paper", see above.
        clean_weight: alpha; 100 in the authors' code, where the learning rate is 1e-4.
        penalty: "l1" (constant), "dynamic" (omega), or "none".
        penalty_weight: lambda; 1e-6 in the authors' code, 1e-4 (on an omega of mean 1) in form "paper".
        ascent_weight: of the ascent term; 1 in both forms.
        ascent_margin: ascent stops at a cross-entropy of ln K + this, per image; infinite in the paper.
        relearn_weight: of CE(f(x + G), y), the true label of triggered images; 0 in the paper, 1 alone is MESA's choice.
        distil_weight: of KL(f_0(x) || f(x)) on clean images; 0 in the paper.
        exclude_target: leave triggered images of the target class out of the ascent.
        rounds: most rounds of recovery and unlearning.
        trainer: one round's unlearning; the authors train 10 epochs at 1e-4 without augmentation, BN in train mode. Frozen
            statistics diverge at a rate this high and lose accuracy at a lower one.
        least_steps: small clean sets get more epochs, until a round has this many steps.
        accuracy_loss: loss of held-out accuracy, as a fraction, beyond which weights are not kept, give or take one
            standard error.
        ordinary_rate: a label counts as erased when a fresh search needs an area that less than this share of a benign
            model's labels would fall short of, judged by the other labels of the scan; with fewer than two, never.
        holdout: share of the clean images kept from unlearning, to choose weights on.
    """

    version: ClassVar[int] = 3
    needs: ClassVar[str] = "a backdoor whose trigger can be searched"
    cost_passes: ClassVar[float] = 68
    takes_verdict: ClassVar[bool] = True

    inverter: MaxEntropy = field(default_factory=MaxEntropy)
    schedule: Literal["alternating", "published"] = "alternating"
    form: Literal["code", "paper"] = "code"
    clean_weight: float = 1.0
    penalty: Literal["dynamic", "l1", "none"] = "dynamic"
    penalty_weight: float = 1e-5
    ascent_weight: float = 0.2
    ascent_margin: float = 1.0
    relearn_weight: float = 1.0
    distil_weight: float = 2.0
    exclude_target: bool = True
    rounds: int = 4
    trainer: Trainer = field(default_factory=lambda: fine_tuning_recipe(6, weight_decay=0.0))
    least_steps: int = 90
    accuracy_loss: float = 0.02
    ordinary_rate: float = 0.05
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.rounds < 1:
            raise ValueError(f"expected at least one round; got {self.rounds}")
        if min(self.clean_weight, self.penalty_weight, self.ascent_weight, self.relearn_weight, self.distil_weight) < 0:
            raise ValueError("expected weights of at least 0")
        check_holdout(self.holdout)

    def published(self) -> BaEraser:
        """Return the published settings of this form: one recovery, ascent without cap, step 1e-4 against alpha = 100."""
        is_code = self.form == "code"
        return replace(
            self,
            schedule="published",
            clean_weight=100.0 if is_code else 1.0,
            penalty="l1" if is_code else "dynamic",
            penalty_weight=1e-6 if is_code else 1e-4,
            ascent_weight=1.0,
            ascent_margin=math.inf,
            relearn_weight=0.0,
            distil_weight=0.0,
            exclude_target=False,
            rounds=1,
            least_steps=0,
            trainer=Trainer(
                epochs=10,
                batch_size=128,
                learning_rate=1e-4,
                schedule="constant",
                weight_decay=0.0,
                batch_norm="train",
            ),
        )

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return a model without the backdoor to the labels that ``view.verdict`` names; see ``Purifier``."""
        if self.schedule == "published" and self != self.published():
            return self.published().purify(view, generator=generator, on_progress=on_progress)
        require_usable(view.clean)
        verdict = view.require_verdict()
        with CostMeter(view.model, clean_images=len(view.clean)) as meter:
            if not verdict.suspect_labels:
                return returned_unchanged(view, meter.cost, NOTHING_TO_ERASE)
            model, history, chosen, notes = self._erase(view, verdict, generator, on_progress)
        return Purified(
            model=model, history=tuple(history), selected=chosen, cost=meter.cost, verdict=verdict, notes=notes
        )

    def _erase(
        self,
        view: DefenderView,
        verdict: Verdict,
        generator: Generator,
        on_progress: OnProgress | None,
    ) -> tuple[nn.Module, list[HistoryEntry], int | None, tuple[str, ...]]:
        """Alternate recovery and unlearning; return (model, history, selected entry, notes)."""
        labels = verdict.suspect_labels
        held_out, fit = split(view.clean, self.holdout, generator=fork(generator, "holdout"))
        fit_view = DefenderView(model=view.model, clean=fit)
        wanted, note = self._goal(verdict)
        floor = accuracy_floor(view.model, held_out, self.accuracy_loss)
        model, bank, history = view.model, list(verdict.triggers), list[HistoryEntry]()
        if set(labels) != {trigger.target_label for trigger in bank}:
            bank = self.inverter.invert(
                fit_view, labels, held_out=held_out, generator=fork(generator, "recover", 0), on_progress=on_progress
            )
        best: tuple[tuple[float, ...], nn.Module, int, tuple[str, ...]] | None = None
        divisor = 1.0
        for index in range(self.rounds):
            selection = Selection(
                held_out=held_out, triggers=tuple(bank), floor=floor, parts={"round": index + 1}, history=history
            )
            if index == 0:
                selection.note_given(model)
            divisor = self._unlearn(
                model,
                view.model,
                fit,
                bank,
                selection,
                divisor,
                index=index,
                generator=generator,
                on_progress=on_progress,
            )
            assert selection.best_model is not None
            model = selection.best_model
            CostMeter.follow(view.model, model)
            if self.schedule == "published":
                return model, history, selection.best_index, ()
            fresh = self.inverter.invert(
                DefenderView(model=model, clean=fit),
                labels,
                held_out=held_out,
                generator=fork(generator, "recover", index + 1),
                on_progress=on_progress,
            )
            area = min(needed_area(trigger) for trigger in fresh)
            kept = history[selection.best_index] = replace(history[selection.best_index], area=area)
            accuracy = kept.clean_accuracy or 0.0
            key = (float(accuracy >= floor), min(area, wanted), accuracy)
            if best is None or key > best[0]:
                best = (key, model, selection.best_index, retry_notes(selection, divisor, self.accuracy_loss))
            if area >= wanted:
                note = f"A freshly started search needed {area:.1f} pixels after round {index + 1}: no trigger is left."
                break
            bank += fresh
        assert best is not None
        return best[1], history, best[2], (note, *best[3])

    def _goal(self, verdict: Verdict) -> tuple[float, str]:
        """Return the area at which a label counts as erased, in pixels, and the note for a run that does not get there."""
        labels = verdict.suspect_labels
        others = other_areas(verdict, labels)
        if len(others) < 2:
            return math.inf, (
                f"Too few other labels were searched to say which area is ordinary: all {self.rounds} rounds ran."
            )
        wanted = ordinary_area(others, self.ordinary_rate, len(verdict.by_label(MASK_AREA)) - len(labels))
        note = f"After {self.rounds} rounds a fresh search still needed less than {wanted:.1f} pixels for a label."
        return wanted, note

    def _unlearn(
        self,
        model: nn.Module,
        received: nn.Module,
        fit: ImageSet,
        bank: Sequence[RecoveredTrigger],
        selection: Selection,
        divisor: float,
        *,
        index: int,
        generator: Generator,
        on_progress: OnProgress | None,
    ) -> float:
        """Run one unlearning, slower where it costs too much; ``selection`` keeps the weights. Return the rate's divisor."""
        loss = UnlearningLoss(self, received, fit, bank)
        first = clean_importance(received, fit) if self.penalty == "dynamic" else None

        def after_epoch(report: EpochReport) -> None:
            selection.watch(report)
            if self.penalty == "dynamic":
                loss.importance = clean_importance(report.model, fit)
                set_training_mode(report.model, self.trainer.batch_norm)

        trainer = self.trainer.fitted_to_size(len(fit), self.least_steps)

        def train(by: float) -> None:
            loss.importance = first
            replace(trainer, learning_rate=trainer.learning_rate / by).fit(
                model,
                fit,
                generator=fork(generator, "unlearn", index),
                objective=loss,
                on_epoch=after_epoch,
                on_progress=on_progress,
                stage="unlearning",
            )

        if self.schedule == "published":
            train(divisor)
            return divisor
        return retry_at_lower_rates(selection, train, divisor)


class UnlearningLoss:
    """Stage 2's loss of a batch, with the terms that ``BaEraser`` adds.

    Attributes:
        importance: omega of each parameter, or None for 1; whoever trains computes it again every epoch.
    """

    def __init__(
        self, settings: BaEraser, received: nn.Module, fit: ImageSet, bank: Sequence[RecoveredTrigger]
    ) -> None:
        """Keep the received weights, and a copy of the received model that answers for clean images."""
        self.settings, self.bank = settings, bank
        self.importance: list[Tensor] | None = None
        self._start = [p.detach().clone() for p in received.parameters()]
        self._cap = math.log(fit.num_classes) + settings.ascent_margin
        self._teacher = copy.deepcopy(received)
        CostMeter.follow(received, self._teacher)

    def __call__(self, student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
        """Return the loss, (); one trigger is drawn for the whole batch."""
        settings, x, y = self.settings, batch.inputs, batch.labels
        trigger = self.bank[int(torch.randint(len(self.bank), (), generator=stream))]
        rows = (y != trigger.target_label) if settings.exclude_target else torch.ones_like(y, dtype=torch.bool)
        stamped = trigger(x[rows], generator=stream)
        if settings.schedule == "published":  # batches of their own, as in the authors' code
            clean, fooled = student(x).float(), student(stamped).float()
        else:  # one batch: normalised together in training, as the running statistics will in use
            clean, fooled = student(torch.cat([x, stamped])).float().split([len(x), len(stamped)])
        loss = settings.clean_weight * F.cross_entropy(clean, y)
        if settings.distil_weight:
            with torch.no_grad(), frozen(self._teacher):
                answers = self._teacher(x).float().log_softmax(1)
            held = F.kl_div(clean.log_softmax(1), answers, log_target=True, reduction="batchmean")
            loss = loss + settings.distil_weight * held
        ascent_weight = settings.ascent_weight * (settings.clean_weight if settings.form == "paper" else 1.0)
        if len(stamped):
            loss = loss + ascent_weight * capped_ascent(fooled, trigger.target_label, self._cap).mean()
            if settings.relearn_weight:
                loss = loss + settings.relearn_weight * F.cross_entropy(fooled, y[rows])
        if settings.penalty != "none":
            loss = loss + settings.penalty_weight * weighted_l1(student, self._start, self.importance)
        return loss


def other_areas(verdict: Verdict, labels: Sequence[int]) -> list[float]:
    """Return the areas of the labels that are not suspected, were searched to the end, and were reached."""
    areas, steps = verdict.by_label(MASK_AREA), verdict.by_label(SEARCH_STEPS)
    full = max(steps.values(), default=0)
    return [
        area
        for label, area in areas.items()
        if label not in labels and steps.get(label) == full and math.isfinite(area)
    ]
