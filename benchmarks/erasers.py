"""Keep what erasers reached in a plan as one small JSON file, and write their cards and the tables of docs/results-erasers.md.

lustral bench run benchmarks/plans/erasers_toy.toml --store STORE
python benchmarks/erasers.py keep STORE --plan benchmarks/plans/erasers_toy.toml
python benchmarks/erasers.py cards
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from eraser_pictures import heat_map
from lustral.bench.expansion import expand
from lustral.bench.grid import attack_label
from lustral.bench.plan import PlanError, read_plan
from lustral.bench.sources import Sources
from lustral.bench.store import Store, StoreError
from lustral.files import write_json_atomic, write_text_atomic

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "erasers"
CARDS = ROOT.parent / "tests" / "cards"
TABLE = ROOT.parent / "docs" / "results-erasers.md"
SETTINGS = {  # by plan
    "erasers": "PreAct-ResNet18 of width 16, CIFAR-10, CPU",
    "erasers_seeds": "PreAct-ResNet18 of width 16, CIFAR-10, further seeds, CPU",
    "erasers_1pct": "PreAct-ResNet18 of width 16, CIFAR-10, 1 % poison, CPU",
    "erasers_few": "PreAct-ResNet18 of width 16, CIFAR-10, few clean images, CPU",
    "erasers_architectures": "BadNets on other networks, ten classes of Tiny ImageNet at 32 pixels, CPU",
    "erasers_paper": "PreAct-ResNet18 of width 64, CIFAR-10, one NVIDIA H200",
    "erasers_paper_budgets": "the same victims, published budgets and unbounded rates, one NVIDIA H200",
    "erasers_toy": "small CNN, embedded digits (1,365 training images, 72 clean ones), CPU",
}
PICTURES = {  # titles of the plans that are drawn
    "erasers": "Width 16, 2,500 clean images, 10 % poison (SIG and Label-Consistent: 5 %)",
    "erasers_1pct": "Width 16, 2,500 clean images, 1 % poison",
    "erasers_paper": "Width 64, 2,500 clean images, 10 % poison (SIG: 5 %)",
}
CHECKS = ("before", "retuned", "retuned_clean", "pushed")  # of an audit
MODELS = ("purified", "benign", "exact")
WORKED = 0.5  # attack success rate above which a victim counts in means of ASR and DER
LEADERBOARD = (
    "BackdoorBench leaderboard, June 2025, PreAct-ResNet18, CIFAR-10, 10 % poison, 5 % clean: mean of 8 attacks"
)
LEADERBOARD_ATTACKS = ("badnets", "blended", "low_frequency", "ssba", "wanet", "input_aware", "bpp", "trojan_nn")
LEADERBOARD_BEFORE = 0.921  # mean accuracy of its victims
PUBLISHED: dict[str, dict[str, Any]] = {
    "anp": {"source": LEADERBOARD, "acc": 0.859, "asr": 0.008, "ra": 0.791, "der": 0.952},
    "clp": {"source": LEADERBOARD, "acc": 0.901, "asr": 0.659, "ra": 0.298, "der": 0.648},
    "cnpd": {
        "source": "Zhu et al., arXiv 2502.18520: its tables were not at hand, and the BackdoorBench leaderboard leaves it out"
    },
    "fine_pruning": {"source": LEADERBOARD, "acc": 0.923, "asr": 0.537, "ra": 0.335, "der": 0.718},
    "fine_tuning": {"source": LEADERBOARD, "acc": 0.924, "asr": 0.348, "ra": 0.586, "der": 0.811},
    "fst": {
        "source": "Min et al., NeurIPS 2023: its tables were not at hand, and the BackdoorBench leaderboard leaves it out"
    },
    "ft_sam": {
        "source": "Zhu et al., ICCV 2023, table 1: CIFAR-10, 10 % poison, 5 % clean: mean of 10 attacks",
        "acc": 0.9210,
        "asr": 0.0247,
        "der": 0.9662,
    },
    "i_bau": {"source": LEADERBOARD, "acc": 0.885, "asr": 0.178, "ra": 0.687, "der": 0.880},
    "nad": {"source": LEADERBOARD, "acc": 0.922, "asr": 0.320, "ra": 0.614, "der": 0.824},
    "neural_cleanse": {"source": LEADERBOARD, "acc": 0.917, "asr": 0.153, "ra": 0.754, "der": 0.906},
    "neural_polarizer": {
        "source": "Zhu et al., NeurIPS 2023: its tables were not at hand, and the BackdoorBench leaderboard leaves it out"
    },
    "rnp": {
        "source": "Li et al., ICML 2023: its tables were not at hand, and the BackdoorBench leaderboard leaves it out"
    },
    "sau": {
        "source": "Wei et al., NeurIPS 2023: its tables were not at hand, and the BackdoorBench leaderboard leaves it out"
    },
    "tsbd": {
        "source": "Lin et al., NeurIPS 2024: its tables were not at hand, and the BackdoorBench leaderboard leaves it out"
    },
}
OF_CPU_SETTING = ("baeraser", "mesa")  # benchmarks/cpu_setting.py knows what is published of these


def keep(url: str, plan: Path) -> None:
    """Copy what matters of the results that a store has of a plan into the repository; what is kept of other stores stays."""
    store, path = Store(url).open(create=False), RESULTS / f"{plan.stem}.json"
    old = {row["key"]: row for row in json.loads(path.read_text())["results"]} if path.exists() else {}
    rows = []
    audits = {record["result_key"]: record["metrics"] for record in store.records("audits")}
    for cell in expand(read_plan(plan), Sources()).cells:
        if cell.kind != "results":
            continue
        if not store.has("results", cell.key):
            rows += [old[cell.key[:16]]] if cell.key[:16] in old else []
            continue
        record = store.read("results", cell.key)
        spec, metrics, facts = record["spec"], record["metrics"], record["facts"]
        rates = {
            when: {name: metrics[when][name]["value"] for name in ("acc", "asr", "ra", "natural_rate")}
            for when in ("before", "after")
        }
        rows.append(
            {
                "key": record["key"][:16],
                "defence": facts["defence_method"],
                "settings": facts["defence"],
                "attack": attack_label(spec["victim"]),
                "poison_rate": facts["poison_rate"],
                "target_label": facts["target_label"],
                "seed": facts["seed"],
                "arch": spec["victim"]["arch"],
                "clean_images": facts["clean_images"],
                **rates,
                "der": metrics["compare"]["der"],
                "seconds": round(record["cost"]["seconds"], 1),
                "image_passes": round(record["cost"]["image_passes"]),
                "code": record["made"]["code"],
                **audit_of(record["key"], audits, old, rates["after"]),
            }
        )
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, {"plan": plan.stem, "results": rows})


def audit_of(
    key: str, audits: dict[str, dict[str, Any]], old: dict[str, dict[str, Any]], after: dict[str, float | None]
) -> dict[str, dict[str, Any]]:
    """Return the audit of a result as a kept row has it: of this store, or of one before that found the same rates."""
    if key in audits:
        return {"audit": success(audits[key])}
    before = old.get(key[:16], {})
    return {"audit": before["audit"]} if "audit" in before and before["after"] == after else {}


def success(audit: dict[str, Any]) -> dict[str, Any]:
    """Return what an audit says of the attack's success, by check and model, and the resistance."""
    rates = {check: {model: audit[check][model]["asr"] for model in MODELS} for check in CHECKS}
    return {**rates, "resistance": audit["resistance"]}


