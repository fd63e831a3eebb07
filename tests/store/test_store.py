"""The store under two writers, kills, damage and strangers' records: a piece is there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lustral.core.files import canonical
from lustral.store import claims as claims_module
from lustral.store.store import KINDS, LAYOUT, Store, StoreError, checksum_of, content_key

KEY = "ab" + 62 * "0"
LINUX = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="elsewhere only silence tells who is dead")
QUICK = settings(max_examples=50, deadline=None)
FILES = {"model.safetensors": b"weights", "trigger.png": b"picture"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store")).open(create=True)


@pytest.fixture(params=["local", "memory"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    url = str(tmp_path / "store") if request.param == "local" else f"memory://{secrets.token_hex(8)}/store"
    store = Store(url).open(create=True)
    yield store
    store.disk.fs.rm(store.root, recursive=True)


def spec_of(number: int) -> dict[str, Any]:
    return {"kind": "victim", "number": number}


def put(store: Store, number: int = 0, files: dict[str, bytes] | None = None, **fields: Any) -> tuple[str, bool]:
    key = content_key(spec_of(number))
    return key, store.put("victims", key, {"spec": spec_of(number), **fields}, FILES if files is None else files)


def all_files(store: Store) -> dict[str, bytes]:
    return {path: store.disk.fs.cat_file(path) for path in store.disk.fs.find(store.root)}


def rewrite(store: Store, key: str, **changes: Any) -> None:
    """Change a record as somebody would who wants it to look right."""
    record = {**store.read("victims", key), **changes}
    store.disk.fs.pipe_file(store.path("victims", key), canonical({**record, "checksum": checksum_of(record)}))


def start(code: str, *words: object) -> subprocess.Popen[str]:
    """Run Python code in another process; it says "ready" when it is."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


# Records and files


def test_what_goes_in_comes_out(any_store: Store) -> None:
    assert not any_store.has("victims", content_key(spec_of(0)))
    key, written = put(any_store, rates=[0.5, math.nan], name="Käse")
    assert written
    assert any_store.has("victims", key)
    assert not any_store.has("purifications", key)
    assert any_store.keys("victims") == {key}
    record = any_store.read("victims", key)
    assert (record["spec"], record["rates"], record["name"], record["key"]) == (spec_of(0), [0.5, None], "Käse", key)
    assert record["files"]["trigger.png"] == {"sha256": hashlib.sha256(b"picture").hexdigest(), "bytes": 7}
    assert {name: any_store.file(record, name) for name in record["files"]} == FILES
    with any_store.as_folder(record) as folder:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert not folder.exists()
    any_store.remove("victims", key)
    assert any_store.keys("victims") == set()
    assert [Path(path).name for path in all_files(any_store)] == ["store.json"]
    any_store.remove("victims", key)  # nothing happens
    with pytest.raises(KeyError, match=key):
        any_store.read("victims", key)


def test_records_come_sorted_and_need_no_files(any_store: Store) -> None:
    keys = [put(any_store, number, files={})[0] for number in range(5)]
    found = list(any_store.records("victims"))
    assert [record["key"] for record in found] == sorted(keys)
    assert all(record["files"] == {} and "folder" not in record for record in found)
    assert [json.loads(content)["key"] for _, content in any_store.contents("victims")] == sorted(keys)
    assert list(any_store.records("purifications")) == []


def test_another_store_object_sees_the_same(any_store: Store) -> None:
    other = Store(any_store.url).open(create=False)
    assert other.keys("victims") == set()
    key, _ = put(any_store)
    assert other.has("victims", key)
    assert other.read("victims", key) == any_store.read("victims", key)


def test_the_first_writer_wins_and_the_loser_leaves_nothing(any_store: Store) -> None:
    key, _ = put(any_store, result="first")
    before = all_files(any_store)
    assert put(any_store, files={"model.safetensors": b"other"}, result="second") == (key, False)
    assert all_files(any_store) == before
    assert any_store.read("victims", key)["result"] == "first"
    assert any_store.leftovers(grace_seconds=0) == []


