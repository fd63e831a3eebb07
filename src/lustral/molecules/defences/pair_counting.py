"""What both defences of a training set count over: the fragments of every molecule, with progress."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from lustral.core.records import OnProgress, Progress
from lustral.molecules.chemistry import fragments

CHUNK = 256  # molecules between two reports
STAGE = "cutting molecules into fragments"
_KEPT = 32_768  # molecules whose fragments are remembered: both defences, and a second look, cut the same ones


def fragments_of(smiles: Sequence[str], on_progress: OnProgress | None = None) -> list[frozenset[str]]:
    """Return the fragments of N molecules."""
    found = []
    for place, each in enumerate(smiles):
        found.append(_fragments(each))
        if on_progress is not None and (place % CHUNK == 0 or place + 1 == len(smiles)):
            on_progress(Progress(stage=STAGE, done=place + 1, total=len(smiles)))
    return found


@lru_cache(maxsize=_KEPT)
def _fragments(smiles: str) -> frozenset[str]:
    return fragments(smiles)
