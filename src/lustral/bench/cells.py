"""Doing one cell: training the victim that a specification describes, or running a defence on it.

What comes out is a record (plain data, small: tables are made of it) and files (weights, pictures, curves). See
``docs/benchmarks.md`` for every field.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

import lustral
from lustral.bench.grid import DEFENCES, Cell, table_columns
from lustral.bench.sources import Sources
from lustral.catalog import ATTACKS, DETECTORS, PURIFIERS
from lustral.core.files import json_ready, write_bytes_atomic
from lustral.core.history import HistoryEntry
from lustral.core.randomness import child
from lustral.core.records import OnProgress, Progress
from lustral.core.settings import build
from lustral.store.store import DETAIL_FILE, MODEL_FILE, RECOVERED_PICTURE, Store, content_key
from lustral.training import EpochReport, Trainer
from lustral.vision.erasing import erase
from lustral.vision.evaluation import Evaluation, compare_evaluations, evaluate
from lustral.vision.figures import stamp_sheet
from lustral.vision.images import as_float, as_uint8, at_most
from lustral.vision.models import Classifier, arch_of, load_model, parse_architecture, save_model
from lustral.vision.records import DefenderView, ImageSet, Purified, Verdict, Victim
from lustral.vision.victim_files import TRIGGER_FILE, tensors_in
from lustral.vision.victims import NO_ATTACK, implant, library_versions, load_victim, save_victim

RECORD_SCHEMA = 1


class CellError(ValueError):
    """A cell cannot be done; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished cell, ready for the store.

    Attributes:
        record: plain data.
        files: content by name.
    """

    record: Mapping[str, Any]
    files: Mapping[str, bytes]


class StoreAssets:
    """Surrogates, encoders and patterns, built once and kept in a store."""

    def __init__(self, store: Store) -> None:
        """Keep them in ``store``."""
        self._store = store

    def get(self, spec: Mapping[str, Any], build: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Return the tensors of a specification; see ``lustral.vision.records.Assets``."""
        key = content_key(spec)
        if not self._store.has("assets", key):
            started = time.perf_counter()
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in build().items()}
            record = {
                "schema": RECORD_SCHEMA,
                "kind": "asset",
                "spec": spec,
                "made": build_info(time.perf_counter() - started),
            }
            self._store.put("assets", key, record, {TRIGGER_FILE: save(tensors)})
        content = self._store.file(self._store.read("assets", key), TRIGGER_FILE)
        return tensors_in(content, where=f"the asset {key[:12]}")