def test_it_does_not_bring_torch_along() -> None:
    code = "import sys, lustral.store.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Names


def test_the_name_of_a_specification_does_not_change() -> None:
    """The name of everything that was ever stored hangs on these bytes."""
    spec = {"b": [1, 2.5, None, True], "a": "é"}
    assert canonical(spec) == '{"a":"é","b":[1,2.5,null,true]}'.encode()
    assert content_key(spec) == "0c187fb652afca8017b5ef38178eeef09a9dfef844316f80ba4207cdf1995ee5"
    assert content_key({"rate": 1}) != content_key({"rate": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        content_key({"rate": math.nan})


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
SPECS = st.dictionaries(st.text(max_size=5), PLAIN, max_size=4)


def backwards(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: backwards(item) for key, item in reversed(value.items())}
    return [backwards(item) for item in value] if isinstance(value, list) else value


@given(SPECS)
@QUICK
def test_a_name_does_not_depend_on_the_order_of_keys(spec: dict[str, Any]) -> None:
    assert content_key(backwards(spec)) == content_key(spec)


@given(SPECS)
@QUICK
def test_a_name_survives_json(spec: dict[str, Any]) -> None:
    assert content_key(json.loads(json.dumps(spec))) == content_key(spec)
    assert content_key(json.loads(canonical(spec))) == content_key(spec)


@given(SPECS, SPECS)
@QUICK
def test_different_specifications_have_different_names(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (content_key(one) == content_key(other)) == (canonical(one) == canonical(other))
    assert content_key({**one, "seed": 0}) != content_key({**one, "seed": 1})


@given(SPECS)
@QUICK
def test_any_record_reads_back_as_it_was(content: dict[str, Any]) -> None:
    store = Store(f"memory://{secrets.token_hex(8)}").open(create=True)
    store.put("purifications", KEY, {"content": content})
    assert store.read("purifications", KEY)["content"] == content
    store.disk.fs.rm(store.root, recursive=True)


# Damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.replace(b"0.5", b"0.6"),
        lambda content: content[:-20],
        lambda content: b"",
        lambda content: b"\xff" + content[1:],
        lambda content: b"null",
        lambda content: b"[1]",
        lambda content: b"{}",
        lambda content: b'{"key":"x","files":{}}',
    ],
)
def test_a_damaged_record_is_said_to_be(any_store: Store, damage: Any) -> None:
    key, _ = put(any_store, rate=0.5)
    path = any_store.path("victims", key)
    any_store.disk.fs.pipe_file(path, damage(any_store.disk.fs.cat_file(path)))
    with pytest.raises(StoreError, match=key):
        any_store.read("victims", key)
    with pytest.raises(StoreError, match=key):
        list(any_store.records("victims"))
    with pytest.raises(StoreError, match=key):  # its files might be taken for leftovers
        any_store.leftovers(grace_seconds=0)
    any_store.remove("victims", key)
    assert not any_store.has("victims", key)


def test_no_flipped_bit_goes_unseen(store: Store) -> None:
    """Not even in the last digit of a number, where it may stand for the same number."""
    key, _ = put(store, rates=[0.1, 0.30000000000000004, 1e-17], name="Käse")
    path = Path(store.path("victims", key))
    whole = path.read_bytes()
    assert json.loads(whole.replace(b"0.30000000000000004", b"0.30000000000000005"))["rates"][1] == 0.1 + 0.2
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(StoreError, match=key):
            store.read("victims", key)


def test_unchecked_records_must_still_be_records(store: Store) -> None:
    key, _ = put(store, rate=0.5)
    path = Path(store.path("victims", key))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"0.5", b"0.6"))
    assert next(store.records("victims", check=False))["rate"] == 0.6
    for broken in (whole[:-20], b"null"):
        path.write_bytes(broken)
        with pytest.raises(StoreError, match=key):
            list(store.records("victims", check=False))


