"""Control: re-estimate the batch-normalisation statistics on clean images and change nothing else.

Some weakly planted backdoors do not survive this; an eraser must be compared with it (a comment in MESA's official code
warns that one epoch of forward passes in training mode can remove the backdoor).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, nn

from lustral.core.cost import CostMeter
from lustral.core.history import HistoryEntry
from lustral.core.randomness import fork
from lustral.core.records import OnProgress, Progress
from lustral.training import autocast, set_training_mode
from lustral.vision.images import require_usable
from lustral.vision.records import DefenderView, Purified


@dataclass(frozen=True, kw_only=True)
class BNRefresh:
    """Replace the running statistics by averages over the clean set.

    Attributes:
        batch_size: images per forward pass.
        passes: how often the clean set goes through.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "batch normalisation; a control"
    cost_passes: ClassVar[float] = 0.6

    batch_size: int = 256
    passes: int = 2

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.batch_size < 2 or self.passes < 1:
            raise ValueError(f"expected batch_size >= 2 and passes >= 1; got {self.batch_size} and {self.passes}")

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return a model with refreshed statistics; see ``Purifier``."""
        require_usable(view.clean, least=2)
        model = copy.deepcopy(view.model)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        with CostMeter(model, clean_images=len(view.clean)) as meter, torch.no_grad():
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over all batches
            set_training_mode(model, "train")
            order = fork(generator, "order")
            drop_last = len(view.clean) >= self.batch_size
            for done in range(self.passes if norms else 0):
                for x, *_ in view.clean.batches(self.batch_size, generator=order, drop_last=drop_last):
                    with autocast(x.device):
                        model(x.contiguous(memory_format=torch.channels_last))
                if on_progress is not None:
                    on_progress(Progress(stage="refreshing statistics", done=done + 1, total=self.passes))
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        if not norms:
            note = "The model has no batch normalisation: it was returned unchanged."
            return Purified(model=model.eval(), history=(), selected=None, cost=meter.cost, notes=(note,))
        history = (HistoryEntry(count=self.passes, unit="passes"),)
        return Purified(model=model.eval(), history=history, selected=0, cost=meter.cost)
