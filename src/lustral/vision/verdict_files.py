"""A verdict on disk: what ``lustral scan --out`` writes and ``lustral erase --verdict`` reads, so that a scan is made once.

``result.json`` holds the verdict, digests of the scanned model's weights and of the scan's settings, and the SHA-256 of
``triggers.safetensors`` beside it, which is written first: a file of another scan never passes for it. Everything read is
hostile input: sizes are bounded before anything is read, every value has its type and range, and no file names another.

Errors::

    ValueError
    └── VerdictError    a verdict that cannot be taken over; the message says why and what to do
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load, save
from torch import Tensor, nn

from lustral.core.characters import visible
from lustral.core.digests import weights_digest
from lustral.core.files import canonical, json_ready, read_regular, write_bytes_atomic, write_json_atomic
from lustral.core.limits import LARGEST_TRIGGERS, LARGEST_VERDICT
from lustral.core.records import Cost, Evidence
from lustral.core.settings import shortened
from lustral.vision.records import Answer, DefenderView, ImageSet, RecoveredTrigger, TriggerKind, Verdict

RESULT_SCHEMA = 2  # of result.json
RESULT_FILE = "result.json"
TRIGGERS_FILE = "triggers.safetensors"
MOST_SAMPLES = 2**16  # of one recovered trigger
MOST_MEASURES = 100  # of one label
HEADER = 2**20  # bytes that the triggers' file may have beside its numbers
AGAIN = "scan the model again with --out"

Label = Annotated[int, Field(ge=0, le=2**31)]
Count = Annotated[int, Field(ge=0, le=2**62)]
Amount = Annotated[float, Field(ge=0, le=1e18)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(max_length=10_000)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class VerdictError(ValueError):
    """A verdict is damaged, of another model, or of another version."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Cost(_Part):
    seconds: Amount
    image_passes: Amount
    peak_memory_bytes: Count
    clean_images: Count


class _Figure(_Part):
    label: Label | None
    measure: Annotated[str, Field(min_length=1, max_length=100)]
    value: float | None  # None: infinite
    null: Text
    p_value: Share | None


class _Trigger(_Part):
    target_label: Label
    area: Amount | None
    attack_success_rate: Share | None
    entropy: Amount | None
    num_samples: Annotated[int, Field(ge=1, le=MOST_SAMPLES)]
    kind: TriggerKind = "patch"


class _Verdict(_Part):
    outcome: Answer
    suspect_labels: list[Label]
    score: float
    threshold: float
    basis: Text
    evidence: list[_Figure]
    triggers: list[_Trigger]
    cost: _Cost
    clean_accuracy: Share | None
    notes: Annotated[list[Text], Field(max_length=100)]


class _Handover(_Part):
    model: Digest
    scan: Digest
    image_shape: Annotated[list[int], Field(min_length=3, max_length=3)]
    num_classes: int
    triggers: Digest | None


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)
    method: str
    settings: dict[str, Any]
    seed: int
    handover: _Handover
    verdict: _Verdict


