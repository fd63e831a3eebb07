"""What the pages of single cells and victims show, made from records and rows: texts and positions, no markup."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise, zip_longest
from typing import Any

from lustral.core.files import canonical
from lustral.core.history import MISSING, HistoryEntry, history_table, read_history
from lustral.report.figures.charts import curves
from lustral.report.words import (
    MEASURES,
    RATES,
    SCORES,
    chance,
    count,
    duration,
    is_number,
    is_share,
    measured,
    memory,
    percent,
    plain,
    points,
    score,
    spaced,
    words_of,
)
from lustral.site.addresses import file_name, page_of, table_link
from lustral.site.page_writer import Link
from lustral.store.store import RECOVERED_PICTURE, TRIGGER_PICTURE
from lustral.tables.rows import BENIGN

MOST_LINKS = 24  # to other cells in one list
MOST_ENTRIES = 120  # of a history or an evidence table; the file beside the record has all
SIFTING_RATES = (  # of a list of suspicious images: field and heading
    ("tpr", "poisoned images listed (TPR)"),
    ("fpr", "clean images listed (FPR)"),
    ("precision", "precision"),
    ("listed", "listed"),
    ("covers_listed", "covers listed"),
)
P_VALUE = " p_value"  # ends the name of a column of chances
SHORT_KEY = 12  # digits of a key that commands take
LARGEST_PIXELATED = 200  # pixels; smaller pictures are drawn with sharp edges
PNG_START = b"\x89PNG\r\n\x1a\n"
PICTURES = {TRIGGER_PICTURE: "The attacker’s trigger", RECOVERED_PICTURE: "The trigger that the defence recovered"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of the site: its path from the root, its size in pixels, and what it shows."""

    path: str
    width: int
    height: int
    caption: str

    @property
    def is_pixelated(self) -> bool:
        """Whether it is so small that its pixels should be seen."""
        return max(self.width, self.height) <= LARGEST_PIXELATED


