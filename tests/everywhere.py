"""Run the tests that compute under the arithmetic of other processors: ``make test-everywhere``.

Two processors sum in another order and round at other places, and so do two numbers of threads and two precisions. What a test
asserts has to hold under all of them. Each setting is a run of its own, since the libraries read it when they are loaded:

* ``ONEDNN_MAX_CPU_ISA`` holds oneDNN (convolutions, bfloat16 products) to an older instruction set. One that the processor lacks
  is no error: oneDNN takes the best it has, and the run equals one under "default".
* ``ATEN_CPU_CAPABILITY`` does the same for PyTorch's own kernels.
* ``OMP_NUM_THREADS`` is the number of threads.
* ``LUSTRAL_TEST_PRECISION`` is what the library's "auto" means in the tests (tests/conftest.py).

bfloat16 under AVX2 is left out: oneDNN has only reference kernels for it there, about sixteen times slower than float32, and
"auto" never takes it.

    python tests/everywhere.py [--only WORD] [-- PYTEST ARGUMENTS]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_NUMERIC = (  # tests of text, tables and files, and folders of them
    *("bench", "cards", "cli", "fuzz", "report", "site", "store", "tables", "vision/sources"),
    *("test_cards.py", "test_docs.py", "test_publish.py"),
    *(f"core/test_{name}.py" for name in ("characters", "files", "history", "randomness", "settings")),
    *(f"vision/test_{name}.py" for name in ("images", "records", "victim_files")),
    *(
        f"vision/models/test_{name}.py"
        for name in ("architecture", "checkpoint", "hub_folder", "model_files", "outline", "weight_sets")
    ),
)


@dataclass(frozen=True)
class Setting:
    """One arithmetic."""

    onednn: str
    aten: str
    threads: int
    precision: str

    def environment(self) -> dict[str, str]:
        """Return the variables that give it; "default" sets none."""
        names = {"ONEDNN_MAX_CPU_ISA": self.onednn, "ATEN_CPU_CAPABILITY": self.aten}
        kept = {name: value for name, value in os.environ.items() if name not in names}
        chosen = {name: value for name, value in names.items() if value != "default"}
        return kept | chosen | {"OMP_NUM_THREADS": str(self.threads), "LUSTRAL_TEST_PRECISION": self.precision}

    def __str__(self) -> str:
        """Return the columns of the table."""
        return f"{self.onednn:<18}{self.aten:<9}{self.threads:<9}{self.precision:<10}"


SETTINGS = (
    Setting("default", "default", 1, "float32"),
    Setting("default", "default", 2, "bfloat16"),
    Setting("AVX512_CORE_BF16", "default", 1, "bfloat16"),
    Setting("AVX512_CORE_BF16", "default", 2, "float32"),
    Setting("AVX512_CORE", "default", 1, "bfloat16"),
    Setting("AVX512_CORE", "default", 2, "float32"),
    Setting("AVX2", "avx2", 1, "float32"),
    Setting("AVX2", "default", 2, "float32"),
)


def numeric_paths() -> list[str]:
    """Return the tests that compute: all but those of text, tables and files, so that a new folder is in from the start."""
    tests = ROOT / "tests"
    left_out = [tests / name for name in NOT_NUMERIC]
    if missing := [str(path) for path in left_out if not path.exists()]:
        raise SystemExit(f"NOT_NUMERIC names what is not there: {', '.join(missing)}")
    found = sorted(tests.rglob("test_*.py"))
    return [str(path) for path in found if not any(path.is_relative_to(folder) for folder in left_out)]


def run(setting: Setting, arguments: list[str]) -> tuple[int, float, str]:
    """Run pytest under a setting; return its exit code, seconds, and the end of what it said."""
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=setting.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, time.monotonic() - began, done.stdout


def main() -> int:
    """Run every setting, print a line for each, and then what failed."""
    parser = argparse.ArgumentParser(description="Run the tests that compute under the arithmetic of other processors.")
    parser.add_argument("--only", default="", help="run the settings whose line holds this word")
    parser.add_argument("arguments", nargs="*", help="for pytest, after --; default: the tests that compute")
    given = parser.parse_args()
    arguments = given.arguments or numeric_paths()
    chosen = [setting for setting in SETTINGS if given.only in str(setting)]
    print(f"{'oneDNN':<18}{'ATen':<9}{'threads':<9}{'precision':<10}result", flush=True)
    failures: list[tuple[Setting, str]] = []
    for threads in sorted({setting.threads for setting in chosen}):
        group = [setting for setting in chosen if setting.threads == threads]
        with ThreadPoolExecutor(max((os.cpu_count() or 1) // threads, 1)) as pool:
            for setting, (code, seconds, output) in zip(
                group, pool.map(lambda s: run(s, arguments), group), strict=True
            ):
                last = output.strip().splitlines()[-1:] or ["no output"]
                print(
                    f"{setting}{'passed' if code == 0 else 'FAILED'} ({last[0].strip('= ')}; {seconds:.0f} s)",
                    flush=True,
                )
                if code:
                    failures.append((setting, output))
    for setting, output in failures:
        print(f"\n--- {setting}\n{output[-4000:]}", flush=True)
    return int(bool(failures) or not chosen)


if __name__ == "__main__":
    sys.exit(main())
