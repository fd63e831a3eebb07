"""A first look at a classifier in about a second: which labels lie nearest in the space of its last features.

A backdoor leaves its mark on the last layer: a small step in one direction of the features sends every image to the target. The
closed-form latent perturbation of a label k (arXiv 2511.08944, here with a quantile over the images in place of all of them) is

    s_k = argmin 1/2 ||s||^2   with   (w_k - w_j)^T s >= m_kj   for every other label j,

where m_kj is the margin that ``QUANTILE`` of the clean images need, max(0, quantile of z_j - z_k) of the logits z. The dual,
lambda >= 0 with s = sum_j lambda_j (w_k - w_j), is ascended for all labels at once, by accelerated projected steps. Products with
the constraints of all labels need K x K numbers only: with M = W W^T, row k of ``sum(lambda_k) M_k - lambda_k M`` is W s_k.

The norms order the labels well, but a repaired model's head may still carry the direction. So they never decide alone; they say
where a scan spends its error rate (``error_weights``), and lend weight to what a search finds odd as well (``oddities``).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from lustral.vision.detectors.small_areas import p_values
from lustral.vision.images import at_most
from lustral.vision.models.features import gather
from lustral.vision.models.wiring import trace
from lustral.vision.records import ImageSet

QUANTILE = 0.95
STEPS, FEW_STEPS = 1000, 200  # of the ascent; the second where there are many labels
MANY_LABELS = 100
MOST_IMAGES, FEW_IMAGES = 600, 200  # clean images looked at; the second where there are many labels
LIKE_LOGITS = 1e-2  # how far the head's own product may be from the logits, over their spread
FIRST_SHARES = (0.4, 0.15, 0.1)  # of the error rate, for the labels that need least; the others share the rest


def latent_norms(model: nn.Module, clean: ImageSet) -> Tensor | None:
    """Return the norm of each label's latent perturbation, (K,) float32 on the CPU, >= 0.

    None where the network does not end in a linear layer whose outputs are the logits.

    Args:
        model: classifier.
        clean: clean images.
    """
    images = at_most(clean, MOST_IMAGES if clean.num_classes <= MANY_LABELS else FEW_IMAGES)
    head = model.get_submodule(trace(model, next(images.batches(1)).inputs).head)
    if not isinstance(head, nn.Linear):
        return None
    features, logits = gather(model, images)
    weight = head.weight.detach().float().cpu()
    if features.shape[1] != weight.shape[1] or logits.shape[1] != len(weight):
        return None
    own = features @ weight.T + (0 if head.bias is None else head.bias.detach().float().cpu())
    if not bool((own - logits).abs().max() <= LIKE_LOGITS * logits.std().clamp_min(1e-12)):
        return None
    return least_steps(weight, margins(logits))


def margins(logits: Tensor) -> Tensor:
    """Return m (K, K) >= 0: what ``QUANTILE`` of the images (N, K) lack of being called k, not j; 0 for k itself."""
    rows = [(logits - logits[:, [k]]).quantile(QUANTILE, dim=0).clamp_min(0) for k in range(logits.shape[1])]
    return torch.stack(rows).fill_diagonal_(0)


def least_steps(weight: Tensor, margin: Tensor) -> Tensor:
    """Return the norms of s_k of the module's first formula, (K,).

    Args:
        weight: (K, D) float32 rows w of the head.
        margin: (K, K) float32 >= 0, m_kj; its diagonal is 0.
    """
    gram = (weight @ weight.T).double()
    need, own = margin.double(), gram.diagonal()

    def product(multipliers: Tensor) -> Tensor:
        """Return (w_k - w_j)^T s_k for multipliers (K, K), whose diagonal is 0."""
        along = multipliers.sum(1, keepdim=True) * gram - multipliers @ gram
        return (along.diagonal()[:, None] - along).fill_diagonal_(0)

    vector = torch.ones_like(gram).fill_diagonal_(0)
    for _ in range(30):  # the largest eigenvalue of each label's constraints
        vector = product(vector / vector.norm(dim=1, keepdim=True).clamp_min(1e-30))
    size = 1.1 * vector.norm(dim=1, keepdim=True).clamp_min(1e-30 + 1e-12 * float(own.max()))
    current = ahead = torch.zeros_like(gram)
    pace = 1.0
    for _ in range(STEPS if len(weight) <= MANY_LABELS else FEW_STEPS):
        moved = (ahead + (need - product(ahead)) / size).clamp_min(0).fill_diagonal_(0)
        faster = (1 + (1 + 4 * pace**2) ** 0.5) / 2
        ahead = moved + (pace - 1) / faster * (moved - current)
        current, pace = moved, faster
    return (current * product(current)).sum(1).clamp_min(0).sqrt().float()


def error_weights(norms: Tensor | None, count: int) -> list[float]:
    """Return by how much each label's share of the error rate exceeds an equal share; the mean over the labels is 1.

    A test of many labels may spend its error rate unevenly, as long as what orders them is not what is tested (weighted
    Bonferroni: Genovese, Roeder, Wasserman, "False discovery control with p-value weighting", Biometrika 2006). Labels that need
    the least latent step get the most.

    >>> [round(w, 2) for w in error_weights(torch.tensor([5.0, 1.0, 4.0, 6.0, 7.0]), 5)]
    [0.5, 2.0, 0.75, 0.88, 0.88]
    >>> error_weights(None, 3)
    [1.0, 1.0, 1.0]
    """
    if norms is None or count <= len(FIRST_SHARES):
        return [1.0] * count
    rest = (1 - sum(FIRST_SHARES)) / (count - len(FIRST_SHARES))
    shares = [rest] * count
    for share, label in zip(FIRST_SHARES, norms.argsort(stable=True).tolist(), strict=False):
        shares[label] = share
    return [count * share for share in shares]


def oddities(norms: Tensor | None, count: int) -> list[float]:
    """Return the p-value of each label's norm, corrected for all labels: is it too small to belong with the larger ones?

    The null: in a benign model the logarithms of the squared norms come from one normal distribution. 1 where nothing is known.
    """
    if norms is None:
        return [1.0] * count
    order = norms.argsort(stable=True)
    _, chances = p_values(2 * np.log(norms[order].double().clamp_min(1e-6).numpy()), count)
    found = [1.0] * count
    for label, chance in zip(order.tolist(), chances.tolist(), strict=True):
        found[label] = chance
    return found
