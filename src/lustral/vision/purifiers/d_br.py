"""D-BR: the backdoor is unlearned on what was sifted out, the task relearned on what was sifted in (Chen, Wu, Wang, "Effective
Backdoor Defense by Exploiting Sensitivity of Poisoned Samples", NeurIPS 2022, section 3.4).

FCT splits the training set into clean D_c, poisoned D_p and uncertain images. Then, round after round,

    max CE(f(x), y) over D_p, one pass          (equation 4)
    min CE(f(x), y) over D_c, one pass          (equation 5)

by one optimizer. The paper's code keeps the round of the largest test accuracy minus attack success, which takes the trigger to
know. Here a round is chosen by what a defender has: among those that hold the accuracy of the clean images, the last of those
that call the fewest images of D_p by their labels. ``lustral.vision.evaluation.oracle_round`` gives the other choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.history import HistoryEntry
from lustral.core.randomness import fork
from lustral.core.records import Batch, Objective, OnProgress
from lustral.training import Augment, EpochReport, Trainer, fine_tuning_recipe
from lustral.vision.records import DefenderView, LabelledImages, Purified, Sifted, TrainingView
from lustral.vision.repair.run import PurifyRun, returned_unchanged
from lustral.vision.repair.selection import Selection, accuracy_floor, retry_at_lower_rates, retry_notes
from lustral.vision.sifters import FCT, Combined
from lustral.vision.suspicion.scoring_model import untrained_copy

NOTHING_FOUND = "No image of the training set was found poisoned, so the model was returned unchanged."
LEAST_POISONED = 2  # images in a batch that normalises by its own statistics
LEAST_BATCH = 16  # images of a small D_p in a batch
LEFT = 0.5  # share of D_p still called by their labels from which a note is due; its false alarms bear true ones


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """A training set whose passes are the rounds: first all of D_p, then all of D_c, each shuffled.

    Attributes:
        poisoned: D_p; a batch's ``index`` counts them first.
        clean: D_c.
    """

    poisoned: LabelledImages
    clean: LabelledImages

    @property
    def num_classes(self) -> int:
        """Number of classes of the task."""
        return self.clean.num_classes

    def __len__(self) -> int:
        """Return the number of images of a round."""
        return len(self.poisoned) + len(self.clean)

    def batches(
        self, batch_size: int, *, generator: Generator | None = None, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Yield the batches of one round; none mixes the two."""
        for first, part in ((0, self.poisoned), (len(self.poisoned), self.clean)):
            for batch in part.batches(batch_size, generator=generator, drop_last=drop_last):
                yield batch._replace(index=batch.index + first)


def unlearning_objective(num_poisoned: int, cap: float) -> Objective:
    """Return the loss of a batch of ``Rounds``: -CE of a poisoned image, while its CE is below ``cap``, +CE of a clean one."""

    def objective(model: nn.Module, batch: Batch, generator: Generator) -> Tensor:
        losses = F.cross_entropy(model(batch.inputs).float(), batch.labels, reduction="none")
        return torch.where(batch.index < num_poisoned, -losses.clamp(max=cap), losses).mean()

    return objective


