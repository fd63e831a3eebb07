"""A copy of a model folder: whole or not at all, nothing else in it, no links, and no weights that were not erased."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from lustral.vision.models import ModelFileError, load_model
from lustral.vision.models.checkpoint import save_folder_like
from lustral.vision.models.files import folder_copy
from lustral.vision.models.files.folder_copy import FolderPlan, plan_copy, require_room, write_copy

OTHERS = {"config.json": "{}", "vocab/names.txt": "ant\nbee\n", "modeling.py": "x = 1\n", ".gitattributes": "* text\n"}
WEIGHTS = {"model.safetensors": bytearray(b"new weights")}
STALE = ("pytorch_model.bin", "onnx/model.onnx", "pytorch_model.bin.index.json", "runs/last.ckpt", "TF_MODEL.H5")


@pytest.fixture
def given(tmp_path: Path) -> Path:
    folder = tmp_path / "given"
    for name, text in {**OTHERS, "model.safetensors": "old weights"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def plan_of(folder: Path) -> FolderPlan:
    return plan_copy(folder, list(WEIGHTS))


def files_in(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_everything_but_weights_stays_as_it_was(given: Path, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (*STALE, ".cache/huggingface/a.lock"):
        (given / name).parent.mkdir(parents=True, exist_ok=True)
        (given / name).write_text("given weights")
    plan = plan_of(given)
    assert sorted(plan.left_out) == sorted([*STALE, ".cache/"])
    write_copy(out, plan, WEIGHTS.items())
    assert files_in(out) == {**OTHERS, "model.safetensors": "new weights"}
    assert "not copied: .cache/" in caplog.text


def test_the_index_of_the_weights_goes_with_them(given: Path) -> None:
    (given / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json" in plan_of(given).left_out
    plan = plan_copy(given, ["model-1.safetensors"], index="model.safetensors.index.json")
    assert "model.safetensors.index.json" in plan.copied
    assert "model.safetensors" in plan.left_out  # of another program that prefers one file


@pytest.mark.parametrize("has_card", [False, True])
def test_a_card_is_made_from_the_given_one_and_the_new_digests(given: Path, out: Path, has_card: bool) -> None:
    if has_card:
        (given / "README.md").write_bytes(b"theirs \xff")
    seen: list[bytes | None] = []

    def card(text: bytes | None, digests: Mapping[str, str]) -> bytes:
        seen.append(text)
        assert digests == {"model.safetensors": hashlib.sha256(b"new weights").hexdigest()}
        return b"ours"

    write_copy(out, plan_of(given), WEIGHTS.items(), card=card)
    assert seen == [b"theirs \xff" if has_card else None]
    assert (out / "README.md").read_bytes() == b"ours"


@pytest.mark.parametrize("where", ["secret.txt", "vocab/secret.txt", "all", "circle"])
def test_links_are_refused(given: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("private")
    targets = {"all": tmp_path / "secret", "circle": given / "circle"}
    (given / where).symlink_to(targets.get(where, tmp_path / "secret" / "key"))
    with pytest.raises(ModelFileError, match=r"is a link or no regular file; .* \(cp -rL\)"):
        plan_of(given)


def test_pipes_are_refused(given: Path) -> None:
    os.mkfifo(given / "pipe")
    with pytest.raises(ModelFileError, match="'pipe' is a link or no regular file"):
        plan_of(given)


def test_a_file_that_becomes_a_link_is_refused(given: Path, out: Path, tmp_path: Path) -> None:
    plan = plan_of(given)
    (tmp_path / "key").write_text("private")
    (given / "modeling.py").unlink()
    (given / "modeling.py").symlink_to(tmp_path / "key")
    with pytest.raises(ModelFileError, match=r"modeling\.py.* nothing was written"):
        write_copy(out, plan, WEIGHTS.items())
    assert list(out.iterdir()) == []


def test_only_links_of_the_hubs_own_cache_are_followed(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for name, text in {"config.json": "{}", "model.safetensors": "old", "note.txt": "hello"}.items():
        (blobs / f"{name}-digest").write_text(text)
        (folder / name).symlink_to(Path("..") / ".." / "blobs" / f"{name}-digest")
    write_copy(out, plan_of(folder), WEIGHTS.items())
    assert files_in(out) == {"config.json": "{}", "model.safetensors": "new weights", "note.txt": "hello"}
    assert not any(path.is_symlink() for path in out.iterdir())
    (tmp_path / "key").write_text("private")
    (blobs / "note.txt-digest").unlink()
    (blobs / "note.txt-digest").symlink_to(tmp_path / "key")  # a link behind the link
    with pytest.raises(ModelFileError, match=r"'note\.txt' is a link"):
        plan_of(folder)
    (folder / "note.txt").unlink()
    (folder / "note.txt").symlink_to("../../blobs/../../key")
    with pytest.raises(ModelFileError, match=r"'note\.txt' is a link"):
        plan_of(folder)


@pytest.mark.parametrize(("limit", "most"), [("MOST_FILE", 5), ("MOST_BYTES", 20), ("MOST_FILES", 3)])
def test_sizes_are_bounded(given: Path, monkeypatch: pytest.MonkeyPatch, limit: str, most: int) -> None:
    plan_of(given)
    monkeypatch.setattr(folder_copy, limit, most)
    with pytest.raises(ModelFileError, match="is beyond that"):
        plan_of(given)


def test_folders_are_not_followed_for_ever(given: Path) -> None:
    (given / "/".join("abcdefghi")).mkdir(parents=True)
    with pytest.raises(ModelFileError, match="more than 8 folders inside each other"):
        plan_of(given)


def test_the_place_has_room(given: Path, out: Path) -> None:
    plan = plan_of(given)
    for place in (given, given / "inside", given.parent):
        with pytest.raises(ValueError, match="expected another folder"):
            require_room(place, plan)
    require_room(out / "new", plan)
    (out / "result.json").touch()
    with pytest.raises(ValueError, match=r"expected a new or empty folder .*; it holds 'result\.json'"):
        require_room(out, plan)
    require_room(out, plan, beside=["result.json"])
    (out / "adapter.safetensors").touch()  # of another model
    with pytest.raises(ValueError, match=r"it holds 'adapter\.safetensors'"):
        write_copy(out, plan, WEIGHTS.items(), beside=["result.json"])
    assert set(files_in(out)) == {"result.json", "adapter.safetensors"}


def test_an_earlier_copy_is_replaced(given: Path, out: Path) -> None:
    write_copy(out, plan_of(given), [("model.safetensors", bytearray(b"first"))])
    write_copy(out, plan_of(given), WEIGHTS.items())
    assert files_in(out) == {**OTHERS, "model.safetensors": "new weights"}


def failing() -> Iterator[tuple[str, bytearray]]:
    yield "model-1.safetensors", bytearray(b"new")
    raise OSError(28, "No space left on device")


def test_a_failure_on_the_way_leaves_nothing_or_the_earlier_copy(given: Path, out: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        write_copy(out, plan_of(given), failing())
    assert list(out.iterdir()) == []
    write_copy(out, plan_of(given), WEIGHTS.items())
    with pytest.raises(OSError, match="No space left"):
        write_copy(out, plan_of(given), failing())
    assert files_in(out) == {**OTHERS, "model.safetensors": "new weights"}
    with pytest.raises(ZeroDivisionError):
        write_copy(out, plan_of(given), WEIGHTS.items(), card=lambda *_: b"" * (1 // 0))
    assert files_in(out) == {**OTHERS, "model.safetensors": "new weights"}


@pytest.mark.parametrize("last", range(1, 6))
def test_no_failure_leaves_half_a_model(given: Path, out: Path, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    plan, real, moved = plan_of(given), os.replace, []

    def replace(source: Any, target: Path) -> None:
        if target.parent == out or (target.parent.parent == out and target.parent.name == "vocab"):
            moved.append(target.name)
            if len(moved) == last:
                raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(folder_copy.os, "replace", replace)
    with pytest.raises(OSError, match="Input/output error"):
        write_copy(out, plan, WEIGHTS.items())
    assert ("config.json" in moved) == (last == 5)
    assert files_in(out) == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_types_order_and_shards_are_those_of_the_given_files(
    tmp_path: Path, out: Path, dtype: torch.dtype
) -> None:
    state = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in timm.create_model("test_resnet", num_classes=4).state_dict().items()
    }
    folder = tmp_path / "sharded"
    folder.mkdir()
    recipe = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "config.json").write_text(
        json.dumps({"architecture": "test_resnet", "num_classes": 4, "pretrained_cfg": recipe})
    )
    names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    where = {key: names[number % 2] for number, key in enumerate(state)}
    for name in names:
        safetensors.torch.save_file(
            {key: value for key, value in state.items() if where[key] == name}, folder / name, {"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"a": 1}, "weight_map": where}))
    loaded = load_model(folder)
    with torch.no_grad():
        for parameter in loaded.model.network.parameters():
            parameter.add_(0.5)
    save_folder_like(out, loaded.model, loaded)
    assert sorted(files.name for files in out.iterdir()) == sorted(files.name for files in folder.iterdir())
    assert (out / "model.safetensors.index.json").read_bytes() == (folder / "model.safetensors.index.json").read_bytes()
    for name in names:
        old, new = ((place / name).read_bytes() for place in (folder, out))
        start = 8 + int.from_bytes(old[:8], "little")
        assert new[:start] == old[:start]  # the header: keys, types, order, places
        assert new[start:] != old[start:]
    written = load_model(out).model.network.state_dict()
    for key, value in loaded.model.network.state_dict().items():
        assert torch.equal(written[key], value.to(state[key].dtype).to(value.dtype)), key
