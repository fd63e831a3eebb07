"""``lustral bench run, audit, plan, verify, gc, repeat``: what they return, print and refuse."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from described import require_described
from lustral.bench.kinds import KINDS, Audits
from lustral.cli import main
from lustral.cli.bench_commands import absolute, read_shard, remaining
from lustral.cli.bench_console import ProgressBoard
from lustral.cli.console import Screen
from lustral.core.files import canonical
from lustral.core.records import Progress
from lustral.store.store import Store, checksum_of
from lustral.training import Trainer
from lustral.vision.evaluation import Reactivation
from lustral.vision.purifiers import BNRefresh, FineTuning

PLAN = """
name = "tiny"
clean = [60]
trainer = { epochs = 6 }

[[data]]
name = "digits"
image_size = 16
arch = ["small_cnn:width=8"]

[[attacks]]
method = "badnets"
target_labels = [3]

[[attacks]]
method = "none"

[[defences]]
method = "fine_tuning"
settings = { least_steps = 4, trainer = { epochs = 1 } }

[[defences]]
method = "bn_refresh"

[run]
threads = 1
"""
COMMANDS = ("run", "audit", "plan", "table", "compare", "site", "verify", "gc", "repeat")


def bench(*words: object) -> int:
    return main(["bench", *map(str, words)])


@dataclass(frozen=True)
class Ran:
    """A finished run: the exit code, what it printed, and the store."""

    code: int
    out: str
    err: str
    store: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "plan.toml").write_text(PLAN)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = bench("run", folder / "plan.toml", "--store", folder / "store", "--json", "--device", "cpu")
    return Ran(code, out.getvalue(), err.getvalue(), folder / "store")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    (tmp_path / "plan.toml").write_text(PLAN)
    return tmp_path / "plan.toml"


@pytest.fixture
def store(ran: Ran, tmp_path: Path) -> Path:
    shutil.copytree(ran.store, tmp_path / "store")
    return tmp_path / "store"


def changed(plan: Path, old: str, new: str, name: str = "changed.toml") -> Path:
    assert old in PLAN
    path = plan.with_name(name)
    path.write_text(PLAN.replace(old, new))
    return path


def answer_of(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> dict[str, Any]:
    """Run with --json; standard output must be one JSON object and nothing else."""
    capsys.readouterr()
    assert bench(*words, "--json", "--device", "cpu") == code, capsys.readouterr().err
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    require_described(f"bench {words[0]}", answer)
    return answer


def text_of(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    capsys.readouterr()
    assert bench(*words, "--device", "cpu") == code, capsys.readouterr().err
    return capsys.readouterr().out


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must fail with exit code 2, one line on standard error, and nothing on standard output."""
    capsys.readouterr()
    code = bench(*words)
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), (code, out, err)
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


def counts(answer: dict[str, Any]) -> dict[str, int]:
    return {name: answer[name] for name in ("computed", "present", "failed", "blocked") if answer[name]}


def open_store(folder: Path) -> Store:
    return Store(str(folder)).open(create=False)


# Run


def test_a_run_from_nothing(ran: Ran) -> None:
    assert ran.code == 0
    answer = json.loads(ran.out)
    assert (answer["cells"], counts(answer), answer["store"]) == (6, {"computed": 6}, str(ran.store))
    lines = ran.err.splitlines()
    assert len(lines) == 6
    assert all(f" computed {number}/6 " in line for number, line in enumerate(lines, 1))
    assert " badnets on digits, seed 0 in " in lines[0]
    store = open_store(ran.store)
    assert (len(store.keys("victims")), len(store.keys("purifications")), store.keys("failures")) == (2, 4, set())
    assert not list((ran.store / "claims").glob("*"))


def test_the_same_line_again_computes_nothing(plan: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    assert counts(answer_of(capsys, "run", plan, "--store", store)) == {"present": 6}
    assert "0 cells computed, 6 were there, 0 failed" in text_of(capsys, "run", plan, "--store", store)
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()} == before


