"""Neural Cleanse: fine-tune on images that carry the smallest trigger found, under their true labels (Wang, Yao, Shan, Li,
Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019).

The smallest mask and pattern that lead to each label are searched; a label whose mask is small by the anomaly index,

    (median - area) / (1.4826 median |area - median|) > 2,

is unlearned: a fifth of the clean images get its trigger and keep their labels. One mask per label, no distribution: that is
MESA's and BaEraser's step beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import fork
from lustral.core.records import Batch, OnProgress
from lustral.training import Trainer, fine_tuning_recipe
from lustral.vision.images import check_holdout
from lustral.vision.inverters.mask_search import MaskSearch
from lustral.vision.records import DefenderView, Purified
from lustral.vision.repair.run import PurifyRun

MAD_TO_STD = 1.4826  # makes the median absolute deviation estimate the standard deviation of normal data
LEAST_SUCCESS = 0.75  # of a search on its own images; less is no trigger


def anomaly_index(areas: Tensor) -> Tensor:
    """Return how far each area lies below the median, in robust standard deviations; (K,), negative above it.

    >>> [round(v, 1) for v in anomaly_index(torch.tensor([100.0, 102.0, 98.0, 101.0, 20.0])).tolist()]
    [0.0, -0.7, 0.7, -0.3, 27.0]
    """
    median = areas.quantile(0.5)
    spread = MAD_TO_STD * (areas - median).abs().quantile(0.5)
    return (median - areas) / spread.clamp_min(float(1e-6 * median.clamp_min(1e-6)))


@dataclass(frozen=True, kw_only=True)
class NeuralCleanse:
    """Find the labels with suspiciously small triggers and unlearn those triggers.

    Attributes:
        search: of the smallest masks, all labels in one batch; published code searches label after label.
        threshold: of the anomaly index; 2 in the paper.
        trigger_rate: share of the images that get a trigger; 0.2 in the paper.
        trainer: fine-tuning; one epoch in the paper, 100 epochs of SGD at 0.01 in BackdoorBench.
        least_steps: small clean sets get more epochs, until there are this many steps.
        holdout: share of the clean images kept to watch the accuracy; the last weights are returned.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "a backdoor whose trigger can be searched; five classes"
    cost_passes: ClassVar[float] = 19

    search: MaskSearch = field(default_factory=lambda: MaskSearch(screening=False))
    threshold: float = 2.0
    trigger_rate: float = 0.2
    trainer: Trainer = field(default_factory=lambda: fine_tuning_recipe(10))
    least_steps: int = 90
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_holdout(self.holdout)
        if not 0 < self.trigger_rate <= 1 or self.threshold <= 0:
            raise ValueError(
                f"expected trigger_rate in (0, 1] and a threshold > 0; got {self.trigger_rate} and {self.threshold}"
            )

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return the fine-tuned model, or a copy of the given one where no label stands out; see ``Purifier``."""
        with PurifyRun(view=view, holdout=self.holdout, generator=generator, on_progress=on_progress) as repair:
            labels = range(view.clean.num_classes)
            found = self.search.run(
                view.model, repair.fit, labels, generator=fork(generator, "search"), on_progress=on_progress
            )
            index = anomaly_index(found.areas)
            chosen = ((index > self.threshold) & (found.success >= LEAST_SUCCESS)).nonzero()[:, 0]
            model, note = repair.copy(), "No label stood out, so the model was returned unchanged."
            if len(chosen):
                model = self._unlearn(repair, found.masks[chosen], found.patterns[chosen])
                note = f"Labels unlearned: {', '.join(map(str, chosen.tolist()))}."
        return repair.result(model, note)

    def _unlearn(self, repair: PurifyRun, masks: Tensor, patterns: Tensor) -> nn.Module:
        def objective(student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
            x, y = batch.inputs, batch.labels
            pick = torch.randint(len(masks), (len(x),), generator=stream).to(x.device)
            rows = (torch.rand(len(x), generator=stream) < self.trigger_rate).to(x.device)[:, None, None, None]
            stamped = x + masks[pick] * (patterns[pick] - x)
            return F.cross_entropy(student(torch.where(rows, stamped, x)).float(), y)

        trainer = self.trainer.fitted_to_size(len(repair.fit), self.least_steps)
        return repair.train(repair.view.model, trainer, objective=objective, stage="unlearning")
