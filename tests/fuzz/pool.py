"""Gives files to workers, outlives them, and counts what became of the files.

``PYTHONPATH=tests python -m fuzz.pool`` opens all of them and prints a table; with the words KIND SEED INDEX it opens one, and
says what is in it and what became of it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fuzz.kinds import KINDS
from fuzz.worker import MOST_SECONDS, MOST_WAITING, Limits

MOST_GROWTH = 2**30  # bytes of memory that a process may take for all files of a kind
_TESTS = Path(__file__).resolve().parents[1]


@dataclass
class Tally:
    """What became of files of a kind.

    Attributes:
        outcomes: numbers of files: "opened", "refused", and what must not be: "ran", "unexpected", "hung", "crashed".
        faults: a few lines for each file that did what must not be: what, where it is kept, how to open it again.
        growth: bytes of memory that a worker took at most beyond what it had before the first file.
        longest: processor time for one file, seconds.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    growth: int = 0
    longest: float = 0.0

    def add(self, other: Tally) -> None:
        """Count the files of another tally too."""
        self.outcomes += other.outcomes
        self.faults += other.faults
        self.growth, self.longest = max(self.growth, other.growth), max(self.longest, other.longest)


class Hand:
    """One worker process at a time: another takes the place of one that died."""

    def __init__(self, folder: Path) -> None:
        """Work in ``folder``; bad files are kept in ``folder / "kept"``."""
        self.folder, self.process = folder, None

    process: subprocess.Popen[bytes] | None

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            paths = [str(_TESTS), str(_TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fuzz.worker", str(self.folder / "scratch")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
            )
        return self.process

    def work(self, kind: str, *, seed: int, files: range, limits: Limits = (MOST_SECONDS, MOST_WAITING)) -> Tally:
        """Open files of a kind by number; a worker that dies is followed by one that goes on behind the file."""
        tally, start = Tally(), files.start
        while start < files.stop:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            job = {"kind": kind, "seed": seed, "start": start, "stop": files.stop, "step": files.step, "limits": limits}
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            start, ready = self._follow(process.stdout, tally, kind, seed, range(start, files.stop, files.step))
            if start >= files.stop:
                break
            code = self.close()
            if not ready:
                raise RuntimeError(f"a worker could not make the specimens of {kind}: exit code {code}; see above")
            outcome = "hung" if code in (-signal.SIGPROF, -signal.SIGALRM) else "crashed"
            how = {
                -signal.SIGPROF: f"more than {limits[0]} s of processor time",
                -signal.SIGALRM: f"waited for more than {limits[1]} s",
            }
            self._note(tally, kind, seed, start, outcome, how.get(code, f"the process ended with {code}"))
            start += files.step
        return tally

    def _follow(self, answers: IO[bytes], tally: Tally, kind: str, seed: int, files: range) -> tuple[int, bool]:
        """Count what a worker says; returns the first file that it said nothing of, and whether it began."""
        following, ready = files.start, False
        for line in answers:
            report = json.loads(line)
            if "ready" in report:
                ready = True
                continue
            tally.growth = max(tally.growth, report["growth"])
            tally.longest = max(tally.longest, report["seconds"])
            if report["outcome"] in ("opened", "refused"):
                tally.outcomes[report["outcome"]] += 1
            else:
                self._note(tally, kind, seed, report["index"], report["outcome"], report["said"])
            following = report["index"] + files.step
            if following >= files.stop:
                break
        return following, ready

    def _note(self, tally: Tally, kind: str, seed: int, index: int, outcome: str, said: str) -> None:
        tally.outcomes[outcome] += 1
        kept = self.folder / "kept" / f"{kind}-{seed}-{index}"
        replay = f"PYTHONPATH=tests python -m fuzz.pool {kind} {seed} {index}"
        tally.faults.append(
            f"{kind}, seed {seed}, file {index}: {outcome}: {said}\n  made again in {kept} by: {replay} {kept}"
        )

    def close(self) -> int:
        """End the worker, and return its exit code."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            code = process.wait(timeout=MOST_WAITING)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        process.stdout.close()
        return code


def split(hands: list[Hand], kind: str, *, seed: int, files: int) -> Tally:
    """Let several workers open the files of a kind, each in turn."""
    whole = Tally()
    with ThreadPoolExecutor(len(hands)) as pool:
        parts = [range(number, files, len(hands)) for number in range(len(hands))]
        for tally in pool.map(
            lambda pair: pair[0].work(kind, seed=seed, files=pair[1]), zip(hands, parts, strict=True)
        ):
            whole.add(tally)
    return whole


def report() -> int:
    """Open all files of all kinds, and print what became of them."""
    folder, begin, whole = Path(tempfile.mkdtemp(prefix="fuzz-")), time.monotonic(), Tally()
    hands = [Hand(folder / str(number)) for number in range(min(2, os.cpu_count() or 1))]
    for name, kind in KINDS.items():
        tally = split(hands, name, seed=0, files=kind.rounds)
        whole.add(tally)
        print(name, dict(tally.outcomes), f"longest {tally.longest:.1f} s, growth {tally.growth >> 20} MiB", flush=True)
        print(*tally.faults, sep="\n", end="\n" if tally.faults else "", flush=True)
    for hand in hands:
        hand.close()
    print(f"{whole.outcomes.total()} files in {time.monotonic() - begin:.0f} s: {dict(whole.outcomes)}")
    print(f"longest {whole.longest:.1f} s of processor time, growth {whole.growth >> 20} MiB")
    shutil.rmtree(folder, ignore_errors=True)
    return len(whole.faults) > 0


def again(kind: str, seed: int, index: int, kept: Path | None) -> None:
    """Open one file in a worker, and keep it."""
    from fuzz.trees import write_tree
    from fuzz.worker import damaged

    hand = Hand(Path(tempfile.mkdtemp(prefix="fuzz-")))
    tally = hand.work(kind, seed=seed, files=range(index, index + 1))
    hand.close()
    tree, _ = damaged(KINDS[kind], kind, KINDS[kind].make(), seed, index)
    kept = kept or hand.folder / "case"
    write_tree(kept, tree)
    print(f"{kept}: {dict(tally.outcomes)}", *tally.faults, sep="\n")


def _main(words: list[str]) -> Any:
    if not words:
        return report()
    return again(words[0], int(words[1]), int(words[2]), Path(words[3]) if len(words) > 3 else None)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