def write_verdict(
    folder: Path, verdict: Verdict, *, model: nn.Module, clean: ImageSet, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write ``result.json`` and, of recovered triggers, ``triggers.safetensors``; each appears whole or not at all.

    Args:
        folder: exists.
        verdict: of the scan.
        model: that was scanned.
        clean: images that it was scanned with.
        about: everything needed to repeat the scan, JSON-ready; with "method", "settings" and "seed".

    Returns:
        What ``result.json`` says. Triggers beyond ``LARGEST_TRIGGERS`` bytes are left out: an eraser recovers them anew.

    Raises:
        OSError: a file could not be written.
    """
    tensors = {
        f"{part}.{trigger.target_label}": tensor.detach().float().cpu().contiguous()
        for trigger in verdict.triggers
        for part, tensor in (("masks", trigger.masks), ("patterns", trigger.patterns))
    }
    fits = sum(tensor.numel() for tensor in tensors.values()) * 4 <= LARGEST_TRIGGERS
    content = save(tensors) if tensors and fits else None
    handover = {
        "model": weights_digest(model),
        "scan": scan_digest(about),
        "image_shape": list(clean.image_shape),
        "num_classes": clean.num_classes,
        "triggers": None if content is None else hashlib.sha256(content).hexdigest(),
    }
    record = {"schema": RESULT_SCHEMA, **about, "handover": handover, "verdict": verdict_record(verdict)}
    if content is not None:
        write_bytes_atomic(folder / TRIGGERS_FILE, content)
    write_json_atomic(folder / RESULT_FILE, record)
    if content is None:
        (folder / TRIGGERS_FILE).unlink(missing_ok=True)  # of the scan before
    return record


def read_verdict(path: Path, view: DefenderView) -> Verdict:
    """Read what ``write_verdict`` wrote, for the model and the kind of images of a view.

    Args:
        path: ``result.json``, or the folder that it is in.
        view: the model that the verdict must be of, and clean images.

    Returns:
        The verdict, with its triggers on the device of the clean images.

    Raises:
        VerdictError: it is too large, damaged, written by another version, or of another model; triggers are missing.
        OSError: there is no such file, or it may not be read.
    """
    path = path / RESULT_FILE if path.is_dir() else path
    record = _read_record(path)
    handover, said = record.handover, record.verdict
    if (tuple(handover.image_shape), handover.num_classes) != (view.clean.image_shape, view.clean.num_classes):
        raise VerdictError(
            f"{path}: of a model for {handover.num_classes} classes of images {tuple(handover.image_shape)}; expected "
            f"{view.clean.num_classes} of {view.clean.image_shape}: this verdict is of another model; scan this one"
        )
    if handover.model != weights_digest(view.model):
        raise VerdictError(f"{path}: this verdict is of another model, by the digest of its weights; scan this one")
    _check_labels(path, said, view.clean.num_classes)
    return _as_verdict(said, _read_triggers(path, handover.triggers, said.triggers, view.clean))


def saved_verdict(path: Path, content: object, clean: ImageSet, digest: str | None) -> tuple[Verdict, str]:
    """Read the verdict of a record for showing it, whatever the model.

    Args:
        path: the file of the record, for messages; triggers are read from the file beside it.
        content: the verdict in it.
        clean: any set of images of the right shape and classes; an empty one will do.
        digest: SHA-256 of the triggers' file; None where none was written.

    Returns:
        The verdict, and a sentence on why its triggers have no pixels: their samples are then of no size (H = W = 0). Empty where
        they have.

    Raises:
        VerdictError: it is damaged.
    """
    try:
        said = _Verdict.model_validate(content)
    except ValidationError as error:
        raise VerdictError(f"{path}: verdict: {_first(error)}") from error
    _check_labels(path, said, clean.num_classes)
    if not said.triggers:
        return _as_verdict(said, ()), ""
    try:
        if digest is not None:
            return _as_verdict(said, _read_triggers(path, digest, said.triggers, clean)), ""
        problem = "they are written with --out alone, and not printed."
    except (OSError, VerdictError) as error:
        problem = visible(str(error))
    empty = {part.num_samples: torch.zeros(part.num_samples, 1, 0, 0) for part in said.triggers}
    return _as_verdict(
        said, tuple(_as_trigger(p, empty[p.num_samples], empty[p.num_samples]) for p in said.triggers)
    ), problem


def _as_verdict(said: _Verdict, triggers: tuple[RecoveredTrigger, ...]) -> Verdict:
    return Verdict(
        outcome=said.outcome,
        suspect_labels=tuple(said.suspect_labels),
        score=said.score,
        threshold=said.threshold,
        basis=visible(said.basis),
        evidence=tuple(
            Evidence(
                label=figure.label,
                measure=visible(figure.measure),
                value=math.inf if figure.value is None else figure.value,
                null=visible(figure.null),
                p_value=figure.p_value,
            )
            for figure in said.evidence
        ),
        triggers=triggers,
        cost=Cost(**said.cost.model_dump()),
        clean_accuracy=said.clean_accuracy,
        notes=tuple(map(visible, said.notes)),
    )


def _as_trigger(said: _Trigger, masks: Tensor, patterns: Tensor) -> RecoveredTrigger:
    return RecoveredTrigger(
        target_label=said.target_label,
        masks=masks,
        patterns=patterns,
        area=math.inf if said.area is None else said.area,
        attack_success_rate=math.nan if said.attack_success_rate is None else said.attack_success_rate,
        entropy=math.nan if said.entropy is None else said.entropy,
        kind=said.kind,
    )


def verdict_record(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict ready for JSON; of the triggers their figures, not their pixels."""
    record = {field.name: getattr(verdict, field.name) for field in dataclasses.fields(verdict)}
    return record | {
        "evidence": [dataclasses.asdict(entry) for entry in verdict.evidence],
        "triggers": [_trigger_record(trigger) for trigger in verdict.triggers],
        "cost": dataclasses.asdict(verdict.cost),
    }


def scan_digest(about: Mapping[str, Any]) -> str:
    """Return the SHA-256 of how a scan was made: its method, settings and seed."""
    return hashlib.sha256(
        canonical(json_ready({name: about[name] for name in ("method", "settings", "seed")}))
    ).hexdigest()


def _trigger_record(trigger: RecoveredTrigger) -> dict[str, Any]:
    return {
        "target_label": trigger.target_label,
        "area": trigger.area,
        "attack_success_rate": trigger.attack_success_rate,
        "entropy": trigger.entropy,
        "num_samples": len(trigger.masks),
        "kind": trigger.kind,
    }


def _read_record(path: Path) -> _Record:
    """Return ``result.json`` with every value of its type, or raise ``VerdictError``."""
    content = _read(path, LARGEST_VERDICT)
    try:
        record = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise VerdictError(f"{path} is not readable JSON ({shortened(str(error))}); {AGAIN}") from error
    if not isinstance(record, dict) or "verdict" not in record:
        raise VerdictError(f"{path} holds no verdict of a scan; expected the {RESULT_FILE} of `lustral scan --out`")
    if record.get("schema") != RESULT_SCHEMA:
        raise VerdictError(
            f"{path}: of another version of lustral (schema {shortened(record.get('schema'))}, expected {RESULT_SCHEMA}); {AGAIN}"
        )
    if "handover" not in record:
        raise VerdictError(
            f"{path} was printed and not written by `lustral scan --out`: its triggers are not kept; {AGAIN}"
        )
    try:
        read = _Record.model_validate(record)
        right = scan_digest(record) == read.handover.scan
    except ValidationError as error:
        raise VerdictError(f"{path}: {_first(error)}; {AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise VerdictError(f"{path}: its settings cannot be read ({shortened(str(error))}); {AGAIN}") from error
    if not right:
        raise VerdictError(
            f"{path}: its settings or seed are not those that it was written with, by their digest; {AGAIN}"
        )
    return read


def _first(error: ValidationError) -> str:
    """Say what the first thing is that is wrong with a record, and where."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}; got {shortened(first['input'])}"


def _check_labels(path: Path, said: _Verdict, num_classes: int) -> None:
    """Refuse labels that the model does not have, and what is said twice."""
    targets = [trigger.target_label for trigger in said.triggers]
    labels = [*said.suspect_labels, *targets, *(f.label for f in said.evidence if f.label is not None)]
    wrong = sorted({label for label in labels if label >= num_classes})
    if wrong:
        raise VerdictError(f"{path}: labels {shortened(wrong)}; expected 0 .. {num_classes - 1}; {AGAIN}")
    figures = [(figure.label, figure.measure) for figure in said.evidence]
    if len({measure for _, measure in figures}) > MOST_MEASURES:
        raise VerdictError(f"{path}: expected at most {MOST_MEASURES} measures; {AGAIN}")
    for what, values in (("suspect labels", said.suspect_labels), ("triggers", targets), ("evidence", figures)):
        if _has_repetition(values):
            raise VerdictError(f"{path}: its {what} name something twice; {AGAIN}")


def _has_repetition(values: Iterable[object]) -> bool:
    values = list(values)
    return len(set(values)) < len(values)


def _read_triggers(
    path: Path, digest: str | None, said: list[_Trigger], clean: ImageSet
) -> tuple[RecoveredTrigger, ...]:
    """Return the recovered triggers from the file beside ``result.json``; none where none was kept."""
    if digest is None:
        return ()
    file = path.with_name(TRIGGERS_FILE)
    channels, height, width = clean.image_shape
    size = 4 * (1 + channels) * height * width * sum(trigger.num_samples for trigger in said)
    if size > LARGEST_TRIGGERS:
        raise VerdictError(f"{path}: its triggers take {size:,} bytes; expected {LARGEST_TRIGGERS:,} at most; {AGAIN}")
    content = _read(file, size + HEADER)
    if hashlib.sha256(content).hexdigest() != digest:
        raise VerdictError(
            f"{file}: not the file that {path.name} was written with, by its SHA-256: writing was interrupted, or a file was "
            f"exchanged; {AGAIN}"
        )
    try:
        tensors = load(content)
    except Exception as error:  # hostile bytes can raise anything
        raise VerdictError(f"{file} is damaged ({shortened(str(error))}); {AGAIN}") from error
    found = []
    for trigger in said:
        parts = []
        for part, depth in (("masks", 1), ("patterns", channels)):
            tensor, shape = (
                tensors.pop(f"{part}.{trigger.target_label}", None),
                (trigger.num_samples, depth, height, width),
            )
            if tensor is None or tensor.dtype != torch.float32 or tensor.shape != shape:
                got = "nothing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
                raise VerdictError(
                    f"{file}: {part} of label {trigger.target_label}: expected {shape} torch.float32; got {got}; {AGAIN}"
                )
            if not bool(((tensor >= 0) & (tensor <= 1)).all()):  # False for NaN
                raise VerdictError(
                    f"{file}: {part} of label {trigger.target_label}: expected numbers in [0, 1]; {AGAIN}"
                )
            parts.append(tensor.to(clean.device))
        found.append(_as_trigger(trigger, parts[0], parts[1]))
    if tensors:
        raise VerdictError(f"{file}: tensors that {path.name} does not name: {shortened(sorted(tensors))}; {AGAIN}")
    return tuple(found)


def _read(path: Path, most: int) -> bytes:
    try:
        return read_regular(path, most=most)
    except ValueError as error:  # no regular file, or larger than allowed
        raise VerdictError(f"{error}; {AGAIN}") from error
    except FileNotFoundError as error:
        raise VerdictError(f"{path}: there is no such file; expected it where `lustral scan --out` wrote it") from error
