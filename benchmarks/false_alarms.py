"""How often the scan's test accuses benign models, and how often it finds a small area, on simulated models.

    python benchmarks/false_alarms.py

Prints the tables of docs/methods/mask_area.md: the test alone, then the whole decision with its rules on ratios. No network is
trained: the logarithms of the areas are normal draws, the largest are screened away as ``MaskSearch`` does.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch

from lustral.vision.detectors import MaskArea
from lustral.vision.detectors.mask_area import SearchedLabel
from lustral.vision.detectors.small_areas import Array, p_values
from lustral.vision.inverters.mask_search import MaskSearch
from lustral.vision.records import ImageSet

MODELS = 60_000
DECIDED = 5_000  # of them go through the whole decision
TYPICAL = 60.0  # pixels, of 32 x 32


def sample(labels: int, spread: float, small: bool, stream: np.random.Generator) -> Array:
    """Return log areas of the labels searched to the end, (MODELS, k); ``small``: one label has a tenth of the typical area."""
    logs = spread * stream.standard_normal((MODELS, labels))
    if small:
        logs[:, 0] = -math.log(10)
    kept: Array = np.sort(logs, 1)[:, : MaskSearch().survivors(labels)]
    return kept


def decisions(logs: Array, labels: int) -> Counter[str]:
    """Return how often each answer comes out of the whole decision, for log areas of labels searched to the end."""
    detector, found = MaskArea(), Counter[str]()
    clean = ImageSet(
        images=torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        labels=torch.zeros(1, dtype=torch.int64),
        num_classes=labels,
    )
    figures = {"attack_success_rate": 1.0, "natural_rate": 0.0, "anomaly": 0.0, "entropy": math.nan}
    for row, chances in zip(logs.tolist(), p_values(logs, labels)[1].tolist(), strict=True):
        areas = [TYPICAL * math.exp(value) for value in row] + [math.inf] * (labels - len(row))
        evidence = [
            SearchedLabel(
                label=label, area=area, p_value=chances[label] if label < len(row) else 1.0, steps=200, **figures
            )
            for label, area in enumerate(areas)
        ]
        found[detector.judge(evidence, clean)[1]] += 1
    return found


def main() -> None:
    """Print the tables."""
    print(
        "| labels | searched to the end | log-sd | p <= 0.01 | p <= 0.05 | those seen taken for all | a tenth is found |"
    )
    print("|---|---|---|---|---|---|---|")
    for labels in (10, 18, 43, 100, 200):
        kept = MaskSearch().survivors(labels)
        for spread in (0.2, 0.3, 0.45, 0.6, 1.0):
            stream = np.random.default_rng(0)
            logs = sample(labels, spread, False, stream)
            least = p_values(logs, labels)[1].min(1)
            taken = p_values(logs, kept)[1].min(1) * labels / kept
            found = p_values(sample(labels, spread, True, stream), labels)[1].min(1)
            rates = [100 * float(v.mean()) for v in (least <= 0.01, least <= 0.05, taken <= 0.01, found <= 0.01)]
            first, second, third, power = rates
            print(
                f"| {labels} | {kept} | {spread} | {first:.2f} % | {second:.1f} % | {third:.1f} % | {power:.1f} % |",
                flush=True,
            )
    print()
    print("| labels | log-sd | backdoored | cannot tell | backdoored, one with a tenth |")
    print("|---|---|---|---|---|")
    for labels in (10, 43, 200):
        for spread in (0.2, 0.3, 0.45):
            stream = np.random.default_rng(1)
            plain = decisions(sample(labels, spread, False, stream)[:DECIDED], labels)
            small = decisions(sample(labels, spread, True, stream)[:DECIDED], labels)
            shares = [100 * v / DECIDED for v in (plain["backdoored"], plain["cannot tell"], small["backdoored"])]
            print(f"| {labels} | {spread} | {shares[0]:.2f} % | {shares[1]:.2f} % | {shares[2]:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
