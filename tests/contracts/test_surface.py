"""What ``lustral`` offers: these names are a promise, and they cost nothing until they are used."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any, get_type_hints

import pytest

import lustral

RESULTS = ("EraseResult", "EvaluationResult", "ScanResult", "SiftResult", "TrainResult")
VERBS = ("erase", "evaluate", "open_model", "scan", "sift", "train")
LONGEST_IMPORT = 0.3  # seconds of processor time


def test_the_names_are_these() -> None:
    assert tuple(lustral.__all__) == (*RESULTS, "__version__", *VERBS)
    assert set(lustral.__all__) <= set(dir(lustral))
    with pytest.raises(AttributeError, match="no attribute 'scna'; it offers EraseResult"):
        lustral.scna  # type: ignore[attr-defined] # noqa: B018


def test_the_import_brings_no_torch_along() -> None:
    code = "import time; t = time.process_time(); import lustral, sys; print(time.process_time() - t, 'torch' in sys.modules)"
    seconds, has_torch = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert float(seconds) < LONGEST_IMPORT
    assert has_torch == "False"


@pytest.mark.parametrize("name", RESULTS)
def test_every_result_can_be_shown_saved_and_read(name: str) -> None:
    kind: Any = getattr(lustral, name)
    for method in ("save", "report", "to_dict", "_repr_html_"):
        assert callable(getattr(kind, method))
        assert inspect.getdoc(getattr(kind, method))


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_says_what_it_takes_and_gives(name: str) -> None:
    verb = getattr(lustral, name)
    text = inspect.getdoc(verb) or ""
    assert "Args:" in text
    assert "Returns:" in text
    assert "Raises:" in text
    parameters = inspect.signature(verb).parameters
    assert [p for p in parameters if f"{p}:" not in text and f"``{p}``" not in text] == []
    settings = list(parameters.values())[1 + (name in ("scan", "erase", "evaluate")) :]
    assert all(part.kind is inspect.Parameter.KEYWORD_ONLY for part in settings)
    assert get_type_hints(verb)["return"].__name__ in (*RESULTS, "LoadedModel")