def test_a_record_that_cannot_be_read_is_not_passed_over(any_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one that was removed meanwhile is; else a bad connection would make its files look like leftovers."""
    keys = sorted(put(any_store, number)[0] for number in range(3))
    path = any_store.path("victims", keys[1])
    cat_file, read = any_store.disk.fs.cat_file, any_store.disk.read

    for trouble in (FileNotFoundError(path), PermissionError(path), TimeoutError(path)):

        def fail(where: Any, trouble: OSError = trouble) -> bool:
            if str(where) == path:
                raise trouble
            return False

        with monkeypatch.context() as patch:
            patch.setattr(any_store.disk.fs, "cat_file", lambda where, **_: fail(where) or cat_file(where))
            patch.setattr(any_store.disk, "read", lambda where, **most: fail(where) or read(where, **most))
            if isinstance(trouble, FileNotFoundError):
                assert [record["key"] for record in any_store.records("victims")] == [keys[0], keys[2]]
                continue
            with pytest.raises(type(trouble)):
                list(any_store.records("victims"))
            with pytest.raises(type(trouble)):
                any_store.leftovers(grace_seconds=0)


def test_a_damaged_or_missing_file_is_said_to_be(any_store: Store) -> None:
    key, _ = put(any_store)
    record = any_store.read("victims", key)
    path = f"{any_store.folder(record)}/model.safetensors"
    for content in (b"weightz", b"weight", b""):
        any_store.disk.fs.pipe_file(path, content)
        with pytest.raises(StoreError, match=r"model\.safetensors has changed"):
            any_store.file(record, "model.safetensors")
    any_store.disk.fs.rm(path)
    with pytest.raises(StoreError, match=r"model\.safetensors is missing"), any_store.as_folder(record):
        pass
    with pytest.raises(StoreError, match=r"no file 'model\.onnx'; it has model\.safetensors, trigger\.png"):
        any_store.file(record, "model.onnx")


@pytest.mark.parametrize("name", ["../evil", "../../../evil", "/evil", "..", "", "deep/evil"])
def test_a_strangers_record_reaches_no_file_outside(store: Store, tmp_path: Path, name: str) -> None:
    """Checksums keep out accidents, not intent: anybody can make a record whose checksum is right."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("all of it")
    key, _ = put(store)
    rewrite(store, key, files={name: {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0}})
    with pytest.raises(StoreError, match="outside"):
        store.read("victims", key)
    rewrite_folder = {"folder": "../../../precious", "files": {}}
    store.disk.fs.rm(store.path("victims", key))
    put(store)
    rewrite(store, key, **rewrite_folder)
    with pytest.raises(StoreError, match="outside"):
        list(store.records("victims", check=False))
    store.remove("victims", key)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "all of it"


# Opening


def test_a_store_opens_again_and_only_where_there_is_one(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with pytest.raises(StoreError, match="no store"):
        Store(str(folder)).open(create=False)
    assert not folder.exists()
    Store(str(folder)).open(create=True)
    Store(str(folder)).open(create=True)
    Store(f"file://{folder}").open(create=False)
    (tmp_path / "empty").mkdir()
    Store(str(tmp_path / "empty")).open(create=True)


def test_no_folder_is_taken_for_a_store(tmp_path: Path) -> None:
    (tmp_path / "holidays.txt").write_text("photos")
    with pytest.raises(StoreError, match="not empty and no store"):
        Store(str(tmp_path)).open(create=True)
    with pytest.raises(StoreError, match="not empty and no store"):
        Store(str(tmp_path / "holidays.txt")).open(create=True)
    assert [path.name for path in tmp_path.iterdir()] == ["holidays.txt"]
    with pytest.raises(StoreError, match="cannot be opened"):
        Store("nosuchthing://bucket/folder")


@pytest.mark.parametrize("marker", [b"", b"[]", b'{"layout"', b"{}", b"\xff"])
def test_an_unreadable_marker(store: Store, marker: bytes) -> None:
    Path(store.root, "store.json").write_bytes(marker)
    with pytest.raises(StoreError, match=r"store\.json is not readable"):
        store.open(create=True)


def test_another_layout_is_refused(any_store: Store) -> None:
    any_store.disk.fs.pipe_file(f"{any_store.root}/store.json", canonical({"layout": LAYOUT + 1}))
    with pytest.raises(StoreError, match=f"layout {LAYOUT + 1}; this version reads 1 to {LAYOUT}: use the version"):
        any_store.open(create=False)


def test_two_processes_may_make_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second opens it at the worst moment: while the first has written its marker and not yet named it."""
    link, others = os.link, []

    def wait(source: Any, target: Any) -> None:
        monkeypatch.setattr(os, "link", link)
        others.append(Store(str(tmp_path / "new")).open(create=True))
        link(source, target)

    monkeypatch.setattr(os, "link", wait)
    Store(str(tmp_path / "new")).open(create=True)
    assert len(others) == 1


def test_a_store_whose_making_was_killed_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".0123456789abcdef.tmp").write_bytes(b'{"lay')
    store = Store(str(tmp_path / "new")).open(create=True)
    assert [Path(path).name for path in store.leftovers(grace_seconds=0)] == [".0123456789abcdef.tmp"]


# Partial writes


def test_a_record_is_invisible_until_it_is_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    link, seen = os.link, []

    def look(source: Any, target: Any) -> None:
        other = Store(store.url)
        seen.append((other.keys("victims"), other.has("victims", content_key(spec_of(0))), [*other.records("victims")]))
        link(source, target)

    monkeypatch.setattr(os, "link", look)
    put(store)
    assert seen == [(set(), False, [])]


def test_file_systems_without_hard_links(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    key, written = put(store, result="first")
    assert written
    assert not put(store, result="second")[1]
    assert store.read("victims", key)["result"] == "first"
    with store.claim(KEY) as mine, store.claim(KEY) as other:
        assert (mine, other) == (True, False)
    assert store.leftovers(grace_seconds=0) == []


def test_a_full_disk_writes_no_record(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for place in ("lustral.core.files.os.fsync", "lustral.store.disk.os.link"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(OSError, match="No space"):
                put(store)
        assert store.keys("victims") == set()
        assert not [path for path in all_files(store) if path.endswith(".tmp")]
    assert put(store)[1]


KILLED = """
import os, signal, sys
import lustral.store.store as module
store = module.Store(sys.argv[1])
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "before the second file":
    write, count = store.disk.write_file, []
    store.disk.write_file = lambda *words: die() if count else (count.append(1), write(*words))
elif sys.argv[2] == "before the record":
    store.disk.write_once = die
elif sys.argv[2] == "before its name":
    os.link = die
print("ready", flush=True)
store.put("victims", sys.argv[3], {"spec": {}}, {"a": b"1", "b": b"2"})
"""


@pytest.mark.parametrize("moment", ["before the second file", "before the record", "before its name"])
def test_what_a_killed_writer_leaves_is_found(store: Store, moment: str) -> None:
    for number in range(3):
        put(store, number)
    whole = all_files(store)
    process = start(KILLED, store.root, moment, KEY)
    assert process.wait() == -9
    process.communicate()
    assert not store.has("victims", KEY)
    assert len(store.keys("victims")) == 3
    assert len([*store.records("victims")]) == 3
    assert all_files(store) != whole
    assert store.leftovers(grace_seconds=3600) == []
    found = store.leftovers(grace_seconds=0)
    assert found
    for path in found:
        store.discard(path)
    assert all_files(store) == whole
    assert store.put("victims", KEY, {"spec": {}}, {"a": b"1"})


def test_leftovers_of_a_remote_store(any_store: Store) -> None:
    put(any_store)
    whole = all_files(any_store)
    orphan = f"{any_store.root}/files/ab/{KEY}-0123456789ab"
    any_store.disk.fs.makedirs(orphan, exist_ok=True)
    any_store.disk.fs.pipe_file(f"{orphan}/model.safetensors", b"half")
    assert any_store.leftovers(grace_seconds=3600) == []
    assert any_store.leftovers(grace_seconds=0) == [orphan]
    any_store.discard(orphan)
    any_store.discard(orphan)  # somebody else was faster
    assert all_files(any_store) == whole


# Claims


def claims_of(store: Store) -> list[str]:
    return [path for path in all_files(store) if "/claims/" in path]


def test_a_claim_is_exclusive_and_ends_with_its_block(any_store: Store) -> None:
    other = Store(any_store.url)
    with any_store.claim(KEY) as mine:
        assert mine
        for store in (any_store, other):
            with store.claim(KEY) as again:
                assert not again
        with other.claim(KEY[::-1]) as another:
            assert another
    with other.claim(KEY) as mine:
        assert mine
    with pytest.raises(RuntimeError, match="boom"), any_store.claim(KEY):
        raise RuntimeError("boom")
    with other.claim(KEY) as mine:
        assert mine
    assert claims_of(any_store) == []


HOLDER = """
import sys, time
from lustral.store.store import Store
with Store(sys.argv[1]).claim(sys.argv[2]) as mine:
    assert mine
    print("ready", flush=True)
    time.sleep(60)
"""


@LINUX
def test_the_claim_of_a_killed_process_is_taken_over(store: Store) -> None:
    holder = start(HOLDER, store.root, KEY)
    try:
        for _ in range(3):
            with store.claim(KEY) as mine:
                assert not mine
        assert store.leftovers(grace_seconds=0) == []  # it is at work
    finally:
        holder.kill()
    while "Z" not in Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2]:
        time.sleep(0.01)
    with store.claim(KEY) as mine:  # nobody has buried it yet
        assert mine
    holder.communicate()
    assert claims_of(store) == []


@LINUX
def test_the_claim_of_a_killed_process_is_a_leftover(store: Store) -> None:
    holder = start(HOLDER, store.root, KEY)
    end(holder)
    assert store.leftovers(grace_seconds=0) == claims_of(store) != []


@LINUX
def test_a_new_process_with_an_old_number_is_another(store: Store) -> None:
    with store.claim(KEY):
        claim = json.loads(Path(store.root, "claims", f"{KEY}.json").read_bytes())
    assert claim["pid"] == os.getpid()
    forge(store, {**claim, "started": str(int(claim["started"]) - 1)})
    with store.claim(KEY) as mine:
        assert mine


def forge(store: Store, claim: Any) -> str:
    path = f"{store.root}/claims/{KEY}.json"
    store.disk.fs.makedirs(f"{store.root}/claims", exist_ok=True)
    store.disk.fs.pipe_file(path, claim if isinstance(claim, bytes) else canonical(claim))
    return path


ELSEWHERE = {"host": "elsewhere", "pid": 1, "started": "1", "token": "theirs", "beat": 0}


@pytest.mark.parametrize("claim", [ELSEWHERE, {**ELSEWHERE, "host": ""}, b"", b"{", b"[]", b"null"])
def test_the_claim_of_another_machine_ends_with_silence(
    any_store: Store, claim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(claims_module, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    forge(any_store, claim)

    def is_mine(after: float) -> bool:
        now[0] += after
        with any_store.claim(KEY) as mine:
            return mine

    assert not is_mine(0)
    assert not is_mine(59)
    if isinstance(claim, dict):
        forge(any_store, {**claim, "beat": 1})
        assert not is_mine(59)  # it is alive: the minute begins anew
        assert not is_mine(59)
    assert is_mine(2)
    assert claims_of(any_store) == []


@LINUX
def test_old_claims_of_other_machines_are_leftovers(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = forge(store, ELSEWHERE)
    assert store.leftovers(grace_seconds=0) == []
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    monkeypatch.setattr(claims_module, "SILENCE_SECONDS", 0.01)
    assert store.leftovers(grace_seconds=0) == [path]
    with store.claim(KEY[::-1]):
        mine = Path(store.root, "claims", f"{KEY[::-1]}.json")
        os.utime(mine, (time.time() - 3600, time.time() - 3600))
        assert store.leftovers(grace_seconds=0) == [path]  # a process here that slept, but lives


def test_a_claim_beats_and_survives_a_bad_moment(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "BEAT_SECONDS", 0.01)
    write, troubles = store.disk.write_file, [OSError(errno.EIO, "the network is away"), OSError(errno.ENOSPC, "full")]

    def trouble(path: str, content: bytes) -> None:
        if troubles:
            raise troubles.pop()
        write(path, content)

    monkeypatch.setattr(store.disk, "write_file", trouble)
    with store.claim(KEY):
        path = Path(store.root, "claims", f"{KEY}.json")
        patience = time.monotonic() + 10
        while json.loads(path.read_bytes())["beat"] < 4:
            assert time.monotonic() < patience, "the heart has stopped"
            time.sleep(0.01)
    assert not troubles
    assert claims_of(store) == []


def test_who_has_lost_his_claim_leaves_the_new_one_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "BEAT_SECONDS", 0.01)
    with store.claim(KEY):
        path = forge(store, ELSEWHERE)
        time.sleep(0.1)
    assert json.loads(Path(path).read_bytes())["token"] == "theirs"


def a_dead_claim(store: Store) -> dict[str, Any]:
    """Return a claim whose process has ended."""
    holder = start(HOLDER, store.root, KEY)
    end(holder)
    claim: dict[str, Any] = json.loads(Path(store.root, "claims", f"{KEY}.json").read_bytes())
    return claim


@LINUX
def test_a_claim_is_never_free_while_it_is_taken_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two find a claim dead; the quick one has it before the slow one acts; a third tries at every step of the slow one."""
    a_dead_claim(store)
    slow, third = Store(store.url), Store(store.url)
    intrusions: list[bool] = []
    is_dead = slow.claims._is_dead

    with ExitStack() as held:

        def find_dead(path: str, content: bytes) -> bool:
            dead = is_dead(path, content)
            if dead and not intrusions:
                assert held.enter_context(store.claim(KEY))
                for name in ("content", "write_once", "write_file", "discard"):
                    monkeypatch.setattr(slow.disk, name, intruded(getattr(slow.disk, name)))
            return dead

        def intruded(step: Any) -> Any:
            def act(*words: Any) -> Any:
                with third.claim(KEY) as mine:
                    intrusions.append(mine)
                done = step(*words)
                with third.claim(KEY) as mine:
                    intrusions.append(mine)
                return done

            return act

        monkeypatch.setattr(slow.claims, "_is_dead", find_dead)
        with slow.claim(KEY) as mine:
            assert not mine
        assert intrusions
        assert not any(intrusions)
    assert claims_of(store) == []


TAKER = """
import os, sys
from lustral.store.store import Store
store = Store(sys.argv[1])
store.disk.write_file = lambda *_: os._exit(9)
print("ready", flush=True)
with store.claim(sys.argv[2]):
    pass
"""


@LINUX
def test_a_takeover_that_was_killed_holds_nobody_up(store: Store) -> None:
    a_dead_claim(store)
    taker = start(TAKER, store.root, KEY)
    taker.communicate()
    assert taker.returncode == 9
    tries: list[bool] = []
    while True not in tries and len(tries) < 3:
        with store.claim(KEY) as mine:
            tries.append(mine)
    assert True in tries
    assert claims_of(store) == []


RACER = """
import contextlib, random, sys
from lustral.store.store import Store
store, keys = Store(sys.argv[1]), [f"{number:064x}" for number in range(int(sys.argv[2]))]
random.Random(sys.argv[3]).shuffle(keys)
print("ready", flush=True)
sys.stdin.readline()
with contextlib.ExitStack() as held:
    for key in keys:
        if held.enter_context(store.claim(key)):
            print(key)
    print("end", flush=True)
    sys.stdin.readline()
"""


@LINUX
def test_racing_processes_never_both_get_a_claim(store: Store) -> None:
    """Of 60 claims half are left by a dead process, so that being first and taking over are both raced for."""
    count, dead = 60, a_dead_claim(store)
    os.unlink(f"{store.root}/claims/{KEY}.json")
    for number in range(0, count, 2):
        Path(store.root, "claims", f"{number:064x}.json").write_bytes(canonical({**dead, "token": str(number)}))
    racers = [start(RACER, store.root, count, number // 2) for number in range(3)]  # two of them in one order
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    got: Counter[str] = Counter()
    for racer in racers:
        assert racer.stdout is not None
        got.update(line.strip() for line in takewhile(lambda line: line != "end\n", racer.stdout))
    assert len(got) == count
    assert set(got.values()) == {1}
    for racer in racers:
        racer.communicate("\n")
        assert racer.returncode == 0
    assert claims_of(store) == []
    assert all(not store.keys(kind) for kind in KINDS)


def orphan(store: Store, key: str = KEY, age: float = 0.0) -> str:
    """Leave files of a piece in the store, without a record."""
    folder = f"{store.root}/files/{key[:2]}/{key}-0123456789ab"
    store.disk.write_file(f"{folder}/model.safetensors", b"half")
    os.utime(f"{folder}/model.safetensors", (time.time() - age, time.time() - age))
    return folder


@LINUX
@pytest.mark.parametrize("jump", [-1e9, -7200.0, 7200.0, 1e9])
def test_a_clock_that_jumps_does_not_matter(store: Store, jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in flight stays, and what is old by the store's own clock goes, whatever our clock says."""
    young, old = orphan(store), orphan(store, KEY[::-1], age=7200)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    assert store.leftovers(grace_seconds=3600) == [old]
    with store.claim(KEY):
        assert store.leftovers(grace_seconds=0) == []
    assert store.leftovers(grace_seconds=0) == sorted([young, old])


@LINUX
@pytest.mark.parametrize("shift", [-1e8, 1e8])
def test_what_a_claim_covers_stays_though_the_stores_clock_jumps(store: Store, shift: float) -> None:
    with store.claim(KEY):
        orphan(store, age=-shift)
        for path in claims_of(store):
            os.utime(path, (time.time() + shift, time.time() + shift))
        assert store.leftovers(grace_seconds=0) == []


def test_an_asset_in_flight_has_no_claim_of_its_own_and_stays(store: Store) -> None:
    with store.claim(KEY):  # of the cell that builds the asset
        orphan(store, KEY[::-1], age=1e6)
        assert store.leftovers(grace_seconds=3600) == []


def test_files_from_the_future_stay(store: Store) -> None:
    orphan(store, age=-1e6)
    assert store.leftovers(grace_seconds=0) == []


def test_a_claim_that_beats_is_alive_however_old_it_looks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = forge(store, ELSEWHERE)
    orphan(store, age=1e6)
    os.utime(path, (time.time() - 1e6, time.time() - 1e6))  # the server's clock has jumped

    def beat(_: float) -> None:
        forge(store, {**ELSEWHERE, "beat": 1})

    monkeypatch.setattr(claims_module, "time", SimpleNamespace(sleep=beat, monotonic=time.monotonic))
    assert store.leftovers(grace_seconds=3600) == []
    monkeypatch.setattr(claims_module, "time", SimpleNamespace(sleep=lambda _: None, monotonic=time.monotonic))
    os.utime(path, (time.time() - 1e6, time.time() - 1e6))
    assert len(store.leftovers(grace_seconds=3600)) == 2
