"""Part of the way back: the point between the given and the repaired weights that holds the accuracy and fires least.

A repair that costs too much accuracy is not all or nothing. Between both ends lie

    theta(s) = (1 - s) theta_given + s theta_repaired

(linear mode paths, Min et al., NeurIPS 2024, arXiv 2410.09838, section 5). Running statistics of batch normalisation do not mix:
between the ends they are estimated anew on clean images, at the ends they stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lustral.core.cost import CostMeter
from lustral.core.history import HistoryEntry
from lustral.vision.evaluation.reactivation import are_alike, interpolated
from lustral.vision.records import ImageSet, RecoveredTrigger
from lustral.vision.repair.selection import EXCESS_STEP, SILENT, Selection

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)  # tried after the repaired weights themselves


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point on the way from the given to the repaired weights.

    Attributes:
        model: the network there, in evaluation mode.
        share: of the way, in [0, 1]; 1 is the repaired model.
        measured: held-out accuracy and how often recovered triggers fire.
        admissible: whether it holds the floor.
    """

    model: nn.Module
    share: float
    measured: HistoryEntry
    admissible: bool

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user: where it is not the repaired end."""
        if self.share == 1:
            return ()
        if self.share == 0:
            return ("Every repair cost more clean accuracy than allowed: the given weights were kept.",)
        return (
            f"The weights are {100 * self.share:.0f} % of the way from the given to the repaired ones: farther on, too much "
            "clean accuracy was lost.",
        )


def least_firing_point(
    given: nn.Module,
    repaired: nn.Module,
    *,
    fit: ImageSet,
    held_out: ImageSet,
    triggers: Sequence[RecoveredTrigger],
    floor: float,
    shares: Sequence[float] = SHARES,
) -> Point:
    """Return the point that holds the floor and on which recovered triggers fire least; of equal ones, the most repaired.

    Accuracies above the floor are not compared: a few hundred images cannot rank them, and less repair leaves more of the true
    trigger. Where no trigger fires on the repaired model and it holds the floor, nothing else is looked at. Networks whose
    parameters do not correspond have no way between them: the repaired one is returned.

    Args:
        given: the model before.
        repaired: the model after, of the same architecture.
        fit: clean images for the statistics of batch normalisation.
        held_out: clean images that no training saw, for the accuracy.
        triggers: recovered ones, of any kind; without any, the most repaired point that holds the floor.
        floor: least held-out accuracy (``accuracy_floor``).
        shares: of the way, falling, in [0, 1); tried in turn.
    """
    if list(shares) != sorted(set(shares), reverse=True) or (shares and not 0 <= shares[-1] <= shares[0] < 1):
        raise ValueError(f"expected falling shares in [0, 1); got {tuple(shares)}")
    best: tuple[tuple[bool, float, float], Point] | None = None
    for share in (1.0, *shares):
        model = at_share(given, repaired, share, fit)
        look = Selection(held_out=held_out, triggers=triggers, floor=floor)
        look.measure(model, HistoryEntry(count=1))
        measured = look.history[0]
        fires, accuracy = measured.recovered_asr or 0.0, measured.clean_accuracy or 0.0
        steps = -float(round(max(fires - SILENT, 0.0) / EXCESS_STEP))
        key = (True, steps, 0.0) if look.admissible else (False, accuracy, steps)
        if best is None or key > best[0]:
            best = key, Point(model=model, share=share, measured=measured, admissible=look.admissible)
        enough = best[1].admissible and (not triggers or best[0][1] == 0)
        if enough or not are_alike(given, repaired):
            break
    assert best is not None
    return best[1]


def at_share(given: nn.Module, repaired: nn.Module, share: float, clean: ImageSet) -> nn.Module:
    """Return the model at a share of the way, in evaluation mode; the ends with the statistics that they have."""
    if share in (0.0, 1.0):
        model = copy.deepcopy(repaired if share else given).eval()
        CostMeter.follow(given, model)
        return model
    return interpolated(given, repaired, share, clean)
