"""A generator's folder: what goes in comes out, and nothing else is let in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rdkit")
pytest.importorskip("tokenizers")

from lustral.core.randomness import child
from lustral.molecules.victim import GeneratorFileError, load_generator, save_generator
from molecules.victim.world import alphabet, trained


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_generator(trained(), tmp_path)
    return tmp_path


def test_a_generator_comes_back_as_it_was(folder: Path) -> None:
    model = load_generator(folder)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in trained().state_dict().items())
    captions = alphabet().captions[:5]
    assert model.generate(captions, generator=child(0)) == trained().generate(captions, generator=child(0))
    assert not model.training
    assert {path.name for path in folder.iterdir()} == {"generator.json", "model.safetensors"}
    assert {name for name, _ in model.named_children()} == {"text", "graph", "autoencoder", "denoiser"}


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "huge": (lambda record: record["settings"].update(decoder_width=10**9), "decoder_width from 1 to 4,096"),
    "larger": (lambda record: record["settings"].update(decoder_width=4096), "model.safetensors does not fit"),
    "unknown setting": (lambda record: record["settings"].update(surprise=1), "surprise"),
    "text in place of a number": (lambda record: record["settings"].update(latent="x"), "latent"),
    "no settings": (lambda record: record.pop("settings"), "settings"),
    "another schema": (lambda record: record.update(schema=99), "schema 1"),
    "another kind": (lambda record: record.update(kind="victim"), "molecule generator"),
    "words twice": (lambda record: record["words"].append("@"), "different words"),
    "no word": (lambda record: record["words"].append("import os"), "no word of a molecule"),
    "numbers for words": (lambda record: record["words"].append(7), "no texts"),
    "merges of nothing": (lambda record: record["merges"].append(["zq", "qz"]), "merges"),
    "merges of three": (lambda record: record["merges"].append(["a", "b", "c"]), "no pairs"),
    "another file's checksum": (lambda record: record.update(sha256="0" * 64), "not the file"),
    "fewer sub-words": (lambda record: record["subwords"].pop(), "merges|does not fit"),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_a_record_that_was_tampered_with_is_refused(folder: Path, name: str) -> None:
    change, message = CHANGES[name]
    path = folder / "generator.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(GeneratorFileError, match=message):
        load_generator(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b'{"schema": NaN}', b"\xff\xfe", b"7"])
def test_a_record_that_is_no_record_is_refused(folder: Path, content: bytes) -> None:
    (folder / "generator.json").write_bytes(content)
    with pytest.raises(GeneratorFileError):
        load_generator(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for broken in (b"", content[:7], content[:-4], b"\xff" * 8 + content[8:], content + bytes(2**21)):
        path.write_bytes(broken)
        with pytest.raises(GeneratorFileError):
            load_generator(folder)
    path.unlink()
    with pytest.raises(GeneratorFileError, match="cannot be read"):
        load_generator(folder)


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    model = load_generator(folder)
    with torch.no_grad():
        model.denoiser.null[0] = torch.nan
    save_generator(model, folder)
    with pytest.raises(GeneratorFileError, match=r"denoiser\.null has NaN"):
        load_generator(folder)


def test_a_folder_without_a_generator_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(GeneratorFileError, match=r"expected generator\.json"):
        load_generator(tmp_path)
    with pytest.raises(GeneratorFileError):
        load_generator(tmp_path / "nowhere")
