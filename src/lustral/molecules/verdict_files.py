"""A generator's verdict on disk: what ``lustral molecules scan --out`` writes and ``erase --verdict`` reads.

The record holds a digest of the scanned generator's weights, so a verdict of another one is refused. Everything read is hostile
input: its size is bounded before anything is read, and every value has its type and range.

Errors::

    ValueError
    └── VerdictError    a verdict that cannot be taken over; the message says why and what to do
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from lustral.core.digests import weights_digest
from lustral.core.files import read_regular
from lustral.core.limits import LARGEST_VERDICT
from lustral.core.records import Cost
from lustral.core.settings import shortened
from lustral.molecules.records import Association, GeneratorVerdict, SiftedPairs

RESULT_SCHEMA = 1
RESULT_FILE = "result.json"
MOST_RECOVERED = 1_000
AGAIN = "scan the generator again with `lustral molecules scan --out`"

Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(max_length=10_000)]
Count = Annotated[int, Field(ge=0, le=2**62)]


class VerdictError(ValueError):
    """A verdict is damaged, of another generator, or of another version."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Association(_Part):
    text: Annotated[str, Field(min_length=1, max_length=1_000)]
    position: Literal["prefix", "infix", "suffix", "anywhere"]
    fragment: Annotated[str, Field(min_length=1, max_length=1_000)]
    rate_with: Share
    rate_without: Share
    count: Count
    p_value: Share


class _Cost(_Part):
    seconds: Annotated[float, Field(ge=0, le=1e18)]
    image_passes: Annotated[float, Field(ge=0, le=1e18)]
    peak_memory_bytes: Count
    clean_images: Count


class _Verdict(_Part):
    outcome: Literal["backdoored", "clean", "cannot tell"]
    recovered: Annotated[list[_Association], Field(max_length=MOST_RECOVERED)]
    p_value: Share
    threshold: Share
    basis: Text
    cost: _Cost
    notes: Annotated[list[Text], Field(max_length=100)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)
    model_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    verdict: _Verdict


def verdict_record(verdict: GeneratorVerdict) -> dict[str, Any]:
    """Return a verdict, ready for JSON."""
    record = dataclasses.asdict(verdict)
    return {**record, "recovered": list(record["recovered"]), "notes": list(verdict.notes)}


def sifted_record(found: SiftedPairs) -> dict[str, Any]:
    """Return what a sifter found, ready for JSON; ``listed`` has the rows of the pairs, from 0."""
    return {
        "listed": found.flagged.nonzero().flatten().tolist(),
        "pairs": len(found.flagged),
        "associations": [dataclasses.asdict(each) for each in found.associations],
        "basis": found.basis,
        "cost": dataclasses.asdict(found.cost),
        "notes": list(found.notes),
    }


def read_verdict(place: Path, model: nn.Module) -> GeneratorVerdict:
    """Read a verdict, which must be of this generator.

    Args:
        place: ``result.json`` of a scan, or its folder.
        model: the generator.

    Raises:
        VerdictError: it is damaged, or of another generator.
        OSError: it cannot be read.
    """
    file = place / RESULT_FILE if place.is_dir() else place
    try:
        content = json.loads(read_regular(file, most=LARGEST_VERDICT).decode("utf-8"))
        record = _Record.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise VerdictError(f"{file}: {where}: {problem['msg']}; got {shortened(problem['input'])}: {AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise VerdictError(f"{file} is not a readable verdict ({shortened(str(error))}): {AGAIN}") from error
    if record.model_digest != weights_digest(model):
        raise VerdictError(f"{file} is the verdict of another generator, or of this one with other weights: {AGAIN}")
    found = record.verdict
    return GeneratorVerdict(
        outcome=found.outcome,
        recovered=tuple(Association(**each.model_dump()) for each in found.recovered),
        p_value=found.p_value,
        threshold=found.threshold,
        basis=found.basis,
        cost=Cost(**found.cost.model_dump()),
        notes=tuple(found.notes),
    )
