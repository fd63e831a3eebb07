"""How often the scan's test accuses benign models, and how often it finds a small area, on simulated models.

    python benchmarks/false_alarms.py

Prints the table of docs/methods/mask_area.md. No network is trained: the logarithms of the areas are normal draws, the largest
are screened away as ``MaskSearch`` does.
"""

from __future__ import annotations

import math

import numpy as np

from lustral.detectors.small_areas import Array, p_values
from lustral.inverters.mask_search import MaskSearch

MODELS = 60_000


def sample(labels: int, spread: float, small: bool, stream: np.random.Generator) -> Array:
    """Return log areas of the labels searched to the end, (MODELS, k); ``small``: one label has a tenth of the typical area."""
    logs = spread * stream.standard_normal((MODELS, labels))
    if small:
        logs[:, 0] = -math.log(10)
    kept: Array = np.sort(logs, 1)[:, : MaskSearch().survivors(labels)]
    return kept


def main() -> None:
    """Print the table."""
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


if __name__ == "__main__":
    main()