def test_a_larger_plan_computes_what_is_missing(plan: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    larger = changed(plan, "clean = [60]", "clean = [60, 70]")
    assert counts(answer_of(capsys, "run", larger, "--store", store)) == {"computed": 4, "present": 6}


def test_several_plans_are_one_run(plan: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    larger = changed(plan, "clean = [60]", "clean = [60, 70]")
    larger.write_text(larger.read_text().replace('name = "tiny"', 'name = "larger"'))
    shown = answer_of(capsys, "plan", plan, larger, "--store", store)
    assert [cell["state"] for cell in shown["cells"]].count("to do") == 4
    assert "Plan larger + tiny" in text_of(capsys, "plan", larger, plan)
    chosen = ("--where", "clean_images=70", "defence=bn_refresh")
    assert counts(answer_of(capsys, "run", plan, larger, "--store", store, *chosen)) == {"computed": 2, "present": 2}
    assert counts(answer_of(capsys, "run", plan, larger, "--store", store)) == {"computed": 2, "present": 8}


def test_plans_that_cannot_be_one_run(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = changed(plan, "threads = 1", "threads = 2")
    assert "equal [run] tables" in error_of(capsys, "run", plan, other, "--store", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert "at least one plan file" in error_of(capsys, "plan", "--where", "seed=0")


def test_a_run_that_goes_on(plan: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = open_store(store)
    for key in list(opened.keys("purifications"))[:2]:
        opened.remove("purifications", key)
    assert counts(answer_of(capsys, "run", plan, "--store", store)) == {"computed": 2, "present": 4}
    capsys.readouterr()
    assert bench("run", plan, "--store", store, "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_a_store_in_memory_and_no_purified_models(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lean = changed(plan, "threads = 1", "threads = 1\nkeep_models = false")
    url = f"memory://cli/{plan.parent.name}"
    assert counts(answer_of(capsys, "run", lean, "--store", url)) == {"computed": 6}
    report = answer_of(capsys, "verify", "--store", url, "--plan", lean, "--sample", 9)
    assert (report["faults"], report["missing"]) == ([], [])
    assert len(report["measured"]) == 2  # the victims
    assert answer_of(capsys, "gc", "--store", url, "--grace", 0)["leftovers"] == []


def test_shards_add_up(plan: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in ("1/2", "2/2"):
        answer = answer_of(capsys, "run", plan, "--store", store, "--shard", shard)
        assert (answer["cells"], counts(answer)) == (3, {"present": 3})
    assert answer_of(capsys, "run", plan, "--store", store, "--shard", "3/3")["cells"] == 0


@pytest.mark.parametrize("shard", ["3/2", "0/2", "1/0", "2", "a/b", "1/2/3", "-1/2", "1.0/2", "/", "²/3"])
def test_a_shard_that_cannot_be(plan: Path, tmp_path: Path, shard: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "run", plan, "--store", tmp_path / "new", f"--shard={shard}")
    assert f"--shard {shard!r}: expected I/N with 1 <= I <= N" in message
    assert not (tmp_path / "new").exists()


def test_a_failing_defence_is_a_record_and_not_the_end(
    plan: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_store(store)
    for key in opened.keys("purifications"):
        opened.remove("purifications", key)

    def no_such_luck(self: BNRefresh, *_: Any, **__: Any) -> None:
        raise RuntimeError("the weights [/are] gone")

    with monkeypatch.context() as patch:
        patch.setattr(BNRefresh, "purify", no_such_luck)
        answer = answer_of(capsys, "run", plan, "--store", store, code=1)
        assert counts(answer) == {"computed": 2, "present": 2, "failed": 2}
        failures = list(opened.records("failures"))
        assert len(failures) == 2
        for failure in failures:
            assert failure["error"] == "RuntimeError: the weights [/are] gone"
            assert 'raise RuntimeError("the weights [/are] gone")' in failure["traceback"]
            assert "in no_such_luck" in failure["traceback"]
            assert failure["facts"]["defence"] == "bn_refresh"
        assert {record["facts"]["defence_method"] for record in opened.records("purifications")} == {"fine_tuning"}

        assert bench("run", plan, "--store", store, "--retry-failed") == 1
        captured = capsys.readouterr()
        assert captured.err.count("RuntimeError: the weights [/are] gone") == 2
        assert "2 failed" in captured.out
        assert f"--retry-failed tries them again: {store}/failures" in captured.out
    # it would work now, but nobody said that it should be tried
    assert counts(answer_of(capsys, "run", plan, "--store", store, code=1)) == {"present": 4, "failed": 2}
    report = answer_of(capsys, "verify", "--store", store, "--plan", plan, "--sample", 0, code=1)
    assert (report["faults"], report["missing"], len(report["failed"])) == ([], [], 2)
    state = answer_of(capsys, "plan", plan, "--store", store)
    assert (state["done"], state["failed"], state["left"]) == (4, 2, 0)
    assert counts(answer_of(capsys, "run", plan, "--store", store, "--retry-failed")) == {"computed": 2, "present": 4}
    assert opened.keys("failures") == set()
    assert answer_of(capsys, "verify", "--store", store, "--plan", plan, "--sample", 0)["failed"] == []


def test_results_of_a_failed_victim_are_not_run(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*_: Any, **__: Any) -> None:
        raise MemoryError("17 exabytes")

    monkeypatch.setattr("lustral.bench.kinds.victims.implant", too_large)
    answer = answer_of(capsys, "run", plan, "--store", tmp_path / "new", code=1)
    assert counts(answer) == {"failed": 2, "blocked": 4}
    assert "4 not run because what they need failed" in text_of(
        capsys, "run", plan, "--store", tmp_path / "new", code=1
    )


def test_an_interruption_says_how_far_it_got(
    plan: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_store(store)
    for key in opened.keys("purifications"):
        opened.remove("purifications", key)

    def interrupt(self: FineTuning, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FineTuning, "purify", interrupt)
        assert bench("run", plan, "--store", store) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "2 of 6 cells are settled; the same command goes on." in err
    assert not list((store / "claims").glob("*"))
    assert counts(answer_of(capsys, "run", plan, "--store", store)) == {"computed": 4, "present": 2}


# Plan


def test_a_plan_is_shown_with_what_is_done(plan: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = answer_of(capsys, "plan", plan)
    assert (answer["done"], answer["left"], answer["unknown"], answer["excluded"]) == (0, 6, 6, {})
    assert {cell["state"] for cell in answer["cells"]} == {"to do"}
    assert "unknown; none of the 6 cells has a precedent" in text_of(capsys, "plan", plan)
    answer = answer_of(capsys, "plan", plan, "--store", store)
    assert (answer["done"], answer["left"], answer["seconds"]) == (6, 0, 0.0)
    keys = {key for kind in ("victims", "purifications") for key in open_store(store).keys(kind)}
    assert {cell["key"] for cell in answer["cells"]} == keys
    shown = text_of(capsys, "plan", plan, "--store", store, "--cells")
    assert "Remaining time: nothing is left to do." in shown
    assert all(cell["key"][:12] in shown for cell in answer["cells"])
    larger = changed(plan, 'name = "tiny"', 'name = "tiny"\nseeds = [0, 1]')
    part = text_of(capsys, "plan", plan, "--cells", "--where", "defence=bn_refresh", "attack=benign")
    assert "bn_refresh against benign" in part
    assert "fine_tuning" not in part
    assert "badnets" not in part
    assert bench("plan", plan, "--where", "defence=bn_refresh", "--where", "attack=benign") == 2
    assert "--where once" in capsys.readouterr().err
    answer = answer_of(capsys, "plan", larger, "--store", store)
    assert (answer["done"], answer["left"], answer["unknown"]) == (6, 6, 0)
    assert answer["seconds"] > 0


def test_what_a_plan_leaves_out_is_said(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lean = changed(plan, "[run]", '[[exclude]]\nreason = "too [dear] for us"\ndefence = "bn_refresh"\n[run]')
    assert answer_of(capsys, "plan", lean)["excluded"] == {"too [dear] for us": 2}
    assert "2 left out: too [dear] for us" in text_of(capsys, "plan", lean)


def test_brackets_in_names_are_no_markup(plan: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = changed(plan, 'method = "bn_refresh"', 'method = "bn_refresh"\nlabel = "BN [x] [/y]"')
    assert "BN [x] [/y] against benign" in " ".join(text_of(capsys, "plan", named, "--cells").split())
    opened = open_store(store)
    for key in opened.keys("purifications"):
        opened.remove("purifications", key)
    capsys.readouterr()
    assert bench("run", named, "--store", store) == 0
    assert "BN [x] [/y] against benign" in capsys.readouterr().err
    empty = changed(plan, 'method = "bn_refresh"', 'method = "bn_refresh"\nsettings.passes = 1', "other.toml")
    assert "BN [x] [/y] against benign" in text_of(capsys, "gc", "--store", store, "--keep", empty, "--dry-run")
    (record,) = (r for r in opened.records("purifications") if r["title"].startswith("BN [x] [/y] against benign"))
    Path(opened.folder(record), "detail.json").unlink()
    record["metrics"]["after"]["acc"]["value"] = 0.0
    Path(opened.path("purifications", record["key"])).write_bytes(
        canonical({**record, "checksum": checksum_of(record)})
    )
    assert f"fault {opened.folder(record)}/detail.json is missing" in text_of(
        capsys, "verify", "--store", store, code=1
    )


def test_all_complaints_about_a_plan_are_one_line(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = changed(plan, 'method = "badnets"', 'method = "badnet"')
    wrong.write_text(wrong.read_text().replace("least_steps", "least_stps").replace("[60]", "[6000]"))
    for words in (("run", wrong, "--store", tmp_path / "new"), ("plan", wrong)):
        message = error_of(capsys, *words)
        assert "attacks[1] badnet: unknown attack; did you mean 'badnets'?; " in message
        assert "unknown setting 'least_stps'; did you mean 'least_steps'?" in message
        assert "defence bn_refresh on digits: a clean budget of 6000" in message
    assert not (tmp_path / "new").exists()
    wrong.write_text("name = ")
    assert "changed.toml is not a readable TOML file" in error_of(capsys, "plan", wrong)
    wrong.write_text(PLAN + "treads = 2\n")
    assert "changed.toml: unknown key 'run.treads'; did you mean 'threads'?" in error_of(capsys, "plan", wrong)
    assert "none.toml: No such file" in error_of(capsys, "plan", tmp_path / "none.toml")
    capsys.readouterr()
    assert bench("plan", wrong, "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


# Verify


def test_verify(plan: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = answer_of(capsys, "verify", "--store", store, "--plan", plan, "--sample", 2)
    assert (report["faults"], report["missing"], report["failed"], len(report["measured"])) == ([], [], [], 2)
    expected = {"victims": 2, "scans": 0, "purifications": 4, "siftings": 0, "trainings": 0, "audits": 0}
    generators = {"generators": 0, "pair_siftings": 0, "generator_scans": 0, "generator_erasures": 0}
    assert report["records"] == {**expected, **generators, "assets": 0, "failures": 0}
    shown = text_of(capsys, "verify", "--store", store, "--sample", 0)
    looked = "Looked at 2 victims, 0 scans, 4 purifications, 0 siftings, 0 trainings, 0 audits, 0 generators, "
    looked += "0 pair_siftings, 0 generator_scans, 0 generator_erasures, 0 assets, 0 failures and 16 files"
    assert f"{looked}; measured 0 models again." in shown
    assert "No fault." in shown


def test_verify_finds_faults(plan: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = open_store(store)
    first, second, *_ = sorted(opened.keys("purifications"))
    path = Path(opened.path("purifications", first))
    path.write_bytes(path.read_bytes().replace(b'"seed":0', b'"seed":1', 1))
    report = answer_of(capsys, "verify", "--store", store, "--sample", 0, code=1)
    (fault,) = report["faults"]
    assert f"{first}.json has changed since it was written" in fault
    assert "1 faults." in text_of(capsys, "verify", "--store", store, "--sample", 0, code=1)
    opened.remove("purifications", first)
    title = opened.read("purifications", second)["title"]
    opened.remove("purifications", second)
    assert answer_of(capsys, "verify", "--store", store, "--sample", 0)["faults"] == []
    shown = text_of(capsys, "verify", "--store", store, "--plan", plan, "--sample", 0, code=1)
    assert f"missing: {title}" in shown
    assert "2 faults." in shown


def test_verify_measures_with_the_seed_it_is_given(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = [
        answer_of(capsys, "verify", "--store", store, "--sample", 1, "--seed", seed)["measured"] for seed in (3, 3)
    ]
    assert drawn[0] == drawn[1]
    assert "sample of 0 models or more; got -1" in error_of(
        capsys, "verify", "--store", store, "--sample=-1", "--quiet"
    )


# Clean-up


def test_gc_says_and_removes(plan: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benign = changed(plan, '[[attacks]]\nmethod = "badnets"\ntarget_labels = [3]\n', "")
    orphan = store / "files" / "ab" / ("ab" + "0" * 62 + "-0123456789ab")
    orphan.mkdir(parents=True)
    (orphan / "model.safetensors").write_bytes(b"half")
    before = sorted(store.rglob("*"))
    line = ("gc", "--store", store, "--keep", benign, "--grace", 0)
    would = answer_of(capsys, *line, "--dry-run")
    assert would["dry_run"] is True
    assert would["leftovers"] == [str(orphan)]
    assert sorted(kind for kind, _, _ in would["records"]) == ["purifications", "purifications", "victims"]
    shown = text_of(capsys, *line, "--dry-run")
    assert "3 records and 1 leftovers would go." in shown
    assert str(orphan) in shown
    assert sorted(store.rglob("*")) == before
    assert answer_of(capsys, "gc", "--store", store)["leftovers"] == []  # it is too young
    assert answer_of(capsys, "gc", "--store", store, "--keep", plan, benign)["records"] == []
    assert sorted(store.rglob("*")) == before
    gone = answer_of(capsys, *line)
    assert (gone["records"], gone["leftovers"], gone["dry_run"]) == (would["records"], would["leftovers"], False)
    assert not orphan.exists()
    assert answer_of(capsys, *line)["records"] == []
    assert answer_of(capsys, "verify", "--store", store, "--plan", benign, "--sample", 9)["faults"] == []
    assert "0 records and 0 leftovers removed." in text_of(capsys, *line)


def test_gc_of_failures(store: Path, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_store(store).put("failures", "f" * 64, {"spec": {}, "title": "it failed", "error": "x"})
    assert answer_of(capsys, "gc", "--store", store)["records"] == []
    assert answer_of(capsys, "gc", "--store", store, "--failures")["records"] == [["failures", "f" * 64, "it failed"]]
    assert open_store(store).keys("failures") == set()


def test_gc_keeps_everything_where_a_plan_cannot_be_read(
    plan: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(store.rglob("*"))
    assert "unknown" in error_of(capsys, "gc", "--store", store, "--keep", plan, changed(plan, "name =", "nme ="))
    assert "No such file" in error_of(capsys, "gc", "--store", store, "--keep", plan.with_name("none.toml"))
    assert sorted(store.rglob("*")) == before


# Repeat


def test_repeat(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = open_store(store)
    before = sorted(store.rglob("*"))
    for kind in ("victims", "purifications"):
        key = sorted(opened.keys(kind))[0]
        answer = answer_of(capsys, "repeat", key[:10], "--store", store)
        assert (answer["key"], answer["differences"]) == (key, [])
        assert answer["metrics"] == opened.read(kind, key)["metrics"]
    shown = text_of(capsys, "repeat", key, "--store", store)
    assert opened.read("purifications", key)["title"] in " ".join(shown.split())
    assert "The rates are the stored ones." in shown
    assert sorted(store.rglob("*")) == before


def test_repeat_finds_a_difference(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = open_store(store)
    (record,) = (r for r in opened.records("purifications") if r["title"].startswith("bn_refresh against badnets"))
    record["metrics"]["after"]["acc"]["hits"] = 1
    Path(opened.path("purifications", record["key"])).write_bytes(
        canonical({**record, "checksum": checksum_of(record)})
    )
    answer = answer_of(capsys, "repeat", record["key"], "--store", store, code=1)
    assert len(answer["differences"]) == 1
    assert answer["differences"][0].startswith("acc was 1 of 360")
    assert "differs acc was 1 of 360" in text_of(capsys, "repeat", record["key"], "--store", store, code=1)


def test_cells_that_cannot_be_repeated(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'zz' is the start of 0 names" in error_of(capsys, "repeat", "zz", "--store", store)
    assert "is the start of 6 names" in error_of(capsys, "repeat", "", "--store", store)
    opened = open_store(store)
    (victim,) = (r for r in opened.records("victims") if r["facts"]["attack"] == "badnets")
    (result,) = (r for r in opened.records("purifications") if r["title"].startswith("bn_refresh against badnets"))
    opened.remove("victims", victim["key"])
    message = error_of(capsys, "repeat", result["key"], "--store", store, "--quiet")
    assert f"the victim {victim['key'][:12]} is not in the store; run the plan" in message


# The line itself


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--help") == 0
    out, err = capsys.readouterr()
    assert all(f" {command} " in out for command in COMMANDS)
    assert err == ""
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f" {command} " in out for command in ("implant", "scan", "erase", "evaluate", "demo", "bench"))
    for command in COMMANDS:
        assert bench(command, "--help") == 0
        out = capsys.readouterr().out
        assert f"lustral bench {command}" in out
        assert "--store" in out
        assert "--json" in out


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("", "verify"),
        ("rn", "run"),
        ("run", "--store"),
        ("run --store s", "plan file"),
        ("run p.toml --store s --retry", "--retry"),
        ("verify", "--store"),
        ("verify --store s --sample three", "three"),
        ("gc --store s --grace soon", "soon"),
        ("repeat --store s", "the cell's name"),
    ],
)
def test_a_line_that_is_not_understood(line: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hint in error_of(capsys, *line.split())


def test_only_a_run_makes_a_store(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("plan", plan), ("verify",), ("gc",), ("repeat", "ab")):
        message = error_of(capsys, *words, "--store", tmp_path / "none")
        assert "is no store of benchmark results; make one with `lustral bench run`" in message
        assert not (tmp_path / "none").exists()


def test_a_run_takes_no_other_folder_for_a_store(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(plan.parent.iterdir())
    assert "is not empty and no store" in error_of(capsys, "run", plan, "--store", plan.parent)
    assert "no store" in error_of(capsys, "run", plan, "--store", plan)
    assert "cannot be opened" in error_of(capsys, "run", plan, "--store", "nosuchthing://x")
    assert sorted(plan.parent.iterdir()) == before


def test_a_damaged_store_is_an_error_in_one_line(plan: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next((store / "purifications").rglob("*.json"))
    for content in (path.read_bytes()[:-9], b"null"):
        path.write_bytes(content)
        for words in (("gc", "--store", store), ("plan", plan, "--store", store)):
            assert f"{path} is not a readable record" in error_of(capsys, *words)
    (store / "store.json").write_text('{"layout": 99}')
    assert "has layout 99; this version reads 1 to 4" in error_of(capsys, "verify", "--store", store)


def test_a_device_that_is_not_there(plan: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "run", plan, "--store", store, "--device", "abacus")
    assert "--device cpu" in message


def test_relative_stores_and_urls(
    plan: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(store.parent)
    assert answer_of(capsys, "plan", "plan.toml", "--store", "store")["done"] == 6
    assert absolute("store") == str(store)
    assert absolute("s3://bucket/x") == "s3://bucket/x"


def test_small_words() -> None:
    assert read_shard("2/4") == (1, 4)
    assert remaining(0, 0.0, 0) == "nothing is left to do"
    assert remaining(3, 20.0, 0) == "about 1 min"
    assert remaining(3, 3599.0, 0) == "about 1 h 00 min"
    assert remaining(12, 3725.0, 2) == "about 1 h 02 min for 10 of 12 cells; 2 have no precedent in the store"


def test_the_board_on_a_terminal(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars come and go, and a title with brackets does not break them."""
    from rich.console import Console

    from lustral.bench.runner import Event
    from lustral.cli.bench_commands import open_grid

    grid = open_grid([changed(plan, 'method = "bn_refresh"', 'method = "bn_refresh"\nlabel = "BN [x] [/y]"')])
    screen, shown = Screen(json=False, quiet=False), io.StringIO()
    monkeypatch.setattr(screen, "_err", Console(file=shown, force_terminal=True, width=160))
    with ProgressBoard(screen, grid) as board:
        for cell in grid.cells:
            board.report(cell, Progress(stage="training", done=1, total=2))
            board.record_event(Event(cell=cell, state="computed", seconds=1.0))
    assert shown.getvalue().count("BN [x] [/y] against") >= 2
    assert "6/6" in shown.getvalue()


def test_threads_are_the_plans_and_given_back(plan: Path, store: Path) -> None:
    before = torch.get_num_threads()
    assert bench("run", plan, "--store", store, "--quiet") == 0
    assert torch.get_num_threads() == before
    assert {record["made"]["threads"] for record in open_store(store).records("purifications")} == {1}


# audit


def test_audits_are_shown_and_kept(
    plan: Path, store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    once = Trainer(epochs=1, batch_size=64, learning_rate=0.01, channels_last=False)
    quick = Reactivation(trainer=once, clean_epochs=1, push_images=20, push_trainer=once, hidden=8, path=(0.0, 1.0))
    monkeypatch.setitem(KINDS, "audits", Audits(settings=quick))
    answer = answer_of(capsys, "audit", plan, "--store", store, "--where", "defence=bn_refresh")
    assert (answer["computed"], answer["present"], answer["blocked"]) == (1, 0, 0)
    answer = answer_of(capsys, "audit", plan, "--store", store)
    assert (answer["computed"], answer["present"], answer["blocked"]) == (1, 1, 0)
    assert {row["title"] for row in answer["audits"]} == {
        f"{name} against badnets on digits, seed 0"
        for name in ("fine_tuning trainer.epochs=1 least_steps=4", "bn_refresh")
    }
    assert "2 present" in text_of(capsys, "audit", plan, "--store", store)
    answer = answer_of(capsys, "run", plan, "--store", store, "--audit")
    assert (answer["cells"], answer["computed"], answer["present"]) == (8, 0, 8)
    key = next(iter(open_store(store).keys("audits")))
    assert bench("repeat", key, "--store", store, "--quiet") == 0


def test_an_audit_without_a_benign_model_is_refused(
    plan: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = changed(plan, '[[attacks]]\nmethod = "none"\n', "")
    assert bench("audit", alone, "--store", store) == 2
    assert "add an attack with method none" in capsys.readouterr().err