def png_size(content: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a PNG in pixels, or None if it is none."""
    if len(content) < 24 or not content.startswith(PNG_START) or content[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", content[16:24])
    return (width, height) if width and height else None


@dataclass
class Relatives:
    """Finds what belongs to a cell: its victim, other defences on that victim, other seeds of the same."""

    rows: Sequence[Mapping[str, Any]]
    victims: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    by_victim: dict[str, list[tuple[str, Link]]] = field(default_factory=lambda: defaultdict(list))
    by_setting: dict[tuple[Any, ...], list[tuple[str, Link]]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        """Sort the links to all rows into groups, each with the key it leads to."""
        for row in sorted(self.rows, key=lambda row: (row["defence"], row["seed"], row["defence_seed"] or 0)):
            key, href, number = row["key"], f"../{page_of(row)}", _telling_number(row)
            draw = f", draw {row['defence_seed']}" if row["defence_seed"] else ""
            self.by_setting[self._setting(row)].append((key, (f"seed {row['seed']}{draw}", href, number)))
            if row["kind"] == "victim":
                self.victims[key] = row
            else:
                text = f"{row['defence']}, {count(row['clean_images'])} images{draw}"
                self.by_victim[row["victim_key"]].append((key, (text, href, number)))

    @staticmethod
    def _setting(row: Mapping[str, Any]) -> tuple[Any, ...]:
        names = ("kind", "data", "arch", "attack", "poison_rate", "defence", "clean_images")
        return tuple(row[name] for name in names)

    def link_to(self, key: str | None) -> tuple[str, str] | None:
        """Return the title and the address of a victim, or None if the store does not have it."""
        victim = self.victims.get(key or "")
        return None if victim is None else (victim["title"], f"../{page_of(victim)}")

    def of(self, row: Mapping[str, Any]) -> list[tuple[str, list[Link], int, str]]:
        """Return the lists of links under a cell's page: (title, links, how many more, where all are)."""
        where = {name: row[name] for name in ("data", "arch", "attack", "poison_rate")}
        if row["kind"] == "victim":
            title, seeds = "Defences on this victim", "The same attack with other seeds"
            where["kind"] = "victim"
        else:
            title, seeds = "Other defences on the same victim", "The same with other seeds"
            where |= {"defence": row["defence"], "clean_images": row["clean_images"]}
        return [
            found
            for found in (
                _links(title, self.by_victim.get(row["victim_key"], ()), row["key"], {"victim_key": row["victim_key"]}),
                _links(seeds, self.by_setting[self._setting(row)], row["key"], where),
            )
            if found[1]
        ]


def _links(
    title: str, group: Sequence[tuple[str, Link]], own: str, where: Mapping[str, Any]
) -> tuple[str, list[Link], int, str]:
    """Return a list of links to a group's members but the page's own; see ``Relatives.of``."""
    others = [link for key, link in group if key != own]
    return title, others[:MOST_LINKS], len(others) - MOST_LINKS, table_link("../", **where)


def _telling_number(row: Mapping[str, Any]) -> str:
    if row["status"] != "done":
        return "failed"
    if row["kind"] == "victim":
        return f"ASR {percent(row['asr'])}" if row["asr"] is not None else f"ACC {percent(row['acc'])}"
    if row["defence_kind"] == "detector":
        return f"{row['outcome']}, {'right' if row['correct'] else 'wrong'}"
    if row["kind"] == "sifting":
        return f"{percent(row['listed'])} listed" if row["auroc"] is None else f"AUROC {score(row['auroc'])}"
    return f"DER {score(row['der'])}" if row["der"] is not None else f"ACC {percent(row['acc'])}"


def record_page(
    record: Mapping[str, Any],
    row: Mapping[str, Any],
    detail: Mapping[str, Any],
    *,
    pictures: Sequence[Picture],
    relatives: Relatives,
    problems: Sequence[str],
    store_name: str,
) -> dict[str, Any]:
    """Return what the page of one record shows.

    Args:
        record: from the store; a victim, a result or a failure.
        row: the same in the flat table.
        detail: content of its detail.json, or {}.
        pictures: to show, the victim's first.
        relatives: finds other cells.
        problems: files that could not be shown, and why.
        store_name: what the command calls the store.
    """
    metrics = record.get("metrics") or {}
    before, after = metrics.get("before"), metrics.get("after")
    names = [str(name) for name in record.get("class_names") or ()]
    history, damage = read_history(detail.get("history"))
    selected = detail["selected"] if isinstance(detail.get("selected"), int) else None
    base = relatives.link_to(record.get("victim_key"))
    return {
        "title": record["title"],
        "badge": _badge(row),
        "facts": _facts(row),
        "victim": base if row["kind"] != "victim" else None,
        "start": base if row["kind"] == "victim" else None,
        "warnings": [*_warnings(before, after), *problems, *damage],
        "notes": [str(note) for note in detail.get("notes") or ()],
        "tiles": _tiles(row, metrics),
        "measures": _measures(before, after, metrics.get("compare") or {}),
        "has_after": after is not None,
        "pictures": pictures,
        "curves": curves(history, selected),
        "history": _history_grid(history, selected),
        "detection": _detection(metrics.get("detection"), names),
        "sifting": _sifting(metrics.get("sifting"), metrics.get("parts") or {}, detail.get("sifting") or {}),
        "verdict": _verdict(detail.get("verdict"), names),
        "audit": _verdict(detail.get("audit"), names),
        "classes": _classes(detail.get("per_class") or {}, names),
        "cost": _cost(record, row),
        "failure": (record["error"], record["traceback"]) if row["status"] != "done" else None,
        "command": _command(row, store_name),
        "spec": pretty(record["spec"]),
        "made": _made(record["made"]),
        "key": record["key"],
        "relatives": relatives.of(row),
        "methods": _method_links(row),
    }


def pretty(spec: Mapping[str, Any]) -> str:
    """Return a specification as indented JSON, keys sorted. Its parts come again and again: the same victim, the same defence.

    >>> print(pretty({"seed": 0, "data": {"name": "digits"}}))
    {
      "data": {
        "name": "digits"
      },
      "seed": 0
    }
    """
    parts = (f"{json.dumps(key)}: {_pretty_part(canonical(value))}" for key, value in sorted(spec.items()))
    return "{\n  " + ",\n  ".join(parts) + "\n}" if spec else "{}"


@lru_cache(maxsize=4096)
def _pretty_part(text: bytes) -> str:
    return json.dumps(json.loads(text), indent=2, ensure_ascii=False).replace("\n", "\n  ")


def _command(row: Mapping[str, Any], store_name: str) -> str:
    """Return the command that does a cell again; a failed one has no result to compare with, so its plan runs again."""
    if row["status"] != "done":
        return f"lustral bench run PLAN --store {store_name} --retry-failed"
    return f"lustral bench repeat {row['key'][:SHORT_KEY]} --store {store_name}"


def _badge(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the outcome of a row in two words, and the tone to paint it in."""
    if row["status"] != "done":
        return "failed", "bad"
    if row["kind"] == "victim":
        return ("benign model" if row["attack"] == BENIGN else "victim"), "plain"
    if row["defence_kind"] == "detector":
        return ("verdict right", "good") if row["correct"] else ("verdict wrong", "unsure")
    if row["erased"] is None:
        return "done", "plain"
    return ("erased", "good") if row["erased"] else ("not erased", "unsure")


def _facts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("data set", row["data"]),
        ("network", row["arch"]),
        ("attack", row["attack"]),
        ("poison rate", None if row["poison_rate"] is None else f"{100 * row['poison_rate']:.4g}%"),
        ("target label", row["target_label"]),
        ("seed", row["seed"]),
    ]
    if row["kind"] != "victim":
        facts += [
            ("defence", row["defence"]),
            ("clean images", count(row["clean_images"])),
            ("defence seed", row["defence_seed"]),
        ]
    return [(name, str(value)) for name, value in facts if value is not None]


def _warnings(*evaluations: Mapping[str, Any] | None) -> Iterator[str]:
    for when, evaluation in zip(("before", "after"), evaluations, strict=True):
        if evaluation and evaluation.get("non_finite"):
            yield (
                f"The model {when} the defence gives logits that are not finite, on {evaluation['num_non_finite']:,} triggered "
                "images among others: its low ASR says nothing."
            )


def _tiles(row: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    if row["status"] != "done":
        return []
    if row["kind"] == "victim":
        tiles = [("clean accuracy", percent(row["acc"]))]
        if row["asr"] is not None:
            tiles += [("attack success rate", percent(row["asr"])), ("robust accuracy", percent(row["ra"]))]
        return [*tiles, ("training", duration(row["victim_seconds"]))]
    if "detection" in metrics:
        found = metrics["detection"]
        tiles = [
            ("outcome", str(found["outcome"])),
            (f"score, threshold {plain(found['threshold'])}", plain(found["score"])),
        ]
        return [*tiles, ("time of the defence", duration(row["seconds"]))]
    if row["kind"] == "sifting":
        tiles = [("listed", percent(row["listed"])), ("clean images listed (FPR)", percent(row["fpr"]))]
        if row["auroc"] is not None:
            tiles = [("AUROC", score(row["auroc"])), ("poisoned images listed (TPR)", percent(row["tpr"])), *tiles]
        return [*tiles, ("time of the defence", duration(row["seconds"]))]
    tiles = [("clean accuracy", f"{percent(row['acc0'])} → {percent(row['acc'])}")]
    if row["asr"] is not None:
        tiles += [
            ("attack success rate", f"{percent(row['asr0'])} → {percent(row['asr'])}"),
            ("robust accuracy", f"{percent(row['ra0'])} → {percent(row['ra'])}"),
            ("defence effectiveness (DER)", score(row["der"])),
        ]
    return [*tiles, ("time of the defence", duration(row["seconds"]))]


def _measures(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, compared: Mapping[str, Any]
) -> list[tuple[str, str, tuple[str, ...], tuple[str, ...], str]]:
    """Return (name, meaning, before, after, change) of every measure, as texts."""
    if before is None:
        return []
    after = after or {}
    rates = [(name, meaning, before.get(key), after.get(key)) for key, name, meaning in RATES]
    probes, probes_after = before.get("probes") or {}, after.get("probes") or {}
    rates += [(f"Probe: {spaced(name)}", "", rate, probes_after.get(name)) for name, rate in probes.items()]
    rows = [(name, meaning, _rate(old), _rate(new), _change(old, new)) for name, meaning, old, new in rates]
    rows += [
        (name, meaning, (MISSING,), (score(compared[key]),), MISSING)
        for key, name, meaning in SCORES
        if key in compared
    ]
    return rows


def _change(old: Any, new: Any) -> str:
    return points(new["value"] - old["value"]) if _has_value(old) and _has_value(new) else MISSING


def _has_value(rate: Any) -> bool:
    return isinstance(rate, Mapping) and rate.get("value") is not None


def _rate(rate: Any) -> tuple[str, ...]:
    """Return a rate as lines: value, interval, number of images."""
    if not isinstance(rate, Mapping):
        return (MISSING,)
    if rate.get("value") is None:
        return "n/a", "no images"
    return percent(rate["value"]), f"{100 * rate['low']:.1f}–{100 * rate['high']:.1f}", f"n = {rate['n']:,}"


def _classes(per_class: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return (class, accuracies before and after and their change) as texts."""
    before, after = per_class.get("before") or [], per_class.get("after") or []
    rows = []
    for label, (old, new) in enumerate(zip_longest(before, after)):
        texts = [_rate(old)[0], _rate(new)[0], _change(old, new)] if after else [_rate(old)[0]]
        rows.append((_class_name(label, names), texts))
    return rows


def _class_name(label: Any, names: Sequence[str]) -> str:
    if isinstance(label, int) and 0 <= label < len(names) and names[label] != str(label):
        return f"{names[label]} ({label})"
    return str(label)


def _history_grid(history: Sequence[HistoryEntry], selected: int | None) -> dict[str, Any] | None:
    """Return a history as a table: {columns, rows: [(texts, is the one kept)], more}; None of nothing."""
    columns, rows = history_table(history)
    shown = [(texts, index == selected) for index, texts in enumerate(rows[:MOST_ENTRIES])]
    return {"columns": columns, "rows": shown, "more": len(rows) - len(shown)} if rows else None


def _grid(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return entries of an evidence table: {columns, rows: [(texts, False)], more}; None of nothing."""
    if not entries:
        return None
    columns = list(dict.fromkeys(key for entry in entries for key in entry))
    rows = [([_entry_text(column, entry.get(column)) for column in columns], False) for entry in entries[:MOST_ENTRIES]]
    return {"columns": [_entry_heading(column) for column in columns], "rows": rows, "more": len(entries) - len(rows)}


def _entry_heading(column: str) -> str:
    if column.endswith(P_VALUE):
        return f"{words_of(column.removesuffix(P_VALUE)).heading}: chance if benign"
    return MEASURES[column].heading if column in MEASURES else spaced(column)


def _entry_text(column: str, value: Any) -> str:
    if is_number(value) and column.endswith(P_VALUE):
        return chance(value)
    if is_number(value) and column in MEASURES:
        return measured(column, value)
    return percent(value) if is_number(value) and is_share(column) else plain(value)


def _detection(found: Mapping[str, Any] | None, names: Sequence[str]) -> list[tuple[str, str]]:
    if found is None:
        return []
    return [
        ("Outcome", str(found["outcome"])),
        ("Labels it names", _label_list(found["suspects"], names)),
        ("Labels the trigger leads to", _label_list(found["targets"], names)),
        ("Score and threshold", f"{plain(found['score'])}, {plain(found['threshold'])}"),
        ("Right", plain(found["correct"])),
    ]


def _sifting(
    found: Mapping[str, Any] | None, parts: Mapping[str, Mapping[str, Any]], told: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return what a list of suspicious images was worth, as texts: {basis, threshold, rates, histogram}; None without one."""
    if found is None:
        return None
    columns = ["method", "AUROC", "AUPRC", *(heading for _, heading in SIFTING_RATES)]
    rows = [([name, *_sifting_texts(rates)], False) for name, rates in {"all": found, **parts}.items()]
    counts = told.get("histogram") or {}
    edges = [plain(float(edge)) for edge in counts.get("edges") or ()]
    kinds = [name for name in ("clean", "poisoned", "cover") if any(counts.get(name) or ())]
    lines = [
        ([f"{low} to {high}", *(count(counts[name][place]) for name in kinds)], False)
        for place, (low, high) in enumerate(pairwise(edges))
        if any(counts[name][place] for name in kinds)
    ]
    return {
        "basis": str(told.get("basis") or ""),
        "threshold": "nothing is listed" if told.get("threshold") is None else plain(told["threshold"]),
        "rates": {"columns": columns, "rows": rows, "more": 0},
        "histogram": {"columns": ["score", *kinds], "rows": lines, "more": 0} if lines else None,
    }


def _sifting_texts(rates: Mapping[str, Any]) -> list[str]:
    return [score(rates["auroc"]), score(rates["auprc"]), *(_rate(rates[name])[0] for name, _ in SIFTING_RATES)]


def _label_list(labels: Iterable[Any], names: Sequence[str]) -> str:
    return ", ".join(_class_name(label, names) for label in labels) or "none"


def _verdict(verdict: Any, names: Sequence[str]) -> dict[str, Any] | None:
    """Return a verdict's summary and its evidence, the suspects marked; None without one."""
    if not isinstance(verdict, Mapping):
        return None
    suspects = list(verdict.get("suspects") or ())
    entries = _by_class(entry for entry in verdict.get("evidence") or () if isinstance(entry, Mapping))
    shown = [{**entry, "label": _class_name(entry["label"], names)} if "label" in entry else entry for entry in entries]
    grid = _grid(shown)
    if grid is not None:
        grid["rows"] = [
            (texts, entry.get("label") in suspects) for (texts, _), entry in zip(grid["rows"], entries, strict=False)
        ]
    return {
        "outcome": plain(verdict.get("outcome")),
        "suspects": _label_list(suspects, names),
        "score": plain(verdict.get("score")),
        "threshold": plain(verdict.get("threshold")),
        "basis": str(verdict.get("basis") or ""),
        "grid": grid,
    }


def _by_class(evidence: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return one entry per class with a column per measure; entries of results before measures had names stay as they are."""
    rows: dict[Any, dict[str, Any]] = {}
    others = []
    for entry in evidence:
        if "measure" not in entry:
            others.append(entry)
            continue
        label, measure = entry.get("label"), str(entry["measure"])
        row = rows.setdefault(repr(label), {"label": "whole model" if label is None else label})
        row[measure] = entry.get("value")
        if entry.get("p_value") is not None:
            row[f"{measure}{P_VALUE}"] = entry["p_value"]
    return [*others, *rows.values()]


def _cost(record: Mapping[str, Any], row: Mapping[str, Any]) -> list[tuple[str, str]]:
    cost = record.get("cost")
    if not cost:
        return [("time until it failed", duration(record["made"]["seconds"]))]
    what = "training" if row["kind"] == "victim" else "defence"
    tiles = [(f"time of the {what}", duration(cost.get("seconds"))), ("image passes", count(cost.get("image_passes")))]
    tiles += [("peak memory", memory(cost.get("peak_memory_bytes"))), ("clean images", count(cost.get("clean_images")))]
    if row["kind"] == "victim" and record.get("num_poisoned") is not None:
        tiles.append(("poisoned images", count(record["num_poisoned"])))
    return [*tiles, ("whole cell", duration(record["made"]["seconds"]))]


def _made(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {version}" for name, version in (made.get("versions") or {}).items())
    entries = [("at", made.get("at")), ("device", made.get("device")), ("threads", made.get("threads"))]
    entries += [("machine", made.get("machine")), ("versions", versions), ("source", made.get("code"))]
    return [(name, str(value)) for name, value in entries if value]


def _method_links(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = [row["attack_method"]] if row["attack"] != BENIGN else []
    if row["kind"] != "victim":
        names.append(row["defence_method"])
    return [(name, f"../methods/{file_name(name)}.html") for name in names]
