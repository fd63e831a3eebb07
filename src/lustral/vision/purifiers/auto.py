"""Auto: unlearn everything that a scan recovered, at a rate found on the network, with the way back closed.

BaEraser's loop (Liu et al., INFOCOM 2022, arXiv 2201.09538), for triggers of every kind: with clean images (x, y), recovered
triggers G_1 .. G_n of the named labels c_i and the received model f_0, minimise

    w_d KL(f_0(x) || f(x)) + w_r KL(f_0(x) || f(G_i(x))),      x in the last term not of class c_i,  i drawn for each batch

and search again, until a fresh search needs a far larger trigger. What the received model says of an image is what it shall say
of it with a trigger: labels, which a few hundred images overfit, are not learnt. Five things are added:

* steps along directions that clean images do not use (``lustral.vision.repair.unused_directions``): what a few hundred images
  cannot hold, the accuracy on all the others, is held by the layers themselves; freer steps where held-out images call them
  harmless, as what silences a recovered trigger may leave the true one;
* a low learning rate: rates rise, each from the received weights, until no recovered trigger fires, and once more;
* path-aware steps (PAM: Min, Qin, Zhang, Shen, Cheng, NeurIPS 2024, arXiv 2410.09838, section 5): a share of the steps takes its
  gradient at weights part of the way back to the received ones, theta + s (theta_0 - theta), so that no short way leads back to
  the backdoor;
* faint changes: an added pattern is found as a patch too, whose unlearning leaves the pattern. So each named label is searched
  for a faint change, and one that needs far less energy than the label's patch is unlearnt with it;
* interpolation towards the received weights where the repair costs too much accuracy (``lustral.vision.repair.interpolation``).

Where the scan cannot tell, the labels that it finds unusual are unlearnt as a precaution. Where it
names nothing and doubts nothing there is nothing to unlearn, and the model is returned as it was. ``anyway`` trains it all the
same, by what needs no label: FT-SAM's steps (Zhu et al., ICCV 2023, arXiv 2304.11823) with FST's fresh head, held away from the
received one (Min et al., NeurIPS 2023, arXiv 2310.01875), at a rate found, with the same way back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.history import Part
from lustral.core.randomness import fork
from lustral.core.records import Batch, OnProgress
from lustral.training import Trainer, TrainingDiverged, fine_tuning_recipe, frozen
from lustral.vision.images import check_holdout
from lustral.vision.inverters.mask_search import MaskSearch
from lustral.vision.inverters.max_entropy import MaxEntropy
from lustral.vision.records import DefenderView, Purified, RecoveredTrigger, TriggerKind, Verdict
from lustral.vision.repair.heads import fresh_head, head_of, rescale
from lustral.vision.repair.interpolation import least_firing_point
from lustral.vision.repair.rates import RateChoice
from lustral.vision.repair.run import NOTHING_TO_ERASE, PurifyRun, returned_unchanged
from lustral.vision.repair.selection import (
    SILENT,
    Selection,
    Sought,
    accuracy_floor,
    needed_energy,
    needed_sizes,
    newly_wrong,
    retry_at_lower_rates,
)
from lustral.vision.repair.shifted_weights import adaptive_shift, interpolated_loss, loss_part_of_the_way
from lustral.vision.repair.unused_directions import UnusedDirections
from lustral.vision.repair.waking import Waking, waking_note

LOOSER = 10.0  # what the damping is multiplied by where that is harmless, and in a further round
DOUBT, MOST_DOUBTED = 0.1, 2  # p-value from which down a label is in doubt; labels that are unlearnt for it
RISING = (16.0, 4.0, 1.0, 1 / 4, 1 / 16, 1 / 64)  # what the trainer's rate is divided by, try by try
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
        fainter: a faint change counts beside a patch from this share of the patch's energy down; 0 searches none. Added patterns
            needed 0.39 and 0.45 of it on networks of the choosing half, blended pictures and patches 1.1 and 1.2.
        damping: of the projector on directions that clean images do not use, as a share of the mean energy of a direction; ten
            times higher where that is harmless, and after each round whose fresh searches need no more than the scan; None:
            every weight is trained.
        path_share: share of the steps that look back; 0: none.
        back: farthest that they look, as a share of the way to the received weights; each draws its own.
        grown: a label counts as erased when fresh searches need this many times what the scan's triggers do: pixels of area for
            patches, of energy (the squared change) for faint ones.
        trainer: one round; its rate is the third of those that are tried.
        rate: "found": the one after the least that silences the triggers, where it holds the accuracy; or "given": the trainer's.
        least_steps: small clean sets get more epochs, until a round has this many steps.
        accuracy_loss: loss of held-out accuracy, as a fraction, beyond which weights are not kept, give or take one standard
            error.
        lost: ten times the damping is harmless where no more than this share of the held-out images turns from right to wrong,
            whatever is gained.
        holdout: share of the clean images kept from training, to choose the rate and the weights on.
        doubted: where the scan cannot tell, unlearn the labels that it finds unusual (p of at most 10 %), as a precaution.
        anyway: train without a label where the scan named none.
        generic: how.
        reactivate: audit the result: tune a copy on the clean images and five with a recovered trigger, and say how often
            these fire then.
        waking: how.
    """

    version: ClassVar[int] = 3
    needs: ClassVar[str] = "nothing"
    cost_passes: ClassVar[float] = 71
    takes_verdict: ClassVar[bool] = True
    scans_by: ClassVar[str] = "cascade"

    inverter: MaxEntropy = field(default_factory=MaxEntropy)
    faint: MaxEntropy = field(
        default_factory=lambda: MaxEntropy(search=MaskSearch(penalty="energy", starts=1, steps=120, batch_size=16))
    )
    rounds: int = 3
    relearn_weight: float = 1.0
    distil_weight: float = 2.0
    fainter: float = 0.7
    damping: float | None = 0.1
    path_share: float = 0.5
    back: float = 0.5
    grown: float = 3.0
    trainer: Trainer = field(default_factory=lambda: fine_tuning_recipe(6, weight_decay=0.0))
    rate: RateChoice = "found"
    least_steps: int = 90
    accuracy_loss: float = 0.015
    lost: float = 0.01
    holdout: float = 0.2
    doubted: bool = True
    anyway: bool = False
    generic: WithoutLabel = field(default_factory=WithoutLabel)
    reactivate: bool = False
    waking: Waking = field(default_factory=Waking)

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_holdout(self.holdout)
        if self.rounds < 1 or self.grown <= 0:
            raise ValueError(f"expected rounds >= 1 and grown > 0; got {self.rounds} and {self.grown}")
        if not 0 <= self.lost <= 1:
            raise ValueError(f"expected lost in [0, 1]; got {self.lost}")
        if self.damping is not None and not self.damping > 0:
            raise ValueError(f"expected damping > 0, or None to train every weight; got {self.damping}")
        if min(self.relearn_weight, self.distil_weight, self.fainter) < 0:
            raise ValueError("expected weights and fainter of at least 0")
        if not (0 <= self.path_share <= 1 and 0 <= self.back <= 1):
            raise ValueError(f"expected path_share and back in [0, 1]; got {self.path_share} and {self.back}")

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return a model without the backdoors that ``view.verdict`` names; see ``Purifier``."""
        verdict = view.require_verdict()
        with PurifyRun(view=view, holdout=self.holdout, generator=generator, on_progress=on_progress) as repair:
            doubted, precaution = doubted_labels(verdict, view.clean.class_names) if self.doubted else ((), ())
            labels = verdict.suspect_labels or doubted
            if not labels:
                if not self.anyway:
                    return returned_unchanged(view, repair.cost, f"{NOTHING_TO_ERASE} {ANYWAY}")
                return replace(self._without_label(repair), verdict=verdict)
            floor = accuracy_floor(view.model, repair.held_out, self.accuracy_loss)
            bank = [trigger for trigger in verdict.triggers if trigger.target_label in labels]
            # A scan that accuses nobody gives the oddest mask as it is; the search gives many like it.
            ready = {trigger.target_label for trigger in bank} if verdict.suspect_labels else set[int]()
            if missing := set(labels) - ready:
                bank += self._search(repair, view.model, [(label, "patch") for label in sorted(missing)])
            bank += self._fainter(repair, bank)
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
        return replace(repair.result(model, *precaution, *notes, kept=kept), verdict=verdict)

    def _fainter(self, repair: PurifyRun, bank: Sequence[RecoveredTrigger]) -> list[RecoveredTrigger]:
        """Return faint changes of the labels that have patches alone, where they need far less energy than the patches."""
        labels = {trigger.target_label for trigger in bank}
        lone = sorted(labels - {trigger.target_label for trigger in bank if trigger.kind == "faint"})
        if not self.fainter or not lone:
            return []
        patches = dict[int, float]()
        for trigger in bank:
            energy = needed_energy(trigger, repair.held_out)
            patches[trigger.target_label] = min(energy, patches.get(trigger.target_label, math.inf))
        found = self._search(repair, repair.view.model, [(label, "faint") for label in lone])
        return [
            trigger
            for trigger in found
            if needed_energy(trigger, repair.held_out) <= self.fainter * patches[trigger.target_label]
        ]

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
            repair.view.model,
            model,
            fit=repair.fit,
            held_out=repair.held_out,
            triggers=bank,
            floor=floor,
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
                tried = least_rate(selection, train)
                selection = self._freer(repair, model, trainer, loss, selection, tried)
            else:
                tried = retry_at_lower_rates(selection, train, divisor)
            if kept >= 0 and not selection.admissible:
                break  # a further round costs too much: what there is stays
            assert selection.best_model is not None
            model, kept, divisor = repair.follow(selection.best_model), selection.best_index, tried
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
            if any(size <= wanted[sought] / self.grown for sought, size in sizes.items()):
                loss.loosen(LOOSER)
        return model, kept, (*notes, f"The learning rate was {self.trainer.learning_rate / divisor:.1e}.")

    def _freer(
        self,
        repair: PurifyRun,
        model: nn.Module,
        trainer: Trainer,
        loss: TriggerUnlearning,
        selection: Selection,
        divisor: float,
    ) -> Selection:
        """Train the round again with a higher damping; return what watched that if it is harmless, else ``selection``.

        The true trigger is not the recovered one: what silences the one may leave the other. Freer steps leave less of it.
        """
        if self.damping is None or not selection.silences:
            return selection
        parts: dict[Part, float] = {"round": 1, "damping": self.damping * LOOSER, "rate_divisor": divisor}
        freer = replace(selection, parts=parts, best=None, best_model=None)
        loss.loosen(LOOSER)
        with suppress(TrainingDiverged):
            self._training(repair, model, trainer, loss, freer)(divisor)
            assert freer.best_model is not None
            if (
                freer.silences
                and newly_wrong(repair.view.model, repair.follow(freer.best_model), repair.held_out) <= self.lost
            ):
                return freer
        loss.loosen(1 / LOOSER)
        return selection

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
        self._unused = None
        if settings.damping is not None:
            self._unused = UnusedDirections(self._teacher, repair.fit, damping=settings.damping)

    def loosen(self, factor: float) -> None:
        """Multiply the damping: confine the steps less, or more."""
        if self._unused is not None:
            self._unused.loosen(factor)

    def __call__(self, student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
        """Return the loss, (). Clean and triggered images share a batch: normalised together, as they will be in use.

        Confined steps are taken in evaluation mode. What the layers hold is what they see in use: by running statistics, with
        nothing dropped.
        """
        settings, x, y = self.settings, batch.inputs, batch.labels
        trigger = self.bank[int(torch.randint(len(self.bank), (), generator=stream))]
        looks_back, share = torch.rand(2, generator=stream).tolist()
        rows = y != trigger.target_label
        seen = torch.cat([x, trigger(x[rows], generator=stream)])
        if self._unused is not None:
            student.eval()
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
            loss = loss_part_of_the_way(student, loss_of, self._origin, settings.back * share)
        else:
            loss = loss_of(student)
        return loss if self._unused is None else self._unused.confine(loss, student)


def least_rate(selection: Selection, train: Callable[[float], None]) -> float:
    """Train at rising rates, each time from the same weights, until the triggers are silent, and once more; return the divisor.

    The true trigger is not the recovered one: what just silences the one may leave the other. So of two rates that silence it
    the higher one is kept where it holds the floor; accuracies above that are not compared, as a few hundred images cannot rank
    them. A rate at which the training diverges, or at which no epoch holds the floor, is the last too: higher ones do no better.
    """
    silenced = False
    for divisor in RISING:
        selection.parts["rate_divisor"] = divisor
        seen = len(selection.history)
        try:
            train(divisor)
        except TrainingDiverged:
            if selection.best is None:
                raise
            break
        epochs = [entry for entry in selection.history[seen:] if (entry.clean_accuracy or 0.0) >= selection.floor]
        if silenced or not epochs:
            break
        silenced = min(entry.recovered_asr or 0.0 for entry in epochs) <= SILENT
    return dict(selection.history[selection.best_index].parts)["rate_divisor"]


def doubted_labels(verdict: Verdict, names: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return (the unusual labels of a scan that cannot tell, most unusual first, and a note on them); nothing of any other scan.

    Args:
        verdict: the scan.
        names: of the classes, or empty.
    """
    if verdict.suspect_labels or verdict.outcome != "cannot tell":
        return (), ()
    least = {label: p for label, p in verdict.p_values().items() if label is not None and p <= DOUBT}
    labels = tuple(sorted(least, key=lambda label: least[label])[:MOST_DOUBTED])
    if not labels:
        return (), ()
    told = " and ".join(f"{names[label] if names else label} (p = {least[label]:.2g})" for label in labels)
    return labels, (f"The scan cannot tell, and finds class {told} unusual: that was unlearnt as a precaution.",)
