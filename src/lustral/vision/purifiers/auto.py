"""Auto: unlearn everything that a scan recovered, at a rate found on the network, with the way back closed.

BaEraser's loop (Liu et al., INFOCOM 2022, arXiv 2201.09538), for triggers of every kind: with clean images (x, y), recovered
triggers G_1 .. G_n of the named labels c_i and the received model f_0, minimise

    w_d KL(f_0(x) || f(x)) + w_r KL(f_0(x) || f(G_i(x))),      x in the last term not of class c_i,  i drawn for each batch

and search again, until a fresh search needs a far larger trigger. What the received model says of an image is what it shall say
of it with a trigger: labels, which a few hundred images overfit, are not learnt. Three things are added:

* the least learning rate that does it: rates rise, each from the received weights, until no recovered trigger fires;
* path-aware steps (PAM: Min, Qin, Zhang, Shen, Cheng, NeurIPS 2024, arXiv 2410.09838, section 5): a share of the steps takes its
  gradient at weights part of the way back to the received ones, theta + s (theta_0 - theta), so that no short way leads back to
  the backdoor;
* interpolation towards the received weights where the repair costs too much accuracy (``lustral.vision.repair.interpolation``).

Where the scan named nothing there is nothing to unlearn, and the model is returned as it was. ``anyway`` trains it all the same,
by what needs no label: FT-SAM's steps (Zhu et al., ICCV 2023, arXiv 2304.11823) with FST's fresh head, held away from the
received one (Min et al., NeurIPS 2023, arXiv 2310.01875), at a rate found, with the same way back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.history import Part
from lustral.core.randomness import fork
from lustral.core.records import Batch, OnProgress
from lustral.training import Trainer, TrainingDiverged, fine_tuning_recipe, frozen
from lustral.vision.images import as_float, at_most, check_holdout
from lustral.vision.inverters.mask_search import MaskSearch
from lustral.vision.inverters.max_entropy import MaxEntropy
from lustral.vision.records import DefenderView, ImageSet, Purified, RecoveredTrigger, TriggerKind
from lustral.vision.repair.heads import fresh_head, linear_head, rescale
from lustral.vision.repair.interpolation import SILENT, least_firing_point
from lustral.vision.repair.rates import RateChoice
from lustral.vision.repair.run import NOTHING_TO_ERASE, PurifyRun, returned_unchanged
from lustral.vision.repair.selection import (
    Selection,
    accuracy_floor,
    needed_area,
    retry_at_lower_rates,
    retry_notes,
)
from lustral.vision.repair.shifted_weights import adaptive_shift, interpolated_loss, loss_part_of_the_way
from lustral.vision.repair.waking import Waking

Sought = tuple[int, TriggerKind]
"""A label, and the kind of trigger to search for it."""

ENERGY_IMAGES = 256  # that the energy of a trigger is measured on
RISING = (64.0, 16.0, 4.0, 1.0, 0.25)  # what the trainer's rate is divided by, try by try
ANYWAY = "To train it all the same, without a label: `anyway` (`--anyway`)."
WITHOUT_LABEL = "The scan named no label: the model was trained without one, which erases less surely."


@dataclass(frozen=True, kw_only=True)
class WithoutLabel:
    """How to train a model of which a scan named no label.

    Attributes:
        trainer: how.
        rho: size of FT-SAM's shift; 2 in its authors' code.
        alpha: of FST's inner product with the received head; 0.1 in its authors' code.
    """

    version: ClassVar[int] = 1

    trainer: Trainer = field(default_factory=lambda: fine_tuning_recipe(20))
    rho: float = 2.0
    alpha: float = 0.1

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.rho <= 0 or self.alpha < 0:
            raise ValueError(f"expected rho > 0 and alpha >= 0; got {self.rho} and {self.alpha}")


@dataclass(frozen=True, kw_only=True)
class Auto:
    """Unlearn what a scan named; leave a model of which it named nothing alone, unless asked.

    Attributes:
        inverter: searches patches: of named labels that come without a trigger, and again after every round.
        faint: searches faint changes again, of labels whose trigger is one.
        rounds: most rounds of unlearning and searching.
        relearn_weight: w_r.
        distil_weight: w_d.
        path_share: share of the steps that look back; 0: none.
        back: farthest that they look, as a share of the way to the received weights; each draws its own.
        grown: a label counts as erased when fresh searches need this many times what the scan's triggers do: pixels of area for
            patches, of energy (the squared change) for faint ones.
        trainer: one round; its rate is the middle of what is tried.
        rate: "found": the least of five that silences the triggers, else the highest; or "given": the trainer's.
        least_steps: small clean sets get more epochs, until a round has this many steps.
        accuracy_loss: loss of held-out accuracy, as a fraction, beyond which weights are not kept, give or take one standard
            error.
        holdout: share of the clean images kept from training, to choose the rate and the weights on.
        anyway: train without a label where the scan named none.
        generic: how.
        reactivate: audit the result: tune a copy on the clean images and five with a recovered trigger, and say how often
            these fire then.
        waking: how.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing"
    cost_passes: ClassVar[float] = 61
    takes_verdict: ClassVar[bool] = True
    scans_by: ClassVar[str] = "cascade"

    inverter: MaxEntropy = field(default_factory=MaxEntropy)
    faint: MaxEntropy = field(
        default_factory=lambda: MaxEntropy(search=MaskSearch(penalty="energy", starts=1, steps=120, batch_size=16))
    )
    rounds: int = 3
    relearn_weight: float = 1.0
    distil_weight: float = 2.0
    path_share: float = 0.5
    back: float = 0.5
    grown: float = 3.0
    trainer: Trainer = field(default_factory=lambda: fine_tuning_recipe(6, weight_decay=0.0))
    rate: RateChoice = "found"
    least_steps: int = 90
    accuracy_loss: float = 0.015
    holdout: float = 0.2
    anyway: bool = False
    generic: WithoutLabel = field(default_factory=WithoutLabel)
    reactivate: bool = False
    waking: Waking = field(default_factory=Waking)

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_holdout(self.holdout)
        if self.rounds < 1 or self.grown <= 0:
            raise ValueError(f"expected rounds >= 1 and grown > 0; got {self.rounds} and {self.grown}")
        if min(self.relearn_weight, self.distil_weight) < 0:
            raise ValueError("expected weights of at least 0")
        if not (0 <= self.path_share <= 1 and 0 <= self.back <= 1):
            raise ValueError(f"expected path_share and back in [0, 1]; got {self.path_share} and {self.back}")

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return a model without the backdoors that ``view.verdict`` names; see ``Purifier``."""
        verdict = view.require_verdict()
        with PurifyRun(view=view, holdout=self.holdout, generator=generator, on_progress=on_progress) as repair:
            if not verdict.suspect_labels:
                if not self.anyway:
                    return returned_unchanged(view, repair.cost, f"{NOTHING_TO_ERASE} {ANYWAY}")
                return replace(self._without_label(repair), verdict=verdict)
            floor = accuracy_floor(view.model, repair.held_out, self.accuracy_loss)
            bank = [trigger for trigger in verdict.triggers if trigger.target_label in verdict.suspect_labels]
            if missing := set(verdict.suspect_labels) - {trigger.target_label for trigger in bank}:
                bank += self._search(repair, view.model, [(label, "patch") for label in sorted(missing)])
            model, kept, notes = self._rounds(repair, bank, floor)
            model, kept, notes = self._way_back(repair, model, kept, notes, bank, floor)
            if self.reactivate:
                now, woken = self.waking.rates(
                    model,
                    bank,
                    fit=repair.fit,
                    held_out=repair.held_out,
                    generator=fork(generator, "waking"),
                    on_progress=on_progress,
                )
                notes = (*notes, waking_note(self.waking.poisoned_images, now, woken))
        return replace(repair.result(model, *notes, kept=kept), verdict=verdict)

    def _way_back(
        self,
        repair: PurifyRun,
        model: nn.Module,
        kept: int,
        notes: tuple[str, ...],
        bank: Sequence[RecoveredTrigger],
        floor: float,
    ) -> tuple[nn.Module, int, tuple[str, ...]]:
        """Go part of the way back to the given weights if the accuracy asks for it; return (model, its entry, notes)."""
        point = least_firing_point(
            repair.view.model, model, fit=repair.fit, held_out=repair.held_out, triggers=bank, floor=floor
        )
        if point.share == 1:
            return repair.follow(point.model), kept, notes
        reached = repair.history[kept]
        parts: tuple[tuple[Part, float], ...] = (*reached.parts, ("share", point.share))
        repair.history.append(replace(point.measured, count=reached.count, parts=parts))
        return repair.follow(point.model), len(repair.history) - 1, (*notes, *point.notes)

    def _without_label(self, repair: PurifyRun) -> Purified:
        """Return the model trained by FT-SAM's steps with a fresh head, and as far back as the accuracy asks for."""
        given, generator = repair.view.model, repair.generator
        floor = accuracy_floor(given, repair.held_out, self.accuracy_loss)
        head = head_of(given, next(repair.fit.batches(1)).inputs)
        model, towards = repair.copy(), None
        if head is not None:
            linear = model.get_submodule(head)
            assert isinstance(linear, nn.Linear)
            towards = linear.weight.detach().clone()
            fresh_head(linear, fork(generator, "head"))

        def sharp(student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
            return interpolated_loss(
                student,
                lambda classify: F.cross_entropy(classify(batch.inputs).float(), batch.labels),
                shift=lambda weights, slopes: adaptive_shift(weights, slopes, rho=self.generic.rho),
                share=1.0,
            )

        def objective(student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
            if head is None or towards is None:
                return sharp(student, batch, stream)
            weight = student.get_submodule(head).weight
            assert isinstance(weight, Tensor)
            rescale(weight, towards.norm())
            return sharp(student, batch, stream) + self.generic.alpha * (weight * towards).sum()

        trainer = self.generic.trainer.fitted_to_size(len(repair.fit), self.least_steps)
        # The range test is of the given head: a fresh one has no accuracy to keep.
        trainer, notes = repair.with_rate(self.rate, trainer, lambda: sharp)
        repaired = repair.train(model, trainer, objective=objective, stage="fine-tuning")
        repaired, kept, told = self._way_back(repair, repaired, len(repair.history) - 1, notes, (), floor)
        return repair.result(repaired, WITHOUT_LABEL, *told, kept=kept)

    def _rounds(
        self, repair: PurifyRun, bank: list[RecoveredTrigger], floor: float
    ) -> tuple[nn.Module, int, tuple[str, ...]]:
        """Unlearn and search in turn; return (model, its entry in the history, notes). What is found goes into ``bank``."""
        given, held_out = repair.view.model, repair.held_out
        wanted = {sought: self.grown * size for sought, size in needed_sizes(bank, held_out).items()}
        loss = TriggerUnlearning(self, repair, bank)
        trainer = self.trainer.fitted_to_size(len(repair.fit), self.least_steps)
        notes = list[str]()
        model, kept, divisor = given, -1, 1.0
        for number in range(1, self.rounds + 1):
            selection = Selection(
                held_out=held_out,
                triggers=tuple(bank),
                floor=floor,
                parts={"round": number},
                history=repair.history,
            )
            if number == 1:
                selection.note_given(given)
            train = self._training(repair, model, trainer, loss, selection)
            if number == 1 and self.rate == "found":
                divisor = least_rate(selection, train)
            else:
                divisor = retry_at_lower_rates(selection, train, divisor)
            if kept >= 0 and not selection.admissible:
                break  # a further round costs too much: what there is stays
            assert selection.best_model is not None
            model, kept = repair.follow(selection.best_model), selection.best_index
            if number == self.rounds or not selection.admissible:
                break
            fresh = self._search(repair, model, sorted(wanted))
            sizes = needed_sizes(fresh, held_out)
            areas = [size for (_, kind), size in sizes.items() if kind == "patch"]
            repair.history[kept] = replace(repair.history[kept], area=min(areas, default=None))
            if all(size >= wanted[sought] for sought, size in sizes.items()):
                notes.append(
                    f"After round {number} fresh searches needed {self.grown:g} times what the scan's triggers do, or more."
                )
                break
            bank += fresh
        return model, kept, (*notes, *rate_notes(self.trainer.learning_rate / divisor, selection, self.accuracy_loss))

    def _training(
        self, repair: PurifyRun, model: nn.Module, trainer: Trainer, loss: TriggerUnlearning, selection: Selection
    ) -> Callable[[float], None]:
        """Return what trains one round at the rate divided by its argument, watched by ``selection``."""
        stream = fork(repair.generator, "unlearn")

        def train(divisor: float) -> None:
            replace(trainer, learning_rate=trainer.learning_rate / divisor).fit(
                model,
                repair.fit,
                generator=fork(stream, int(divisor)),
                objective=loss,
                on_epoch=selection.watch,
                on_progress=repair.on_progress,
                stage="unlearning",
            )

        return train

    def _search(self, repair: PurifyRun, model: nn.Module, wanted: Sequence[Sought]) -> list[RecoveredTrigger]:
        """Search triggers of labels anew on a model, each of its kind."""
        view, found = DefenderView(model=model, clean=repair.fit), list[RecoveredTrigger]()
        inverters: dict[TriggerKind, MaxEntropy] = {"patch": self.inverter, "faint": self.faint}
        for kind, inverter in inverters.items():
            if labels := [label for label, own in wanted if own == kind]:
                found += inverter.invert(
                    view,
                    labels,
                    held_out=repair.held_out,
                    generator=fork(repair.generator, "recover", kind),
                    on_progress=repair.on_progress,
                )
        return found


class TriggerUnlearning:
    """The loss of a batch; one trigger of ``bank`` is drawn for the whole batch, and where on the way back to look."""

    def __init__(self, settings: Auto, repair: PurifyRun, bank: Sequence[RecoveredTrigger]) -> None:
        """Keep the received weights, and a copy of the received model that answers for clean images."""
        self.settings, self.bank = settings, bank
        self._teacher = repair.copy()
        self._origin = {name: parameter.detach() for name, parameter in self._teacher.named_parameters()}

    def __call__(self, student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
        """Return the loss, (). Clean and triggered images share a batch: normalised together, as they will be in use."""
        settings, x, y = self.settings, batch.inputs, batch.labels
        trigger = self.bank[int(torch.randint(len(self.bank), (), generator=stream))]
        looks_back, share = torch.rand(2, generator=stream).tolist()
        rows = y != trigger.target_label
        seen = torch.cat([x, trigger(x[rows], generator=stream)])
        with torch.no_grad(), frozen(self._teacher):
            answers = self._teacher(x).float().log_softmax(1)

        def loss_of(classify: Callable[[Tensor], Tensor]) -> Tensor:
            logits = classify(seen).float()
            clean, triggered = logits[: len(x)], logits[len(x) :]
            held = F.kl_div(clean.log_softmax(1), answers, log_target=True, reduction="batchmean")
            loss = settings.distil_weight * held
            if len(triggered):
                silent = F.kl_div(triggered.log_softmax(1), answers[rows], log_target=True, reduction="batchmean")
                loss = loss + settings.relearn_weight * silent
            return loss

        if looks_back < settings.path_share:
            return loss_part_of_the_way(student, loss_of, self._origin, settings.back * share)
        return loss_of(student)


def least_rate(selection: Selection, train: Callable[[float], None]) -> float:
    """Train at rising rates, each time from the same weights, until the recovered triggers are silent; return the last divisor.

    A rate at which the training diverges, or at which no epoch holds the accuracy, is the last too: higher ones do no better.
    """
    for divisor in RISING:
        selection.parts["rate_divisor"] = divisor
        seen = len(selection.history)
        try:
            train(divisor)
        except TrainingDiverged:
            if selection.best is None:
                raise
            return divisor
        epochs = [entry for entry in selection.history[seen:] if (entry.clean_accuracy or 0.0) >= selection.floor]
        if not epochs or min(entry.recovered_asr or 0.0 for entry in epochs) <= SILENT:
            return divisor
    return divisor


def rate_notes(rate: float, selection: Selection, accuracy_loss: float) -> tuple[str, ...]:
    """Say which rate it was, and what it cost where that is more than asked for."""
    return (
        f"The learning rate was {rate:.1e}.",
        *retry_notes(selection, 1.0, accuracy_loss),
    )


def head_of(model: nn.Module, images: Tensor) -> str | None:
    """Return the name of the linear head, or None where there is none."""
    try:
        return linear_head(model, images)
    except ValueError:
        return None


def waking_note(count: int, now: float, woken: float) -> str:
    """Say what the re-activation audit found.

    >>> waking_note(5, 0.01, 0.253)
    'Tuned on the clean images and 5 with a recovered trigger, the model obeys it on 25.3 % of the others; before, on 1.0 %.'
    """
    if math.isnan(woken):
        return "The re-activation audit says nothing: tuning on a few poisoned images diverged."
    return (
        f"Tuned on the clean images and {count} with a recovered trigger, the model obeys it on {100 * woken:.1f} % of the "
        f"others; before, on {100 * now:.1f} %."
    )


def needed_sizes(triggers: Sequence[RecoveredTrigger], images: ImageSet) -> dict[Sought, float]:
    """Return the least that triggers needed, in pixels, by label and kind: area of a patch, energy of a faint change."""
    sizes: dict[Sought, float] = {}
    for trigger in triggers:
        sought = trigger.target_label, trigger.kind
        size = needed_area(trigger) if trigger.kind == "patch" else needed_energy(trigger, images)
        sizes[sought] = min(size, sizes.get(sought, math.inf))
    return sizes


def needed_energy(trigger: RecoveredTrigger, images: ImageSet) -> float:
    """Return the mean of ||x' - x||_2^2 / C over images, in pixels; a trigger that does not fire needed more than it has."""
    x = as_float(at_most(images, ENERGY_IMAGES).images)
    energy = (trigger(x) - x).square().flatten(1).sum(1).mean() / x.shape[1]
    return float(energy) / max(trigger.attack_success_rate, 0.05)
