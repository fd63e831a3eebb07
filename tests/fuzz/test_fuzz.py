"""Thousands of damaged files: each opens or is refused with a ``ValueError`` or ``OSError``; nothing in them runs, none hangs,
and none takes much memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from fuzz.kinds import ACTS, KINDS
from fuzz.pool import MOST_GROWTH, Hand, Tally, split

SEED = 0


@pytest.fixture(scope="module")
def hands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Hand]]:
    found = [Hand(tmp_path_factory.mktemp("fuzz")) for _ in range(min(2, os.cpu_count() or 1))]
    yield found
    for hand in found:
        hand.close()


def check(tally: Tally) -> None:
    assert not tally.faults, "\n".join(tally.faults[:20])
    assert tally.growth < MOST_GROWTH


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_open_or_are_refused(hands: list[Hand], kind: str) -> None:
    tally = split(hands, kind, seed=SEED, files=KINDS[kind].rounds)
    assert tally.outcomes.total() == KINDS[kind].rounds
    check(tally)
    assert tally.outcomes["opened"] > 0
    assert tally.outcomes["refused"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_some_damaged_files_open_or_are_refused(hands: list[Hand], kind: str) -> None:
    tally = hands[0].work(kind, seed=SEED, files=range(KINDS[kind].few))
    assert tally.outcomes.total() == KINDS[kind].few
    check(tally)


def test_there_are_ten_thousand() -> None:
    assert sum(kind.rounds for kind in KINDS.values()) >= 10_000


# What the fuzz would see, if something did what it must not


@pytest.mark.slow
def test_each_bad_act_is_counted_and_the_next_file_opened(tmp_path: Path) -> None:
    files = range(373, 382)  # each act once or twice
    draws = [Random(f"probe 0 {index}") for index in files]
    for draw in draws:
        draw.choice([0])  # of the only specimen
    acts = [draw.choice(ACTS) for draw in draws]
    assert set(acts) == set(ACTS)
    outcomes = {"fine": "opened", "raise": "unexpected", "take": "unexpected", "hide": "unexpected", "run": "ran"}
    outcomes |= {"spin": "hung", "wait": "hung", "die": "crashed"}
    hand = Hand(tmp_path)
    tally = hand.work("probe", seed=0, files=files, limits=(0.5, 1))
    hand.close()
    assert tally.outcomes == Counter(outcomes[act] for act in acts)
    assert len(tally.faults) == sum(act != "fine" for act in acts)


OUTSIDE = {
    "os.system('true')": "os.system",
    "__import__('subprocess').run(['true'])": "subprocess.Popen",
    "os.posix_spawn('/bin/true', ['true'], {})": "os.posix_spawn",
    "__import__('lustral_canary')": "import",
    "exec('1 + 1')": "exec",
    "__import__('pickle').loads(b'cos\\ngetcwd\\n.')": "pickle.find_class",
    "__import__('ctypes').CDLL('libc.so.6')": "ctypes.dlopen",
    "__import__('socket').create_connection(('127.0.0.1', 9))": "socket.",
    "open('../outside', 'w')": "open: writes",
    "open('/etc/passwd')": "open: reads",
    "os.open('../outside', os.O_WRONLY | os.O_CREAT)": "open: writes",
    "os.remove('../outside')": "os.remove",
    "os.mknod('ran')": "something made a file called 'ran'",
    "open('fine', 'w').close()": "",
    "__import__('tomllib').loads('a = 1')": "",
}


@pytest.mark.parametrize("act", OUTSIDE)
def test_what_runs_or_reaches_out_is_seen(act: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "lustral_canary.py").write_text("")
    text = (
        "import contextlib, os, pathlib, sys\nfrom fuzz.watch import Watch\nsys.path.insert(0, os.getcwd())\n"
        f"act = compile({act!r}, sys.executable, 'eval')\nwatch = Watch(pathlib.Path.cwd())\n"
        "with watch.on() as seen, contextlib.suppress(Exception):\n    eval(act)\nprint(*seen, sep='\\n')\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")])
    done = subprocess.run(
        [sys.executable, "-c", text],
        cwd=tmp_path / "here",
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert OUTSIDE[act] in done.stdout
    assert bool(done.stdout.strip()) == bool(OUTSIDE[act])
