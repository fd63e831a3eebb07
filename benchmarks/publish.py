"""Turn what a plan measured into kept rows, the tables of docs/results.md and README.md, and the methods' cards.

    lustral bench run benchmarks/plans/erasers.toml --store STORE
    python benchmarks/publish.py benchmarks/plans/erasers.toml --store STORE

Every cell of the plan becomes a row of ``benchmarks/results/PLAN.json``, the ones that the store lacks too: tables call these
"not run", and a later call fills them in. Rows that are kept and not in this store stay. Without a plan only pages and cards are
written again.

Pages hold a pair of comments for each generated part; what stands between them is replaced. Cards keep their ``published``
part, which is written by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lustral.bench.expansion import expand
from lustral.bench.plan import read_plan
from lustral.bench.sources import Sources
from lustral.catalog import DETECTORS, PURIFIERS, SAFE_TRAINERS, SIFTERS
from lustral.core.files import canonical, write_json_atomic, write_text_atomic
from lustral.core.versions import outdated
from lustral.store.store import KINDS, Store
from lustral.tables.rows import BENIGN, RATES, UNDEFENDED, load_cells

ROOT = Path(__file__).resolve().parent.parent
WORKED = 0.5  # attack success rate above which a victim counts in means
COLUMNS = ("data", "arch", "attack", "poison_rate", "target_label", "seed", "defence", "clean_images")
SEARCHERS = ("auto", "baeraser", "mesa", "neural_cleanse")  # leave a model as it was where they find no trigger
MOST_LOSS = 0.03  # accuracy that a recommended eraser may cost on average
MOST_LEFT = 0.5  # share of the attack success that it may leave on average
LITTLE_LOSS = 0.015  # the same where accuracy comes first
LARGE_LOSS = 0.15  # the same where few clean images make every eraser costly
FIRST = (
    "erasers",
    "erasers_toy",
    "erasers_architectures",
    "zoo_toy",
)  # whose rows are a card's "ours": the first that has any
README_ROWS = (
    ("erasers_toy", "auto"),
    ("erasers", "baeraser"),
    ("erasers", "sau"),
    ("erasers", "i_bau"),
    ("erasers", "fine_tuning"),
)
NOTHING = "not run"
AREAS = ("auroc", "auprc")
SIFTED = ("tpr", "fpr", "precision", "listed", "covers_listed")

Row = dict[str, Any]


class PublishError(ValueError):
    """Something cannot be published; the message says what is missing."""


# Rows


def keep(plan_file: Path, store: Store, results: Path) -> None:
    """Write a row for every cell of a plan: from the store, else as it was kept, else as not run."""
    path = results / f"{plan_file.stem}.json"
    old = {row["name"]: row for row in read_kept(path)["rows"]} if path.exists() else {}
    plan = read_plan(plan_file)
    everything = stored(store)
    found = {name_of(record): (cell, record) for cell, record in everything}
    found_by_key = {record["key"]: (cell, record) for cell, record in everything}  # by whatever label it was run
    rows = []
    for cell in expand(plan, Sources()).cells:
        columns = {"defence": UNDEFENDED, "clean_images": 0} | dict(cell.columns)
        name = name_of({"spec": cell.spec, "facts": columns})
        if hit := found.get(name) or found_by_key.get(cell.key):
            rows.append(row_of(name, {**hit[0], "defence": columns["defence"]}, hit[1]))
        else:
            rows.append(old.get(name) or {"name": name, **{key: columns[key] for key in COLUMNS}, "status": NOTHING})
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    head = json.dumps({"plan": plan_file.stem, "description": plan.description}, ensure_ascii=False, indent=1)
    write_text_atomic(path, f'{head[:-2]},\n "rows": [\n{lines}\n]}}\n')


def stored(store: Store) -> list[tuple[Row, dict[str, Any]]]:
    """Return the cells that a store has done, with their records; of two that differ in versions alone, today's comes last."""
    done = [row for row in load_cells(store).to_pylist() if row["status"] == "done"]
    done.sort(key=lambda row: (row["outdated"] is None, row["at"]))
    return [(row, record_of(store, row["key"])) for row in done]


