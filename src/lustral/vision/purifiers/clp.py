"""CLP: cut channels that amplify more than their neighbours, without any data (Zheng, Tang, Li, Liu, "Data-Free Backdoor Removal
Based on Channel Lipschitzness", ECCV 2022, arXiv 2208.03111).

The upper bound of a channel's Lipschitz constant is the spectral norm of its kernel, (in, k * k), times the factor of the
normalisation that follows, |gamma| / sqrt(variance). Channels above mean + u std of their layer are cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lustral.core.history import HistoryEntry
from lustral.core.records import OnProgress
from lustral.vision.images import check_holdout
from lustral.vision.models.wiring import Wiring, trace
from lustral.vision.records import DefenderView, Purified
from lustral.vision.repair.channels import require_pairs, silence
from lustral.vision.repair.run import PurifyRun
from lustral.vision.repair.selection import accuracy_floor, held_out_accuracy


@torch.no_grad()
def channel_bounds(conv: nn.Conv2d, norm: _BatchNorm) -> Tensor:
    """Return the Lipschitz bound of each output channel of a convolution with its normalisation, (C,)."""
    assert norm.running_var is not None
    kernels = conv.weight.float().flatten(2).cpu()  # (C, in, k * k); thousands of small SVDs, which a GPU is slow at
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.abs()
    bounds: Tensor = torch.linalg.matrix_norm(kernels, ord=2).to(factor.device) * factor
    return bounds


def outliers(bounds: Tensor, u: float) -> Tensor:
    """Return which values exceed mean + u std of their layer, (C,) bool."""
    return bounds > bounds.mean() + u * bounds.std(correction=1)


@dataclass(frozen=True, kw_only=True)
class CLP:
    """Cut channels whose Lipschitz bound stands out.

    Attributes:
        u: standard deviations above the mean; 3 in the paper and in BackdoorBench.
        u_step: u is raised by this as long as cutting costs too much; the paper has no such check, and cuts some networks to
            pieces. 0 turns it off.
        accuracy_loss: loss of held-out accuracy, as a fraction, that is too much, give or take one standard error.
        holdout: share of the clean images that this check uses; the rest are not used at all.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "convolutions that go straight into batch normalisation"
    cost_passes: ClassVar[float] = 0.2

    u: float = 3.0
    u_step: float = 0.5
    accuracy_loss: float = 0.1
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_holdout(self.holdout)
        if self.u <= 0 or self.u_step < 0:
            raise ValueError(f"expected u > 0 and u_step >= 0; got {self.u} and {self.u_step}")

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return the pruned model; see ``Purifier``."""
        with PurifyRun(view=view, holdout=self.holdout, generator=generator, on_progress=on_progress) as repair:
            wiring = trace(view.model, next(repair.fit.batches(1)).inputs)
            require_pairs("CLP", view.model, wiring)
            floor, u = accuracy_floor(view.model, repair.held_out, self.accuracy_loss), self.u
            model, count = self.cut(repair.copy(), wiring, u)
            while count and self.u_step and held_out_accuracy(model, repair.held_out) < floor:
                u += self.u_step
                model, count = self.cut(repair.copy(), wiring, u)
            repair.note(model, HistoryEntry(count=count, unit="channels", threshold=u))
            repair.report("cutting channels")
        notes = [f"{count} channels were cut, at u = {u:g}."]
        if u > self.u:
            notes.append(f"u = {self.u:g} would have cost more accuracy than allowed.")
        return repair.result(model, *notes)

    @staticmethod
    def cut(model: nn.Module, wiring: Wiring, u: float) -> tuple[nn.Module, int]:
        """Cut the outliers of every layer of ``model``, in place; return it and their number."""
        count = 0
        for name, norm_name in wiring.normed.items():
            conv, norm = model.get_submodule(name), model.get_submodule(norm_name)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, _BatchNorm):
                chosen = outliers(channel_bounds(conv, norm), u)
                silence(norm, chosen)
                count += int(chosen.sum())
        return model, count
