"""RNP: unlearn clean images, see which channels recovery does without, and cut those (Li, Lyu, Ma, Koren, Lyu, Ma, Jiang,
"Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023, arXiv 2305.14876).

Gradient ascent on clean images unlearns the task. Then channel masks alone are trained on the unlearned model,

    min_m CE(f(x; m w_unlearned), y),       m in [0, 1],

and channels whose mask falls are cut in the given model: they served something other than the task.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.protocols import DefenderView, OnProgress, Purified
from lustral.purifiers.channels import MaskedNorms, cutting_note, prune_by_masks, require_norms
from lustral.purifiers.clean_unlearning import unlearn_clean
from lustral.purifiers.repair import Repair, check_holdout
from lustral.purifiers.selection import accuracy_floor
from lustral.randomness import fork
from lustral.training import Trainer

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))


@dataclass(frozen=True, kw_only=True)
class RNP:
    """Unlearn, recover by masks, cut what did not recover.

    Attributes:
        unlearner: gradient ascent; SGD at 0.01 with batches of 128 in the authors' code.
        share_left: ascent stops when this much of the accuracy above chance is left; at an accuracy of 0.1 there.
        recoverer: of the masks; 20 epochs of SGD at 0.2 there.
        least_steps: small clean sets get more epochs of recovery, until there are this many steps.
        thresholds: to choose from.
        accuracy_loss: loss of held-out accuracy, as a fraction, that cutting may cost, give or take one standard error.
        holdout: share of the clean images kept to choose the threshold on.
    """

    unlearner: Trainer = field(
        default_factory=lambda: Trainer(
            epochs=30, batch_size=128, learning_rate=1e-3, schedule="constant", weight_decay=0.0, clip_norm=10.0
        )
    )
    share_left: float = 0.05
    recoverer: Trainer = field(
        default_factory=lambda: Trainer(
            epochs=20, batch_size=128, learning_rate=0.2, schedule="constant", weight_decay=0.0
        )
    )
    least_steps: int = 200
    thresholds: tuple[float, ...] = THRESHOLDS
    accuracy_loss: float = 0.03
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_holdout(self.holdout)
        if not 0 <= self.share_left < 1 or not self.thresholds:
            raise ValueError(
                f"expected share_left in [0, 1) and some thresholds; got {self.share_left}, {self.thresholds}"
            )

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return the pruned model; see ``Purifier``."""
        with Repair(view=view, holdout=self.holdout, generator=generator, on_progress=on_progress) as repair:
            names = require_norms("RNP", view.model)
            unlearned, left, epochs = unlearn_clean(
                view.model,
                repair.fit,
                self.unlearner.stretched(len(repair.fit), 0),
                share_left=self.share_left,
                generator=fork(generator, "unlearning"),
                on_progress=on_progress,
            )
            masked = repair.follow(MaskedNorms(unlearned, names))
            trained = self.recoverer.stretched(len(repair.fit), self.least_steps).fit(
                masked,
                repair.fit,
                generator=fork(generator, "masks"),
                objective=recovery,
                on_progress=on_progress,
                stage="recovering by masks",
            )
            assert isinstance(trained, MaskedNorms)
            floor = accuracy_floor(view.model, repair.held_out, self.accuracy_loss)
            model, threshold, count = prune_by_masks(repair, trained.by_name(), self.thresholds, floor)
        first = f"Clean unlearning took {epochs} epochs, to an accuracy of {left:.3f}."
        return repair.result(model, first, cutting_note(threshold, count))


def recovery(model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
    """Return the loss that the masks minimise."""
    assert isinstance(model, MaskedNorms)
    model.clip()
    return F.cross_entropy(model(images).float(), labels)
