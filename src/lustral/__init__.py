"""Find, show and erase backdoors in neural networks.

What is offered here is imported when it is first used, so ``import lustral`` costs nothing. ``docs/python.md`` shows it at work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lustral.api.results import EraseResult, EvaluationResult, ScanResult
    from lustral.api.set_results import SiftResult, TrainResult
    from lustral.api.set_verbs import sift, train
    from lustral.api.verbs import erase, evaluate, open_model, scan

__version__ = "0.1.0"
__all__ = [
    "EraseResult",
    "EvaluationResult",
    "ScanResult",
    "SiftResult",
    "TrainResult",
    "__version__",
    "erase",
    "evaluate",
    "open_model",
    "scan",
    "sift",
    "train",
]

_HOMES = {
    "lustral.api.results": ("EraseResult", "EvaluationResult", "ScanResult"),
    "lustral.api.set_results": ("SiftResult", "TrainResult"),
    "lustral.api.set_verbs": ("sift", "train"),
    "lustral.api.verbs": ("erase", "evaluate", "open_model", "scan"),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for the first time."""
    for home, names in _HOMES.items():
        if name in names:
            import importlib

            globals()[name] = getattr(importlib.import_module(home), name)
            return globals()[name]
    raise AttributeError(f"module 'lustral' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    """Return what is offered, imported or not."""
    return sorted({*globals(), *__all__})
