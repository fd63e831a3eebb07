"""Where cells are done: a device, data sets that are opened once, and what one cell leaves for the next."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from lustral.bench.cells import Cell, CellError, Outcome
from lustral.bench.code import require_unchanged
from lustral.bench.kinds import KINDS
from lustral.bench.recording import RECORD_SCHEMA, build_info, finished, set_digest
from lustral.bench.sources import Sources
from lustral.catalog import ATTACKS
from lustral.core.files import write_bytes_atomic
from lustral.core.randomness import child
from lustral.core.records import OnProgress
from lustral.core.settings import build
from lustral.store.store import MODEL_FILE, Kind, Store, content_key
from lustral.vision.evaluation import Evaluation, evaluate
from lustral.vision.models import Classifier, load_model
from lustral.vision.records import ImageSet, PoisonedSet, Victim
from lustral.vision.victim_files import TRIGGER_FILE, tensors_in
from lustral.vision.victims import NO_ATTACK, load_victim, poison_training_set, poisons_data

T = TypeVar("T")


class StoreAssets:
    """Surrogates, encoders and patterns, built once and kept in a store."""

    def __init__(self, store: Store) -> None:
        """Keep them in ``store``."""
        self._store = store

    def get(self, spec: Mapping[str, Any], build: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Return the tensors of a specification; see ``lustral.core.records.Assets``."""
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
    """Does cells one after the other; keeps data sets and the last victims in memory between them.

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
    _kept: dict[str, tuple[str, Any]] = field(default_factory=dict, repr=False)

    def do(self, cell: Cell, on_progress: OnProgress | None = None) -> Outcome:
        """Compute a cell.

        Raises:
            CellError: something that it needs is not in the store, or code that it names has changed.
            TrustError: the specification asks for code or for data that are not allowed; see ``Sources.trust``.
            Exception: whatever the method raises.
        """
        self.sources.trust.require(cell.spec)
        require_unchanged(cell.spec)
        started = time.perf_counter()
        outcome = KINDS[cell.kind].do(cell, self, on_progress)
        whole = finished(cell, outcome.record, time.perf_counter() - started, self.device)
        return Outcome(record=whole, files=outcome.files)

    @property
    def assets(self) -> StoreAssets:
        """What attacks build and share."""
        return StoreAssets(self.store)

    def kept(self, role: str, key: str, make: Callable[[], T]) -> T:
        """Return what ``make`` returns; as long as the same role asks for the same key, what it returned before."""
        if role not in self._kept or self._kept[role][0] != key:
            self._kept.pop(role, None)  # before the next one is made: both may not fit
            self._kept[role] = key, make()
        found: T = self._kept[role][1]
        return found

    def record(self, kind: Kind, key: str) -> dict[str, Any]:
        """Return the record of a cell that another one needs.

        Raises:
            CellError: there is none.
        """
        try:
            return self.store.read(kind, key)
        except KeyError as error:
            raise CellError(
                f"the {kind.removesuffix('s')} {key[:12]} is not in the store; run the plan from its start"
            ) from error

    def victim(self, key: str, *, role: str = "victim") -> Victim:
        """Return a victim from the store, on the device; the last one of each role stays in memory."""

        def load() -> Victim:
            with self.store.as_folder(self.record("victims", key)) as folder:
                loaded = load_victim(folder, allow_code=self.sources.trust.code)
            return dataclasses.replace(loaded, model=loaded.model.to(self.device))

        return self.kept(role, key, load)

    def model(self, record: Mapping[str, Any]) -> Classifier:
        """Return the model that was kept with a record, on the device."""
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / MODEL_FILE
            write_bytes_atomic(path, self.store.file(record, MODEL_FILE))
            return load_model(path, allow_code=self.sources.trust.code).model.to(self.device)

    def evaluate(self, victim: Victim, model: torch.nn.Module | None, spec: Mapping[str, Any]) -> Evaluation:
        """Measure a model with a victim's true trigger, on the images that its own metrics were measured on.

        Args:
            victim: whose trigger.
            model: which; None: the victim's own.
            spec: the victim's specification.
        """
        return evaluate(victim, model, self.test_set(spec), generator=child(spec["seed"], "evaluation"))

    def training_set(self, victim: Mapping[str, Any]) -> ImageSet:
        """Return the attacker's images, on the device."""
        data = victim["data"]
        return self.sources.training_set(data["name"], data["image_size"], data.get("images")).to(self.device)

    def poisoned_set(self, key: str, victim: Mapping[str, Any]) -> PoisonedSet:
        """Return the training set of a victim, poisoned again as it was, on the device; the last one stays in memory.

        Args:
            key: the victim's name in the store.
            victim: its specification; the attack "none" has clean images.

        Raises:
            CellError: the attack steers training, or this machine makes another set than the victim was trained on.
        """
        method = victim["attack"]["method"]
        if method != NO_ATTACK and not poisons_data(method):
            raise CellError(f"{method} steers training and poisons no data")

        def make() -> PoisonedSet:
            attack: Any = None if method == NO_ATTACK else build(ATTACKS[method], victim["attack"]["settings"])
            train = self.training_set(victim)
            _, found = poison_training_set(attack, train, seed=victim["seed"], assets=self.assets)
            if found is None:
                found = PoisonedSet(data=train, is_poisoned=torch.zeros(len(train), dtype=torch.bool))
            record = self.record("victims", key)
            made = {"num_poisoned": int(found.is_poisoned.sum()), "training_set": set_digest(found.data)}
            if any(record.get(name, value) != value for name, value in made.items()):
                raise CellError(
                    f"the training set of the victim {key[:12]} cannot be made again here: it comes out different, as other "
                    "hardware rounds differently; train the victim again on this machine, in a new store"
                )
            return found

        return self.kept("poisoned", key, make)

    def test_set(self, victim: Mapping[str, Any]) -> ImageSet:
        """Return the evaluator's images, on the device."""
        source = self.sources.open(victim["data"]["name"], victim["data"]["image_size"])
        if source.test is None:
            raise CellError(f"{source.name} has no test set")
        return source.test.to(self.device)

    def clean_images(self, spec: Mapping[str, Any]) -> ImageSet:
        """Draw the defender's images, classes in proportion, as the command line does.

        Args:
            spec: of the defence; equal victims, numbers of images and seeds give equal images, whatever the defence.
        """
        victim = spec["victim"]
        source = self.sources.open(victim["data"]["name"], victim["data"]["image_size"])
        return source.draw_clean(spec["clean_images"], generator=self.stream(spec, "clean")).to(self.device)

    def stream(self, spec: Mapping[str, Any], name: str) -> torch.Generator:
        """Return the random stream of a defence's cell for one purpose; with seed 0 that of the single command."""
        own = (spec["seed"],) if spec["seed"] else ()
        return child(spec["victim"]["seed"], name, *own)