def kept() -> dict[str, list[dict[str, Any]]]:
    """Return the kept results by plan."""
    found = {path.stem: json.loads(path.read_text())["results"] for path in sorted(RESULTS.glob("*.json"))}
    return {name: found[name] for name in SETTINGS if name in found}


def short(row: dict[str, Any], *, with_arch: bool) -> dict[str, Any]:
    """Return a result as cards have it, named by what its attack does not tell: the network, if wanted, and settings."""
    named = {name: row[name] for name in ("attack", "poison_rate", "target_label", "seed", "clean_images")}
    told = [row["arch"]] if with_arch else []
    told += [row["settings"].removeprefix(row["defence"] + " ")] if row["settings"] != row["defence"] else []
    if told:
        named["name"] = ", ".join([row["attack"], *told])
    if row.get("audit"):
        named["audit"] = row["audit"]
    before = {f"{name}_before": row["before"][name] for name in ("acc", "asr")}
    after = {name: row["after"][name] for name in ("acc", "asr", "ra")}
    rates = {name: round(value, 5) for name, value in {**before, **after}.items() if value is not None}
    der = None if row["der"] is None else round(row["der"], 5)
    return {**named, **rates, "der": der, "seconds": row["seconds"], "image_passes": row["image_passes"]}


def cards() -> None:
    """Write a card for each eraser: published beside ours."""
    for method in (*PUBLISHED, *OF_CPU_SETTING):
        ours = {}
        for plan, rows in kept().items():
            several = len({row["arch"] for row in rows}) > 1
            own = [short(row, with_arch=several) for row in rows if row["defence"] == method]
            if own:
                command = f"lustral bench run benchmarks/plans/{plan}.toml --store STORE"
                ours[plan] = {"setting": SETTINGS[plan], "victims": own, "command": command}
        if not ours:
            continue
        path = CARDS / f"{method}.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        published = PUBLISHED.get(method) or old["published"]
        if "families" in old.get("ours", {}):  # of benchmarks/cpu_setting.py
            write_json_atomic(path, {**old, "published": published, "erasers": ours})
        else:
            write_json_atomic(
                path, {"method": method, "published": published, "ours": next(iter(ours.values())), "erasers": ours}
            )


def percent(value: float | None) -> str:
    """Return a fraction in per cent."""
    return "" if value is None else f"{100 * value:.1f}"


