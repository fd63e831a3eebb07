"""How much faster the four erasers are than their published algorithms written down plainly: same victim, images and steps.

    PYTHONPATH=tests python benchmarks/eraser_speed.py --victim FOLDER --data cifar10 [--clean 2500] [--epochs 2] [--seeds 1]

The plain versions (``tests/reference``) follow the published code step by step: float32, contiguous memory, what it computes
twice is computed twice, what it lets accumulate accumulates. ``--only sau,tsbd`` takes a part of them. Ours run with the
same number of steps, once as they are and once in float32, so that the share of bfloat16 and channels-last in the gain can
be told from the share of the algorithm. Ratios are of medians, within one run. Quality is the accuracy and the attack
success afterwards, with the victim's true trigger.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import reference
from lustral.core.files import write_json_atomic
from lustral.core.randomness import child
from lustral.training import Trainer
from lustral.vision.evaluation import evaluate
from lustral.vision.images import as_float, stratified_indices
from lustral.vision.purifiers import IBAU, SAU, TSBD, NeuralPolarizer
from lustral.vision.records import DefenderView, ImageSet
from lustral.vision.repair import clean_unlearning
from lustral.vision.sources import load_source
from lustral.vision.victims import load_victim
from reference.batches import Batches

RESULT = Path(__file__).resolve().parent / "results" / "eraser_speed_cpu.json"


def batches_of(data: ImageSet, batch_size: int) -> Batches:
    """Return float batches in a fixed order, the last one only if it is full."""
    images = as_float(data.images)
    starts = range(0, len(data) - batch_size + 1, batch_size)
    return [(images[s : s + batch_size], data.labels[s : s + batch_size]) for s in starts]


def ours(name: str, epochs: int) -> Any:
    """Return our method with as many steps as the plain one."""
    constant = {"schedule": "constant", "weight_decay": 0.0}
    if name == "sau":
        trainer = Trainer(
            epochs=epochs, batch_size=128, optimizer="amsgrad", learning_rate=1e-4, batch_norm="frozen", **constant
        )
        return SAU(trainer=trainer, least_steps=0)
    if name == "npd":
        method = NeuralPolarizer(initial="standardised", least_steps=0)
        return dataclasses.replace(method, trainer=dataclasses.replace(method.trainer, epochs=epochs))
    if name == "tsbd":
        return TSBD(
            neuron_ratios=(0.3,),
            unlearner=Trainer(epochs=epochs, batch_size=128, learning_rate=1e-3, clip_norm=10.0, **constant),
            trainer=Trainer(epochs=epochs, batch_size=128, learning_rate=0.01, **constant),
            least_steps=0,
        )
    method = IBAU(rounds=epochs, least_steps=0)
    return dataclasses.replace(method, trainer=dataclasses.replace(method.trainer, learning_rate=1e-3))


def in_float32(method: Any) -> Any:
    """Return a method whose trainers compute in float32 and contiguous memory."""
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    changed = {
        name: dataclasses.replace(value, precision="float32", channels_last=False)
        for name, value in fields.items()
        if isinstance(value, Trainer)
    }
    return dataclasses.replace(method, **changed)


PLAIN: dict[str, Callable[[nn.Module, Batches, int], nn.Module]] = {
    "sau": reference.sau,
    "npd": reference.neural_polarizer,
    "tsbd": reference.tsbd,
    "i_bau": reference.i_bau,
}
BATCH = {"i_bau": 100}


def variants(
    name: str, view: DefenderView, batches: Batches, epochs: int, method: Any, seed: int
) -> dict[str, Callable[[], nn.Module]]:
    """Return what is timed, by label."""
    return {
        "plain": lambda: PLAIN[name](view.model, batches, epochs),
        "ours": lambda: method.purify(view, generator=child(seed, "erase")).model,
        "ours in float32": lambda: in_float32(method).purify(view, generator=child(seed, "erase")).model,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victim", type=Path, required=True)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--clean", type=int, default=2500)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1, help="repetitions, each with another order of the images")
    parser.add_argument("--only", default=",".join(PLAIN))
    options = parser.parse_args()
    source, victim = load_source(options.data), load_victim(options.victim)
    pool = source.defender_pool()
    chosen, _ = stratified_indices(pool.labels, pool.num_classes, options.clean, generator=child(0, "clean"))
    clean = pool.subset(chosen)
    assert source.test is not None
    test = source.test.subset(torch.randperm(len(source.test), generator=child(0, "test"))[:2000])
    fit = clean.subset(torch.arange(round(0.8 * len(clean))))  # ours hold out a fifth
    rows: dict[str, Any] = json.loads(RESULT.read_text())["methods"] if RESULT.exists() else {}
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    clean_unlearning.MOST_RAISES = 0  # as many epochs of ascent as the plain version has, whatever they reach
    for name in options.only.split(","):
        epochs, method = options.epochs, ours(name, options.epochs)
        view = DefenderView(model=victim.model, clean=clean)
        measured: dict[str, Any] = {}
        for seed in range(options.seeds):
            order = torch.randperm(len(fit), generator=child(seed, "order"))
            batches = batches_of(fit.subset(order), BATCH.get(name, 128))
            for label, run in variants(name, view, batches, epochs, method, seed).items():
                began = time.perf_counter()
                model = run()
                seconds = time.perf_counter() - began
                rates = evaluate(victim, model, test, generator=child(0, "evaluation"))
                found = {"seconds": seconds, "acc": rates.acc.value, "asr": rates.asr.value}
                for column, value in found.items():
                    measured.setdefault(label, {}).setdefault(column, []).append(value)
                print(
                    f"{name:6} {label:16} {seconds:7.1f} s  ACC {rates.acc.value:.3f}  ASR {rates.asr.value:.3f}",
                    flush=True,
                )
        plain, own = (statistics.median(measured[label]["seconds"]) for label in ("plain", "ours"))
        ratio = plain / own
        rows[name] = {"machine": machine, "clean": options.clean, "epochs": epochs, **measured, "ratio": ratio}
        print(f"{name:6} plain / ours = {rows[name]['ratio']:.2f}", flush=True)
        write_json_atomic(RESULT, {"methods": rows})


if __name__ == "__main__":
    main()
