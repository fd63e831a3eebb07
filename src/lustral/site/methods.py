"""What the pages of methods show, made from cards and means: the published number beside ours; texts, no markup."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lustral.core.history import MISSING
from lustral.core.versions import listed_methods, listed_rooms
from lustral.report.words import PRINTS, count, is_number, plain, plus_minus, spaced
from lustral.site.addresses import file_name, table_link
from lustral.tables.rows import UNDEFENDED

CARD_FORMS = {  # fields of cards, in the order of the table: heading and how they print
    "acc": ("ACC", "percent"),
    "asr": ("ASR", "percent"),
    "ra": ("RA", "percent"),
    "der": ("DER", "score"),
    "correct": ("right verdicts", "percent"),
    "acc_loss": ("ACC loss, points", "points"),
    "acc_before": ("ACC before", "percent"),
    "asr_before": ("ASR before", "percent"),
    "asr_drop": ("ASR lowered by, points", "points"),
    "worst_asr": ("largest ASR", "percent"),
    "worst_acc_loss": ("largest ACC loss, points", "points"),
    "seconds": ("time", "seconds"),
    "image_passes": ("image passes", "passes"),
    "num_victims": ("victims", "passes"),
    "auroc": ("AUROC", "score"),
    "auprc": ("AUPRC", "score"),
    "tpr": ("TPR", "percent"),
    "fpr": ("FPR", "percent"),
    "precision": ("precision", "percent"),
    "listed": ("listed", "percent"),
}
CARD_SETTINGS: dict[
    str, Callable[[float], str]
] = {  # fields of cards that say how a number was made: they stand under the row's name
    "poison_rate": lambda value: f"{100 * value:.4g}% poison",
    "clean_images": lambda value: f"{count(value)} clean images",
    "target_label": lambda value: f"target {plain(value)}",
    "epochs": lambda value: f"{count(value)} epochs",
    "seed": lambda value: f"seed {plain(value)}",
}
CARD_NAMES = {"accuracy_loss": "acc_loss", "worst_accuracy_loss": "worst_acc_loss", "asr0": "asr_before"}
WORKED = 0.5  # attack success rate above which a victim counts in means
STORE_FIELDS = (
    "acc",
    "asr",
    "ra",
    "der",
    "correct",
    "acc_loss",
    "asr_before",
    "auroc",
    "tpr",
    "fpr",
    "listed",
    "seconds",
)
SIFTED = ("auroc", "auprc", "tpr", "fpr", "precision", "listed")
ON_TRAINING_SETS = ("SIFTERS", "SAFE_TRAINERS")  # tables of the catalog whose methods work on a training set


class CardError(ValueError):
    """Cards cannot be used; the message has one line for each problem."""


def read_cards(folder: Path | None) -> dict[str, dict[str, Any]]:
    """Return the cards of a folder (its \\*.json) by method.

    Raises:
        CardError: the folder is missing, or a card is no object with a "method"; one line for each.
    """
    if folder is None:
        return {}
    if not folder.is_dir():
        raise CardError(f"{folder} is no folder of cards")
    cards, problems = dict[str, dict[str, Any]](), []
    for path in sorted(folder.glob("*.json")):
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problems.append(f"{path} is not readable JSON: {error}")
            continue
        if not isinstance(card, dict) or not isinstance(card.get("method"), str):
            problems.append(f'{path} is no card: expected an object with a "method"')
        elif card["method"] in cards:
            problems.append(f"{path}: a second card of {card['method']!r}")
        else:
            cards[card["method"]] = card
    if problems:
        raise CardError("\n".join(problems))
    return cards


def method_page(
    method: str,
    card: Mapping[str, Any] | None,
    settings: Sequence[Mapping[str, Any]],
    means: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return what a method's page shows: the published number, the card's and the store's under each other.

    Args:
        method: its name in the catalog.
        card: its card, or None.
        settings: means over seeds, as ``lustral.site.data.settings_of`` returns them, of this method only.
        means: means over attacks, of this method only.
    """
    says = listed_methods().get(method, {})
    file = "" if card is None else f"{file_name(method)}.json"
    card = card or {}
    is_attack = "threat_model" in says or any(row["attack_method"] == method for row in settings)
    groups = _groups(card, settings, means, is_attack=is_attack)
    found = {name for _, rows in groups for row in rows for name in row["values"]}
    others = sorted(found - set(CARD_FORMS))
    columns = [name for name in CARD_FORMS if name in found] + others
    ours = card.get("ours")
    ours = ours if isinstance(ours, Mapping) else {}
    return {
        "title": method,
        "kind": "attack" if is_attack else "defence" if settings or says else "",
        "about": _about(says, listed_rooms().get(method, "")),
        "absence": _absence(settings),
        "columns": [CARD_FORMS[name][0] if name in CARD_FORMS else spaced(name) for name in columns],
        "groups": [
            {"title": title, "rows": [{**row, "cells": [_card_cell(row, name) for name in columns]} for row in rows]}
            for title, rows in groups
            if rows and columns
        ],
        "source": _sources(card.get("published")),
        "setting": plain(ours.get("setting")) if ours.get("setting") else "",
        "command": str(ours["command"]) if ours.get("command") else "",
        "file": file,
        "table": table_link("../", **{"attack_method" if is_attack else "defence_method": method}) if settings else "",
    }


