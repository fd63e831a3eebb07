"""Erasers given images that the victim was trained on, as BackdoorBench gives them, beside images it never saw.

    python benchmarks/seen_images.py STORE --attacks blended sig --methods ft_sam neural_polarizer
    python benchmarks/seen_images.py --table

BackdoorBench draws a defender's 2,500 images from the clean version of the training set (`utils/choose_index.py`): a victim has
fitted nine tenths of them and knows the others with the trigger on. Here a defender's images are held out from training. The
victims are those that ``STORE`` has of ``plans/erasers.toml``, draws as in ``lustral bench run``; what the same erasers did
with unseen images is read from ``results/erasers/erasers.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from lustral.bench.cells import Workbench
from lustral.bench.expansion import expand
from lustral.bench.grid import attack_label
from lustral.bench.plan import read_plan
from lustral.bench.sources import Sources
from lustral.catalog import PURIFIERS
from lustral.core.files import write_json_atomic
from lustral.core.randomness import child
from lustral.store.store import Store
from lustral.vision.images import stratified_indices
from lustral.vision.records import DefenderView
from lustral.vision.sources import load_source

ROOT = Path(__file__).resolve().parent
PLAN = ROOT / "plans" / "erasers.toml"
UNSEEN = ROOT / "results" / "erasers" / "erasers.json"
RESULT = ROOT / "results" / "seen_images_cpu.json"
CLEAN = 2500


def measure(url: str, attacks: list[str], methods: list[str]) -> None:
    """Put erasers to stored victims with images that these were trained on; what is there is kept and not done again."""
    torch.set_num_threads(1)
    found = json.loads(RESULT.read_text())["results"] if RESULT.exists() else []
    done = {(row["attack"], row["defence"]) for row in found}
    train, _ = load_source("cifar10").training_split()
    chosen, _ = stratified_indices(train.labels, train.num_classes, CLEAN, generator=child(0, "clean"))
    bench = Workbench(store=Store(url).open(create=False), device=torch.device("cpu"))
    cells = [cell for cell in expand(read_plan(PLAN), Sources()).cells if cell.kind == "victims"]
    for attack in attacks:
        (cell,) = (cell for cell in cells if cell.spec["attack"]["method"] == attack)
        victim = bench.victim(cell.key)
        for method in methods:
            if (attack_label(cell.spec), method) in done:
                continue
            view, began = DefenderView(model=victim.model, clean=train.subset(chosen)), time.perf_counter()
            purified = PURIFIERS[method]().purify(view, generator=child(0, "erase"))
            seconds = time.perf_counter() - began
            after = bench.evaluate(victim, purified.model, cell.spec)
            rates = {name: getattr(after, name).value for name in ("acc", "asr", "ra")}
            found.append(
                {"attack": attack_label(cell.spec), "defence": method, "after": rates, "seconds": round(seconds, 1)}
            )
            write_json_atomic(RESULT, {"clean_images": CLEAN, "results": found})
            print(
                f"{attack:18} {method:18} " + " ".join(f"{name} {100 * rates[name]:.1f}" for name in rates), flush=True
            )


def table() -> None:
    """Print the attack success and the loss of accuracy with seen and with unseen images."""
    found = json.loads(RESULT.read_text())["results"]
    unseen = {(row["attack"], row["settings"]): row for row in json.loads(UNSEEN.read_text())["results"]}
    attacks = list(dict.fromkeys(row["attack"] for row in found))
    print(f"| ASR / ACC loss: seen (unseen) | {' | '.join(attacks)} |")
    print("|---" * (len(attacks) + 1) + "|")
    for method in dict.fromkeys(row["defence"] for row in found):
        cells = []
        for attack in attacks:
            rows = [row for row in found if (row["attack"], row["defence"]) == (attack, method)]
            cells.append("")
            if rows:
                before = unseen[attack, method]["before"]["acc"]
                pair = [
                    f"{100 * after['asr']:.1f} / {100 * (before - after['acc']):.1f}"
                    for after in (rows[0]["after"], unseen[attack, method]["after"])
                ]
                cells[-1] = "{} ({})".format(*pair)
        print(f"| {method} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?")
    parser.add_argument("--attacks", nargs="+", default=["blended", "sig", "label_consistent", "trojan_nn"])
    parser.add_argument("--methods", nargs="+", default=["ft_sam", "neural_polarizer"], choices=sorted(PURIFIERS))
    parser.add_argument("--table", action="store_true", help="print what was measured")
    options = parser.parse_args()
    if options.table:
        table()
    elif options.store:
        measure(options.store, options.attacks, options.methods)
    else:
        parser.error("expected a store of victims, or --table")


if __name__ == "__main__":
    main()
