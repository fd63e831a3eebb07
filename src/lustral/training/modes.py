"""The modes a model can be put in for a block of code: reduced precision, frozen, training with or without statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

Precision = Literal["auto", "bfloat16", "float32"]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Say whether bfloat16 arithmetic is native on this device."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def autocast(device: torch.device, precision: Precision = "auto") -> Iterator[None]:
    """Run the block under bfloat16 autocast if asked for, or if "auto" and the hardware has it."""
    enabled = precision == "bfloat16" or (precision == "auto" and has_fast_bfloat16(device))
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Hold a model in evaluation mode with parameters that take no gradient; restore both afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    needs = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    model.requires_grad_(False)
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, need in needs:
            parameter.requires_grad_(need)


def set_training_mode(model: nn.Module, batch_norm: Literal["train", "frozen"]) -> None:
    """Switch to training mode; "frozen" keeps batch normalisation on its running statistics."""
    model.train()
    if batch_norm == "frozen":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
