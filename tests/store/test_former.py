"""Stores of the first layout: their victims are read, their results and audits are counted and left out, never misread."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from bench.synthetic import synthetic_store
from lustral.cli import main
from lustral.core.files import canonical
from lustral.store.former import former_note
from lustral.store.store import LAYOUT, Kind, Store, StoreError, content_key
from lustral.store.waste import find_waste, remove_waste
from lustral.tables.rows import current_cells, load_cells

WEIGHTS = b"the weights of a purified model"


def place(root: Path, kind: str, record: dict[str, Any], files: dict[str, bytes]) -> str:
    """Write a record and its files as the first layout had them."""
    key = content_key(record["spec"])
    folder = f"{key}-0123456789ab"
    named = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()}
    for name, data in files.items():
        path = root / "files" / key[:2] / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    whole = {**record, "key": key, "files": named, **({"folder": folder} if files else {})}
    whole["checksum"] = hashlib.sha256(canonical(whole)).hexdigest()
    path = root / kind / key[:2] / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(canonical(whole))
    return key


@pytest.fixture
def former(tmp_path: Path) -> Store:
    """A store of the first layout: four victims, a result with weights, its audit, and a result that failed."""
    root = tmp_path / "store"
    store = synthetic_store(root, results=0, attacks=1, defences=1, seeds=2, data=("digits",), failures=0)
    victim = next(store.records("victims"))
    facts = {**victim["facts"], "defence": "bn_refresh", "defence_method": "bn_refresh", "defence_kind": "purifier"}
    facts |= {"defence_seed": 0, "clean_images": 60}
    common = {"schema": 1, "facts": facts, "victim_key": victim["key"], "made": victim["made"]}
    evaluation = victim["metrics"]["before"]
    spec = {
        "kind": "result",
        "victim": victim["spec"],
        "defence": {"method": "bn_refresh", "settings": {"passes": 5}},
        "clean_images": 60,
        "seed": 0,
        "versions": {"BNRefresh": 1},
    }
    result = {
        **common,
        "kind": "result",
        "status": "done",
        "title": f"bn_refresh against {victim['title']}",
        "spec": spec,
        "metrics": {"before": evaluation, "after": evaluation},
        "cost": {"seconds": 1.0, "image_passes": 60.0, "peak_memory_bytes": 0, "clean_images": 60},
    }
    place(root, "results", result, {"model.safetensors": WEIGHTS})
    audit = {"kind": "audit", "result": spec, "benign": victim["spec"], "settings": {}, "versions": {"Reactivation": 1}}
    place(root, "audits", {**common, "kind": "audit", "status": "done", "title": "an audit", "spec": audit}, {})
    failed = {**result, "spec": {**spec, "seed": 1}, "status": "failed", "error": "x", "traceback": "x"}
    place(root, "failures", failed, {})
    (root / "store.json").write_bytes(canonical({"layout": 1}))
    return store


def layout(store: Store) -> int:
    return int(json.loads(Path(store.root, "store.json").read_bytes())["layout"])


def test_victims_are_read_and_the_rest_is_counted(former: Store) -> None:
    store = Store(former.url).open(create=False)
    assert layout(store) == 1  # to look changes nothing
    note = former_note(store)
    assert note is not None
    assert note.startswith("Of an earlier version, left out: 1 result, 1 audit, 1 failure.")
    assert "gc --old" in note
    cells, left_out = current_cells(store)
    assert left_out == note
    assert (cells.num_rows, set(cells.column("kind").to_pylist())) == (4, {"victim"})
    assert load_cells(store).equals(cells)


def test_a_writer_marks_the_store_so_that_no_earlier_version_cleans_it_up(former: Store) -> None:
    for options in ({"create": True}, {"create": False, "write": True}):
        Path(former.root, "store.json").write_bytes(canonical({"layout": 1}))
        store = Store(former.url).open(**options)
        assert layout(store) == LAYOUT
        assert store.keys("victims") == former.keys("victims")


def test_former_results_go_when_asked_and_victims_stay(former: Store) -> None:
    store = Store(former.url).open(create=False)
    assert find_waste(store, failures=False, grace_seconds=-1).records == []
    assert find_waste(store, grace_seconds=-1).leftovers == []  # the weights are named by a record, though a former one
    kinds: list[Kind] = [kind for kind, _, _ in find_waste(store, old=True, grace_seconds=-1).records]
    assert sorted(kinds) == ["audits", "failures", "results"]
    remove_waste(store, find_waste(store, old=True, grace_seconds=-1))
    assert former_note(store) is None
    assert len(store.keys("victims")) == 4
    assert not [
        path for path in Path(store.root, "files").rglob("*") if path.is_file() and path.read_bytes() == WEIGHTS
    ]


@pytest.mark.parametrize("command", ["table", "verify", "gc"])
def test_commands_say_what_is_left_out(command: str, former: Store, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"table": [], "verify": ["--sample", "0", "--device", "cpu"], "gc": ["--dry-run"]}[command]
    assert main(["bench", command, "--store", former.url, *words]) == 0
    assert "left out: 1 result, 1 audit, 1 failure" in " ".join(capsys.readouterr().out.split())


def test_a_later_layout_is_refused_with_what_to_do(former: Store) -> None:
    Path(former.root, "store.json").write_bytes(canonical({"layout": LAYOUT + 1}))
    with pytest.raises(StoreError, match=f"this version reads 1 to {LAYOUT}: use the version of lustral that wrote it"):
        Store(former.url).open(create=True)
