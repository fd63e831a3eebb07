"""Opens damaged files in a process of its own, which says of each what became of it, or dies with it.

``python -m fuzz.worker FOLDER`` reads jobs from standard input, one JSON object a line, and answers on standard output.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzz.kinds import KINDS, PROBE, Kind
from fuzz.mutators import CANARY, MARK
from fuzz.trees import Tree, write_tree
from fuzz.watch import Watch

MOST_SECONDS = 10  # of processor time for one file
MOST_WAITING = 120  # seconds by the clock: a process that waits for ever takes no processor time
MOST_MEMORY = 3 << 29  # bytes that a process may ask for beyond what it has; touching 2**30 of them is a fault as well
LONGEST_MESSAGE = 20_000  # characters
Limits = tuple[float, int]  # MOST_SECONDS and MOST_WAITING, or less
NO_MEMORY = ("DefaultCPUAllocator", "not enough memory", "std::bad_alloc", "an't allocate memory", "malloc of size")

_KINDS = {**KINDS, "probe": PROBE}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of one file.

    Attributes:
        index: its number.
        outcome: "opened", "refused", or what must not happen: "ran", "unexpected".
        said: what is known of it.
        seconds: processor time.
        growth: bytes of memory that the process has taken beyond what it had when the job began, so far and at most.
    """

    index: int
    outcome: str
    said: str
    seconds: float
    growth: int


def damaged(kind: Kind, name: str, trees: list[Tree], seed: int, index: int) -> tuple[Tree, Random]:
    """Return the damaged specimen of a number, and what the rest is drawn from."""
    draw = Random(f"{name} {seed} {index}")
    return kind.damage(draw.choice(trees), draw), draw


class Worker:
    """A process that opens files."""

    def __init__(self, scratch: Path) -> None:
        """Put what must not run into the working directory, and watch."""
        self.scratch = scratch
        shutil.rmtree(scratch, ignore_errors=True)
        self.here, self.case, self.aside = scratch / "here", scratch / "case", scratch / "aside"
        self.here.mkdir(parents=True)
        for name in ("evil.py", "y@evil.py", "modeling.py", f"{CANARY}.py", "x@evil.py"):
            (self.here / name).write_text(
                f"open({str(self.here / MARK)!r}, 'w').close()\ndef f(*_, **__): raise SystemExit\n"
            )
        os.chdir(self.here)
        sys.path.insert(0, str(self.here))
        tempfile.tempdir = str(scratch)
        torch.set_num_threads(1)
        self.trees: dict[str, list[Tree]] = {}
        self.watch = Watch(scratch)

    def prepare(self, name: str) -> None:
        """Make the specimens of a kind, and open each once: later growth of memory is then the damaged files' own."""
        if name in self.trees:
            return
        kind = _KINDS[name]
        self.trees[name] = kind.make()
        opened, refusals = 0, list[str]()
        for tree in self.trees[name]:
            for number in range(kind.ways):
                report = self.open(kind, tree, Random(number), index=-1)
                if report.outcome not in ("opened", "refused"):
                    raise AssertionError(f"{name}: a specimen is no valid one: {report.said}")
                opened += report.outcome == "opened"
                refusals += [report.said] * (report.outcome == "refused")
        if opened < len(self.trees[name]) * kind.ways / 2:
            raise AssertionError(f"{name}: too few specimens open: {refusals}")

    def open(
        self, kind: Kind, tree: Tree, draw: Random, *, index: int, limits: Limits = (MOST_SECONDS, MOST_WAITING)
    ) -> Report:
        """Open one file, under a limit of time by signals that end the process."""
        write_tree(self.case, tree)
        shutil.rmtree(self.aside, ignore_errors=True)
        self.aside.mkdir()
        outcome, said = "opened", ""
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, limits[0])
        signal.alarm(limits[1])
        with self.watch.on() as seen:
            try:
                kind.open(self.case, self.aside, draw)
            except (ValueError, OSError) as error:
                outcome, said = "refused", f"{type(error).__name__}: {error}"
                if lacks_memory(error) or len(said) > LONGEST_MESSAGE:
                    outcome, said = "unexpected", shortened(error)
            except BaseException as error:
                outcome, said = "unexpected", shortened(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        if seen:
            outcome, said = "ran", "; ".join(seen)
        seconds = time.process_time() - start
        return Report(index=index, outcome=outcome, said=said[-3000:], seconds=seconds, growth=0)

    def work(self, job: Mapping[str, Any]) -> None:
        """Open the files of a job, and say of each what became of it."""
        name, seed = job["kind"], job["seed"]
        kind = _KINDS[name]
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        self.prepare(name)
        say({"ready": name})
        begin = resident()
        for index in range(job["start"], job["stop"], job["step"]):
            resource.setrlimit(resource.RLIMIT_AS, (reserved() + MOST_MEMORY, resource.RLIM_INFINITY))
            tree, draw = damaged(kind, name, self.trees[name], seed, index)
            report = self.open(kind, tree, draw, index=index, limits=tuple(job["limits"]))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            say({**asdict(report), "growth": max(0, peak - begin)})


def lacks_memory(error: BaseException | None) -> bool:
    """Say whether memory ran out, be it that another error was made of it."""
    while error is not None:
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def shortened(error: BaseException) -> str:
    """Return the end of a traceback."""
    return "".join(traceback.format_exception(error))[-2500:]


def resident() -> int:
    """Return the bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def reserved() -> int:
    """Return the bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def say(content: Mapping[str, Any]) -> None:
    """Answer on what was standard output when the process began."""
    os.write(_ANSWERS, json.dumps(content).encode() + b"\n")


_ANSWERS = 1


def main(scratch: Path) -> None:
    """Work until there are no more jobs."""
    global _ANSWERS
    _ANSWERS = os.dup(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # what commands print
    if not os.environ.get("FUZZ_LOUD"):
        os.dup2(quiet, 2)
    warnings.simplefilter("error")
    worker = Worker(scratch)
    for line in sys.stdin:
        worker.work(json.loads(line))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