@dataclass
class Workbench:
    """Does cells one after the other; keeps data sets and the last victim in memory between them.

    Attributes:
        store: where victims and assets are.
        device: where to compute.
        keep_models: put purified models into the outcome.
        sources: data sets, and what stored specifications may ask for.
    """

    store: Store
    device: torch.device
    keep_models: bool = True
    sources: Sources = field(default_factory=Sources)
    _victim: tuple[str, Victim] | None = None

    def do(self, cell: Cell, on_progress: OnProgress | None = None) -> Outcome:
        """Train a victim or run a defence.

        Raises:
            CellError: the victim is not in the store.
            TrustError: the specification asks for code or for data that are not allowed; see ``Sources.trust``.
            Exception: whatever the method raises.
        """
        self.sources.trust.require(cell.spec)
        started = time.perf_counter()
        if cell.kind == "victims":
            record, files = self._train(cell, on_progress)
        else:
            record, files = self._defend(cell, on_progress)
        whole = {
            "schema": RECORD_SCHEMA,
            "kind": cell.spec["kind"],
            "status": "done",
            "title": cell.title,
            "facts": table_columns(cell),
            "spec": cell.spec,
            "victim_key": cell.victim_key,
            **record,
            "made": build_info(time.perf_counter() - started, self.device),
        }
        return Outcome(record=whole, files=files)

    def victim(self, key: str) -> Victim:
        """Return a victim from the store, on the device."""
        if self._victim is None or self._victim[0] != key:
            try:
                record = self.store.read("victims", key)
            except KeyError as error:
                raise CellError(f"the victim {key[:12]} is not in the store; run the plan from its start") from error
            with self.store.as_folder(record) as folder:
                loaded = load_victim(folder, allow_code=self.sources.trust.code)
            self._victim = key, dataclasses.replace(loaded, model=loaded.model.to(self.device))
        return self._victim[1]

    def evaluate(self, victim: Victim, model: torch.nn.Module | None, spec: Mapping[str, Any]) -> Evaluation:
        """Measure a model with a victim's true trigger, on the images that its own metrics were measured on."""
        return evaluate(victim, model, self._test(spec), generator=child(spec["seed"], "evaluation"))

    def _train(self, cell: Cell, on_progress: OnProgress | None) -> tuple[dict[str, Any], dict[str, bytes]]:
        spec, data = cell.spec, cell.spec["data"]
        train = self.sources.training_set(data["name"], data["image_size"]).to(self.device)
        method, epochs = spec["attack"]["method"], []

        def note(report: EpochReport) -> None:
            rate = round(report.images_per_second)
            epochs.append(HistoryEntry(count=report.epoch, loss=report.loss, images_per_second=rate).to_dict())

        start = None
        if cell.victim_key is not None:
            model = self.victim(cell.victim_key).model
            assert isinstance(model, Classifier)
            start = model
        began = time.perf_counter()
        victim = implant(
            None if method == NO_ATTACK else build(ATTACKS[method], spec["attack"]["settings"]),
            train,
            self._test(spec),
            arch=parse_architecture(spec["arch"], allow_code=self.sources.trust.code),
            trainer=build(Trainer, spec["trainer"]),
            seed=spec["seed"],
            data_name=data["name"],
            start=start,
            assets=StoreAssets(self.store),
            on_epoch=note,
            on_progress=on_progress,
        )
        seconds = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as scratch:
            save_victim(Path(scratch), victim, self._test(spec))
            files = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
        metrics, per_class = without_per_class(victim.metrics)
        files[DETAIL_FILE] = as_json({"history": epochs, "per_class": {"before": per_class}})
        cost = {
            "seconds": seconds,
            "image_passes": float(sum(1 for _ in epochs) * len(train)),
            "peak_memory_bytes": None,
            "clean_images": 0,
        }
        return {
            "metrics": {"before": metrics},
            "cost": cost,
            "num_poisoned": victim.provenance["num_poisoned"],
            "class_names": list(train.class_names),
        }, files

    def _defend(self, cell: Cell, on_progress: OnProgress | None) -> tuple[dict[str, Any], dict[str, bytes]]:
        spec = cell.spec
        victim_spec, method, seed = spec["victim"], spec["defence"]["method"], spec["victim"]["seed"]
        assert cell.victim_key is not None
        victim = self.victim(cell.victim_key)
        view = DefenderView(model=victim.model, clean=self._clean(spec))
        defence: Any = build(DEFENCES[method], spec["defence"]["settings"])
        before = Evaluation.from_dict(victim.metrics)
        metrics: dict[str, Any] = {}
        metrics["before"], per_class_before = without_per_class(victim.metrics)
        detail: dict[str, Any] = {"per_class": {"before": per_class_before}}
        files: dict[str, bytes] = {}
        if method in PURIFIERS:
            scan = spec["defence"].get("scan")
            purified: Purified = erase(
                defence,
                view,
                detector=None if scan is None else build(DETECTORS[scan["method"]], scan["settings"]),
                generator=child(seed, "erase", *seed_name(spec["seed"])),
                audit=scan is not None and scan["audit"],
                on_progress=on_progress,
            )
            cost, verdict = purified.cost, purified.verdict
            after = self.evaluate(victim, purified.model, victim_spec)
            metrics["after"], detail["per_class"]["after"] = without_per_class(after.to_dict())
            metrics["compare"] = compare_evaluations(before, after)
            detail |= {
                "history": [entry.to_dict() for entry in purified.history],
                "selected": purified.selected,
                "notes": list(purified.notes),
                "audit": None if purified.audit is None else evidence(purified.audit),
            }
            if self.keep_models and isinstance(purified.model, Classifier):
                files[MODEL_FILE] = self._weights(purified.model, victim_spec, view.clean)
        else:
            verdict = defence.inspect(
                view, generator=child(seed, "scan", *seed_name(spec["seed"])), on_progress=on_progress
            )
            cost = verdict.cost
            metrics["detection"] = detection(verdict, true_targets(victim, view.clean.num_classes))
        if verdict is not None:
            detail["verdict"] = evidence(verdict)
            if verdict.triggers:
                files[RECOVERED_PICTURE] = recovered_picture(verdict, view.clean)
        files[DETAIL_FILE] = as_json(detail)
        return {
            "metrics": metrics,
            "cost": dataclasses.asdict(cost),
            "class_names": list(view.clean.class_names),
        }, files

    def _test(self, spec: Mapping[str, Any]) -> ImageSet:
        source = self.sources.open(spec["data"]["name"], spec["data"]["image_size"])
        if source.test is None:
            raise CellError(f"{source.name} has no test set")
        return source.test.to(self.device)

    def _clean(self, spec: Mapping[str, Any]) -> ImageSet:
        """Draw the defender's images, classes in proportion, as the command line does."""
        victim = spec["victim"]
        source = self.sources.open(victim["data"]["name"], victim["data"]["image_size"])
        stream = child(victim["seed"], "clean", *seed_name(spec["seed"]))
        return source.draw_clean(spec["clean_images"], generator=stream).to(self.device)

    def _weights(self, model: Classifier, victim: Mapping[str, Any], clean: ImageSet) -> bytes:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / MODEL_FILE
            save_model(path, model, arch=arch_of(model.network, victim["arch"]), image_shape=clean.image_shape)
            return path.read_bytes()

    def measure_again(self, record: Mapping[str, Any]) -> Evaluation | None:
        """Measure a stored victim or purified model again from its weights; None where no weights were kept."""
        if MODEL_FILE not in record["files"]:
            return None
        spec = record["spec"]
        self.sources.trust.require(spec)
        if record["kind"] == "victim":
            return self.evaluate(self.victim(record["key"]), None, spec)
        victim = self.victim(record["victim_key"])
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / MODEL_FILE
            write_bytes_atomic(path, self.store.file(record, MODEL_FILE))
            model = load_model(path, allow_code=self.sources.trust.code).model.to(self.device)
        return self.evaluate(victim, model, spec["victim"])