def _groups(
    card: Mapping[str, Any],
    settings: Sequence[Mapping[str, Any]],
    means: Sequence[Mapping[str, Any]],
    *,
    is_attack: bool,
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the parts of a method's table: (title, rows)."""
    groups = [
        ("Published", _card_rows(card.get("published"), "published")),
        ("Our number on the card", _card_rows(card.get("ours"), "card")),
    ]
    if is_attack:
        groups.append(("Our tables on the card: mean over victims", _table_rows(card.get("zoo"))))
        victims = [row for row in settings if row["defence"] == UNDEFENDED]
        groups.append(("This store: victims, mean over seeds", [_store_row(row) for row in victims]))
    else:
        worked = "Our tables on the card: mean over attacks that had worked"
        groups.append((worked, _table_rows(card.get("erasers"))))
        groups.append((worked, _table_rows(card.get("trainings"))))
        groups.append(("Our tables on the card: mean over victims", _table_rows(card.get("siftings"))))
        groups.append(("This store: mean over attacks", [_store_row(row) for row in means]))
        groups.append(("This store: mean over seeds", [_store_row(row) for row in settings]))
    if any("asr_drop" in row["values"] for _, rows in groups for row in rows):
        for row in (row for _, rows in groups for row in rows):
            _add_drop(row["values"])
    return groups


def _about(says: Mapping[str, Any], room: str = "") -> list[tuple[str, str]]:
    """Return what a method of the catalog says of itself: (name, text); ``room`` is the table that lists it."""
    about = []
    if "threat_model" in says:
        about.append(("The attacker", says["threat_model"]))
    if "needs" in says:
        beyond = "the training set" if room in ON_TRAINING_SETS else "clean images"
        about.append((f"Needs beyond {beyond}", says["needs"]))
    if "cost_passes" in says:
        images = "image of the training set" if room in ON_TRAINING_SETS else "of 2,500 clean images"
        passes = f"{plain(says['cost_passes'])} passes of each {images} through the network and back"
        about.append(("Costs by default", passes))
    return about


def _absence(settings: Sequence[Mapping[str, Any]]) -> str:
    """Say that the store has no result of a method, and why; nothing where it has one."""
    if any(row["cells"] > 0 for row in settings):
        return ""
    failed = sum(row["failed"] for row in settings)
    if failed:
        return f"This store has no result of this method: {count(failed)} {'cell' if failed == 1 else 'cells'} failed."
    return "This store has no result of this method."


def _add_drop(values: dict[str, Any]) -> None:
    """Add by how much the attack success rate fell, where the numbers before and after are there."""
    if "asr_before" in values and "asr" in values:
        values.setdefault("asr_drop", values["asr_before"] - values["asr"])


def folded(node: Any, indent: int = 0) -> str:
    """Return JSON in which whatever holds no objects or arrays stands on one line.

    >>> print(folded({"victims": [{"attack": "badnets", "asr": 0.1}, {"attack": "sig", "asr": 0.2}]}))
    {
      "victims": [
        {"attack": "badnets", "asr": 0.1},
        {"attack": "sig", "asr": 0.2}
      ]
    }
    """
    parts = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
    if not any(isinstance(part, dict | list) for part in parts):
        return json.dumps(node, ensure_ascii=False)
    names = (
        [f"{json.dumps(name, ensure_ascii=False)}: " for name in node] if isinstance(node, dict) else [""] * len(node)
    )
    pad, (first, last) = " " * (indent + 2), "{}" if isinstance(node, dict) else "[]"
    lines = [f"{pad}{name}{folded(part, indent + 2)}" for name, part in zip(names, parts, strict=True)]
    return "\n".join([first, ",\n".join(lines), f"{' ' * indent}{last}"])


def _card_rows(part: Any, fallback: str) -> list[dict[str, Any]]:
    """Return the rows of a part of a card: its own numbers, and those of every object inside it, whatever its shape.

    A row is called by its "name" or "attack"; what lies inside of one with an attack names that first.
    """
    rows: list[dict[str, Any]] = []

    def walk(node: Any, name: str, within: str = "") -> None:
        if isinstance(node, Mapping):
            label = str(node.get("name") or node.get("attack") or name)
            within = f"{label}, " if node.get("attack") else within
            numbers = {CARD_NAMES.get(key, key): value for key, value in node.items() if is_number(value)}
            values = {key: value for key, value in numbers.items() if key not in CARD_SETTINGS}
            if values:
                setting = ", ".join(text(numbers[key]) for key, text in CARD_SETTINGS.items() if key in numbers)
                rows.append({"name": label, "values": values, "halves": {}, "href": "", "setting": setting, "runs": ""})
            for key, value in node.items():
                if isinstance(value, Mapping | list):
                    walk(value, f"{within}{key}" if isinstance(value, Mapping) else label, within)
        elif isinstance(node, list):
            for number, item in enumerate(node, 1):
                walk(item, f"{name} {number}", within)

    walk(part, fallback)
    return rows


def _table_rows(tables: Any) -> list[dict[str, Any]]:
    """Return a row for each budget and variant of each of a card's tables: means over its victims.

    Where a defence was measured, only victims whose attack had worked count.
    """
    rows = []
    for name, table in tables.items() if isinstance(tables, Mapping) else ():
        groups: dict[tuple[float | None, str], list[Mapping[str, Any]]] = {}
        for victim in table.get("victims", ()) if isinstance(table, Mapping) else ():
            if isinstance(victim, Mapping) and _counts(victim):
                variant = str(victim.get("name", "")).removeprefix(str(victim.get("attack"))).removeprefix(", ")
                clean = victim.get("clean_images")
                groups.setdefault((clean if is_number(clean) else None, variant), []).append(victim)
        for (clean, variant), victims in groups.items():
            values: dict[str, Any] = {"num_victims": len(victims)}
            for key in ("acc", "asr", "ra", "der", "asr_before", "seconds", *SIFTED):
                if found := [float(victim[key]) for victim in victims if is_number(victim.get(key))]:
                    values[key] = statistics.median(found) if key == "seconds" else statistics.fmean(found)
            if losses := [
                victim["acc_before"] - victim["acc"]
                for victim in victims
                if is_number(victim.get("acc_before")) and is_number(victim.get("acc"))
            ]:
                values["acc_loss"] = statistics.fmean(losses)
            budget = "" if clean is None else f"{clean:,} clean images"
            rows.append(
                {
                    "name": ", ".join(part for part in (str(name), variant) if part),
                    "values": values,
                    "halves": {},
                    "href": "",
                    "setting": ", ".join(part for part in (plain(table.get("setting", "")), budget) if part),
                    "runs": "",
                }
            )
    return rows


def _counts(victim: Mapping[str, Any]) -> bool:
    """Say whether a victim of a card's table belongs in its means: an attack's own, or one whose attack had worked."""
    if "acc_before" not in victim and "asr_before" not in victim:
        return True
    before = victim.get("asr_before")
    return before is not None and is_number(before) and before > WORKED


def _sources(published: Any) -> list[str]:
    parts = published if isinstance(published, list) else [published]
    return [str(part["source"]) for part in parts if isinstance(part, Mapping) and part.get("source")]


def _store_row(row: Mapping[str, Any]) -> dict[str, Any]:
    own = {**row, **{f"asr_before{end}": row.get(f"asr0{end}") for end in ("", "_half")}}
    is_victim = row["defence"] == UNDEFENDED
    names = ("acc", "asr", "ra") if is_victim else STORE_FIELDS
    where = {name: row.get(name) for name in ("data", "arch", "attack", "poison_rate", "clean_images")}
    parts = [row["data"], row["arch"]]
    parts += [f"{100 * row['poison_rate']:.4g}% poison"] if row["poison_rate"] is not None else []
    parts += [f"{count(row['clean_images'])} clean images"] if row["clean_images"] is not None else []
    title = (
        row["attack"]
        if is_victim
        else f"{row['defence']} against {row['attack']}"
        if "attack" in row
        else row["defence"]
    )
    over = [f"{row['attacks']} {'attack' if row['attacks'] == 1 else 'attacks'}"] if "attack" not in row else []
    over += [f"{row['seeds']} {'seed' if row['seeds'] == 1 else 'seeds'}"]
    over += [f"{row['failed']} failed"] if row["failed"] else []
    return {
        "name": title,
        "setting": ", ".join(str(part) for part in parts),
        "runs": ", ".join(over),
        "values": {name: own[name] for name in names if own.get(name) is not None},
        "halves": {name: own.get(f"{name}_half") for name in names},
        "href": table_link("../", **where, defence=row["defence"]),
    }


def _card_cell(row: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Return (value, interval) as texts."""
    value = row["values"].get(name)
    if value is None:
        return MISSING, ""
    if name not in CARD_FORMS:
        return plain(value), ""
    form = CARD_FORMS[name][1]
    return PRINTS[form](value), plus_minus(form, row["halves"].get(name))
