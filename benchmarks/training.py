"""How much of the bare speed our training loop keeps, and what bfloat16 channels-last is worth, in one run.

    python benchmarks/training.py [--width 16] [--batch-size 128] [--rounds 5] [--device cpu]

Bare rate: forward, cross-entropy, backward and SGD step of the same network in the same precision and memory layout on one
batch that never changes. Ours: ``Trainer.fit`` with its data pipeline (random order, 8-bit to float, crop and flip, copies to
the device). The variants take turns, round after round, so that a machine whose speed drifts hits all alike; ratios are
medians over rounds. Data are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from lustral.core.files import write_json_atomic
from lustral.core.randomness import child
from lustral.training import Augment, Trainer, autocast
from lustral.vision.models import build_classifier
from lustral.vision.records import ImageSet

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
PEAK_BF16 = {"H200": 989e12, "H100": 989e12}  # dense, from the vendor's data sheet
MACS_WIDTH_64 = 0.56e9  # of one PreAct-ResNet18 forward at 32x32


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_set(count: int, device: torch.device) -> ImageSet:
    stream = child(0, "benchmark")
    return ImageSet(
        images=torch.randint(256, (count, 3, 32, 32), generator=stream, dtype=torch.uint8).to(device),
        labels=torch.randint(10, (count,), generator=stream).to(device),
        num_classes=10,
    )


def network(width: int, device: torch.device) -> torch.nn.Module:
    arch = f"preact_resnet18:width={width}"
    return build_classifier(arch, num_classes=10, image_shape=(3, 32, 32), mean=MEAN, std=STD).to(device)


def ours(trainer: Trainer, model: torch.nn.Module, data: ImageSet) -> float:
    rates: list[float] = []
    trainer.fit(model, data, generator=child(1), on_epoch=lambda report: rates.append(report.images_per_second))
    synchronise(data.device)
    return rates[-1]


def bare(trainer: Trainer, model: torch.nn.Module, data: ImageSet, steps: int) -> float:
    layout = torch.channels_last if trainer.channels_last else torch.contiguous_format
    model = model.to(memory_format=layout).train()
    images, labels, _ = next(data.batches(trainer.batch_size))
    images = images.contiguous(memory_format=layout)
    optimizer = trainer.optimizer_for(model)

    def step() -> None:
        with autocast(data.device, trainer.precision):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    synchronise(data.device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise(data.device)
    return steps * len(images) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="also write the figures to this JSON file")
    options = parser.parse_args()
    device = torch.device(options.device)
    data = random_set(options.steps * options.batch_size, device)
    fast = Trainer(epochs=1, batch_size=options.batch_size, augment=Augment())
    slow = Trainer(epochs=1, batch_size=options.batch_size, augment=Augment(), precision="float32", channels_last=False)
    rates: dict[str, list[float]] = {"ours": [], "bare": [], "ours float32 contiguous": []}
    for round_index in range(options.rounds + 1):
        results = {
            "ours": ours(fast, network(options.width, device), data),
            "bare": bare(fast, network(options.width, device), data, options.steps),
            "ours float32 contiguous": ours(slow, network(options.width, device), data),
        }
        if round_index:  # the first round warms up
            for name, rate in results.items():
                rates[name].append(rate)
    share = statistics.median(a / b for a, b in zip(rates["ours"], rates["bare"], strict=True))
    gain = statistics.median(a / b for a, b in zip(rates["ours"], rates["ours float32 contiguous"], strict=True))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    medians = {key: round(statistics.median(values)) for key, values in rates.items()}
    print(f"{name}, torch {torch.__version__}, PreAct-ResNet18 width {options.width}, batch {options.batch_size}")
    for key, value in medians.items():
        print(f"  {key:26s} {value:8d} images/s")
    print(f"  our loop / bare step       {share:.3f}   (bar: 0.85)")
    print(f"  bfloat16 channels-last / float32 contiguous  {gain:.2f}")
    record = {
        "device": name,
        "torch": str(torch.__version__),
        "width": options.width,
        "batch_size": options.batch_size,
        "images_per_second": medians,
        "ours_over_bare": share,
        "bfloat16_over_float32": gain,
    }
    peak = next((value for key, value in PEAK_BF16.items() if key in name), None)
    if peak is not None:
        flops = 6 * MACS_WIDTH_64 * (options.width / 64) ** 2  # two per multiply-add, forward and twice that backward
        record["share_of_bfloat16_peak"] = medians["ours"] * flops / peak
        print(f"  share of the card's bfloat16 peak            {record['share_of_bfloat16_peak']:.3f}")
    if options.out is not None:
        write_json_atomic(options.out, record)


if __name__ == "__main__":
    main()
