"""A method by its name or as an object, and the defaults of every verb."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lustral.api.progress import shown_on, standard_error
from lustral.catalog import DETECTORS, PURIFIERS, SAFE_TRAINERS, SIFTERS
from lustral.core.records import OnProgress, Progress
from lustral.vision.detectors import MaskArea
from lustral.vision.erasing import scan_method
from lustral.vision.interfaces import Detector, Purifier

DEFAULT_DETECTOR = "cascade"
DEFAULT_PURIFIER = "auto"
DEFAULT_SIFTER = "combined"
DEFAULT_SAFE_TRAINER = "sift_first"

CATALOGS: Mapping[str, tuple[Mapping[str, Any], str]] = {  # kind: its methods, the verb of one
    "detector": (DETECTORS, "inspect"),
    "purifier": (PURIFIERS, "purify"),
    "sifter": (SIFTERS, "sift"),
    "safe trainer": (SAFE_TRAINERS, "train"),
}


def look_up(kind: str, name: str, catalog: Mapping[str, type]) -> type:
    """Return a method by name, or raise ``ValueError`` with the nearest name.

    >>> look_up("purifier", "amp", PURIFIERS)
    Traceback (most recent call last):
    ValueError: unknown purifier 'amp'; did you mean 'anp'?
    """
    if name in catalog:
        return catalog[name]
    close = difflib.get_close_matches(name, catalog, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(catalog)}"
    raise ValueError(f"unknown {kind} {name!r}; {hint}")


def chosen(kind: str, method: Any) -> tuple[str, Any]:
    """Return a method's name and the method, with its default settings where only the name is given.

    Args:
        kind: of ``CATALOGS``.
        method: a name in the catalog, or an object with the verb of the kind; other classes than the catalog's will do.

    Raises:
        ValueError: no such name.
        TypeError: it is no method of this kind.
    """
    catalog, verb = CATALOGS[kind]
    if isinstance(method, str):
        return method, look_up(kind, method, catalog)()
    if isinstance(method, type) or not callable(getattr(method, verb, None)):
        raise TypeError(
            f"expected the name of a {kind}, or an object with {verb}(...) such as {next(iter(catalog.values())).__name__}(); "
            f"got {method!r:.100}"
        )
    return next((name for name, known in catalog.items() if type(method) is known), type(method).__name__), method


@contextmanager
def reporting(on_progress: OnProgress | None, progress: bool) -> Iterator[OnProgress | None]:
    """Yield where a method reports to: the caller's function, standard error, both, or nobody."""
    if not progress:
        yield on_progress
        return
    with shown_on(standard_error()) as show:

        def both(report: Progress) -> None:
            show(report)
            if on_progress is not None:
                on_progress(report)

        yield both


def default_detector(purifier: Purifier) -> Detector:
    """Return the detector that scans and audits for a purifier where none is given: of its own search, where it has one."""
    kind = DETECTORS[scan_method(purifier)]
    return MaskArea(inverter=purifier.inverter) if kind is MaskArea and hasattr(purifier, "inverter") else kind()
