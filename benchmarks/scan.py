"""The time of a scan over all labels, against class after class at the same number of steps, in one run.

    python benchmarks/scan.py MODEL [--data cifar10] [--clean 2500] [--steps 200] [--sample-classes 6]

Class after class, the published way, searches one label at a time to the last step. It is timed on ``--sample-classes`` labels
spread over all of them and scaled to all; the batched scan is timed whole, with and without screening.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from lustral.core.files import write_json_atomic
from lustral.core.randomness import child
from lustral.vision.images import stratified_indices
from lustral.vision.inverters import FoundMasks, MaskSearch
from lustral.vision.models import load_model
from lustral.vision.sources import load_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--clean", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sample-classes", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="also write the figures to this JSON file")
    options = parser.parse_args()
    model = load_model(options.model).model.to(options.device)
    pool = load_source(options.data).defender_pool()
    chosen, _ = stratified_indices(
        pool.labels, pool.num_classes, min(options.clean, len(pool)), generator=child(0, "clean")
    )
    clean = pool.subset(chosen).to(options.device)
    labels = list(range(clean.num_classes))

    def timed(search: MaskSearch, which: list[int]) -> tuple[float, FoundMasks]:
        began = time.perf_counter()
        found = search.run(model, clean, which, generator=child(0, "search"))
        return time.perf_counter() - began, found

    timed(MaskSearch(steps=5), labels[:4])  # warm-up
    screened, found = timed(MaskSearch(steps=options.steps), labels)
    whole, _ = timed(MaskSearch(steps=options.steps, screening=False), labels)
    sample = labels[:: max(1, len(labels) // options.sample_classes)][: options.sample_classes]
    one_by_one = sum(timed(MaskSearch(steps=options.steps, screening=False), [label])[0] for label in sample)
    one_by_one *= len(labels) / len(sample)
    print(f"{len(labels)} labels, {options.steps} steps of {MaskSearch().batch_size} images, {options.device}")
    print(f"  all at once, screened      {screened:7.1f} s  ({int(found.steps.sum())} label-steps)")
    print(f"  all at once, no screening  {whole:7.1f} s")
    print(f"  class after class          {one_by_one:7.1f} s  (from {len(sample)} labels)")
    print(f"  ratio class after class / all at once, screened: {one_by_one / screened:.2f}")
    if options.out is not None:
        record = {
            "labels": len(labels),
            "steps": options.steps,
            "screened_s": screened,
            "unscreened_s": whole,
            "class_after_class_s": one_by_one,
            "ratio": one_by_one / screened,
            "torch": str(torch.__version__),
        }
        write_json_atomic(options.out, record)


if __name__ == "__main__":
    main()
