"""A store of made-up results, as large as a test needs: the layout and the fields are real, the numbers are drawn.

Half of the names are methods of the catalog; the rest stand for what a larger benchmark would hold. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from lustral.core.files import canonical
from lustral.core.versions import current_versions
from lustral.store.store import LAYOUT, Store, checksum_of, content_key

NUM_CLASSES = 10
# name, how it prints, settings beside rate and label, success before a defence, how hard to erase (0 .. 1)
ATTACKS: tuple[tuple[str, dict[str, Any], float, float], ...] = (
    ("badnets", {"size": 3}, 0.97, 0.2),
    ("blended", {"alpha": 0.2}, 0.99, 0.5),
    ("ssba", {"bits": 64}, 0.95, 0.6),
    ("sig", {"delta": 40}, 0.42, 0.4),  # hardly works: DER and RIR have to leave it out
    ("wanet", {"strength": 0.5}, 0.93, 0.4),
    ("input_aware", {"density": 0.03}, 0.98, 0.5),
    ("low_frequency", {"band": 4}, 0.96, 0.7),
    ("trojan_nn", {"neurons": 1}, 1.0, 0.3),
    ("bpp", {"depth": 5}, 0.99, 0.4),
    ("adap_blend", {"pieces": 16}, 0.88, 0.8),
    ("label_consistent", {"epsilon": 8}, 0.9, 0.6),
    ("refool", {"reflections": 20}, 0.91, 0.5),
)
# name, kind, settings, how well it erases or finds (0 .. 1), accuracy lost, seconds
DEFENCES: tuple[tuple[str, str, dict[str, Any], float, float, float], ...] = (
    ("baeraser", "purifier", {"rounds": 3}, 0.9, 0.012, 140.0),
    ("mask_area", "detector", {"false_alarm_rate": 0.01}, 0.8, 0.0, 60.0),
    ("mesa", "purifier", {"trigger_rate": 0.2}, 0.85, 0.010, 95.0),
    ("fine_tuning", "purifier", {"epochs": 20}, 0.45, 0.006, 22.0),
    ("bn_refresh", "purifier", {"passes": 5}, 0.15, 0.004, 1.2),
    ("fine_pruning", "purifier", {"share": 0.3}, 0.55, 0.02, 35.0),
    ("anp", "purifier", {"step": 0.02}, 0.8, 0.025, 30.0),
    ("neural_cleanse", "detector", {"threshold": 2.0}, 0.6, 0.0, 200.0),
    ("nad", "purifier", {"beta": 500}, 0.6, 0.03, 45.0),
    ("i_bau", "purifier", {"rounds": 5}, 0.88, 0.02, 28.0),
    ("ft_sam", "purifier", {"rho": 2.0}, 0.87, 0.009, 50.0),
    ("clp", "purifier", {"u": 3.0}, 0.65, 0.015, 0.4),
)
SIZES = {"digits": (360, "small_cnn", 0.985), "cifar10": (10_000, "preact_resnet18:width=16", 0.87)}
CLASS_NAMES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FOLDER_TOKEN = "0" * 12
WEIGHTS = b"no weights: a made-up record"


@dataclass(frozen=True)
class _Method:
    """An attack or a defence as the records name it."""

    name: str
    label: str
    settings: Mapping[str, Any]
    kind: str
    strength: float
    cost: float
    seconds: float


def synthetic_store(
    root: Path,
    *,
    results: int,
    attacks: int,
    defences: int,
    seeds: int,
    data: Sequence[str] = ("digits", "cifar10"),
    clean: Sequence[int] = (500,),
    failures: int = 3,
    pictures: bool = True,
    details: bool = True,
    seed: int = 0,
) -> Store:
    """Write a store of made-up victims and results and open it.

    The grid is data x (attacks + benign) x seeds x defences x clean budgets, with as many defence seeds as it takes to
    reach ``results``. Equal arguments give equal records.

    Args:
        root: a folder that does not exist yet, or is empty.
        results: scans and purifications.
        attacks: attacks beside the benign model; from the thirteenth on, variants with other settings.
        defences: defences; the second, eighth, ... is a detector.
        seeds: victims of each attack on each data set.
        data: data sets: "digits", "cifar10", or made-up names.
        clean: clean budgets in images.
        failures: cells of the grid that failed; they come on top of ``results``. With any, one victim failed too.
        pictures: write trigger.png and recovered.png.
        details: write detail.json and, for victims, the other files.
        seed: of the numbers.
    """
    if min(results, failures) < 0 or min(attacks, defences, seeds, len(data), len(clean)) < 1:
        raise ValueError("expected at least one attack, defence, seed, data set and clean budget")
    root.mkdir(parents=True, exist_ok=True)
    (root / "store.json").write_bytes(canonical({"layout": LAYOUT}))
    writer = _Writer(root, pictures=pictures, details=details)
    chosen_attacks = [None, *_attacks(attacks)]
    chosen_defences = list(_defences(defences))

    victims: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for number, attack in enumerate(chosen_attacks):
        for name, victim_seed in itertools.product(data, range(seeds)):
            spec = _victim_spec(name, attack, victim_seed, (number + victim_seed) % NUM_CLASSES)
            facts = _victim_facts(spec, attack)
            record = _victim(spec, facts, attack, random.Random(f"{seed} {canonical(spec)!r}"))
            writer.victim(record)
            victims.append((record, {"attack": attack}))
    if failures:
        writer.failure(_failed_victim(data[0]))

    total = results + failures
    failing = {(2 * index + 1) * total // (2 * failures) for index in range(failures)} if failures else set()
    for index, (defence_seed, budget, defence, (victim, extra)) in enumerate(
        itertools.islice(_grid(clean, chosen_defences, victims), total)
    ):
        spec = {
            "kind": "purification" if defence.kind == "purifier" else "scan",
            "victim": victim["spec"],
            "defence": {"method": defence.name, "settings": dict(defence.settings)},
            "clean_images": budget,
            "seed": defence_seed,
            "versions": {"Evaluation": current_versions()["Evaluation"]},
        }
        facts = {
            **victim["facts"],
            "defence": defence.label,
            "defence_method": defence.name,
            "defence_kind": defence.kind,
            "defence_seed": defence_seed,
            "clean_images": budget,
        }
        if index in failing:
            writer.failure(_failure(spec, facts, victim["key"], "OutOfMemoryError: out of memory; tried 2.0 GiB"))
        else:
            draw = random.Random(f"{seed} {victim['key']} {defence.label} {budget} {defence_seed}")
            writer.result(_result(spec, facts, victim, extra["attack"], defence, draw), draw)
    return Store(str(root)).open(create=False)


def defended(store: Store) -> list[dict[str, Any]]:
    """Return the records of all defences, by key."""
    return sorted([*store.records("scans"), *store.records("purifications")], key=lambda record: str(record["key"]))


def defended_keys(store: Store) -> set[str]:
    """Return the keys of all defences."""
    return store.keys("scans") | store.keys("purifications")


def _grid(clean: Sequence[int], defences: Sequence[_Method], victims: Sequence[Any]) -> Iterator[Any]:
    """Yield (defence seed, budget, defence, victim) for ever."""
    for defence_seed in itertools.count():
        for budget, defence, victim in itertools.product(clean, defences, victims):
            yield defence_seed, budget, defence, victim


def _attacks(count: int) -> Iterator[_Method]:
    for index in range(count):
        turn, place = divmod(index, len(ATTACKS))
        name, settings, success, hardness = ATTACKS[place]
        settings, label = _variant(name, settings, turn)
        yield _Method(name, label, settings, "attack", success, max(0.0, hardness - 0.05 * turn), 0.0)


def _defences(count: int) -> Iterator[_Method]:
    for index in range(count):
        turn, place = divmod(index, len(DEFENCES))
        name, kind, settings, strength, loss, seconds = DEFENCES[place]
        settings, label = _variant(name, settings, turn)
        yield _Method(name, label, settings, kind, strength - 0.04 * turn, loss, seconds * (1 + turn))


def _variant(name: str, settings: Mapping[str, Any], turn: int) -> tuple[dict[str, Any], str]:
    """Return settings and label of a method; the first turn is the method with its defaults."""
    if turn == 0:
        return dict(settings), name
    (key, value), *_ = settings.items()
    changed = round(value * (1 + turn), 4)
    return {**settings, key: changed}, f"{name} {key}={changed}"


# -- specifications -------------------------------------------------------------------------------------------------


def _victim_spec(name: str, attack: _Method | None, seed: int, target: int, rate: float = 0.1) -> dict[str, Any]:
    settings = {} if attack is None else {"poison_rate": rate, "target_label": target, **attack.settings}
    return {
        "kind": "victim",
        "data": {"name": name, "image_size": None},
        "arch": SIZES.get(name, SIZES["cifar10"])[1],
        "attack": {"method": "none" if attack is None else attack.name, "settings": settings},
        "trainer": {"epochs": 12, "batch_size": 128, "optimizer": "sgd", "learning_rate": 0.2, "augment": None},
        "seed": seed,
        "start": None,
        "versions": {"Trainer": current_versions()["Trainer"]},
    }


def _victim_facts(spec: Mapping[str, Any], attack: _Method | None) -> dict[str, Any]:
    settings = spec["attack"]["settings"]
    return {
        "data": spec["data"]["name"],
        "arch": spec["arch"],
        "attack": "benign" if attack is None else attack.label,
        "attack_method": spec["attack"]["method"],
        "poison_rate": settings.get("poison_rate"),
        "target_label": settings.get("target_label"),
        "seed": spec["seed"],
    }


def _title(facts: Mapping[str, Any]) -> str:
    victim = f"{facts['attack']} on {facts['data']}, seed {facts['seed']}"
    return f"{facts['defence']} against {victim}" if "defence" in facts else victim


# -- records --------------------------------------------------------------------------------------------------------


def _victim(spec: dict[str, Any], facts: dict[str, Any], attack: _Method | None, draw: random.Random) -> dict[str, Any]:
    size, _, accuracy = SIZES.get(facts["data"], SIZES["cifar10"])
    asr = None if attack is None else attack.strength + draw.gauss(0, 0.008)
    metrics = _evaluation(size, accuracy + draw.gauss(0, 0.004), asr, 0.02, draw)
    return {
        "schema": 1,
        "kind": "victim",
        "status": "done",
        "title": _title(facts),
        "facts": facts,
        "spec": spec,
        "victim_key": None,
        "key": content_key(spec),
        "metrics": {"before": metrics},
        "cost": {
            "seconds": round(draw.uniform(40, 60) * math.sqrt(size / 360), 3),
            "image_passes": 12.0 * 5 * size,
            "peak_memory_bytes": None,
            "clean_images": 0,
        },
        "num_poisoned": 0 if attack is None else size // 2,
        "class_names": CLASS_NAMES if facts["data"] == "cifar10" else [str(label) for label in range(NUM_CLASSES)],
        "made": _made(draw.uniform(60, 90)),
    }


def _result(
    spec: dict[str, Any],
    facts: dict[str, Any],
    victim: Mapping[str, Any],
    attack: _Method | None,
    defence: _Method,
    draw: random.Random,
) -> dict[str, Any]:
    before = victim["metrics"]["before"]
    size = before["acc"]["n"]
    metrics: dict[str, Any] = {"before": before}
    if defence.kind == "purifier":
        works = 0.0
        if attack is not None:
            works = min(1.0, max(0.0, defence.strength * (1.25 - 0.6 * attack.cost) + draw.gauss(0, 0.08)))
        asr = None if attack is None else 0.01 + before["asr"]["value"] * (1 - works)
        accuracy = before["acc"]["value"] - max(0.0, defence.cost + draw.gauss(0, 0.004))
        after = _evaluation(size, accuracy, asr, 0.95 * accuracy * works, draw, broken=draw.random() < 0.001)
        metrics |= {"after": after, "compare": _compare(before, after)}
    else:
        alarm = draw.random() < (0.08 if attack is None else defence.strength)
        targets = [] if attack is None else [facts["target_label"]]
        named = (targets if draw.random() < 0.93 else [(facts["seed"] + 5) % NUM_CLASSES]) if alarm else []
        named = named or ([draw.randrange(NUM_CLASSES)] if alarm else [])
        outcome = "backdoored" if alarm else draw.choice(["clean", "clean", "clean", "cannot tell"])
        metrics["detection"] = {
            "outcome": outcome,
            "suspects": named,
            "targets": targets,
            "score": round(draw.uniform(3, 9) if alarm else draw.uniform(0, 2), 4),
            "threshold": 2.0,
            "alarm": alarm,
            "correct": (named == targets if targets else False) if alarm else outcome == "clean" and not targets,
        }
    return {
        "schema": 1,
        "kind": spec["kind"],
        "status": "done",
        "title": _title(facts),
        "facts": facts,
        "spec": spec,
        "victim_key": victim["key"],
        "key": content_key(spec),
        "metrics": metrics,
        "cost": {
            "seconds": round(defence.seconds * draw.uniform(0.9, 1.2) * math.sqrt(size / 10_000), 3),
            "image_passes": round(defence.seconds * 900 * draw.uniform(0.95, 1.05), 1),
            "peak_memory_bytes": int(2**28 * (1 + defence.strength) * draw.uniform(0.98, 1.02)),
            "clean_images": facts["clean_images"],
        },
        "class_names": victim["class_names"],
        "made": _made(defence.seconds * 1.3),
    }


def _failure(spec: dict[str, Any], facts: dict[str, Any], victim_key: str | None, error: str) -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": spec["kind"],
        "status": "failed",
        "title": _title(facts),
        "facts": facts,
        "spec": spec,
        "victim_key": victim_key,
        "error": error,
        "traceback": f"Traceback (most recent call last):\n  ...\n{error}",
        "made": _made(1.5),
        "key": content_key(spec),
    }


def _failed_victim(name: str) -> dict[str, Any]:
    attack = next(_attacks(1))
    spec = _victim_spec(name, attack, 0, 0, rate=0.0001)
    error = "ValueError: a poison rate of 0.0001 poisons no image of 1,437"
    return _failure(spec, _victim_facts(spec, attack), None, error)


def _made(seconds: float) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 3),
        "at": "2025-11-22T08:00:00Z",
        "versions": {"lustral": "0.1.0", "torch": "2.14.1", "python": "3.11.9"},
        "code": "0123456789ab",
        "machine": "x86_64",
        "device": "cpu",
        "threads": 2,
    }


def _rate(share: float | None, total: int) -> dict[str, float | int | None]:
    """Return a proportion with its Wilson interval, as the records hold it."""
    if share is None or total == 0:
        return {"value": None, "low": None, "high": None, "hits": 0, "n": 0}
    hits = round(min(1.0, max(0.0, share)) * total)
    value, unit = hits / total, 1.96**2 / total
    centre = (value + unit / 2) / (1 + unit)
    half = math.sqrt(unit * value * (1 - value) + unit * unit / 4) / (1 + unit)
    low = 0.0 if hits == 0 else max(0.0, centre - half)
    high = 1.0 if hits == total else min(1.0, centre + half)
    return {"value": value, "low": low, "high": high, "hits": hits, "n": total}


def _evaluation(
    size: int, acc: float, asr: float | None, ra: float, draw: random.Random, *, broken: bool = False
) -> dict[str, Any]:
    attackable = 0 if asr is None else size * (NUM_CLASSES - 1) // NUM_CLASSES
    success = _rate(asr, attackable)
    room = 1 - (success["value"] or 0.0)
    return {
        "acc": _rate(acc, size),
        "asr": success,
        "ra": _rate(None if asr is None else min(ra, room), attackable),
        "natural_rate": _rate(None if asr is None else draw.uniform(0.005, 0.02), attackable),
        "num_non_finite": 37 if broken else 0,
        "non_finite": broken,
        "probes": {},
    }


def _compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    acc0, asr0, ra0 = (before[name]["value"] for name in ("acc", "asr", "ra"))
    acc1, asr1, ra1 = (after[name]["value"] for name in ("acc", "asr", "ra"))
    loss = acc0 - acc1
    if asr0 is None:
        empty = dict.fromkeys(("der", "rir", "asr_drop", "ra_gain", "erased"))
        return {**empty, "acc_loss": loss}
    floor = max(0.05, 1.5 * after["natural_rate"]["value"])
    return {
        "der": (max(0.0, asr0 - asr1) - max(0.0, loss) + 1) / 2,
        "rir": (max(0.0, ra1 - ra0) - max(0.0, loss) + 1) / 2,
        "acc_loss": loss,
        "asr_drop": asr0 - asr1,
        "ra_gain": ra1 - ra0,
        "erased": not after["non_finite"] and asr1 < floor and loss < 0.03 and ra1 >= 0.8 * acc1,
    }


# -- files ----------------------------------------------------------------------------------------------------------


class _Writer:
    """Puts records and their files where a store has them, without waiting for the disk."""

    def __init__(self, root: Path, *, pictures: bool, details: bool) -> None:
        self.root, self.pictures, self.details = root, pictures, details
        self.sheets = [_sheet(index) for index in range(12)]
        self.made: set[Path] = set()

    def victim(self, record: dict[str, Any]) -> None:
        files: dict[str, bytes] = {}
        if self.details:
            draw = random.Random(record["key"])
            history = [
                {"epoch": epoch, "loss": round(2.2 * 0.7**epoch, 4), "images_per_second": draw.randrange(1900, 2100)}
                for epoch in range(1, 13)
            ]
            detail = {"history": history, "per_class": {"before": _per_class(record["metrics"]["before"], draw)}}
            files["detail.json"] = json.dumps(detail).encode()
            files["model.safetensors"] = WEIGHTS
            files["victim.json"] = json.dumps({"spec": record["spec"]}).encode()
        if self.pictures and record["facts"]["attack"] != "benign":
            files["trigger.png"] = self.sheet(record["facts"]["attack"])
        self.put("victims", record, files)

    def result(self, record: dict[str, Any], draw: random.Random) -> None:
        facts, files = record["facts"], dict[str, bytes]()
        searches = facts["defence_method"] in ("baeraser", "mesa", "mask_area", "neural_cleanse")
        if self.details:
            files["detail.json"] = json.dumps(_detail(record, searches, draw)).encode()
        if self.pictures and searches and facts["attack"] != "benign":
            files["recovered.png"] = self.sheet(facts["attack"])
        self.put(f"{record['kind']}s", record, files)

    def failure(self, record: dict[str, Any]) -> None:
        self.put("failures", record, {})

    def sheet(self, name: str) -> bytes:
        return self.sheets[hashlib.sha256(name.encode()).digest()[0] % len(self.sheets)]

    def put(self, kind: str, record: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        key, named = record["key"], {}
        folder = self.root / "files" / key[:2] / f"{key}-{FOLDER_TOKEN}"
        if files:
            folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
            named[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        whole = {**record, "files": named}
        if files:
            whole["folder"] = folder.name
        whole["checksum"] = checksum_of(whole)
        path = self.root / kind / key[:2] / f"{key}.json"
        if path.parent not in self.made:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.made.add(path.parent)
        path.write_bytes(canonical(whole))


def _per_class(evaluation: Mapping[str, Any], draw: random.Random) -> list[dict[str, float | int | None]]:
    value, total = evaluation["acc"]["value"], evaluation["acc"]["n"] // NUM_CLASSES
    return [_rate(value + draw.gauss(0, 0.02), total) for _ in range(NUM_CLASSES)]


def _detail(record: Mapping[str, Any], searches: bool, draw: random.Random) -> dict[str, Any]:
    metrics = record["metrics"]
    detail: dict[str, Any] = {"per_class": {"before": _per_class(metrics["before"], draw)}}
    if "after" in metrics:
        first, last = metrics["before"]["acc"]["value"], metrics["after"]["acc"]["value"]
        history = [
            {
                "epoch": epoch,
                "clean_accuracy": round(first + (last - first) * epoch / 8 + draw.gauss(0, 0.003), 4),
                "recovered_asr": round(max(0.0, 0.98 * 0.5**epoch + draw.gauss(0, 0.004)), 4) if searches else None,
            }
            for epoch in range(9)
        ]
        audit = _verdict(record, draw, quiet=True) if searches else None
        detail["per_class"]["after"] = _per_class(metrics["after"], draw)
        detail |= {"history": history, "selected": draw.randrange(5, 9), "notes": [], "audit": audit}
    if searches:
        detail["verdict"] = _verdict(record, draw)
    return detail


_UNTESTED: dict[str, Any] = {"null": "", "p_value": None}


def _verdict(record: Mapping[str, Any], draw: random.Random, *, quiet: bool = False) -> dict[str, Any]:
    label = record["facts"]["target_label"]
    found = label is not None and not quiet
    evidence = []
    for index in range(NUM_CLASSES):
        accused = found and index == label
        p_value = 1e-7 if accused else round(draw.uniform(0.2, 1.0), 4)
        figures = {
            "mask_area": round(draw.uniform(3, 9) if accused else draw.uniform(40, 90), 2),
            "success_rate": round(draw.uniform(0.93, 1.0), 4),
            "natural_rate": round(draw.uniform(0.0, 0.02), 4),
            "anomaly_index": round(draw.uniform(4, 8) if accused else draw.uniform(-1, 1), 3),
            "search_steps": 200.0 if index % 3 == 0 else 50.0,
        }
        for measure, value in figures.items():
            tested = {"null": "a made-up one", "p_value": p_value} if measure == "mask_area" else _UNTESTED
            evidence.append({"label": index, "measure": measure, "value": value, **tested})
    return {
        "outcome": "backdoored" if found else "clean",
        "suspects": [label] if found else [],
        "score": 5.0 if found else 0.7,
        "threshold": 2.0,
        "basis": "The score compares the smallest area with those of the other classes.",
        "evidence": evidence,
    }


def _sheet(index: int) -> bytes:
    """Return a small PNG of coloured tiles with a patch."""
    picture = Image.new("RGB", (96, 48), (30 + 15 * index, 90, 220 - 15 * index))
    pen = ImageDraw.Draw(picture)
    for column in range(4):
        pen.rectangle((24 * column + 2, 2, 24 * column + 21, 21), fill=(200 - 40 * column, 60 + 12 * index, 120))
        pen.rectangle((24 * column + 16, 40, 24 * column + 21, 45), fill=(255, 255, 255))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