@dataclass(frozen=True, kw_only=True)
class DBR:
    """Sift, then unlearn and relearn in turn.

    Attributes:
        sifter: gives scores, flags and the quotas of D_c and D_p.
        combined: scores and flags by the default sifter in place of FCT, ours; the quotas stay those of ``sifter``.
        only_flagged: take into D_p only what the sifter flagged; the quota is then the most that D_p holds. Without, as
            published, a set of fewer poisoned images than the quota has clean ones unlearned.
        trainer: ``epochs`` rounds. SGD at 1e-4, constant, for 20 rounds in the paper, with the statistics of each batch. Here
            0.01, falling, and the model's own statistics: a batch of poisoned images alone has others than are met in use.
        least_steps: a small D_p gets smaller batches, and more rounds until so many steps have unlearned it; the paper has 400,
            with 50,000 images.
        ascent_margin: a poisoned image is left alone from a cross-entropy of ln K + this on; infinite in the paper.
        accuracy_loss: loss of held-out accuracy, as a fraction, that a round may cost, give or take one standard error. If no
            round keeps to it, all starts anew at a quarter of the rate, down to a sixteenth.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "the training set"
    cost_passes: ClassVar[float] = 368  # with 50,000 images to sift, measured on a fiftieth
    takes_untrusted: ClassVar[bool] = True

    sifter: FCT = field(default_factory=FCT)
    combined: Combined | None = None
    only_flagged: bool = True
    trainer: Trainer = field(default_factory=lambda: replace(fine_tuning_recipe(20), batch_norm="frozen"))
    least_steps: int = 200
    ascent_margin: float = 1.0
    accuracy_loss: float = 0.03

    @classmethod
    def published(cls) -> Self:
        """Return the settings of the paper, for images that a flip leaves what they are; the round is chosen as ever."""
        trainer = Trainer(
            epochs=20,
            batch_size=128,
            optimizer="heavy_ball",
            learning_rate=1e-4,
            schedule="constant",
            augment=Augment(crop_padding=4, flip=True),
        )
        return cls(only_flagged=False, trainer=trainer, least_steps=0, ascent_margin=math.inf)

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return the model of the chosen round; see ``Purifier``. No clean image is trained on: all of them choose."""
        return self.purify_watched(view, generator=generator, on_progress=on_progress)

    def purify_watched(
        self,
        view: DefenderView,
        *,
        generator: Generator,
        on_progress: OnProgress | None = None,
        on_round: Callable[[nn.Module], None] | None = None,
    ) -> Purified:
        """Do as ``purify``, and hand the model of every round to ``on_round``, which must not change it."""
        untrusted = view.require_untrusted()
        with PurifyRun(view=view, holdout=1.0, generator=generator, on_progress=on_progress) as repair:
            sifted = (self.combined or self.sifter).sift(
                TrainingView(
                    untrusted=untrusted,
                    build_model=lambda stream: repair.follow(untrained_copy(view.model, generator=stream)),
                    clean=view.clean,
                ),
                generator=fork(generator, "sifting"),
                on_progress=on_progress,
            )
            clean, poisoned = self.chosen(sifted)
            enough = len(poisoned) >= LEAST_POISONED and len(clean) >= LEAST_POISONED
            if enough:
                rounds = Rounds(poisoned=untrusted.subset(poisoned), clean=untrusted.subset(clean))
                selection, notes = self._alternate(repair, rounds, on_round)
        if not enough:
            return replace(returned_unchanged(view, repair.cost, NOTHING_FOUND), notes=(NOTHING_FOUND, *sifted.notes))
        assert selection.best_model is not None
        found = f"{len(poisoned):,} images were unlearned and {len(clean):,} relearned, of {len(untrusted):,}."
        return Purified(
            model=selection.best_model,
            history=tuple(selection.history),
            selected=selection.best_index,
            cost=repair.cost,
            verdict=view.verdict,
            notes=(found, *sifted.notes, *notes),
        )

    def chosen(self, sifted: Sifted) -> tuple[Tensor, Tensor]:
        """Return D_c and D_p as int64 positions: the quotas, of D_p what was flagged where ``only_flagged`` asks for that."""
        clean, poisoned, _ = self.sifter.split(sifted.scores)
        if not bool(sifted.flagged.any()):
            poisoned = poisoned[:0]
        elif self.only_flagged:
            poisoned = poisoned[sifted.flagged[poisoned]]
        return clean[~sifted.flagged[clean]], poisoned

    def recipe(self, num_poisoned: int, num_clean: int) -> Trainer:
        """Return how to train on so many images of D_p and D_c: neither is smaller than a batch."""
        quarter = max(num_poisoned // 4, LEAST_BATCH) if self.least_steps else num_poisoned
        size = min(self.trainer.batch_size, quarter, num_poisoned, num_clean)
        epochs = max(self.trainer.epochs, math.ceil(self.least_steps / (num_poisoned // size)))
        return replace(self.trainer, batch_size=size, epochs=epochs)

    def _alternate(
        self, repair: PurifyRun, rounds: Rounds, on_round: Callable[[nn.Module], None] | None
    ) -> tuple[Selection, tuple[str, ...]]:
        """Unlearn and relearn, slower where it costs too much; return what was kept, and notes."""
        model = repair.view.model
        floor = accuracy_floor(model, repair.held_out, self.accuracy_loss)
        selection = Selection(held_out=repair.held_out, triggers=(), floor=floor, suspects=rounds.poisoned)
        selection.note_given(model)
        recipe = self.recipe(len(rounds.poisoned), len(rounds.clean))
        objective = unlearning_objective(len(rounds.poisoned), math.log(rounds.num_classes) + self.ascent_margin)

        def watch(report: EpochReport) -> None:
            selection.watch(report)
            if on_round is not None:
                on_round(report.model)

        def train(divisor: float) -> None:
            replace(recipe, learning_rate=recipe.learning_rate / divisor).fit(
                model,
                rounds,
                generator=fork(repair.generator, "rounds"),
                objective=objective,
                on_epoch=watch,
                on_progress=repair.on_progress,
                stage="unlearning and relearning",
            )

        divisor = retry_at_lower_rates(selection, train)
        return selection, (*retry_notes(selection, divisor, self.accuracy_loss), *left_note(selection))


def left_note(selection: Selection) -> tuple[str, ...]:
    """Return a note where the kept weights still call many of the unlearned images by their labels."""
    kept: HistoryEntry = selection.history[selection.best_index]
    if kept.suspects_called is None or kept.suspects_called <= LEFT:
        return ()
    return (
        f"{100 * kept.suspects_called:.0f} % of the unlearned images are still called by their labels: raise the learning rate, "
        "or use another eraser.",
    )
