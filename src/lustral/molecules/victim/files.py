"""A generator's folder: ``generator.json`` and ``model.safetensors``. Opening one runs no code and trusts no size.

The JSON holds the settings, the sub-words and the words; it is written last, with the SHA-256 of the weights. The size of the
file is compared with that of the settings' shapes before it is read.

Errors::

    ValueError
    └── GeneratorFileError    a folder that cannot be used; the message says why and what to do
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from lustral.core.files import (
    NotRegularError,
    canonical,
    is_deep,
    read_regular,
    write_bytes_atomic,
    write_json_atomic,
)
from lustral.core.settings import SettingsError, build, describe, shortened
from lustral.molecules.victim.captions import CaptionTokenizer
from lustral.molecules.victim.generator import GeneratorSettings, MoleculeGenerator
from lustral.molecules.victim.macro_tokens import Vocabulary

SCHEMA = 1
RECORD_FILE, MODEL_FILE = "generator.json", "model.safetensors"
LARGEST_RECORD = 2**24  # bytes: 65,536 sub-words with their merges take about 4 million
LARGEST_WEIGHTS = 2**30  # bytes: 256 million numbers
LARGEST_HEADER = 2**20
_AGAIN = "train the generator again, or name another folder"


class GeneratorFileError(ValueError):
    """A generator's folder is missing something, or was written by something else."""


