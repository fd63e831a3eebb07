"""Erasing a backdoor with everything around the method, alike for every caller: the one function behind ``lustral erase``.

The model's task is checked first. A method that starts from a scan gets one, unless it was handed over: then nothing is
searched twice. What such a method erased is scanned again with fresh randomness. The costs of the parts add up.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Generator

from lustral.core.cost import CostMeter
from lustral.core.randomness import fork
from lustral.core.records import OnProgress, Progress
from lustral.vision.evaluation import require_task
from lustral.vision.images import require_usable
from lustral.vision.interfaces import Detector, Purifier
from lustral.vision.records import DefenderView, Purified
from lustral.vision.scanning import inspect_within, require_deadline

TAKEN_OVER = (
    "The scan was handed over: the model was not searched again before erasing, and that scan is not in the cost."
)


def takes_verdict(purifier: Purifier | type) -> bool:
    """Say whether a purifier, or its class, starts from a scan."""
    return bool(getattr(purifier, "takes_verdict", False))


def scan_method(purifier: object) -> str:
    """Return the detector's name in the catalog that a purifier, or its class, starts from by default."""
    return str(getattr(purifier, "scans_by", "mask_area"))


def takes_untrusted(purifier: Purifier | type) -> bool:
    """Say whether a purifier, or its class, learns from the training set of unknown origin."""
    return bool(getattr(purifier, "takes_untrusted", False))


def erase(
    purifier: Purifier,
    view: DefenderView,
    *,
    detector: Detector | None = None,
    generator: Generator,
    audit: bool = True,
    max_time: float | None = None,
    on_progress: OnProgress | None = None,
) -> Purified:
    """Erase a backdoor.

    Args:
        purifier: the method.
        view: the model and the clean images; its verdict, if it has one, is taken over.
        detector: scans and audits, for a purifier that takes a verdict; None will do for others, which are not scanned.
        generator: stream of the run. A verdict handed over takes nothing from it that a scan would have: the model is then
            the one that a run with that scan inside gives.
        audit: scan the new model too, where the purifier takes a verdict and changed something.
        max_time: of the scan, and of the audit again, seconds, for a detector that keeps a limit; None: no limit.
        on_progress: called on the way.

    Returns:
        The new model, with the scan that it started from, the audit, and the cost of all that was done here.

    Raises:
        UnfitModel: the model does not do its task on the clean images; nothing was changed.
        ValueError: the clean images are too few, or a detector is needed and there is none.
    """
    scans = takes_verdict(purifier)
    if scans and detector is None and (audit or view.verdict is None):
        raise ValueError(
            f"{type(purifier).__name__} starts from a scan and is checked by one; expected a detector, got None"
        )
    if max_time is not None and not scans:
        raise ValueError(f"{type(purifier).__name__} starts from no scan; expected no max_time, which limits one")
    if scans and detector is not None:
        require_deadline(detector, max_time)
    if takes_untrusted(purifier) and view.untrusted is None:
        raise ValueError(
            f"{type(purifier).__name__} looks at the set that the model was trained on, and the view has none: give it as "
            "DefenderView(untrusted=...), or as `lustral erase --untrusted DATA`"
        )
    require_usable(view.clean, least=2)
    with CostMeter(view.model, clean_images=len(view.clean)) as meter:
        doubts = require_task(view.model, view.clean).notes(view.clean.class_names)
    cost = meter.cost
    if scans:
        stream = fork(generator, "scan")
        if view.verdict is not None:
            doubts = (*doubts, TAKEN_OVER)
            if on_progress is not None:
                on_progress(Progress(stage="scan taken over", done=1, total=1))
        else:
            assert detector is not None
            verdict = inspect_within(detector, view, max_time=max_time, generator=stream, on_progress=on_progress)
            view, cost = replace(view, verdict=verdict), cost + verdict.cost
    purified = purifier.purify(view, generator=generator, on_progress=on_progress)
    cost += purified.cost
    after = purified.audit
    if scans and audit and purified.selected is not None:
        assert detector is not None
        changed = DefenderView(model=purified.model, clean=view.clean)
        after = inspect_within(
            detector, changed, max_time=max_time, generator=fork(generator, "audit"), on_progress=on_progress
        )
        cost += after.cost
    return replace(purified, cost=cost, audit=after, notes=(*doubts, *purified.notes))
