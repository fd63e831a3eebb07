"""The cpu setting: every victim of the main table, scanned, erased and measured, one JSON file per result.

    python benchmarks/cpu_setting.py train  [--only NAME ...]
    python benchmarks/cpu_setting.py scan   [--only NAME ...]
    python benchmarks/cpu_setting.py erase  [--only NAME ...] [--methods baeraser mesa ...]
    python benchmarks/cpu_setting.py table

Needs LUSTRAL_DATA with cifar10.npz and gtsrb32.npz. Results that exist are kept, so a killed run resumes. Victims go to
runs/victims (not in the repository), results to benchmarks/results/cpu.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lustral.core.files import write_json_atomic
from lustral.core.randomness import child
from lustral.training import EpochReport, Trainer, default_trainer
from lustral.vision.attacks import BadNets, Blended
from lustral.vision.detectors import MaskArea
from lustral.vision.evaluation.protocol import Evaluation, compare_evaluations, evaluate
from lustral.vision.images import stratified_indices
from lustral.vision.interfaces import Attack, Purifier
from lustral.vision.inverters import MaxEntropy
from lustral.vision.measures import MASK_AREA
from lustral.vision.models import Classifier
from lustral.vision.purifiers import BaEraser, BNRefresh, FineTuning, Mesa
from lustral.vision.records import DefenderView, Verdict, Victim
from lustral.vision.sources import DataSource, load_source
from lustral.vision.victims import implant, load_victim, save_victim

ROOT = Path(__file__).resolve().parent
VICTIMS = ROOT.parent / "runs" / "victims"
RESULTS = ROOT / "results" / "cpu"
ARCH = "preact_resnet18:width=16"
CLEAN_IMAGES = 2_500
SHORT = 7  # epochs of the further seeds: 2 points less accurate than the full recipe, at little more than half its time
SECONDARY = {"epochs": 3, "learning_rate": 0.05}  # fine-tuning of a clean model, the way MESA's victims are made


@dataclasses.dataclass(frozen=True)
class Plan:
    name: str
    attack: Attack | None
    seed: int = 0
    data: str = "cifar10"
    start: str | None = None
    epochs: int | None = None  # None: the full recipe


def plans() -> list[Plan]:
    corner = [
        Plan("badnets-corner-s0", BadNets(target_label=3), 0),
        Plan("badnets-corner-s1", BadNets(target_label=0), 1, epochs=SHORT),
        Plan("badnets-corner-s2", BadNets(target_label=7), 2, start="clean-s1"),
    ]
    inset = [
        Plan(
            f"badnets-inset4-s{s}",
            BadNets(target_label=(5, 9, 1)[s], size=4, margin=2, pattern="checker"),
            s,
            epochs=None if s else SHORT,
            start=f"clean-s{s}" if s else None,
        )
        for s in range(3)
    ]
    colour = [
        Plan(
            f"random-colour-{i}",
            BadNets(target_label=(2, 4, 6, 8, 1)[i], pattern="random", pattern_seed=i, placement="random"),
            i,
            start="clean-s0",
        )
        for i in range(5)
    ]
    clean = [Plan(f"clean-s{s}", None, s, epochs=SHORT if s else None) for s in range(4)]
    return [
        clean[0],
        corner[0],
        *colour,
        corner[1],
        inset[0],
        clean[1],
        Plan("blended-s0", Blended(target_label=4), 0),
        corner[2],
        clean[2],
        inset[1],
        inset[2],
        clean[3],
        Plan("gtsrb-corner-s0", BadNets(target_label=14), 0, data="gtsrb", epochs=12),
    ]


def trainer_for(plan: Plan, source: DataSource) -> Trainer:
    trainer = default_trainer(flip=source.flip, num_images=len(source.train))
    if plan.start:
        return dataclasses.replace(trainer, **SECONDARY)
    return trainer if plan.epochs is None else dataclasses.replace(trainer, epochs=plan.epochs)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, {**record, "machine": machine()})


def machine() -> str:
    return f"{platform.machine()} {torch.get_num_threads()} threads, torch {torch.__version__}"


def train(plan: Plan, source: DataSource) -> None:
    folder = VICTIMS / plan.name
    if (folder / "victim.json").exists():
        return
    train_set, _ = source.training_split()
    assert source.test is not None
    start = load_victim(VICTIMS / plan.start).model if plan.start else None
    assert start is None or isinstance(start, Classifier)
    began = time.perf_counter()
    epochs: list[EpochReport] = []

    def note(report: EpochReport) -> None:
        epochs.append(dataclasses.replace(report, model=torch.nn.Identity()))
        say(f"  {plan.name} epoch {report.epoch}: loss {report.loss:.3f}, {report.images_per_second:.0f} images/s")

    victim = implant(
        plan.attack,
        train_set,
        source.test,
        arch=ARCH,
        trainer=trainer_for(plan, source),
        seed=plan.seed,
        data_name=plan.data,
        start=start,
        on_epoch=note,
    )
    seconds = time.perf_counter() - began
    save_victim(folder, victim, source.test)
    m = victim.metrics
    write(
        RESULTS / "victims" / f"{plan.name}.json",
        {
            "name": plan.name,
            "seconds": seconds,
            "metrics": m,
            "provenance": dict(victim.provenance),
            "images_per_second": [round(r.images_per_second) for r in epochs],
        },
    )
    say(
        f"train {plan.name}: {seconds:.0f} s, ACC {m['acc']['value']:.4f}, ASR {m['asr']['value']}, RA {m['ra']['value']}"
    )


def view_of(victim: Victim, source: DataSource, seed: int) -> DefenderView:
    pool = source.defender_pool()
    count = min(CLEAN_IMAGES, len(pool))
    chosen, _ = stratified_indices(pool.labels, pool.num_classes, count, generator=child(seed, "clean"))
    return DefenderView(model=victim.model, clean=pool.subset(chosen))


def scan(plan: Plan, source: DataSource) -> None:
    path = RESULTS / "scans" / f"{plan.name}.json"
    if path.exists() or not (VICTIMS / plan.name / "victim.json").exists():
        return
    victim = load_victim(VICTIMS / plan.name)
    verdict = MaskArea().inspect(view_of(victim, source, plan.seed), generator=child(plan.seed, "scan"))
    write_scan(path, plan, verdict)


def write_scan(path: Path, plan: Plan, verdict: Verdict) -> None:
    truth = getattr(plan.attack, "target_label", None)
    record = {
        "name": plan.name,
        "outcome": verdict.outcome,
        "suspects": verdict.suspect_labels,
        "truth": truth,
        "score": verdict.score,
        "evidence": [dataclasses.asdict(e) for e in verdict.evidence],
        "cost": dataclasses.asdict(verdict.cost),
    }
    write(path, record)
    areas = " ".join(f"{area:.1f}" for area in verdict.by_label(MASK_AREA).values())
    say(
        f"scan {plan.name}: {verdict.outcome} {verdict.suspect_labels} truth {truth} score {verdict.score:.2f} "
        f"{verdict.cost.seconds:.0f} s; areas {areas}"
    )


RANDOM_PATCH = MaskArea(inverter=MaxEntropy(operator="random_patch", steps=200, batch_size=128, learning_rate=2e-4))
METHODS: dict[str, Purifier] = {
    "baeraser": BaEraser(),
    "mesa": Mesa(),
    "fine_tuning": FineTuning(choose="held_out"),
    "bn_refresh": BNRefresh(),
    "baeraser.published-code": BaEraser(schedule="published"),
    "baeraser.published-paper": BaEraser(schedule="published", form="paper"),
    "baeraser.published-code-random-patch": BaEraser(schedule="published", detector=RANDOM_PATCH),
    "mesa.published": Mesa(
        trigger_rate=0.01,
        least_steps=0,
        trainer=Trainer(epochs=10, batch_size=128, learning_rate=1e-3, schedule="constant", weight_decay=0.0),
    ),
    "baeraser.forced": BaEraser(target_labels=(3,)),  # for benign models, on which the scan names nothing
    "mesa.forced": Mesa(target_labels=(3,)),
}
MAIN_METHODS = ("baeraser", "mesa", "fine_tuning", "bn_refresh")


def erase(plan: Plan, source: DataSource, method: str) -> None:
    path = RESULTS / "erased" / f"{plan.name}.{method}.json"
    if path.exists() or not (VICTIMS / plan.name / "victim.json").exists():
        return
    victim = load_victim(VICTIMS / plan.name)
    view = view_of(victim, source, plan.seed)
    purifier = METHODS[method]
    assert source.test is not None
    purified = purifier.purify(view, generator=child(plan.seed, "erase", method))
    before = Evaluation.from_dict(victim.metrics)  # measured by the same stream when the victim was made
    after = evaluate(victim, purified.model, source.test, generator=child(plan.seed, "evaluation"))
    record = {
        "name": plan.name,
        "method": method,
        "settings": repr(purifier),
        "before": before.to_dict(),
        "after": after.to_dict(),
        "compare": compare_evaluations(before, after),
        "history": list(purified.history),
        "selected": purified.selected,
        "notes": purified.notes,
        "cost": dataclasses.asdict(purified.cost),
        "audit": None if purified.audit is None else purified.audit.outcome,
    }
    write(path, record)
    scan_path = RESULTS / "scans" / f"{plan.name}.json"
    if method == "baeraser" and purified.verdict is not None and not scan_path.exists():
        write_scan(scan_path, plan, purified.verdict)  # the scan that the erasing began with is as good as another
    say(
        f"erase {plan.name} {method}: ACC {before.acc.value:.4f} -> {after.acc.value:.4f}, ASR {before.asr.value:.4f} -> "
        f"{after.asr.value:.4f}, RA {after.ra.value:.4f}, {purified.cost.seconds:.0f} s {purified.notes}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["train", "scan", "erase"])
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--methods", nargs="*", default=MAIN_METHODS, choices=METHODS)
    options = parser.parse_args()
    sources: dict[str, DataSource] = {}
    for plan in plans():
        if options.only and not any(plan.name.startswith(name) for name in options.only):
            continue
        if plan.data not in sources:
            sources[plan.data] = load_source(plan.data)
        source = sources[plan.data]
        if options.verb == "train":
            train(plan, source)
        elif options.verb == "scan":
            scan(plan, source)
        else:
            for method in options.methods:
                erase(plan, source, method)


if __name__ == "__main__":
    sys.exit(main())
