"""Grad-CAM: which parts of an image speak for an answer (Selvaraju et al., ICCV 2017).

With the last feature maps A^k of a network and the logit y^c of a class,

    alpha_k = mean over pixels of d y^c / d A^k        (equation 1)
    L = ReLU(sum over k of alpha_k A^k)                (equation 2)

Reference:
    Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra: Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
    Localization, ICCV 2017, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lustral.training.modes import frozen


@dataclass(frozen=True, kw_only=True)
class HeatMaps:
    """Where two models look in the same triggered images.

    Attributes:
        images: (N, C, H, W) uint8, triggered.
        before: (N, H, W) float32 in [0, 1]: what speaks for the answer of the given model.
        after: likewise, for the answer of the new model.
        answers_before: the N answers of the given model.
        answers_after: the N answers of the new model.
    """

    images: Tensor
    before: Tensor
    after: Tensor
    answers_before: tuple[int, ...]
    answers_after: tuple[int, ...]


def grad_cam(model: nn.Module, layer: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Say which parts of each image speak for the answer that a model gives.

    Args:
        model: classifier; its modes, gradients and hooks are restored.
        layer: the module with the maps, through which all of an image passes, as ``last_map`` finds it.
        images: (N, C, H, W) float32 in [0, 1].

    Returns:
        (maps (N, H, W) float32 on the CPU, answers (N,) int64 on the CPU). The largest value of a map is 1, unless nothing speaks
        for the answer.
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1].clone()  # layers that work in place may change the copy

    with frozen(model), torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        handle = model.get_submodule(layer).register_forward_hook(keep)
        try:
            logits: Tensor = model(images)
        finally:
            handle.remove()
        answers = logits.argmax(1)
        (gradient,) = torch.autograd.grad(logits.gather(1, answers[:, None]).sum(), seen[-1])
    maps = class_maps(seen[-1].detach().float(), gradient.float())
    maps = F.interpolate(maps[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return (maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)).cpu(), answers.cpu()


def class_maps(maps: Tensor, gradient: Tensor) -> Tensor:
    """Return equation 2.

    Args:
        maps: (N, K, h, w) float.
        gradient: of the logit of a class, same shape.

    Returns:
        (N, h, w) float, not negative.
    """
    weights = gradient.mean((2, 3), keepdim=True)
    return (weights * maps).sum(1).relu()