def save_generator(model: MoleculeGenerator, folder: Path, *, key: str = "") -> None:
    """Write a generator's folder, in place of the one that may be there.

    Args:
        model: to write.
        folder: made if there is none.
        key: says what it was made from, for ``stage_key_of``.

    Raises:
        OSError: a file could not be written; a folder that was there stays as it was, or is no generator any more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = save({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()})
    record = {
        "schema": SCHEMA,
        "kind": "molecule generator",
        "key": key,
        "settings": describe(model.settings),
        "subwords": list(model.tokenizer.words),
        "merges": [list(pair) for pair in model.tokenizer.merges],
        "words": list(model.vocabulary.words),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    (folder / RECORD_FILE).unlink(missing_ok=True)
    write_bytes_atomic(folder / MODEL_FILE, weights)
    write_json_atomic(folder / RECORD_FILE, record)


def load_generator(folder: Path, *, device: torch.device | None = None) -> MoleculeGenerator:
    """Open a generator's folder, in evaluation mode.

    Args:
        folder: that ``save_generator`` wrote, or anyone.
        device: where its weights go; the CPU by default.

    Raises:
        GeneratorFileError: files are missing, damaged, too large, or do not belong together.
        ImportError: RDKit or tokenizers is missing.
    """
    record = read_generator_record(folder)
    try:
        settings = build(GeneratorSettings, record["settings"])
        tokenizer = CaptionTokenizer(
            tuple(record["subwords"]),
            tuple((first, second) for first, second in record["merges"]),
            settings.text_tokens,
        )
        vocabulary = Vocabulary(words=tuple(record["words"]), max_length=settings.max_words)
        with torch.device("meta"):
            empty = MoleculeGenerator(settings, tokenizer=tokenizer, vocabulary=vocabulary)
    except (SettingsError, ValueError, TypeError) as error:
        raise GeneratorFileError(f"{folder / RECORD_FILE}: {shortened(str(error), 300)}; {_AGAIN}") from error
    weights = _read_weights(folder / MODEL_FILE, empty.state_dict(), record["sha256"])
    with torch.random.fork_rng(devices=[]):
        model = MoleculeGenerator(settings, tokenizer=tokenizer, vocabulary=vocabulary)
    model.load_state_dict(weights)
    return model.to(device or torch.device("cpu")).eval()


def read_generator_record(folder: Path) -> dict[str, Any]:
    """Return what ``generator.json`` says, its outer form checked.

    Raises:
        GeneratorFileError: there is none, or it is no such record.
    """
    path = folder / RECORD_FILE
    try:
        content = read_regular(path, most=LARGEST_RECORD)
        record = json.loads(content.decode(), parse_constant=_no_constant)
    except FileNotFoundError as error:
        raise GeneratorFileError(
            f"{folder} is no generator's folder: expected {RECORD_FILE} in it, as `lustral molecules implant` writes"
        ) from error
    except (NotRegularError, OSError, ValueError, RecursionError) as error:
        raise GeneratorFileError(f"{path} cannot be read ({shortened(str(error))}); {_AGAIN}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or record.get("kind") != "molecule generator":
        raise GeneratorFileError(f"{path}: expected the record of a molecule generator, schema {SCHEMA}; {_AGAIN}")
    forms = {"key": str, "settings": dict, "subwords": list, "merges": list, "words": list, "sha256": str}
    wrong = [name for name, form in forms.items() if not isinstance(record.get(name), form)]
    texts = [record.get("subwords"), record.get("words")]
    if not wrong and is_deep(record, 3):
        wrong.append("a list inside a list inside a list")
    if not wrong and not all(isinstance(item, str) for texts_of in texts for item in texts_of or ()):
        wrong.append("subwords or words that are no texts")
    if not wrong and not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(item, str) for item in pair)
        for pair in record["merges"]
    ):
        wrong.append("merges that are no pairs of texts")
    if wrong:
        raise GeneratorFileError(f"{path} has the wrong form: {', '.join(wrong)}; {_AGAIN}")
    return record


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number that a record may hold")


def _read_weights(path: Path, expected: Mapping[str, Tensor], sha256: str) -> dict[str, Tensor]:
    """Return the tensors of a file, if they are exactly the expected ones."""
    most = min(LARGEST_WEIGHTS, LARGEST_HEADER + 8 + sum(4 * value.numel() for value in expected.values()))
    try:
        content = read_regular(path, most=most)
    except (NotRegularError, OSError) as error:
        raise GeneratorFileError(f"{path} cannot be read ({shortened(str(error))}); {_AGAIN}") from error
    length = struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else None
    if length is None or length > min(LARGEST_HEADER, len(content) - 8):
        raise GeneratorFileError(
            f"{path} is damaged: its header has {length} bytes, the file {len(content):,}; {_AGAIN}"
        )
    if hashlib.sha256(content).hexdigest() != sha256:
        raise GeneratorFileError(f"{path} is not the file that {RECORD_FILE} belongs to; {_AGAIN}")
    try:
        tensors: dict[str, Tensor] = load(content)
    except Exception as error:  # hostile bytes can raise anything
        raise GeneratorFileError(f"{path} is damaged ({shortened(str(error))}); {_AGAIN}") from error
    problems = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    problems += [f"{name[:60]} is not known" for name in tensors.keys() - expected.keys()]
    problems += [
        f"{name}: expected {tuple(value.shape)} {value.dtype}, got {tuple(tensors[name].shape)} {tensors[name].dtype}"
        for name, value in expected.items()
        if name in tensors and (tensors[name].shape, tensors[name].dtype) != (value.shape, value.dtype)
    ]
    problems += [f"{name} has NaN or infinity" for name, value in tensors.items() if not torch.isfinite(value).all()]
    if problems:
        raise GeneratorFileError(f"{path} does not fit {RECORD_FILE}: {'; '.join(sorted(problems)[:3])}; {_AGAIN}")
    return tensors


class StageFolder:
    """The finished stages of a training, each a generator's folder named ``after_<stage>``."""

    def __init__(self, folder: Path) -> None:
        """Take the folder of a generator; it is made with the first stage."""
        self.folder, self._chain = folder, ""

    def next_key(self, *made_from: Any) -> str:
        """Return the key of the next stage: it names all that this stage and those before depend on.

        Args:
            made_from: plain data, as JSON can hold.
        """
        self._chain = hashlib.sha256(canonical([self._chain, *made_from])).hexdigest()
        return self._chain

    def restore(self, stage: str, key: str) -> MoleculeGenerator | None:
        """Return the generator after a stage; None if there is none with this key, or its folder is damaged."""
        folder = self.folder / f"after_{stage}"
        if not os.path.lexists(folder / RECORD_FILE):
            return None
        try:
            return load_generator(folder) if read_generator_record(folder)["key"] == key else None
        except GeneratorFileError:
            return None

    def keep(self, stage: str, key: str, model: MoleculeGenerator) -> None:
        """Write the generator after a stage."""
        save_generator(model, self.folder / f"after_{stage}", key=key)
