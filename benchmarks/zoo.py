"""Keep the victims of an attack plan as small JSON files, and write each attack's card and the table of docs/results-attacks.md.

    lustral bench run benchmarks/plans/zoo.toml --store STORE
    python benchmarks/zoo.py keep STORE --plan benchmarks/plans/zoo.toml   # a folder of benchmarks/results/zoo for each plan
    python benchmarks/zoo.py cards

Only rates, seeds, settings and costs are kept; weights and pictures stay in the store.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lustral.bench.expansion import expand
from lustral.bench.grid import attack_label
from lustral.bench.plan import read_plan
from lustral.bench.sources import Sources
from lustral.core.files import write_json_atomic, write_text_atomic
from lustral.core.versions import outdated
from lustral.store.store import Store

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "zoo"
CARDS = ROOT.parent / "tests" / "cards"
TABLE = ROOT.parent / "docs" / "results-attacks.md"
LEADERBOARD = "BackdoorBench leaderboard, state of June 2025, PreAct-ResNet18, CIFAR-10"
WIDTH_16 = "PreAct-ResNet18 width 16"
SETTINGS = {  # by plan
    "zoo": f"{WIDTH_16}, CIFAR-10 (47,500 training images), 12 epochs, CPU",
    "zoo_1pct": f"the same at 1 % poison: {WIDTH_16}, CIFAR-10, 12 epochs, CPU",
    "zoo_gtsrb": f"{WIDTH_16}, GTSRB (18,540 training images, split by track), 8 epochs, CPU",
    "zoo_controls": f"controls of the first table: {WIDTH_16}, CIFAR-10, 12 epochs, CPU",
    "zoo_toy": "small CNN, embedded digits (1,365 training images), 20 epochs, CPU",
}
BENIGN = {"zoo_1pct": "zoo", "zoo_controls": "zoo"}  # whose benign models serve for comparison
ON_CARDS = {"zoo": "cifar10", "zoo_1pct": "cifar10 at 1 %", "zoo_gtsrb": "gtsrb", "zoo_toy": "digits"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "adap_blend": {"source": "Qi et al., ICLR 2023, tables 1 and 2; see the method's page"},
    "adap_patch": {"source": "Qi et al., ICLR 2023, tables 1 and 2; see the method's page"},
    "badnets": {"source": f"{LEADERBOARD}, 10 % poison", "acc": 0.9132, "asr": 0.9503, "ra": 0.0467},
    "blended": {"source": f"{LEADERBOARD}, 10 % poison", "acc": 0.9347, "asr": 0.9992, "ra": 0.0008},
    "bpp": {"source": f"{LEADERBOARD}, 10 % poison", "acc": 0.9069, "asr": 0.9978, "ra": 0.0021},
    "imc": {"source": "Pang et al., CCS 2020: figures only, no table for this setting at hand"},
    "input_aware": {"source": f"{LEADERBOARD}, 10 % poison", "acc": 0.9067, "asr": 0.9826, "ra": 0.0166},
    "label_consistent": {"source": f"{LEADERBOARD}, 5 % poison", "acc": 0.9353, "asr": 0.9980, "ra": 0.0020},
    "low_frequency": {"source": f"{LEADERBOARD}, 10 % poison", "acc": 0.9319, "asr": 0.9928, "ra": 0.0071},
    "sig": {"source": f"{LEADERBOARD}, 5 % poison", "acc": 0.9364, "asr": 0.9709, "ra": 0.0290},
    "ssba": {"source": f"{LEADERBOARD}, 10 % poison", "acc": 0.9288, "asr": 0.9786, "ra": 0.0199},
    "tact": {"source": "Tang et al., USENIX Security 2021; see the method's page"},
    "trojan_nn": {"source": f"{LEADERBOARD}, 10 % poison", "acc": 0.9342, "asr": 1.0, "ra": 0.0},
    "wanet": {"source": f"{LEADERBOARD}, 10 % poison", "acc": 0.9125, "asr": 0.8973, "ra": 0.0976},
}

BESIDE = {  # ACC / ASR in per cent of the same leaderboard, PreAct-ResNet18 of width 64
    "zoo": {m: f"{100 * p['acc']:.2f} / {100 * p['asr']:.2f}" for m, p in PUBLISHED.items() if "acc" in p},
    "zoo_1pct": {
        "badnets": "93.14 / 74.73",
        "blended": "93.76 / 94.88",
        "bpp": "90.81 / 87.23",
        "input_aware": "91.74 / 79.18",
        "label_consistent": "93.80 / 93.73",
        "low_frequency": "93.56 / 86.46",
        "sig": "93.82 / 83.40",
        "ssba": "93.43 / 73.44",
        "trojan_nn": "93.58 / 99.97",
        "wanet": "90.65 / 12.63",
    },
    "zoo_gtsrb": {  # clean-label attacks are not published at so high a rate
        "badnets": "97.24 / 59.25",
        "blended": "98.58 / 99.99",
        "bpp": "97.43 / 99.90",
        "input_aware": "97.26 / 92.74",
        "low_frequency": "97.93 / 99.57",
        "ssba": "97.98 / 99.56",
        "trojan_nn": "98.57 / 100.00",
        "wanet": "97.74 / 94.25",
    },
}


def keep(url: str, plan: Path) -> None:
    """Copy what matters of the victims that a store has of a plan into the repository."""
    store, name = Store(url).open(create=False), plan.stem
    for cell in expand(read_plan(plan), Sources()).cells:
        if cell.kind != "victims" or not store.has("victims", cell.key):
            continue
        record = store.read("victims", cell.key)
        spec, metrics = record["spec"], record["metrics"]["before"]
        facts = record["facts"]
        kept = {
            "key": record["key"],
            "attack": spec["attack"],
            "seed": spec["seed"],
            "epochs": spec["trainer"]["epochs"],
            "metrics": {k: metrics[k] for k in ("acc", "asr", "ra", "natural_rate", "probes")},
            "seconds": record["cost"]["seconds"],
            "made": record["made"],
            "versions": spec.get("versions", {}),
        }
        rate = "" if facts["poison_rate"] is None else f"-{facts['poison_rate']:g}"
        path = RESULTS / name / f"{facts['attack_method']}{rate}-s{facts['seed']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, kept)


def kept(name: str) -> list[dict[str, Any]]:
    """Return the kept victims of a data set, by attack and seed."""
    rows = [json.loads(path.read_text()) for path in (RESULTS / name).glob("*.json")]
    return sorted(rows, key=lambda row: (row["attack"]["method"], row["seed"]))


def short(row: dict[str, Any]) -> dict[str, Any]:
    """Return a victim as cards have it."""
    rates = {name: row["metrics"][name]["value"] for name in ("acc", "asr", "ra")}
    settings = row["attack"]["settings"]
    named = {"seed": row["seed"], "epochs": row["epochs"], "poison_rate": settings["poison_rate"]}
    probes = {name: rate["value"] for name, rate in row["metrics"]["probes"].items()}
    return {**named, "target_label": settings["target_label"], **rates, **({"probes": probes} if probes else {})}


def cards() -> None:
    """Write a card for each attack: published beside ours, with CIFAR-10 before digits."""
    for method, published in PUBLISHED.items():
        path = CARDS / f"{method}.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        ours: dict[str, Any] = {}
        for name, title in ON_CARDS.items():
            rows = [short(row) for row in kept(name) if row["attack"]["method"] == method]
            if rows:
                command = f"lustral bench run benchmarks/plans/{name}.toml --store STORE"
                ours[title] = {"setting": SETTINGS[name], "victims": rows, "command": command}
        if not ours:
            continue
        if "victims" in old.get("ours", {}) and method in ("badnets", "blended"):  # of benchmarks/cpu_setting.py
            write_json_atomic(path, {**old, "zoo": ours})
            continue
        first = next(iter(ours.values()))
        write_json_atomic(path, {"method": method, "published": published, "ours": first, "zoo": ours})


REMARKS = """
## What to make of it

