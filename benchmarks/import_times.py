"""Measure how long the first look takes: ``import lustral`` and ``lustral --help`` beside what Python itself and numpy take.

    python benchmarks/import_times.py

Every command runs in a new process, all in turn, several times; the least of each counts, because other work only adds. Ratios
are of one run: another machine has other seconds and like ratios. Written to ``benchmarks/results/import_times_cpu.json``.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lustral.core.files import write_json_atomic

OUT = Path(__file__).parent / "results" / "import_times_cpu.json"
COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "import numpy": ("-c", "import numpy"),
    "import lustral": ("-c", "import lustral"),
    "lustral --help": ("-m", "lustral", "--help"),
    "lustral bench --help": ("-m", "lustral", "bench", "--help"),
}
BASES = ("python -c pass", "import numpy")
LIMITS = {"import lustral": 0.3, "lustral --help": 1.0}  # seconds of processor time


def measure(command: tuple[str, ...]) -> tuple[float, float]:
    """Return (wall, processor) seconds of one process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(rounds + 1):
        for name, command in COMMANDS.items():
            found[name].append(measure(command))
    best = {
        name: tuple(map(min, zip(*times[1:], strict=True))) for name, times in found.items()
    }  # the first fills the caches
    rows: list[dict[str, Any]] = []
    for name, (wall, processor) in best.items():
        ratios = {f"times {base}": round(processor / best[base][1], 2) for base in BASES}
        rows.append({"what": name, "processor_seconds": round(processor, 3), "wall_seconds": round(wall, 3), **ratios})
        print(
            f"{name:22} {processor:6.3f} s of processor, {wall:6.3f} s, "
            + ", ".join(f"{v} {k}" for k, v in ratios.items())
        )
    late = {name: best[name][1] for name, most in LIMITS.items() if best[name][1] > most}
    machine = f"cpu, {platform.machine()}, {os.cpu_count()} cores, python {platform.python_version()}"
    head = {
        "command": "python benchmarks/import_times.py",
        "at": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "rounds": rounds,
    }
    write_json_atomic(OUT, {**head, "limits_processor_seconds": LIMITS, "rows": rows})
    for name, seconds in late.items():
        print(f"late: {name} takes {seconds:.2f} s, at most {LIMITS[name]} s are allowed", file=sys.stderr)
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
