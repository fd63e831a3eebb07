"""FT-SAM: fine-tune at the worst weights nearby, so that neurons that only the backdoor uses have to move (Zhu, Wei, Shen, Fan,
Wu, "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization", ICCV 2023, arXiv 2304.11823).

    theta <- theta - eta grad L(theta + e),     e = rho w^2 g / || |w| g ||          (adaptive: large weights are shifted more)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.records import Batch, OnProgress
from lustral.training import Trainer, fine_tuning_recipe
from lustral.vision.images import check_holdout
from lustral.vision.records import DefenderView, Purified
from lustral.vision.repair.run import PurifyRun
from lustral.vision.repair.shifted_weights import adaptive_shift, interpolated_loss


@dataclass(frozen=True, kw_only=True)
class FTSAM:
    """Fine-tune all weights by adaptive sharpness-aware minimisation.

    Attributes:
        rho: size of the shift; 2 on CIFAR-10 in the authors' code.
        label_smoothing: 0.1 there.
        trainer: SGD at 0.01, cosine, for 100 epochs there.
        least_steps: small clean sets get more epochs, until there are this many steps.
        holdout: share of the clean images kept to watch the accuracy; the last weights are returned.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing"
    cost_passes: ClassVar[float] = 48

    rho: float = 2.0
    label_smoothing: float = 0.1
    trainer: Trainer = field(default_factory=lambda: fine_tuning_recipe(30))
    least_steps: int = 200
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_holdout(self.holdout)
        if self.rho <= 0 or not 0 <= self.label_smoothing < 1:
            raise ValueError(f"expected rho > 0 and label_smoothing in [0, 1); got {self.rho}, {self.label_smoothing}")

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return a fine-tuned model; see ``Purifier``."""
        with PurifyRun(view=view, holdout=self.holdout, generator=generator, on_progress=on_progress) as repair:

            def objective(model: nn.Module, batch: Batch, stream: Generator) -> Tensor:
                x, y = batch.inputs, batch.labels
                return interpolated_loss(
                    model,
                    lambda classify: F.cross_entropy(classify(x).float(), y, label_smoothing=self.label_smoothing),
                    shift=lambda weights, slopes: adaptive_shift(weights, slopes, rho=self.rho),
                    share=1.0,
                )

            trainer = self.trainer.fitted_to_size(len(repair.fit), self.least_steps)
            model = repair.train(view.model, trainer, objective=objective, stage="fine-tuning")
        return repair.result(model)
