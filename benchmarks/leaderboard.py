"""How long tables and pages of 10,000 results take, as whole processes.

    PYTHONPATH=tests python benchmarks/leaderboard.py [--results 10000]

The results are made up (tests/bench/synthetic.py); only their number and size matter.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.synthetic import synthetic_store
from lustral.core.files import write_json_atomic

RESULT = Path(__file__).parent / "results" / "leaderboard_cpu.json"
CARDS = Path(__file__).parent.parent / "tests" / "cards"


def seconds(*words: str) -> float:
    """Run ``lustral`` with these words and return how long the process took."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lustral", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=int, default=10_000)
    results = parser.parse_args().results
    with tempfile.TemporaryDirectory() as scratch:
        store, site = Path(scratch) / "store", Path(scratch) / "site"
        synthetic_store(store, results=results, attacks=20, defences=25, seeds=10)
        table = ("bench", "table", "--store", str(store), "--by", "defence,attack", "--metric", "der")
        record = {
            "results": results,
            "table_seconds": [seconds(*table) for _ in range(3)],
            "site_seconds": [seconds("bench", "site", str(site), "--store", str(store), "--cards", str(CARDS))],
            "pages": sum(1 for _ in site.rglob("*.html")),
        }
    print(record)
    write_json_atomic(RESULT, record)


if __name__ == "__main__":
    main()
