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
from lustral.core.files import write_json_atomic, write_text_atomic
from lustral.core.versions import outdated
from lustral.store.store import Store, StoreError

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "erasers"
REMARKS = ROOT / "remarks"  # what is said of each plan, in Markdown
CARDS = ROOT.parent / "tests" / "cards"
TABLE = ROOT.parent / "docs" / "results-erasers.md"
SETTINGS = {  # by plan
    "erasers": "PreAct-ResNet18 of width 16, CIFAR-10, CPU",
    "erasers_seeds": "PreAct-ResNet18 of width 16, CIFAR-10, further seeds, CPU",
    "erasers_1pct": "PreAct-ResNet18 of width 16, CIFAR-10, 1 % poison, CPU",
    "erasers_few": "PreAct-ResNet18 of width 16, CIFAR-10, few clean images, CPU",
    "erasers_architectures": "BadNets on other networks, ten classes of Tiny ImageNet at 32 pixels, CPU",
    "erasers_paper": "PreAct-ResNet18 of width 64, CIFAR-10, one NVIDIA H200",
    "erasers_paper_seeds": "PreAct-ResNet18 of width 64, CIFAR-10, another seed, one NVIDIA H200",
    "erasers_paper_budgets": "the victims of erasers_paper, published budgets and unbounded rates, one NVIDIA H200",
    "erasers_toy": "small CNN, embedded digits (1,365 training images, 72 clean ones), CPU",
}
PICTURES = {  # titles of the plans that are drawn
    "erasers": "Width 16, 2,500 clean images, 10 % poison (SIG and Label-Consistent: 5 %)",
    "erasers_1pct": "Width 16, 2,500 clean images, 1 % poison",
    "erasers_paper": "Width 64, 2,500 clean images, 10 % poison (SIG: 5 %)",
    "erasers_paper_seeds": "Width 64, another seed, 2,500 clean images, 10 % poison (SIG: 5 %)",
}
FIRST_SEEDS = {  # plans of further seeds, and of the first
    "erasers_seeds": "erasers",
    "erasers_paper_seeds": "erasers_paper",
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
                "versions": {**spec["victim"].get("versions", {}), **spec.get("versions", {})},
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


def versions_note(rows: list[dict[str, Any]]) -> str:
    """Return a sentence about how many results older versions made."""
    old = sum(outdated(row.get("versions")) is not None for row in rows)
    return f"{old:,} of these {len(rows):,} results were made by older versions of a class that took part, or without versions."


def table() -> None:
    """Write the tables of each plan: means, every cell, and what woke the purified models up."""
    lines = [
        "# Erasers: what ours reach",
        "",
        "Made by `python benchmarks/erasers.py cards` from benchmarks/results/erasers. In per cent, with the true trigger, on",
        "the test set. Means are over victims whose attack had worked (ASR above 50 %); n says over how many. Passes are passes",
        "of one image through the network and back, per clean image.",
        "",
        versions_note([row for rows in kept().values() for row in rows]),
        "",
        remark("in_short"),
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
        if plan in FIRST_SEEDS:
            lines += [*over_seeds(rows, found.get(FIRST_SEEDS[plan], []), FIRST_SEEDS[plan]), ""]
        lines += [remark(plan), "", ""]
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


def over_seeds(rows: list[dict[str, Any]], first: list[dict[str, Any]], plan: str) -> list[str]:
    """Return a table of means and extremes over the seeds of each attack that worked, with the seed that another plan has.

    Erasers that did not meet every attack with every seed are left out.
    """
    everything = [row for row in [*labelled(first), *rows] if (row["before"]["asr"] or 0) > WORKED]
    attacks = list(dict.fromkeys(row["attack"] for row in rows if (row["before"]["asr"] or 0) > WORKED))
    count = len({row["seed"] for row in everything})
    lines = [
        f"ASR and ACC loss over {count} seeds, the first of them from {plan}: mean (least to most).",
        "",
        f"| eraser | {' | '.join(f'{attack}, ASR | {attack}, ACC loss' for attack in ['all', *attacks])} |",
        "|---" * (2 * len(attacks) + 3) + "|",
    ]
    for method in dict.fromkeys(row["defence"] for row in rows):
        by_attack = [
            [row for row in everything if (row["defence"], row["attack"]) == (method, attack)] for attack in attacks
        ]
        if any(len(own) < count for own in by_attack):
            continue
        asr = [[row["after"]["asr"] for row in own] for own in by_attack]
        loss = [[row["before"]["acc"] - row["after"]["acc"] for row in own] for own in by_attack]
        cells = []
        for rates, losses in zip([seed_means(asr), *asr], [seed_means(loss), *loss], strict=True):
            cells += [spread(rates), spread(losses)]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def seed_means(by_attack: list[list[float]]) -> list[float]:
    """Return the mean over attacks for each seed."""
    return [statistics.fmean(values) for values in zip(*by_attack, strict=True)]


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


def remark(name: str) -> str:
    """Return what is said of a plan, or under "in_short" of all of them; nothing where there is no such text."""
    path = REMARKS / f"{name}.md"
    return path.read_text(encoding="utf-8").rstrip() if path.exists() else ""


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