def mean(values: list[float]) -> float | None:
    """Return the mean, or None of nothing."""
    return statistics.fmean(values) if values else None


Victim = tuple[str, int, str, int]


def victim_of(row: dict[str, Any]) -> Victim:
    """Return what names a column: attack, seed, architecture, clean images."""
    return row["attack"], row["seed"], row.get("arch", ""), row["clean_images"]


def titles(victims: list[Victim]) -> list[str]:
    """Return the heads of columns: the attack, and of the rest what differs."""
    differing = [len({victim[n] for victim in victims}) > 1 for n in range(4)]
    forms = ("{}", "seed {}", "{}", "{} clean")
    return [
        ", ".join(form.format(part) for part, form, show in zip(victim, forms, differing, strict=True) if show)
        or victim[0]
        for victim in victims
    ]


def labelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return results named by their settings too where these are not the defaults."""
    return [{**row, "defence": row["settings"]} for row in rows]


def table() -> None:
    """Write the tables of each plan: means, every cell, and what woke the purified models up."""
    lines = [
        "# Erasers: what ours reach",
        "",
        "Made by `python benchmarks/erasers.py cards` from benchmarks/results/erasers. In per cent, with the true trigger, on",
        "the test set. Means are over victims whose attack had worked (ASR above 50 %); n says over how many. Passes are passes",
        "of one image through the network and back, per clean image.",
        "",
        *IN_SHORT.splitlines(),
        "",
    ]
    found = kept()
    for plan, rows in found.items():
        rows = sorted(labelled(rows), key=lambda row: row["attack"] == "benign")  # stable: the benign column comes last
        victims = list(dict.fromkeys(victim_of(row) for row in rows))
        clean = sorted({row["clean_images"] for row in rows}, reverse=True)
        lines += [f"## {plan}: {SETTINGS[plan]}, {' or '.join(f'{n:,}' for n in clean)} clean images", ""]
        if plan in PICTURES:
            lines += [picture(plan, rows), ""]
        for budget in clean:
            if len(clean) > 1:
                lines += [f"### {budget:,} clean images", ""]
            own = [row for row in rows if row["clean_images"] == budget]
            lines += [*means(own), ""]
            shared = common(own)
            if shared and len(shared) < len(own):
                names = ", ".join(dict.fromkeys(row["attack"] for row in shared))
                lines += [f"The same over what every eraser was put to, {names}:", "", *means(shared), ""]
        before = {victim_of(row): row["before"] for row in rows}
        lines += [f"| ACC / ASR / RA | {' | '.join(titles(victims))} |", "|---" * (len(victims) + 1) + "|"]
        lines.append(f"| none | {' | '.join(cell(before[victim]) for victim in victims)} |")
        for method in dict.fromkeys(row["defence"] for row in rows):
            own = {victim_of(row): row for row in rows if row["defence"] == method}
            cells = [cell(own[victim]["after"]) if victim in own else "" for victim in victims]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines += ["", *audited(rows)]
        if plan == "erasers":
            lines += [*beside_leaderboard(rows), ""]
        if plan == "erasers_seeds":
            lines += [*over_seeds(rows, found.get("erasers", [])), ""]
        lines += [REMARKS.get(plan, ""), ""]
    write_text_atomic(TABLE, "\n".join(lines).rstrip() + "\n")


def picture(plan: str, rows: list[dict[str, Any]]) -> str:
    """Draw a plan's attacks against erasers with the most clean images, and return the line that shows it."""
    most = max(row["clean_images"] for row in rows)
    own = [row for row in rows if row["clean_images"] == most]
    attacks = list(dict.fromkeys(row["attack"] for row in own if (row["before"]["asr"] or 0) > WORKED))
    heat_map(own, TABLE.parent / "images" / f"{plan}.png", attacks=attacks, title=PICTURES[plan])
    return f"![Attack success that each eraser left of each attack, and the accuracy it cost](images/{plan}.png)"