**CIFAR-10, 10 %.** Set beforehand: ASR of at least 95 % for BadNets, Low-Frequency, BPP and IMC, 97 for Blended, 90 for SSBA and
Input-aware, 98 for TrojanNN, 80 for WaNet, 85 for SIG and Label-Consistent at 5 % poison; ACC within 2.5 points of the benign
model. All but one are met. Input-aware reaches 87.1 %. The control tells why: with half as many crossed triggers, all else
equal, it reaches 94.0 %; a classifier that has seen twelve epochs gives own and crossed triggers the more frequent label. BPP
loses nothing by its negatives. Adap-Blend reaches 23.5 % at 1 % poison and 1 % covers (published: 76.5 % at 0.3 %, another
network and a longer training); why was not looked into. Adap-Patch and TaCT reach 100 and 99 %, but TaCT's patch also fires
on 43 % of the images whose class is neither source nor cover, and Adap-Patch's covers are recognised in 61 % of the cases.

**GTSRB**, eight epochs, some 1,150 steps. What fails there: Label-Consistent (0.3 %; BackdoorBench has 0.02 % at 0.1 % poison):
signs stay easy to learn from when they are perturbed by 16/255, so nothing leans on the patches. Adap-Patch (2.2 %): its covers
are recognised, the full trigger is not learnt. WaNet (45 %) and BPP (75 %): their opposing images are learnt late, and there are
a quarter of the steps of CIFAR-10. None of these causes was tested. BadNets reaches 94 %, where BackdoorBench has an odd 59 %.

