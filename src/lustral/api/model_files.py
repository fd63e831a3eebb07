"""The file that an erased or trained model goes to."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lustral.core.files import write_bytes_atomic
from lustral.exchange.model_card import model_card
from lustral.vision.models import Classifier, LoadedModel, ModelFileError, arch_of, save_like, save_model
from lustral.vision.models.checkpoint import copy_plan, save_folder_like
from lustral.vision.models.files.folder_copy import require_room
from lustral.vision.models.files.safety import FileFacts, facts_of_files, file_facts
from lustral.vision.purifiers import CNPD
from lustral.vision.verdict_files import RESULT_FILE

PAGE_FILE = "report.html"
logger = logging.getLogger(__name__)

BESIDE = (RESULT_FILE, PAGE_FILE)  # what a result writes into the folder of a new model
STATE_FILE = "model.pt"  # of a network that no name can build again


def require_nameable(method: Any, loaded: LoadedModel) -> None:
    """Raise ``ValueError`` where a method returns another architecture, and no file could name that."""
    if isinstance(method, CNPD) and loaded.arch.startswith("transformers:"):
        raise ValueError(
            f"cnpd returns another architecture, and no file can name one around {loaded.arch}; choose another --method"
        )


def require_copyable(loaded: LoadedModel, out: Path | None = None) -> None:
    """Raise ``ValueError`` where the folder that a model came from cannot be copied, or not to ``out``."""
    plan = copy_plan(loaded)
    if plan is not None and out is not None:
        require_room(out, plan, beside=BESIDE)


def write_erased(out: Path, model: Classifier, loaded: LoadedModel, record: Mapping[str, Any]) -> Path:
    """Write a model as the given one was, in a file that ends as its did; one of another architecture as safetensors.

    A model folder comes back with a section in its model card.

    Args:
        out: folder that exists.
        model: the new classifier.
        loaded: the given one; one that came from no file gets a state dict, ``model.pt``.
        record: what ``result.json`` will say.

    Raises:
        ValueError: a folder that cannot be copied, or not to ``out``.
    """
    if loaded.origin is None:
        return write_state(out, model)
    arch = arch_of(model.network, loaded.arch)
    if arch != loaded.arch:
        save_model(out / "model.safetensors", model, arch=arch, image_shape=loaded.image_shape)
        return out / "model.safetensors"
    if loaded.other_weights:
        logger.warning("not erased, and written back as they were: %s", ", ".join(loaded.other_weights))
    plan = copy_plan(loaded)
    try:
        if plan is not None:
            left_out = [*plan.left_out]

            def card(given: bytes | None, digests: Mapping[str, str]) -> bytes:
                return model_card(given, record, digests, left_out)

            save_folder_like(out, model, loaded, card=card, beside=BESIDE)
            return out
        return save_like(out / "model", model, loaded)
    except ModelFileError as error:  # e.g. the file changed meanwhile; the work is done and shall not be lost
        logger.warning("%s; the model is written as safetensors", error)
        save_model(out / "model.safetensors", model, arch=arch, image_shape=loaded.image_shape)
        return out / "model.safetensors"


def write_state(out: Path, model: Classifier) -> Path:
    """Write the state dict of a classifier's network, under the network's own keys, and return the file's path."""
    state = {name: tensor.detach().cpu() for name, tensor in model.network.state_dict().items()}
    content = io.BytesIO()
    torch.save(state, content)
    write_bytes_atomic(out / STATE_FILE, content.getvalue())
    return out / STATE_FILE


def given_files(loaded: LoadedModel) -> tuple[FileFacts, ...]:
    """Return the facts about the files that a model was read from."""
    return () if loaded.origin is None else facts_of_files(loaded.origin.files)


def written_files(written: Path, loaded: LoadedModel) -> tuple[FileFacts, ...]:
    """Return the facts about what an eraser wrote: a file, or a folder like the one that the model was read from."""
    if written.is_dir() and loaded.origin is not None:
        return tuple(file_facts(written / file.name) for file in loaded.origin.files)
    return (file_facts(written),)