def failure(cell: Cell, error: BaseException, seconds: float, device: torch.device | None = None) -> dict[str, Any]:
    """Return the record of a cell that raised."""
    return {
        "schema": RECORD_SCHEMA,
        "kind": cell.spec["kind"],
        "status": "failed",
        "title": cell.title,
        "facts": table_columns(cell),
        "spec": cell.spec,
        "victim_key": cell.victim_key,
        "error": writable(f"{type(error).__name__}: {error}"),
        "traceback": writable("".join(traceback.format_exception(error))),
        "made": build_info(seconds, device),
    }


def writable(text: str) -> str:
    """Return a text with what UTF-8 cannot hold written out: messages quote file names, which may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def seed_name(defence_seed: int) -> tuple[int, ...]:
    """Return what a defence seed adds to a stream's name; nothing for 0, so that single commands repeat the cell."""
    return (defence_seed,) if defence_seed else ()


def without_per_class(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return an evaluation without its longest part, and that part: the accuracy of each class."""
    return {name: value for name, value in metrics.items() if name != "per_class"}, metrics["per_class"]


def true_targets(victim: Victim, num_classes: int) -> set[int]:
    """Return the labels that a victim's trigger leads to; none for a benign model."""
    labels = torch.arange(num_classes)
    targets = victim.relabel(labels, num_classes)
    return set(targets[targets != labels].tolist())


def detection(verdict: Verdict, targets: set[int]) -> dict[str, Any]:
    """Return how right a verdict was.

    "correct": a benign model called clean, or a backdoored one with nothing but true targets named. "alarm": called backdoored.
    """
    alarm = verdict.outcome == "backdoored"
    named = set(verdict.suspect_labels)
    correct = bool(named) and named <= targets and alarm if targets else verdict.outcome == "clean"
    return {
        "outcome": verdict.outcome,
        "suspects": list(verdict.suspect_labels),
        "targets": sorted(targets),
        "score": verdict.score,
        "threshold": verdict.threshold,
        "alarm": alarm,
        "correct": correct,
    }


def evidence(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as plain data, without its triggers."""
    return {
        "outcome": verdict.outcome,
        "suspects": list(verdict.suspect_labels),
        "score": verdict.score,
        "threshold": verdict.threshold,
        "basis": verdict.basis,
        "evidence": [dataclasses.asdict(entry) for entry in verdict.evidence],
    }


def recovered_picture(verdict: Verdict, clean: ImageSet) -> bytes:
    """Return a PNG of the first recovered trigger on clean images of other classes."""
    trigger = verdict.triggers[0].to("cpu")
    others = at_most(clean.subset(clean.labels != trigger.target_label), 8)
    originals = others.images.cpu()
    return stamp_sheet(originals, as_uint8(trigger(as_float(originals))))


def as_json(content: Any) -> bytes:
    """Return JSON bytes; numbers that are not finite become null."""
    return json.dumps(json_ready(content), allow_nan=False).encode()


def build_info(seconds: float, device: torch.device | None = None) -> dict[str, Any]:
    """Return by what and when something was made: recorded, but no part of its name."""
    name = "cpu" if device is None else str(device)
    if device is not None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "seconds": seconds,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": library_versions(),
        "code": code_version(),
        "machine": platform.machine(),
        "device": name,
        "threads": torch.get_num_threads(),
    }


@cache
def code_version() -> str:
    """Return a fingerprint of the library's source: 12 hexadecimal digits."""
    root = Path(lustral.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def stage_of(cell: Cell, progress: Progress) -> str:
    """Return a progress report as a line."""
    return f"{cell.title}: {progress.stage} {progress.done}/{progress.total}"
