"""Write the leaderboard of the kept results, for the documentation site; ``lustral bench site`` writes that of a whole store.

    python benchmarks/leaderboard.py OUT

The rows of ``benchmarks/results`` become records of a store for the moment. What is not kept (curves, pictures, class accuracies,
intervals of cost) is not there, and nothing is made up for it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lustral.core.rates import Rate
from lustral.core.versions import listed_rooms
from lustral.site.pages import SiteSummary, write_site
from lustral.store.store import Kind, Store, content_key
from lustral.tables.rows import BENIGN, UNDEFENDED
from matrix import is_erased

ROOT = Path(__file__).resolve().parent.parent
TITLE = "lustral: the kept results"
KINDS: dict[str, Kind] = {
    "PURIFIERS": "purifications",
    "DETECTORS": "scans",
    "SIFTERS": "siftings",
    "SAFE_TRAINERS": "trainings",
}
RATES_OF_LIST = ("tpr", "fpr", "precision", "listed", "covers_listed")

VICTIM = ("data", "arch", "poison_rate", "target_label", "seed", "attack")  # columns that name a victim of a plan

Row = Mapping[str, Any]


def write_leaderboard(results: Path, out: Path, cards: Path) -> SiteSummary:
    """Write the pages.

    Args:
        results: folder of kept rows, a JSON file for each plan.
        out: folder to write, as for ``write_site``.
        cards: folder of the methods' cards.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder).open(create=True)
        for path in sorted(results.glob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict) and "plan" in content:
                put_plan(store, content["plan"], [row for row in content["rows"] if row["status"] == "done"])
        return write_site(store, out, cards=cards, title=TITLE, old=True)


def put_plan(store: Store, plan: str, rows: list[Row]) -> None:
    """Put the kept rows of a plan, and the victims that they met, into a store."""
    victims: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["defence"] != UNDEFENDED):  # a victim's own row tells most of it
        name = tuple(row[part] for part in VICTIM)
        if name not in victims:
            victims[name] = victim_record(plan, row)
            store.put("victims", content_key(victims[name]["spec"]), victims[name])
        if row["defence"] != UNDEFENDED:
            kind = KINDS[listed_rooms()[row["defence"].split()[0]]]
            record = result_record(plan, row, kind, victims[name])
            store.put(kind, content_key(record["spec"]), record)


def rate(counts: list[int] | None) -> dict[str, Any]:
    """Return hits and total as the records have a rate."""
    return Rate(*(counts or (0, 0))).to_dict()


def evaluation(row: Row, end: str) -> dict[str, Any]:
    """Return the rates of a model that a row holds; ``end`` is "0" before the defence, "" after it."""
    rates = {name: rate(row.get(f"{name}{end}")) for name in ("acc", "asr", "ra")}
    probes = (
        {name: rate(counts) for name, counts in row.get("probes", {}).items()} if row["defence"] == UNDEFENDED else {}
    )
    return {**rates, "natural_rate": rate(None), "num_non_finite": 0, "non_finite": False, "probes": probes}


def compared(row: Row) -> dict[str, Any]:
    """Return what the records say of a model before and after; what needs rates that were not kept is unknown."""
    before, after = evaluation(row, "0"), evaluation(row, "")
    loss = before["acc"]["value"] - after["acc"]["value"]
    if before["asr"]["value"] is None:
        return {**dict.fromkeys(("der", "rir", "asr_drop", "ra_gain", "erased")), "acc_loss": loss}
    gain = after["ra"]["value"] - before["ra"]["value"]
    return {
        "der": row["der"],
        "rir": (max(0.0, gain) - max(0.0, loss) + 1) / 2,
        "acc_loss": loss,
        "asr_drop": before["asr"]["value"] - after["asr"]["value"],
        "ra_gain": gain,
        "erased": is_erased(loss, **{name: after[name]["value"] for name in ("acc", "asr", "ra")}),
    }


def victim_record(plan: str, row: Row) -> dict[str, Any]:
    """Return the record of the victim that a row is, or met."""
    is_own = row["defence"] == UNDEFENDED
    method = "none" if row["attack"] == BENIGN else row["attack"].split()[0]
    told = {name: row[name] for name in VICTIM}
    spec = {"kind": "victim", "plan": plan, **told, "epochs": row["epochs"], "versions": row["versions"]}
    if is_own:
        spec["settings"] = row["settings"]
    return {
        **common(row, "victim", f"{row['attack']} on {row['data']}, seed {row['seed']}"),
        "facts": {**told, "attack_method": method},
        "spec": spec,
        "victim_key": None,
        "metrics": {"before": evaluation(row, "0")},
        "cost": cost(row if is_own else {}, 0),
    }


def result_record(plan: str, row: Row, kind: Kind, victim: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of what a defence did to a victim."""
    method = row["defence"].split()[0]
    room = {"purifications": "purifier", "scans": "detector", "siftings": "sifter", "trainings": "safe trainer"}[kind]
    defence = {"defence": row["defence"], "defence_method": method, "defence_kind": room}
    metrics: dict[str, Any] = {"before": evaluation(row, "0")}
    if "sifting" in row:
        metrics |= {"sifting": listing(row["sifting"])}
        metrics |= {"parts": {name: listing(part) for name, part in row.get("parts", {}).items()}}
    elif "outcome" in row:
        found = {"outcome": row["outcome"], "correct": row["correct"], "alarm": row["outcome"] == "backdoored"}
        metrics["detection"] = {**found, "suspects": [], "targets": [], "score": None, "threshold": None}
    else:
        metrics |= {"after": evaluation(row, ""), "compare": compared(row)}
    draws = {"clean_images": row["clean_images"], "defence_seed": 0}
    title = f"{row['defence']} against {victim['title']}"
    return {
        **common(row, kind.removesuffix("s"), title),
        "facts": {**victim["facts"], **defence, **draws},
        "spec": {"plan": plan, "row": row["name"], "kept": row["key"], **defence, "settings": row["settings"]}
        | {"versions": row["versions"]},
        "victim_key": content_key(victim["spec"]),
        "metrics": metrics,
        "cost": cost(row, row["clean_images"]),
    }


def listing(found: Row) -> dict[str, Any]:
    """Return what a list of images was worth as the records have it."""
    areas = {name: found[name] for name in ("auroc", "auprc")}
    return {**areas, **{name: rate(found.get(name)) for name in RATES_OF_LIST}}


def cost(row: Row, images: int) -> dict[str, Any]:
    """Return a row's cost as the records have it."""
    told = {"seconds": row.get("seconds"), "image_passes": row.get("image_passes")}
    return {**told, "peak_memory_bytes": None, "clean_images": images}


def common(row: Row, kind: str, title: str) -> dict[str, Any]:
    """Return what every record says of itself."""
    machine = str(row.get("machine") or "")
    made = {"seconds": row.get("seconds"), "at": row.get("at"), "versions": {}, "code": row.get("code")}
    made |= {"machine": machine, "device": machine.partition(",")[0] or "unknown", "threads": None}
    return {"schema": 1, "kind": kind, "status": "done", "title": title, "made": made}


def main() -> int:
    summary = write_leaderboard(ROOT / "benchmarks" / "results", Path(sys.argv[1]), ROOT / "tests" / "cards")
    print(f"{summary.cells} results, {summary.victims} victims: {summary.path}/index.html")
    for problem in summary.problems:
        print(problem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
