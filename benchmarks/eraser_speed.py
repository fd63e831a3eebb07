"""How much faster the four erasers are than their published algorithms written down plainly: same victim, images and steps.

    python benchmarks/eraser_speed.py --victim FOLDER --data cifar10 [--clean 2500] [--epochs 2] [--seeds 1] [--only sau,tsbd]

The plain versions follow the published code step by step: float32, contiguous memory, what it computes twice is computed
twice, what it lets accumulate accumulates. Ours run with the same number of steps, once as they are and once in float32, so
that the share of bfloat16 and channels-last in the gain can be told from the share of the algorithm. Ratios are of medians,
within one run. Quality is the accuracy and the attack success afterwards, with the victim's true trigger.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lustral.evaluation import evaluate
from lustral.files import write_json_atomic
from lustral.images import as_float, stratified_indices
from lustral.models.wiring import late_layer, trace
from lustral.protocols import DefenderView, ImageSet
from lustral.purifiers import IBAU, SAU, TSBD, NeuralPolarizer, clean_unlearning
from lustral.randomness import child
from lustral.sources import load_source
from lustral.training import Trainer
from lustral.victims import load_victim

RESULT = Path(__file__).resolve().parent / "results" / "eraser_speed_cpu.json"
Batches = Sequence[tuple[Tensor, Tensor]]


def batches_of(data: ImageSet, batch_size: int) -> Batches:
    """Return float batches in a fixed order, the last one only if it is full."""
    images = as_float(data.images)
    starts = range(0, len(data) - batch_size + 1, batch_size)
    return [(images[s : s + batch_size], data.labels[s : s + batch_size]) for s in starts]


def plain_sau(model: nn.Module, batches: Batches, epochs: int) -> nn.Module:
    """Shared adversarial unlearning: five steps for every batch, clean predictions anew in each, gradients to every weight."""
    model, reference = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, amsgrad=True)
    for _ in range(epochs):
        for x, y in batches:
            delta = torch.full_like(x, 0.2, requires_grad=True)
            for _ in range(5):
                f, g = model(x + delta), reference(x + delta)
                f_clean, g_clean = model(x).argmax(1), reference(x).argmax(1)
                f_flipped, g_flipped = f.argmax(1) != f_clean, g.argmax(1) != g_clean
                shared = f_flipped & g_flipped & (f.argmax(1) == g.argmax(1))
                f_loss = (F.cross_entropy(f, y, reduction="none") * ~f_flipped).sum()
                g_loss = (F.cross_entropy(g, y, reduction="none") * ~g_flipped).sum()
                p, q = f.softmax(1).clamp_min(1e-8), g.softmax(1).clamp_min(1e-8)
                middle = ((p + q) / 2).log()
                apart = ((p * (p.log() - middle)).sum(1) + (q * (q.log() - middle)).sum(1)) / 2
                loss = -0.01 * (f_loss + g_loss) / (2 * len(x)) + (apart * ~shared).sum() / len(x)
                if bool(shared.all()):
                    break
                delta.grad = None
                loss.backward()
                delta = (delta - 0.2 * delta.grad.sign()).clamp(-0.2, 0.2).detach().requires_grad_(True)
            delta = delta.detach()
            optimizer.zero_grad()
            clean, moved = model(torch.cat([x, x + delta])).split(len(x))
            fooled, own = reference(x + delta).argmax(1), reference(x).argmax(1)
            counted = (fooled != y) & (fooled != own)
            p = moved.softmax(1)
            wrong = p.gather(1, fooled[:, None])[:, 0]
            rest = p.sum(1) - wrong
            risk = -((1e-6 + rest.clamp_max(0.999)).log() + (1 + 1e-6 - wrong.clamp_min(0.001)).log()) / 2
            (F.cross_entropy(clean, y) + (risk * counted).sum() / len(x)).backward()
            optimizer.step()
    return model


def plain_npd(model: nn.Module, batches: Batches, epochs: int) -> nn.Module:
    """Neural polarizer by a hook: a pass for the target, two steps with a check each, separate clean and perturbed passes."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    name = late_layer(model, trace(model, batches[0][0][:1]))
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Conv2d)
    width = layer.in_channels
    polarizer = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
    nn.init.dirac_(polarizer[0].weight)
    layer.register_forward_pre_hook(lambda _, inputs: polarizer(inputs[0]))
    polarizer.train()
    warm = torch.optim.SGD(polarizer.parameters(), lr=1e-4)
    for x, y in batches:  # one epoch of the five, so that ours is not credited with what it leaves out
        warm.zero_grad()
        F.cross_entropy(model(x), y).backward()
        warm.step()
    polarizer.eval()
    optimizer = torch.optim.SGD(polarizer.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        for x, y in batches:
            with torch.no_grad():
                logits = model(x)
            own, target = logits.argmax(1), logits.scatter(1, y[:, None], -10.0).argmax(1)
            delta = torch.zeros_like(x, requires_grad=True)
            for _ in range(2):
                loss = F.cross_entropy(model((x + delta).clamp(0, 1)), target)
                delta.grad = None
                loss.backward()
                step = delta.detach() - 0.1 * delta.grad.sign()
                norm = step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                delta = (step * (3.0 / norm.clamp_min(3.0))).requires_grad_(True)
                with torch.no_grad():
                    if (model((x + delta).clamp(0, 1)).argmax(1) == target).float().mean() > 0.6:
                        break
            optimizer.zero_grad()
            clean = model(x)
            fooled = model((x + delta.detach()).clamp(0, 1))
            s = fooled.softmax(1)
            rival = fooled.detach().scatter(1, y[:, None], -10.0).argmax(1)
            loss = F.cross_entropy(clean, y) + 0.4 * F.cross_entropy(fooled, own)
            for label in (rival, target):
                loss = loss - 0.4 * (1.0001 - s.gather(1, label[:, None]) + 1e-12).log().mean()
            loss.backward()
            optimizer.step()
    return model


def plain_tsbd(model: nn.Module, batches: Batches, epochs: int) -> nn.Module:
    """Two-stage defence: changes of all weights in one Python list, a deep copy for every step of fine-tuning."""
    unlearned = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(unlearned.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            (-F.cross_entropy(unlearned(x), y)).backward()
            nn.utils.clip_grad_norm_(unlearned.parameters(), 10.0)
            optimizer.step()
        evaluate_accuracy(unlearned, batches)
    moved = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and "shortcut" not in name:
            change = (unlearned.get_submodule(name).weight - module.weight).detach().abs().flatten(1)
            moved += [(float(row.sum()), name, k) for k, row in enumerate(change)]
    moved.sort(reverse=True)
    chosen = moved[: int(0.3 * len(moved))]
    pool = []
    for _, name, k in chosen:
        pool += (unlearned.get_submodule(name).weight[k] - model.get_submodule(name).weight[k]).abs().flatten().tolist()
    pool.sort(reverse=True)
    bound = pool[int(0.7 * len(pool)) - 1]
    tuned = copy.deepcopy(model).train()
    with torch.no_grad():
        for _, name, k in chosen:
            weight = tuned.get_submodule(name).weight
            change = (unlearned.get_submodule(name).weight[k] - model.get_submodule(name).weight[k]).abs()
            weight[k][change >= bound] = 0
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.01, momentum=0.9)
    for _ in range(epochs):
        for x, y in batches:
            trial = copy.deepcopy(tuned)
            trial.zero_grad()
            F.cross_entropy(trial(x), y).backward()
            first = [p.grad.clone() for p in trial.parameters()]
            with torch.no_grad():
                for p, slope in zip(trial.parameters(), first, strict=True):
                    p += 0.05 * slope / slope.norm().clamp_min(1e-12)
            trial.zero_grad()
            F.cross_entropy(trial(x), y).backward()
            optimizer.zero_grad()
            for p, q, slope in zip(tuned.parameters(), trial.parameters(), first, strict=True):
                p.grad = 0.3 * slope + 0.7 * q.grad
            optimizer.step()
            with torch.no_grad():
                tuned(x)  # for the log, and for the running statistics
    return tuned.eval()


def plain_i_bau(model: nn.Module, batches: Batches, rounds: int) -> nn.Module:
    """Implicit hypergradient as its library has it: outer gradients twice, K products from v = 0."""
    model = copy.deepcopy(model).eval()
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    x_inner, y_inner = batches[0]
    for _ in range(rounds):
        delta = torch.zeros_like(x_inner[:1], requires_grad=True)
        for x, _ in batches:
            own = model(x).argmax(1)
            loss = 0.001 * delta.square().sum() - F.cross_entropy(model(x + delta), own)
            delta.grad = None
            loss.backward()
            delta = (delta - 10 * delta.grad).detach().requires_grad_(True)
        delta = (delta * (10 / delta.norm().clamp_min(10.0))).detach()
        for x, y in batches:
            d = delta.clone().requires_grad_(True)
            count = max(1, int(0.01 * len(x)))
            mixed = torch.cat([x[:count] + d, x[count:]])
            outer = F.cross_entropy(model(mixed), y)
            by_weights = torch.autograd.grad(outer, parameters, retain_graph=True)
            (by_delta,) = torch.autograd.grad(outer, d)
            inner = 0.001 * d.square().sum() - F.cross_entropy(model(x_inner + d), y_inner)
            (slope,) = torch.autograd.grad(inner, d, create_graph=True)
            mapped = d - 0.1 * slope
            v = torch.zeros_like(d)
            for _ in range(5):
                (product,) = torch.autograd.grad(mapped, d, grad_outputs=v, retain_graph=True)
                v = product + by_delta
            through = torch.autograd.grad(mapped, parameters, grad_outputs=v, allow_unused=True)
            optimizer.zero_grad()
            for p, direct, indirect in zip(parameters, by_weights, through, strict=True):
                p.grad = direct if indirect is None else direct + indirect
            optimizer.step()
    return model


@torch.no_grad()
def evaluate_accuracy(model: nn.Module, batches: Batches) -> float:
    model.eval()
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    model.train()
    return hits / sum(len(y) for _, y in batches)


def ours(name: str, epochs: int) -> Any:
    """Return our method with as many steps as the plain one."""
    constant = {"schedule": "constant", "weight_decay": 0.0}
    if name == "sau":
        trainer = Trainer(
            epochs=epochs, batch_size=128, optimizer="adam", learning_rate=1e-4, batch_norm="frozen", **constant
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
    "sau": plain_sau,
    "npd": plain_npd,
    "tsbd": plain_tsbd,
    "i_bau": plain_i_bau,
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
