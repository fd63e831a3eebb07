"""A plan or a store of a stranger's runs no code and opens no place of the machine, unless the command line allows it."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lustral.bench.cells import CellError
from lustral.bench.expansion import expand
from lustral.bench.plan import PlanError, parse_plan
from lustral.bench.sources import Sources
from lustral.bench.trust import Trust, TrustError
from lustral.bench.workbench import Workbench
from lustral.cli.entry import main
from lustral.store.store import Store

NET = """
from pathlib import Path
from lustral.vision.models import SmallCNN

with Path({mark!r}).open("a") as file:
    file.write("ran ")

def net(num_classes):
    return SmallCNN(num_classes, width=8)
"""
PLAN = """
name = "foreign"
clean = [60]
[trainer]
epochs = 6
[[data]]
name = "digits"
image_size = 8
arch = ["{arch}"]
[[attacks]]
method = "badnets"
[[defences]]
method = "bn_refresh"
"""


class World:
    """A folder with a Python file that leaves a mark, and a plan that names it."""

    def __init__(self, folder: Path, form: str) -> None:
        self.mark, self.plan, self.store = folder / "mark", folder / "plan.toml", folder / "store"
        (folder / "net.py").write_text(NET.format(mark=str(self.mark)))
        self.arch = form.format(file=folder / "net.py")
        self.plan.write_text(PLAN.format(arch=self.arch))

    def ran(self) -> bool:
        """Say whether the file ran since the last time."""
        found = self.mark.exists()
        self.mark.unlink(missing_ok=True)
        return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, "{file}:net")


def test_code_runs_only_where_it_is_allowed(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    store, plan = str(world.store), str(world.plan)
    assert main(["bench", "run", plan, "--store", store, "--quiet", "--device", "cpu", "--allow-code"]) == 0
    assert world.ran()
    (key,) = Store(store).open(create=False).keys("purifications")
    lines = {
        "run": [plan, "--store", store],
        "audit": [plan, "--store", store],
        "plan": [plan, "--store", store],
        "verify": ["--store", store],
        "gc": ["--store", store, "--keep", plan, "--dry-run"],
        "repeat": [key, "--store", store],
    }
    for name, words in lines.items():
        capsys.readouterr()
        assert main(["bench", name, *words, "--quiet", "--device", "cpu"]) == 2, name
        error = capsys.readouterr().err
        assert error.count("\n") == 1, name
        assert "is Python code" in error and "--allow-code" in error, name  # noqa: PT018
        assert not world.ran(), name
    for name in ("plan", "verify", "gc", "repeat"):
        assert main(["bench", name, *lines[name], "--quiet", "--device", "cpu", "--allow-code"]) == 0, name
        assert world.ran() or name == "gc"


@pytest.mark.parametrize("form", ["conditioned:pool@{file}:net", "conditioned:x\\ny@{file}:net", "{file}:net\\n"])
def test_no_disguise_helps(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path, form)
    assert main(["bench", "plan", str(world.plan)]) == 2
    assert "--allow-code" in capsys.readouterr().err or "\\n" in form
    assert not world.ran()


def plan_of(**changes: Any) -> Mapping[str, Any]:
    whole = {
        "name": "foreign",
        "clean": [60],
        "data": [{"name": "digits", "image_size": 8, "arch": ["small_cnn:width=4"]}],
        "attacks": [{"method": "badnets"}],
    }
    return {**whole, **changes}


@pytest.mark.parametrize("key", ["settings", "grid"])
def test_an_attacks_surrogate_is_no_way_in(world: World, key: str) -> None:
    recipe = {"arch": world.arch}
    attack = {"method": "low_frequency", key: {"surrogate": recipe if key == "settings" else [recipe]}}
    with pytest.raises(PlanError, match=r"low_frequency: the architecture .* is Python code.*--allow-code"):
        expand(parse_plan(plan_of(attacks=[attack])), Sources())
    assert expand(parse_plan(plan_of(attacks=[attack])), Sources(trust=Trust(code=True))).cells
    assert not world.ran()


def test_data_by_path_or_download_has_to_be_allowed(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.npz"
    os.mkfifo(fifo)
    for name in ("/", str(tmp_path), str(fifo), "~", "torchvision:CIFAR10", "digits/../digits", ""):
        with pytest.raises(PlanError, match=r"data .*--allow-paths"):
            expand(parse_plan(plan_of(data=[{"name": name}])), Sources())
    Trust(paths=True).require_data(str(tmp_path))
    Trust().require_data("digits")


def test_a_stored_specification_is_looked_at_before_anything_is_done(world: World) -> None:
    spec = json.loads(json.dumps({"kind": "victim", "data": {"name": "digits"}, "arch": world.arch, "start": None}))
    for hidden in (
        spec,
        {"kind": "purification", "victim": spec},
        {**spec, "arch": "small_cnn", "start": {"arch": world.arch}},
    ):
        with pytest.raises(TrustError, match="--allow-code"):
            Trust().require(hidden)
        Trust(code=True).require(hidden)
    with pytest.raises(TrustError, match="--allow-paths"):
        Trust(code=True).require({**spec, "data": {"name": "/"}})


def test_other_code_in_the_file_makes_another_victim(world: World, tmp_path: Path) -> None:
    sources = Sources(trust=Trust(code=True))
    plan = parse_plan(plan_of(data=[{"name": "digits", "image_size": 8, "arch": [world.arch, "small_cnn:width=4"]}]))
    first, named = expand(plan, sources).cells
    file = tmp_path / "net.py"
    assert first.spec["code"] == {world.arch: hashlib.sha256(file.read_bytes()).hexdigest()}
    assert "code" not in named.spec
    assert expand(plan, sources).cells[0].key == first.key
    file.write_text(file.read_text() + "# a note\n")
    second, still = expand(plan, sources).cells
    assert (second.key != first.key, still.key) == (True, named.key)
    bench = Workbench(store=Store(str(world.store)).open(create=True), device=torch.device("cpu"), sources=sources)
    with pytest.raises(CellError, match=r"net\.py:net has changed since this cell was named"):
        bench.do(first)
    file.unlink()
    with pytest.raises(CellError, match="cannot be read"):
        bench.do(second)