**Cost** (`python benchmarks/attack_costs.py`, one run, as a multiple of a benign training of 12 epochs): Input-aware 1.58, and
0.13 once for its mask network; IMC 1.05; Label-Consistent 1.06; all others 0.99 to 1.01. Set beforehand: 1.1 for attacks on
data, 1.5 for WaNet and BPP, 3.5 for Input-aware. A surrogate takes 0.4 trainings, SSBA's encoder 0.2, once per data set.

**1 % poison** (475 images). TrojanNN, Label-Consistent, IMC and Blended still reach 97 to 100 %, SIG 92, BadNets 87
(BackdoorBench: 75 after 100 epochs), Low-Frequency 77 (86). SSBA, WaNet, BPP and Input-aware end at 2 %, where BackdoorBench has
73, 13, 87 and 79 %. All four have a faint trigger or train against false ones, and twelve epochs show 475 images 5,700 times
instead of 50,000 times; whether a longer training closes the gap was not tried. Accuracy is that of the benign model.

**Digits.** SIG, Label-Consistent and WaNet stay far below their published success: so small a network on so easy a task has no
need of a clean-label trigger, and a warp of a quarter of a pixel hardly changes digits drawn with 8 x 8 pixels. CIFAR-10 shows
that the attacks themselves work. One SSBA victim (seed 2) lost 31 points of accuracy: it calls clean images its target label
(every image of class 9 is recognised, 36 to 94 % of the others). Its training ended before it could tell clean from stamped
images (loss 0.14); the same seed with target 0 ends at 0.05 and 98.6 % ACC. BPP and Input-aware mix in 3 % negatives and
crossed triggers there instead of 10 %.
"""


def versions_note(rows: list[dict[str, Any]]) -> str:
    """Return a sentence about how many victims older versions made."""
    old = sum(outdated(row.get("versions")) is not None for row in rows)
    return f"{old:,} of these {len(rows):,} victims were made by older versions of a class that took part, or without versions."


def table() -> None:
    """Write the table of all kept victims."""
    lines = [
        "# Attacks: what ours reach",
        "",
        "Made by `python benchmarks/zoo.py cards` from benchmarks/results/zoo. ACC, ASR and RA in per cent, measured",
        'with the true trigger rounded to 8 bits; ASR and RA on images whose label the attacker changes. "vs clean":',
        "against the benign model of the same seed, or of seed 0 where there is none. Sources of what is published: the cards.",
        "The PreAct-ResNet18 of these tables has a normalisation and ReLU after its last block (`preact_resnet18_flat` today).",
        "",
        versions_note([row for name in SETTINGS for row in kept(name)]),
        "",
    ]
    for name, setting in SETTINGS.items():
        rows = kept(name)
        if not rows:
            continue
        benign = [row for row in kept(BENIGN.get(name, name)) if row["attack"]["method"] == "none"]
        clean = {row["seed"]: row["metrics"]["acc"]["value"] for row in benign}
        lines += [f"## {name}: {setting}", ""]
        lines += ["| attack | poison | target | seed | ACC | vs clean | ASR | RA | further rates | published ACC/ASR |"]
        lines += ["|---|---|---|---|---|---|---|---|---|---|"]
        for row in rows:
            lines.append(table_row(name, row, clean))
        lines.append("")
    write_text_atomic(TABLE, "\n".join(lines) + REMARKS)


def table_row(name: str, row: dict[str, Any], clean: dict[int, float]) -> str:
    """Return one victim as a row."""
    settings, metrics, method = row["attack"]["settings"], row["metrics"], row["attack"]["method"]
    percent = {
        k: "n/a" if metrics[k]["value"] is None else f"{100 * metrics[k]['value']:.2f}" for k in ("acc", "asr", "ra")
    }
    compared = clean.get(row["seed"], clean.get(0))  # benign models of further seeds are not always there
    change = "" if compared is None else f"{100 * (metrics['acc']['value'] - compared):+.2f}"
    probes = ", ".join(f"{n.replace('_', ' ')} {100 * r['value']:.1f}" for n, r in metrics["probes"].items() if r["n"])
    beside = BESIDE.get(name, {}).get(method, "")
    if method == "none":
        return f"| benign | | | {row['seed']} | {percent['acc']} | | | | | |"
    label = attack_label({"attack": row["attack"], "start": None})
    rate, target = f"{100 * settings['poison_rate']:g} %", settings["target_label"]
    texts = [label, rate, target, row["seed"], percent["acc"], change, percent["asr"], percent["ra"], probes, beside]
    return f"| {' | '.join(map(str, texts))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    keeping = verbs.add_parser("keep")
    keeping.add_argument("store")
    keeping.add_argument("--plan", type=Path, required=True)
    verbs.add_parser("cards")
    options = parser.parse_args()
    if options.verb == "keep":
        keep(options.store, options.plan)
    else:
        cards()
        table()


if __name__ == "__main__":
    main()