def common(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results on victims that every eraser was put to."""
    methods = {row["defence"] for row in rows}
    seen = {(victim_of(row), row["defence"]) for row in rows}
    return [row for row in rows if all((victim_of(row), method) in seen for method in methods)]


def means(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table with a row for each eraser: means over its victims."""
    lines = ["| eraser | n | ASR | ACC loss | RA | DER | ACC loss, benign | seconds | passes |", "|---" * 9 + "|"]
    for method in dict.fromkeys(row["defence"] for row in rows):
        own = [row for row in rows if row["defence"] == method]
        worked = [row for row in own if (row["before"]["asr"] or 0) > WORKED]
        asr = mean([row["after"]["asr"] for row in worked])
        ra = mean([row["after"]["ra"] for row in worked])
        der = mean([row["der"] for row in worked])
        loss = mean([row["before"]["acc"] - row["after"]["acc"] for row in worked])
        benign = mean([row["before"]["acc"] - row["after"]["acc"] for row in own if row["attack"] == "benign"])
        seconds = statistics.median(row["seconds"] for row in own)
        passes = statistics.median(row["image_passes"] / row["clean_images"] for row in own)
        lines.append(
            f"| {method} | {len(worked)} | {percent(asr)} | {percent(loss)} | {percent(ra)} | "
            f"{'' if der is None else f'{der:.3f}'} | {percent(benign)} | {seconds:.0f} | {passes:.0f} |"
        )
    return lines


def beside_leaderboard(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table of means over the attacks that BackdoorBench's leaderboard has, published beside ours."""
    lines = [
        "The eight attacks of BackdoorBench's leaderboard (there: width 64 and 100 epochs): published, ours.",
        "",
        "| eraser | ASR, published | ours | ACC loss, published | ours | RA, published | ours |",
        "|---" * 7 + "|",
    ]
    for method, published in PUBLISHED.items():
        own = [row for row in rows if row["defence"] == method and row["attack"].split()[0] in LEADERBOARD_ATTACKS]
        if published["source"] != LEADERBOARD or len(own) < len(LEADERBOARD_ATTACKS):
            continue
        asr, ra = (mean([row["after"][name] for row in own]) for name in ("asr", "ra"))
        loss = mean([row["before"]["acc"] - row["after"]["acc"] for row in own])
        numbers = (published["asr"], asr, LEADERBOARD_BEFORE - published["acc"], loss, published["ra"], ra)
        lines.append(f"| {method} | {' | '.join(percent(number) for number in numbers)} |")
    return lines


def over_seeds(rows: list[dict[str, Any]], first: list[dict[str, Any]]) -> list[str]:
    """Return a table of means and extremes over the seeds of each attack that worked, with the seed that another plan has."""
    rows, first = ([row for row in own if (row["before"]["asr"] or 0) > WORKED] for own in (rows, first))
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    count = len({row["seed"] for row in [*first, *rows]})
    lines = [
        f"ASR and ACC loss over {count} seeds, the first of them from the table of ten attacks: mean (least to most).",
        "",
        f"| eraser | {' | '.join(f'{attack}, ASR | {attack}, ACC loss' for attack in attacks)} |",
        "|---" * (2 * len(attacks) + 1) + "|",
    ]
    for method in dict.fromkeys(row["defence"] for row in rows):
        cells = []
        for attack in attacks:
            own = [row for row in [*first, *rows] if (row["defence"], row["attack"]) == (method, attack)]
            whole = len(own) == count
            cells += [
                spread([row["after"]["asr"] for row in own]) if whole else "",
                spread([row["before"]["acc"] - row["after"]["acc"] for row in own]) if whole else "",
            ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def spread(values: list[float]) -> str:
    """Return a mean, the least and the most, in per cent."""
    return f"{percent(mean(values))} ({percent(min(values))} to {percent(max(values))})"


def audited(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of what woke purified models up, or nothing where none was audited."""
    own = [row for row in rows if row.get("audit")]
    if not own:
        return []
    lines = [
        "ASR before and after each try to wake the backdoor up; in brackets of the benign model and of an exact purification.",
        "",
        f"| eraser | victim | {' | '.join(CHECKS)} | resistance |",
        "|---" * (len(CHECKS) + 3) + "|",
    ]
    for row in own:
        cells = ["{} ({}, {})".format(*(percent(row["audit"][check][model]) for model in MODELS)) for check in CHECKS]
        told = row["audit"]["resistance"]
        lines.append(
            f"| {row['defence']} | {row['attack']} | {' | '.join(cells)} | {'' if told is None else f'{told:.2f}'} |"
        )
    return [*lines, ""]


def cell(rates: dict[str, float | None]) -> str:
    """Return ACC / ASR / RA, or ACC alone for a benign model."""
    return " / ".join(percent(rates[name]) for name in ("acc", "asr", "ra") if rates[name] is not None)


IN_SHORT = """## In short

* **First choice: `sau`.** Of those that leave little it costs least accuracy: 9 % of ten attacks for 1.8 points at width
  16, 1.4 % of four for 2.1 at width 64, where its erasure also held when it was tuned on poisoned images again.
* **Less left, for more: `tsbd`** (6 % for 2.6 points, at most a fifth of any attack) or **`anp`** (6 % for 3.7) at width
  16.
* **If `lustral scan` finds a trigger: `mesa` or `baeraser`.** At 10 % poison they leave at most 5 % of what they find, for at
  most 1.4 points, give most triggered images their right answers back and leave a benign model as it was. Of the ten attacks they
  find six and five; what they do not find they leave whole.
* **Wide networks: `cnpd` as well** (2.0 % for 2.0 points at width 64), but it makes another architecture, and the backdoor
  sleeps: five poisoned images woke that of BadNets up.
* **1 % poison, or few clean images: no single one is reliable.** SAU leaves 28 % of six attacks at 1 %, the others more,
  but MESA, where it finds a trigger, 3 to 13 %; with 500 images SAU's and I-BAU's erasures came back on clean fine-tuning.
  Get more clean images, or train anew.
* **Not by themselves:** `fine_tuning`, `nad`, `ft_sam`, `fine_pruning`, `rnp`, `clp`, `neural_polarizer` each leave more
  than a quarter of the ten attacks on average, `fst` two thirds of SIG."""

REMARKS = {
    "erasers": """Set beforehand, on average over attacks that had worked: SAU, Neural Polarizer and TSBD ASR of at most 5
%, 3 points of ACC, DER 0.93; I-BAU ASR of at most 15 %; 1.5 points of ACC on a benign model. TSBD and SAU meet ACC and
DER and miss the ASR (6.1 and 9.4 %), I-BAU meets its bar by a hair (14.9 %), Neural Polarizer misses ASR and DER (48.5 %,
0.733); it erases SSBA and, with this seed alone, WaNet. On the benign model SAU stays within 1.5 points, TSBD and I-BAU
lose 1.8, Neural Polarizer 2.3. Who breaks where: SAU keeps a third of SIG and a quarter of Input-aware, and an eighth of
Low-Frequency; TSBD a fifth of Low-Frequency and an eighth of Label-Consistent; I-BAU half of Input-aware (a trigger for
every image, where it looks for one for all), then SIG, Low-Frequency, Blended and WaNet. Robust accuracy on SIG stays
below 38 % even with TSBD, which leaves 4 % ASR; that the wave itself spoils the image is a guess.

Clean fine-tuning, the control, leaves 51.4 % for 1.3 points: 3 to 13 % of BPP, SSBA, BadNets and Input-aware, 28 of WaNet,
nearly all of the others, like NAD. Its epoch used to be chosen on held-out accuracy, which left 70 %: the most accurate
epoch is often the first, whose small steps leave the backdoor as it was. BackdoorBench's, which keeps the last epoch as
ours does now, leaves 34.8 % over its eight attacks, ours 40.8; at width 64 it is not measured yet.

Of the baselines ANP leaves least, 5.9 % over all ten (SIG 18, Low-Frequency 12, Blended 10), less than any of the four
but for 3.7 points; its published row has 0.8 % at 5 points. FST leaves 9.0 % (SIG 66, Low-Frequency 21) at a low robust
accuracy (49): it answers triggered images wrongly instead of with the attacker's label, Label-Consistent's to 89 %. RNP
erases seven of ten and keeps SIG, Label-Consistent (94 and 99 %) and half of Low-Frequency. FT-SAM and Fine-Pruning keep
36 and 35 %, NAD 50: all of Label-Consistent and TrojanNN, most of SIG and Blended, but for Fine-Pruning, which keeps
three quarters of the first two. FT-SAM's paper has 2.5 % over ten attacks; ours is far from
that, furthest on Label-Consistent (100 %). CLP erases SSBA and BPP, for 11 and 5 points, and six tenths of
TrojanNN; against the others it cuts few channels of this narrow network. That its mean ASR is near the published one
(68.4 and 65.9) is chance: on SSBA it is 2 here and 68 there. ANP and RNP found nothing to cut until masks were learnt in
training mode ([a trap](methods/anp.md)) and cut in order. Refreshing the batch normalisation costs 3 points and makes the
triggers work better.

Audits. On SSBA ANP's erasure holds (5 % after retuning with five poisoned images; a benign model 2 %), RNP's less so
(26 %). On BPP those of MESA, FT-SAM, FST and NAD hold (3 to 4 %, a benign model 2, an exact purification 26); Fine-Pruning's
comes back from 0.3 to 98.8 %: what it cut and tuned away a few images restore.

BaEraser, MESA and Neural Cleanse first search a small trigger, and do nothing where they find none: of WaNet, SIG and
Low-Frequency they keep all (Neural Cleanse 86 % of SIG), and the benign model comes back as it was. Where the
search finds something they cost little and give right answers back: MESA leaves at most 2.1 % of BadNets,
Label-Consistent, SSBA, TrojanNN and BPP and 5.2 of Blended for 0.8 to 1.4 points, at robust accuracies of 73 to 89;
BaEraser 0.3 to 1.5 % of BadNets, Blended, SSBA, TrojanNN and BPP for 0.5 to 1.1, and misses Label-Consistent; Neural
Cleanse misses Label-Consistent and leaves 17 % of Input-aware, which the other two miss.

CNPD, whose rate and radius were chosen on Blended at 1 % poison, leaves 18.9 %, where Neural Polarizer leaves 48.5, and
costs 3.5 points (2.6 on the benign model): Blended, Low-Frequency (1.3 %, where none of the four leaves less than 12),
SSBA and BPP are erased, 19 % of SIG is left, where SAU leaves 32, 11 and 12 % of TrojanNN and Input-aware, 27 of WaNet,
46 of BadNets and 70 of Label-Consistent. Robust accuracy stays low: triggered images of SSBA are answered rightly in 34 %
of cases, presumably because a polarizer sends them away from the attacker's label without knowing where. It misses the
bars set for Neural Polarizer here, and meets them at width 64 (below).

SAU's rate was chosen on IMC, I-BAU's on IMC and on Blended with seed 1, Neural Polarizer's settings on Blended at 1 % poison;
none of these is in this table, nothing was changed after it was seen. SAU had run on BadNets at 1e-3 before (ACC 84.0, ASR
3.2), which is why its rate was looked at. On SIG at 1 % poison (ASR 91.8), at 5e-4 instead of 3e-4, SAU leaves 52.9 % at
three points of accuracy: neither rate suffices for SIG. Why Neural Polarizer fails: [its page](methods/neural_polarizer.md).
Seconds are with three trainings at a time on two cores.

**Speed** (`python benchmarks/eraser_speed.py --victim FOLDER --data cifar10 --seeds 3`: Blended, two epochs, two idle
threads, equal steps, against plain transcriptions of the published algorithms): SAU 3.4 times as fast, Neural Polarizer
2.5, I-BAU 2.1, TSBD 1.9; set beforehand were 2 for each, so TSBD misses. Earlier single runs had shown 1.9, 2.2 and 2.4
for TSBD, and 1.75 to 2.2 for I-BAU. In float32 and contiguous memory, where the algorithm alone counts, it is 1.7, 1.3,
1.4 and 1.1: what is computed once instead of five times, passes shared, no copies of the model, and for I-BAU second
derivatives of a product and a sum instead of a frozen batch normalisation (40 and 50 seconds before, 38 after). The rest
is bfloat16 and channels-last memory. What comes out, plain and ours, over the seeds: SAU 82.2 to 82.8 % ACC, 0.2 to 0.5 %
ASR and 82.1 to 82.9, 0.3 to 0.6, no difference; TSBD 81.5 to 82.9, 5 to 11 and 80.1 to 81.7, 3 to 5, a point of ACC and
half the ASR less; I-BAU, two rounds at the published rate, wanders with the seed in both, 80.3 to 84.0, 7 to 16 and 79.4
to 82.5, 2 to 12; Neural Polarizer 79.9 to 80.4, 65 to 89 and 82.9 to 83.7, 55 to 66, better in both and no repair in
either.
""",
    "erasers_seeds": """One seed says little of WaNet: SAU leaves 8, 26 and 50 % of it, I-BAU 6 to 29 %, and Neural
Polarizer, which seemed to erase it with the first seed, keeps 90 and 98 % with the others. TSBD alone erases all three
attacks with every seed, at most a tenth of Blended left. On BadNets SAU, TSBD and I-BAU stay below 5 % with every seed.
""",
    "erasers_1pct": """The six attacks of ten that take hold at 1 %: SSBA, WaNet, BPP and Input-aware do not
([attacks](results-attacks.md): ASR below 3 %), so there is nothing to erase. A benign model knows no poison rate: its
rows are those of the ten attacks and of few images. SAU, Neural Polarizer, TSBD, I-BAU, ANP and RNP met all six with
2,500 images, the four all but Label-Consistent with fewer; CNPD, fine-tuning and the other baselines Blended,
Low-Frequency and TrojanNN. Neural Polarizer's and CNPD's settings were chosen on this Blended victim, and two rates of
SAU were compared on this SIG.

Who breaks where. At 1 % a backdoor is harder to erase than at 10 %, not easier. With 2,500 images BadNets falls to SAU,
TSBD and I-BAU as before (3 to 5 %). Blended does not: SAU leaves 63 % (3 at 10 % poison), I-BAU 91 (16), TSBD 48 (6),
ANP 61 (10), RNP 98 (1). SIG keeps 49 to 89 %, whichever eraser tries. Of Label-Consistent SAU and I-BAU leave 3 %, TSBD
99: resetting more than 5 % of the neurons costs too much accuracy, and the backdoor is not among these ([what was
tried](methods/tsbd.md)); so it is with TrojanNN, of which TSBD leaves 84 % and CNPD 53, SAU and I-BAU 2 and 5.
Low-Frequency, weak before (77 %), comes down to 31 with I-BAU, 32 with SAU, 39 with CNPD and 41 with TSBD, Neural
Polarizer at 67. On average over the six SAU leaves 28 %, I-BAU 37, TSBD 55, Neural Polarizer 74. Least of Blended is
left by MESA, whose search finds its trigger: 13 % for 1.1 points, RA 70; then by CNPD, 38 % for 2.8, on the victim that
it was tuned on; FST, Fine-Pruning and CLP leave 81 to 91 %, the search of Neural Cleanse finds nothing. Neural
Polarizer leaves 19 % of BadNets, better than the 94 at 10 % poison, two thirds of Low-Frequency and above 80 % of the
others. ANP, which erases most at 10 %, and RNP fail at 1 %: 48 and 86 % on average, and a third of BadNets even for ANP
(BackdoorBench has 26 % for ANP at 1 %). TrojanNN's small patch falls to ANP (6 %) and to the searches of BaEraser, MESA
and Neural Cleanse (1, 3 and 3 % for 0.6 to 1.3 points), and to no other baseline (76 to 100 %); of Low-Frequency FST
leaves 30, as SAU and I-BAU do, the others 45 to 78. BaEraser's search finds neither Blended nor Low-Frequency, MESA's
not the latter.

Fewer images change little on BadNets (SAU 5 % with 500 images and 14 with 50, I-BAU 3 and 7, TSBD 8 and 25), on
TrojanNN (SAU 1 and 2, I-BAU 4 and 5, TSBD and Neural Polarizer above 90) and on Blended (56 to 93 %, whichever of the
four tries). Of Low-Frequency SAU leaves 20 % with 500 images and 61 with 50, I-BAU 31 and 30, TSBD 33 and 68. With 50
images SIG falls to SAU, Neural Polarizer and I-BAU (0.4, 1 and 13 %), but so does the model: ACC 75 to 79, RA on SIG at
most 31. Fine-tuning, the control, leaves 80 % or more of BadNets, Blended, SIG and Label-Consistent with its epoch
chosen on held-out images; its last weights 80 to 96 % of Blended, 57 of Low-Frequency and 99.9 of TrojanNN.

Seconds are with two trainings and tests at a time on two cores.
""",
    "erasers_few": """Who breaks where. With 500 images SAU, I-BAU and TSBD still leave 7 to 10 % on average and cost 4 to 5
points instead of 2; TSBD begins to keep Blended (18 %), SAU WaNet (15 %), I-BAU Blended (17 %). With 50 images all four
cost 12 points, also on the benign model, and each keeps something: SAU 44 % of WaNet, I-BAU half of it and a quarter of
Blended, TSBD half of Blended and a third of BadNets; SAU alone still erases both BadNets and Blended. Neural Polarizer
erases WaNet with any number of images, of this seed, and nothing else. Of 50 images 10 are held out: too few to notice a
loss of 12 points reliably.

Plain fine-tuning, its last weights, keeps Blended with 500 images (98 %) and three quarters of WaNet, and cuts BadNets to 12 %
for 1.6 points. With 50 images it leaves 15 % of BadNets and 56 of Blended for 7 to 8 points: less than TSBD and I-BAU cost for
32 and 6, 52 and 24 %. With the epoch chosen on held-out accuracy it does no harm and nothing else.

The audits say that erased is not gone: after the models that SAU and I-BAU made from 500 images were tuned a little, on
clean images alone, Blended was back at 97 and 99 %, BadNets at 33 and 24 %; TSBD's stayed at 22 and 4 %. Neither a benign
model nor an exact purification comes back (below 4 %).
""",
    "erasers_architectures": """With 250 clean images and networks trained from scratch on 4,750, erasing costs far more
than on CIFAR-10. SAU cuts the attack to 3 to 13 % on all three networks at 9 to 15 points of accuracy (at 10 to 16 before
its rate was bounded by the width of the network; on the benign ones the bound saves 2.8), TSBD to 6 to 11 % at 11 to 28,
FT-SAM to 14 to 19 % at 2 to 17. Neural Polarizer costs at most 8 points and erases on the ResNet only. The ViT is weak
before (57.6 % ACC, 53.6 % ASR, barely above the half from which victims count), so little can be said of it: FT-SAM does
best there. The control is sobering: plain fine-tuning, its last weights, leaves 6 to 18 % at 4 to 19 points, a mean of
11.2 % and 13.8 points where SAU has 9.0 and 12.3. SAU keeps 6 and 10 points more than it on the two convolutional
networks; FT-SAM does about as well as it, TSBD worse.
""",
    "erasers_paper": """All five victims and all rows are of one run on one machine. Victims were trained for 60 epochs
instead of BackdoorBench's 100, otherwise alike. What BackdoorBench's leaderboard has (ACC / ASR / RA; 10 % poison, SIG 5
%, where it lists I-BAU alone):

| published | badnets | blended | sig | wanet |
|---|---|---|---|---|
| none | 91.3 / 95.0 / 4.7 | 93.5 / 99.9 / 0.1 | 93.6 / 97.1 | 91.2 / 89.7 / 9.8 |
| fine_tuning | 90.0 / 1.5 / 89.4 | 92.8 / 96.1 / 3.6 | | 93.5 / 17.1 / 78.3 |
| fine_pruning | 91.3 / 57.1 / 41.6 | 93.2 / 99.3 / 0.7 | | 91.5 / 1.1 / 69.7 |
| nad | 89.9 / 2.1 / 88.7 | 92.2 / 97.7 / 2.1 | | 93.2 / 23.0 / 72.7 |
| anp | 84.2 / 0.7 / 84.0 | 86.6 / 2.2 / 61.2 | | 85.7 / 0.4 / 86.5 |
| clp | 90.1 / 77.6 / 21.4 | 91.3 / 99.7 / 0.2 | | 81.9 / 78.4 / 17.7 |
| i_bau | 89.2 / 1.3 / 89.2 | 87.0 / 50.5 / 33.2 | 86.1 / 3.5 / 57.2 | 89.5 / 5.2 / 86.6 |

The victims of BadNets, Blended and SIG are those of the leaderboard to within a point; WaNet's took better (99.0 % ASR).

At this size the bars of the cpu setting are met by SAU (1.4 % ASR, 2.1 points, DER 0.973), by I-BAU, whose bar is 15 %
(4.7 %), and by CNPD (2.0 %, 2.0 points, DER 0.971), the class-conditional form of Neural Polarizer, which itself erases
BadNets and WaNet and neither Blended nor SIG. TSBD misses 5 % by 0.3: it leaves 12 % of SIG. On the benign model all but
Fine-Pruning and CLP cost more than 1.5 points: CNPD 1.6, SAU and RNP 2.0, TSBD 3.7.

Width 16 does not tell what happens at width 64. SAU leaves 9.4 % there (32 of SIG, here 2), CNPD 18.9 (19 of SIG), with
the same settings, but for the rates of SAU and I-BAU that are bounded by the width. NAD, which leaves 50 % there, leaves
7 here and erases what it does not in print; RNP keeps two thirds of Blended and 95 % of SIG. Single runs: on victims of
the same recipe trained in an earlier run TSBD left 6 % of SIG instead of 12, FST 1 instead of 34, ANP 34 of Blended
instead of 14, RNP 21 of Blended instead of 66. CLP fails where it fails in print. ANP keeps 3 to 5 points more accuracy
than in print and leaves more of Blended: its threshold is chosen on held-out accuracy here.

Erased is not gone. On BadNets SAU's erasure holds: retuned with five poisoned images it stays at 2.6 %. Neural
Polarizer's and CNPD's come back to 93 and 87 %: they filter what a network says that knows the trigger as before. The
other rows were not audited: the machine's time ended.

Fine-tuning is here with the epoch chosen on held-out accuracy, as it was by default until this run: of Blended, SIG and
the benign model that is the first, whose small steps have changed little yet. Its last weights, the default now, have not
been measured at this size. Seconds are with fifteen processes on one GPU.
""",
    "erasers_paper_budgets": """SAU's published budget, 100 rounds at a constant 1e-4 in float32, is no better than our 12
epochs at a falling rate and costs three times as long: 4.0 % are left instead of 1.4, and on SIG the model broke down
after 90 good rounds (held-out accuracy 88 to 19 % within four; 28 % at the end), where only the last weights count. Over
the other three attacks it costs 2.7 points and leaves 5.1 %, ours 1.7 and 1.1. At the rate of the cpu setting, unbounded,
SAU costs 5.1 points instead of 2.1; I-BAU destroys the model, which is why both rates are bounded
([I-BAU](methods/i_bau.md)). A bound of 1000 is none. Neural Polarizer's published 50 epochs instead of 30 change little
but on BadNets. FT-SAM's published 100 epochs instead of 30 leave 23 % instead of 21: more of Blended, less of SIG; its
paper's 2.5 % over ten attacks are not reached that way. Fine-tuning for 100 epochs on mirrored images, the epoch chosen
on held-out accuracy: that takes the first epoch of all four runs, so that nothing is erased. At their end held-out
accuracy is 1.6 to 5.0 points below the victim's (2.4 to 5.2 without mirroring, after 20 epochs), so mirroring is not what
ours lacks beside the printed one, which lost 1.3 points of BadNets and 0.7 of Blended.
""",
    "erasers_toy": """72 clean images, of which 58 are trained on, are hard for most: only FST, Neural Polarizer and TSBD
cut the attack success of both victims by more than half, FST at the price of 15 points of accuracy. SAU and I-BAU did so
too (44 and 2 %) at 1e-3; the lower rates that serve 2,500 images better are too low for as few steps as 58 images give.
Of the methods that cut channels, ANP alone erases something, Blended, for 14 points: 14 held-out images cannot notice
such a loss.

MESA, BaEraser and Neural Cleanse erase BadNets and miss Blended; CNPD erases neither (93 %). Audits, of BadNets, say little
here: five poisoned images among 27 bring the benign model itself to 67 %, and most methods left the backdoor awake. Beside that,
the erasures of BaEraser, I-BAU and MESA hold (4, 1 and 39 %), FST's and Neural Cleanse's about as well as the benign
model (67 and 72), those of TSBD and Neural Polarizer do not (99 and 78 %).
""",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    keeping = verbs.add_parser("keep")
    keeping.add_argument("store")
    keeping.add_argument("--plan", type=Path, required=True)
    verbs.add_parser("cards")
    options = parser.parse_args()
    if options.verb == "keep":
        try:
            keep(options.store, options.plan)
        except (PlanError, StoreError) as error:
            parser.error(str(error))
    else:
        cards()
        table()


if __name__ == "__main__":
    main()