def name_of(record: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that name a cell across versions: its victim, what tables call its defence, and its draw."""
    spec, facts = record["spec"], record["facts"]
    victim = without_versions(spec.get("victim", spec))
    told = [victim, facts.get("defence", UNDEFENDED), facts.get("clean_images", 0), spec["seed"]]
    return hashlib.sha256(canonical(told)).hexdigest()[:16]


def without_versions(spec: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a victim's specification without the versions of what made it, and of the model that it started from."""
    if spec is None:
        return None
    return {name: part for name, part in spec.items() if name != "versions"} | {
        "start": without_versions(spec["start"])
    }


def record_of(store: Store, key: str) -> dict[str, Any]:
    """Return the record of a finished cell, whatever its kind."""
    return next(store.read(kind, key) for kind in KINDS if kind != "failures" and store.has(kind, key))


def row_of(name: str, cell: Mapping[str, Any], record: Mapping[str, Any]) -> Row:
    """Return a finished cell as it is kept: numbers from the table of cells, counts, settings and versions from its record."""
    spec, metrics, made = record["spec"], record["metrics"], record["made"]
    row = {
        "name": name,
        **{column: cell[column] for column in COLUMNS},
        "status": "done",
        "key": cell["key"][:16],
        "epochs": spec.get("victim", spec)["trainer"]["epochs"],
        "settings": spec["attack"]["settings"] if cell["defence"] == UNDEFENDED else spec["defence"]["settings"],
        "versions": {
            **spec.get("victim", {}).get("versions", {}),
            **spec.get("scan", {}).get("versions", {}),
            **spec["versions"],
        },
        "code": made["code"],
        "machine": f"{made['device']}, {made['machine']}, threads: {made['threads']}, torch {made['versions']['torch']}",
        "at": made["at"][:10],
        **{f"{rate}0": counts(metrics["before"][rate]) for rate in RATES},
    }
    if "after" in metrics and cell["defence"] != UNDEFENDED:
        row |= {rate: counts(metrics["after"][rate]) for rate in RATES} | {"der": cell["der"]}
    if "sifting" in metrics:
        row["sifting"] = sifting_of(metrics["sifting"])
    if "parts" in metrics:
        row["parts"] = {name: sifting_of(part) for name, part in metrics["parts"].items()}
    if "scan" in spec:
        row["scan"] = spec["scan"]["defence"]
    if cell["outcome"] is not None:
        row |= {"outcome": cell["outcome"], "correct": cell["correct"]}
    if probes := metrics["before"].get("probes"):
        row["probes"] = {name: counts(rate) for name, rate in probes.items()}
    if cell["defence"] == UNDEFENDED:
        return row | {"seconds": round(cell["victim_seconds"], 1)}
    return row | {"seconds": round(cell["seconds"], 1), "image_passes": round(cell["image_passes"])}


def sifting_of(found: Mapping[str, Any]) -> Row:
    """Return what a list of suspicious images was worth as it is kept: AUROC and AUPRC, and counts."""
    areas = {name: None if found[name] is None else round(found[name], 5) for name in AREAS}
    return areas | {name: counts(found[name]) for name in SIFTED}


def counts(rate: Mapping[str, Any]) -> list[int]:
    """Return a rate as [hits, images]."""
    return [rate["hits"], rate["n"]]


def value(pair: Sequence[int] | None) -> float | None:
    """Return a kept rate as a fraction; None where there was nothing to count."""
    return None if pair is None or pair[1] == 0 else pair[0] / pair[1]


def read_kept(path: Path) -> dict[str, Any]:
    """Return a plan's kept rows, with its name and description."""
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return kept


# Means


@dataclass(frozen=True, kw_only=True)
class Mean:
    """What an eraser did to the victims of a plan whose attack had worked; rates are fractions.

    Attributes:
        defence: its label.
        victims: number of these victims.
        before, asr, worst, loss, ra, der: means of attack success before and after, the largest one after, and means of
            the accuracy lost, robust accuracy and DER.
        benign: accuracy lost by benign models; None where none was tried.
        seconds, passes: median seconds, and median passes of each clean image.
    """

    defence: str
    victims: int
    before: float
    asr: float
    worst: float
    loss: float
    ra: float
    der: float
    benign: float | None
    seconds: float
    passes: float


def method_of(row: Row) -> str:
    """Return the method that a row's label begins with."""
    return str(row["defence"].split()[0])


def erased(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in which an eraser was measured."""
    return [row for row in rows if "acc" in row and method_of(row) not in SAFE_TRAINERS]


def worked(row: Row) -> bool:
    """Say whether the victim's attack had worked."""
    return (value(row["asr0"]) or 0.0) > WORKED


def loss(row: Row) -> float:
    """Return the accuracy that was lost, as a fraction."""
    return (value(row["acc0"]) or 0.0) - (value(row["acc"]) or 0.0)


def mean_of(defence: str, rows: Sequence[Row], *, found: bool = False) -> Mean | None:
    """Return an eraser's means; None where it met no victim whose attack had worked.

    Args:
        defence: its label.
        rows: of a plan.
        found: leave out the victims that it returned unchanged.
    """
    own = [row for row in erased(rows) if row["defence"] == defence]
    met = [
        row for row in own if worked(row) and not (found and row["asr"] == row["asr0"] and row["acc"] == row["acc0"])
    ]
    if not met:
        return None
    left = [value(row["asr"]) or 0.0 for row in met]
    benign = [loss(row) for row in own if row["attack"] == BENIGN]
    return Mean(
        defence=defence,
        victims=len(met),
        before=statistics.fmean(value(row["asr0"]) or 0.0 for row in met),
        asr=statistics.fmean(left),
        worst=max(left),
        loss=statistics.fmean(map(loss, met)),
        ra=statistics.fmean(value(row["ra"]) or 0.0 for row in met),
        der=statistics.fmean(row["der"] for row in met),
        benign=statistics.fmean(benign) if benign else None,
        seconds=statistics.median(row["seconds"] for row in met),
        passes=statistics.median(row["image_passes"] / row["clean_images"] for row in met),
    )


def means(rows: Sequence[Row]) -> list[Mean]:
    """Return the means of every eraser that met at least one victim, in the plan's order."""
    labels = dict.fromkeys(row["defence"] for row in erased(rows))
    return [mean for label in labels if (mean := mean_of(label, rows)) is not None]


def best(rows: Sequence[Row], most_loss: float, *, searching: bool = False) -> Mean | None:
    """Return the eraser that leaves least for at most ``most_loss``; none that leaves most.

    Those that search a trigger take part where ``searching`` says so: with what they leave where they find none.

    Erasers that met several victims are compared on the victims that all of them met: a plan may be half run.
    """
    own = [row for row in erased(rows) if searching or row["defence"] not in SEARCHERS]
    met: dict[str, set[tuple[Any, ...]]] = {}
    for row in filter(worked, own):
        met.setdefault(row["defence"], set()).add(victim_of(row))
    several = {label: names for label, names in met.items() if len(names) > 1}
    if not several:
        return None
    shared = set.intersection(*several.values())
    compared = [row for row in own if victim_of(row) in shared or row["attack"] == BENIGN]
    fitting = [mean for mean in means(compared) if mean.defence in several and mean.loss <= most_loss]
    fitting = [mean for mean in fitting if mean.asr <= MOST_LEFT * mean.before]
    return min(fitting, key=lambda mean: mean.asr, default=None)


def victim_of(row: Row) -> tuple[Any, ...]:
    """Return what names a victim of a plan: attack, seed and network."""
    return row["attack"], row["seed"], row["arch"]


# Tables


def percent(number: float | None) -> str:
    """Return a fraction in per cent, with one decimal."""
    return "—" if number is None else f"{100 * number + 0.0:.1f}"


def table(head: str, lines: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown; ``head`` has the columns' names between bars."""
    rule = "|".join("---" for _ in head.split("|"))
    return "\n".join([f"| {head} |", f"|{rule}|", *(f"| {' | '.join(map(str, line))} |" for line in lines)])


def about(kept: Mapping[str, Any]) -> str:
    """Return what a reader has to know about a plan's tables: its command, and which rows are missing or old."""
    rows = kept["rows"]
    done = [row for row in rows if row["status"] == "done"]
    old = sum(outdated(row["versions"]) is not None for row in done)
    days = sorted({row["at"] for row in done if row["at"]})
    machines = sorted({row["machine"] for row in done if row["machine"]})
    parts = [kept["description"], f"Command: `lustral bench run benchmarks/plans/{kept['plan']}.toml --store STORE`."]
    parts += [f"Measured {days[0]} to {days[-1]}." if len(days) > 1 else f"Measured {days[0]}."] if days else []
    parts += [f"On: {'; '.join(machines)}."] if machines else []
    if missing := len(rows) - len(done):
        parts.append(f"**{missing:,} of {len(rows):,} cells are not run.**")
    if old:
        parts.append(f"Earlier versions of a class that takes part made {old:,} of {len(done):,} rows.")
    return "\n".join(parts)


def victims(rows: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
    """Return one row for each victim of a plan, its own where it was kept; by (attack, seed, arch), in the plan's order."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row["defence"] != UNDEFENDED):
        name = victim_of(row)
        if found.get(name, {}).get("status") != "done":
            found[name] = row
    order = dict.fromkeys(map(victim_of, rows))
    return {name: found[name] for name in order}


def heads(names: Sequence[tuple[Any, ...]]) -> list[str]:
    """Return what victims are called: the attack, and of seed and network what differs."""
    differ = [len({name[part] for name in names}) > 1 for part in range(3)]
    forms = ("{}", "seed {}", "{}")
    return [
        ", ".join(form.format(part) for form, part, show in zip(forms, name, differ, strict=True) if show) or name[0]
        for name in names
    ]


def victims_table(rows: Sequence[Row]) -> str:
    """Return a plan's victims at birth, with the further rates that their attacks report; the seeds of an attack share a line."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in victims(rows).values():
        groups.setdefault((row["attack"], row["arch"]), []).append(row)
    names = heads([(attack, 0, arch) for attack, arch in groups])
    lines: list[list[object]] = []
    for head, group in zip(names, groups.values(), strict=True):
        rate = "—" if group[0]["poison_rate"] is None else f"{100 * group[0]['poison_rate']:g}"
        done = [row for row in group if row["status"] == "done"]
        if not done:
            lines.append([head, rate, NOTHING, *[""] * 5])
            continue
        rates = [spread([value(row[f"{name}0"]) for row in done]) for name in RATES]
        probes = [
            f"{name.replace('_', ' ')} {spread([value(row['probes'][name]) for row in done])}"
            for name in done[0].get("probes", {})
        ]
        lines.append([head, rate, len(done), done[0]["epochs"], *rates, ", ".join(probes) or "—"])
    return table("victims | poison % | seeds | epochs | ACC | ASR | RA | further rates", lines)


def spread(rates: Sequence[float | None]) -> str:
    """Return the mean of a rate over seeds in per cent, with the least and the largest where there are several."""
    known = [rate for rate in rates if rate is not None]
    if not known:
        return "—"
    ends = {percent(min(known)), percent(max(known))}
    mean = percent(statistics.fmean(known))
    return mean if len(ends) == 1 else f"{mean} ({percent(min(known))} to {percent(max(known))})"


def labels_of(rows: Sequence[Row]) -> list[str]:
    """Return the labels of a plan's defences, in its order."""
    return list(dict.fromkeys(row["defence"] for row in rows if row["defence"] != UNDEFENDED))


def means_table(rows: Sequence[Row]) -> str:
    """Return the means of every eraser of a plan."""
    lines: list[list[object]] = []
    for label in labels_of(rows):
        if any(label.split()[0] in others for others in (DETECTORS, SIFTERS, SAFE_TRAINERS)):
            continue
        mean = mean_of(label, rows)
        if mean is None:
            lines.append([label, NOTHING, *[""] * 8])
            continue
        rates = [percent(rate) for rate in (mean.asr, mean.worst, mean.loss, mean.benign, mean.ra)]
        lines.append([label, mean.victims, *rates, f"{mean.der:.3f}", f"{mean.seconds:.0f}", f"{mean.passes:.0f}"])
    head = "eraser | victims | ASR left | worst | ACC lost | ACC lost, benign | RA | DER | seconds | passes"
    return table(head, lines)


def cells_table(rows: Sequence[Row]) -> str:
    """Return what every eraser left of each attack, and what it cost; of detectors the verdicts."""
    names = list(victims(rows))
    by_cell = {(row["defence"], *victim_of(row)): row for row in rows}
    lines = []
    for label in labels_of(rows):
        if label.split()[0] in SIFTERS or label.split()[0] in SAFE_TRAINERS:
            continue
        cells = []
        for name in names:
            row = by_cell.get((label, *name))
            if row is None or row["status"] != "done":
                cells.append(NOTHING)
            elif "acc" not in row:
                cells.append(f"{row['outcome']}{'' if row['correct'] else ' (wrong)'}")
            else:
                left = "" if name[0] == BENIGN else f"{percent(value(row['asr']))} / "
                cells.append(f"{left}{percent(loss(row))}")
        lines.append([label, *cells])
    return table(" | ".join(["ASR left / ACC lost", *heads(names)]), lines)


def siftings_table(rows: Sequence[Row]) -> str:
    """Return what every sifter found in the training set of each victim; shares in per cent."""
    own = [row for row in rows if method_of(row) in SIFTERS]
    lines: list[list[object]] = []
    for row in own:
        told = [row["defence"], *head_of(row, own)]
        if row["status"] != "done":
            lines.append([*told, NOTHING, *[""] * 7])
            continue
        lines.append([*told, *sifting_texts(row["sifting"]), f"{row['seconds']:.0f}", f"{row['image_passes']:,}"])
        for name, part in row.get("parts", {}).items():
            lines.append([f"· {name}", told[1], *sifting_texts(part), "", ""])
    return table("sifter | attack | AUROC | AUPRC | TPR | FPR | precision | listed | seconds | passes", lines)


def sifting_texts(found: Row) -> list[str]:
    """Return what a list of images was worth, in words of the table."""
    areas = ["—" if found[name] is None else f"{found[name]:.3f}" for name in AREAS]
    return [*areas, *(percent(value(found[name])) for name in ("tpr", "fpr", "precision", "listed"))]


def trainings_table(rows: Sequence[Row]) -> str:
    """Return what every safe trainer made of each victim's training set, beside the victim, which was trained plainly."""
    own = [row for row in rows if method_of(row) in SAFE_TRAINERS]
    lines: list[list[object]] = []
    for row in own:
        told = [row["defence"], *head_of(row, own)]
        if row["status"] != "done":
            lines.append([*told, NOTHING, *[""] * 6])
            continue
        rates = [percent(value(row[name])) for name in ("asr0", "asr", "acc0", "acc", "ra")]
        lines.append([*told, *rates, f"{row['seconds']:.0f}", f"{row['image_passes']:,}"])
    return table("trainer | attack | ASR, victim | ASR | ACC, victim | ACC | RA | seconds | passes", lines)


def head_of(row: Row, rows: Sequence[Row]) -> list[str]:
    """Return what a row's victim is called among those of a table: its attack, with what else differs."""
    names = list(dict.fromkeys(map(victim_of, rows)))
    head = heads(names)[names.index(victim_of(row))]
    rates = {other["poison_rate"] for other in rows if other["poison_rate"] is not None}
    if len(rates) > 1 and row["poison_rate"] is not None:
        head = f"{head}, {100 * row['poison_rate']:g} %"
    return [head]


def section(kept: Mapping[str, Any]) -> str:
    """Return the generated part of a plan: what it is, what of it is not run at all, and the tables of the rest."""
    rows = kept["rows"]
    done = [row for row in rows if row["status"] == "done"]
    attacks, defences = ({row[column] for row in done} for column in ("attack", "defence"))
    missing = dict.fromkeys(row["attack"] for row in rows if row["attack"] not in attacks)
    missing |= dict.fromkeys(row["defence"] for row in rows if row["defence"] not in defences | {UNDEFENDED})
    parts = [about(kept)]
    if done and missing:
        parts.append(f"Not run at all: {', '.join(missing)}.")
    begun = [row for row in rows if row["attack"] in attacks and row["defence"] in defences | {UNDEFENDED}]
    if begun:
        parts.append(victims_table(begun))
    if erased(begun):
        parts += [means_table(begun), cells_table(begun)]
    if any("sifting" in row and method_of(row) in SIFTERS for row in begun):
        parts.append(siftings_table(begun))
    if any("acc" in row and method_of(row) in SAFE_TRAINERS for row in begun):
        parts.append(trainings_table(begun))
    return "\n\n".join(parts)


def choice_line(situation: str, mean: Mean | None, plan: str, note: str = "") -> list[object]:
    """Return a line of the table that helps to choose."""
    if mean is None:
        return [situation, "none measured yet that does", "", "", "", "", f"`{plan}`"]
    left = f"{percent(mean.before)} → {percent(mean.asr)} (worst {percent(mean.worst)})"
    eraser, lost = f"`{mean.defence}`{note}", (percent(mean.loss), percent(mean.benign))
    return [situation, eraser, mean.victims, left, *lost, f"`{plan}`"]


def choice_table(plans: Mapping[str, Mapping[str, Any]]) -> str:
    """Return which eraser to take in which situation, by what was measured."""
    main, toy, others = (plans.get(name, {"rows": []})["rows"] for name in FIRST[:3])
    tried = {row["attack"] for row in erased(main) if row["defence"] == "baeraser" and worked(row)}
    searched = mean_of("baeraser", main, found=True)
    found = "" if searched is None else f" (found {searched.victims} of {len(tried)} attacks)"
    lines = [
        choice_line("A scan names a label", searched, "erasers", found),
        choice_line("It names none, or you want no scan", best(main, MOST_LOSS), "erasers"),
        choice_line("The same, accuracy first", best(main, LITTLE_LOSS), "erasers"),
        choice_line("A small network, 72 clean images", best(toy, MOST_LOSS, searching=True), "erasers_toy"),
        choice_line("Other networks, 250 clean images", best(others, LARGE_LOSS), "erasers_architectures"),
        choice_line("For comparison: clean fine-tuning", mean_of("fine_tuning", main), "erasers"),
    ]
    return table("situation | take | victims | ASR before → left | ACC lost | ACC lost, benign | table", lines)


def readme_table(plans: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the README's five rows."""
    lines = []
    for plan, method in README_ROWS:
        rows = [row for row in plans.get(plan, {"rows": []})["rows"] if row["defence"] == method]
        where = f"{rows[0]['data']}, {rows[0]['arch']}" if rows else plan
        images = f"{rows[0]['clean_images']:,}" if rows else ""
        mean = mean_of(method, rows)
        told = [where, images, f"`{method}`"]
        if mean is None:
            lines.append([*told, NOTHING, "", "", ""])
        else:
            rates = (mean.asr, mean.worst, mean.loss)
            lines.append(
                [*told, mean.victims, f"{percent(mean.before)} → {percent(rates[0])}", *map(percent, rates[1:])]
            )
    return table("data, network | clean images | eraser | attacks | ASR %, mean | worst left | ACC points lost", lines)


def fill(path: Path, parts: Mapping[str, str]) -> None:
    """Replace the generated parts of a page.

    Raises:
        PublishError: the page asks for a part that there is none of.
    """
    text = path.read_text(encoding="utf-8")

    def replaced(match: re.Match[str]) -> str:
        if match[1] not in parts:
            raise PublishError(f"{path} has a place for {match[1]!r}; there are {', '.join(parts)}")
        return f"<!-- publish {match[1]} -->\n{parts[match[1]]}\n<!-- end -->"

    write_text_atomic(path, re.sub(r"<!-- publish (\S+) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL))


# Cards


def card_row(row: Row, *, with_arch: bool) -> dict[str, Any]:
    """Return a row as cards have it; "name" says that settings or networks are not the method's own."""
    is_victim = row["defence"] == UNDEFENDED
    shown = {name: row[name] for name in ("attack", "poison_rate", "target_label", "seed", "epochs")}
    told = [row["arch"]] if with_arch else []
    told += [row["defence"].partition(" ")[2]] if " " in row["defence"] else []
    if told:
        shown["name"] = ", ".join([row["attack"], *told])
    end = "" if is_victim else "_before"
    rates = {f"{rate}{end}": value(row[f"{rate}0"]) for rate in (RATES if is_victim else ("acc", "asr"))}
    if "sifting" in row:
        rates |= {name: row["sifting"][name] for name in AREAS}
        rates |= {name: value(row["sifting"][name]) for name in ("tpr", "fpr", "precision", "listed")}
    if not is_victim:
        shown["clean_images"] = row["clean_images"]
    if not is_victim and "acc" in row:
        rates |= {rate: value(row[rate]) for rate in RATES} | {"der": row["der"]}
    shown |= {name: round(number, 5) for name, number in rates.items() if number is not None}
    return shown | {name: row[name] for name in ("seconds", "image_passes") if name in row}


def as_part(row: Row, method: str) -> Row:
    """Return the row of a combination as one of its parts."""
    return row | {"defence": f"{method} as part of {method_of(row)}", "sifting": row["parts"][method]}


def card_tables(method: str, plans: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (plan, table) of each plan that measured a method, those of ``FIRST`` first."""
    order = [*(name for name in FIRST if name in plans), *sorted(set(plans) - {*FIRST})]
    for plan in order:
        rows = [row for row in plans[plan]["rows"] if row["status"] == "done"]
        if method in SIFTERS:
            own = [row for row in rows if method_of(row) == method and "sifting" in row]
            own += [as_part(row, method) for row in rows if method in row.get("parts", {})]
        elif method in PURIFIERS or method in SAFE_TRAINERS:
            own = [row for row in rows if method_of(row) == method and "acc" in row]
        else:
            own = [row for row in rows if row["defence"] == UNDEFENDED and row["attack"].split()[0] == method]
        several = len({row["arch"] for row in own}) > 1
        if own:
            yield (
                plan,
                {
                    "setting": plans[plan]["description"].removesuffix("."),
                    "victims": [card_row(row, with_arch=several) for row in own],
                    "command": f"lustral bench run benchmarks/plans/{plan}.toml --store STORE",
                },
            )


def write_cards(folder: Path, plans: Mapping[str, Mapping[str, Any]]) -> None:
    """Write our numbers into every card, beside the published ones that it holds; one whose rows are not kept stays as it is.

    Raises:
        PublishError: a method with a card was measured by no plan.
    """
    for path in sorted(folder.glob("*.json")):
        card = json.loads(path.read_text(encoding="utf-8"))
        tables = dict(card_tables(card["method"], plans))
        if not tables and "ours" in card:  # of a plan whose rows are not kept
            continue
        if not tables:
            raise PublishError(f"no kept row is of {card['method']}; its card would have no number of ours")
        rooms = {"erasers": PURIFIERS, "siftings": SIFTERS, "trainings": SAFE_TRAINERS}
        kind = next((name for name, methods in rooms.items() if card["method"] in methods), "zoo")
        ours = next(iter(tables.values()))
        write_json_atomic(path, {"method": card["method"], "published": card["published"], "ours": ours, kind: tables})


def publish(root: Path = ROOT) -> None:
    """Write pages and cards from the kept rows.

    Args:
        root: the repository, with benchmarks/results, docs/results.md, README.md and tests/cards.

    Raises:
        PublishError: a page or a card needs rows that are not kept.
    """
    plans = {}
    for plan in sorted((root / "benchmarks" / "plans").glob("*.toml")):
        with suppress(FileNotFoundError):
            plans[plan.stem] = read_kept(root / "benchmarks" / "results" / f"{plan.stem}.json")
    parts = {name: section(kept) for name, kept in plans.items()}
    fill(root / "docs" / "results.md", {**parts, "choice": choice_table(plans)})
    fill(root / "README.md", {"measured": readme_table(plans)})
    write_cards(root / "tests" / "cards", plans)


def main() -> int:
    from matrix import write_comparison  # a script beside this one

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="*", type=Path)
    parser.add_argument("--store")
    options = parser.parse_args()
    if bool(options.plans) != bool(options.store):
        parser.error("expected plans together with --store, or neither")
    try:
        for plan in options.plans:
            keep(plan, Store(options.store).open(create=False), ROOT / "benchmarks" / "results")
        publish()
        write_comparison(ROOT)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
