"""Activations and dropout that networks take as options, told by switches: at most one of them is on, none is ReLU."""

from __future__ import annotations

from torch import nn

_KINDS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def activation(**switches: bool) -> type[nn.Module]:
    """Return the class of the activation that is switched on; ReLU if none is.

    Raises:
        ValueError: more than one is.

    >>> activation(tanh=True, gelu=False).__name__, activation().__name__
    ('Tanh', 'ReLU')
    """
    chosen = [name for name, on in switches.items() if on]
    if len(chosen) > 1:
        raise ValueError(f"expected one activation at most; got {', '.join(chosen)}: take away all but one")
    return _KINDS[chosen[0]] if chosen else nn.ReLU


def dropout_rate(percent: int) -> float:
    """Return a share in [0, 1) from a whole number of percent.

    Raises:
        ValueError: it is not in 0 .. 99.

    >>> dropout_rate(30)
    0.3
    """
    if not 0 <= percent < 100:
        raise ValueError(f"expected a dropout of 0 .. 99 percent; got {percent}")
    return percent / 100
