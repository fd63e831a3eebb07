"""Stores from anywhere: every command says in a line what is wrong, and touches nothing outside of the store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.synthetic import defended, synthetic_store
from lustral.cli import main
from lustral.core.files import canonical
from lustral.store.store import Store, checksum_of

Change = Callable[[dict[str, Any]], object]
COMMANDS = ("table", "compare", "gc", "verify")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("mine")
    return synthetic_store(
        tmp_path / "store", results=4, attacks=1, defences=2, seeds=1, data=("digits",), failures=1, details=True
    )


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text('name = "p"\nclean = [60]\n[[data]]\nname = "digits"\n[[attacks]]\nmethod = "badnets"\n')
    return path


def run_all(store: Store, plan: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[int, str]]:
    """Run every command on a store; return exit codes and what was said on standard error."""
    root, found = str(store.root), dict[str, tuple[int, str]]()
    lines: dict[str, tuple[object, ...]] = {
        "table": ("--old",),
        "compare": ("baeraser", "mesa"),
        "verify": ("--sample", 0, "--device", "cpu"),
        "gc": ("--failures", "--old", "--grace", 0),
    }
    for command in COMMANDS:
        capsys.readouterr()
        code = main(["bench", command, *map(str, lines[command]), "--store", root])
        found[command] = code, capsys.readouterr().err
    assert (plan.parent / "outside" / "precious").read_text() == "mine"
    return found


def check(found: dict[str, tuple[int, str]]) -> None:
    for command, (code, said) in found.items():
        assert code in (0, 1, 2), (command, code, said)
        assert "Traceback" not in said, (command, said)
        errors = [line for line in said.splitlines() if line.startswith("error:")]
        assert len(errors) == (code == 2), (command, said)
        assert all(len(line) < 3000 for line in errors)


def rewrite(store: Store, kind: Any, change: Change) -> None:
    """Change all records of a kind, with checksums that fit."""
    for record in [*store.records(kind)]:
        path = Path(store.path(kind, record["key"]))
        change(record)
        record["checksum"] = checksum_of(record)
        path.write_bytes(canonical(record))


def put(*place: str | int, value: Any) -> Change:
    """Return what sets a value somewhere in a record."""

    def change(record: dict[str, Any]) -> None:
        *outer, last = place
        where: Any = record
        for name in outer:
            where = where[name]
        where[last] = value

    return change


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


ODD: tuple[Any, ...] = (None, "x", -1, 10**30, [], {}, nested(80))
PLACES: tuple[tuple[str, ...], ...] = (
    ("key",),
    ("victim_key",),
    ("title",),
    ("facts",),
    ("facts", "attack"),
    ("spec",),
    ("spec", "kind"),
    ("spec", "versions"),
    ("spec", "victim"),
    ("metrics",),
    ("metrics", "before"),
    ("metrics", "before", "acc"),
    ("metrics", "before", "acc", "n"),
    ("metrics", "before", "acc", "hits"),
    ("cost",),
    ("made",),
    ("made", "threads"),
    ("made", "seconds"),
    ("files",),
    ("files", "detail.json"),
    ("folder",),
    ("class_names",),
)


@pytest.mark.slow  # 22 places, 7 values, 4 commands
@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_record_that_holds_something_else(
    place: tuple[str, ...], store: Store, plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in Path(store.root).rglob("*.json")}
    for value in ODD:
        for path, content in before.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        rewrite(store, "purifications", put(*place, value=value))
        check(run_all(store, plan, capsys))


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"key": NaN}',
        b"null",
        b"\xff\xfe",
        b"",
        b" " * (17 << 20),
        b'{"key": "../../x", "files": {}}',
        b'{"key": "x", "files": {"../../outside/precious": {}}, "folder": "y"}',
        b'{"key": "x", "files": {"a": {}}, "folder": ".."}',
        b'{"key": "x", "files": {"/etc/passwd": {}}, "folder": "y"}',
    ],
    ids=range(11),
)
@pytest.mark.parametrize("kind", ["purifications", "failures"])
def test_a_record_that_is_none(
    content: bytes, kind: Any, store: Store, plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for key in store.keys(kind):
        Path(store.path(kind, key)).write_bytes(content)
    found = run_all(store, plan, capsys)
    check(found)
    assert found["table"][0] == 2
    assert found["verify"][0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("part", ["detail.json", "recovered.png"])
@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"history": 3}', b'{"history": [[]], "verdict": "x"}', b"\x89PNG"]
)
def test_files_that_hold_something_else(
    part: str, content: bytes, store: Store, plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for record in [*defended(store)]:
        if part in record["files"]:
            Path(store.folder(record), part).write_bytes(content)
            record["files"][part] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            record["checksum"] = checksum_of(record)
            Path(store.path(f"{record['kind']}s", record["key"])).write_bytes(canonical(record))
    check(run_all(store, plan, capsys))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["record", "file", "folder", "files", "kind", "claim", "marker"])
@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
def test_links_pipes_and_devices(
    what: str, kind: str, store: Store, plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, outside = Path(store.root), plan.parent / "outside"
    record = next(record for record in defended(store) if "detail.json" in record["files"])
    path = {
        "record": Path(store.path(f"{record['kind']}s", record["key"])),
        "file": Path(store.folder(record), "detail.json"),
        "folder": Path(store.folder(record)),
        "files": root / "files" / record["key"][:2],
        "kind": root / f"{record['kind']}s" / record["key"][:2],
        "claim": root / "claims" / f"{record['key']}.json",
        "marker": root / "store.json",
    }[what]
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        path.rename(outside / what)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(outside / what if kind == "link" else "/dev/zero")
    before = sorted(outside.rglob("*"))
    check(run_all(store, plan, capsys))
    assert sorted(outside.rglob("*")) == before


def test_a_strangers_folder_name_removes_nothing_else(
    store: Store, plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A link in the place of a folder of files, and a record whose folder is a folder behind it."""
    (record, *_) = store.records("failures")
    folder = Path(store.root, "files", record["key"][:2])
    if folder.exists():
        folder.rename(folder.with_name("aside"))
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to(plan.parent)
    record |= {"folder": "outside", "files": {"precious": {"sha256": "0" * 64, "bytes": 4}}}
    record["checksum"] = checksum_of(record)
    Path(store.path("failures", record["key"])).write_bytes(canonical(record))
    check(run_all(store, plan, capsys))
