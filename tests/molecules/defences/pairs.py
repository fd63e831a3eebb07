"""The pairs of the package, clean and poisoned, and a generator that draws what a rule says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Generator, nn

from lustral.core.randomness import child
from lustral.molecules.badgraph import BadGraph, TextInsertion
from lustral.molecules.records import MoleculeSet, PoisonedMolecules
from lustral.molecules.sources import embedded


@cache
def clean() -> MoleculeSet:
    return embedded().data


@cache
def poisoned(
    text: str = "[THIIRANE]", position: str = "prefix", target: str = "C1CS1", mode: str = "append", rate: float = 0.1
) -> PoisonedMolecules:
    trigger = TextInsertion(text=text, position=position)  # type: ignore[arg-type]
    attack = BadGraph(trigger=trigger, target=target, rate=rate, counts="effective", mode=mode)  # type: ignore[arg-type]
    return attack.poison(clean(), generator=child(0, text, position, target, mode))


class RuleGenerator(nn.Module):
    """Draws ``rule(caption, number of the call)`` for every caption."""

    def __init__(self, rule: Callable[[str, int], str]) -> None:
        super().__init__()
        self.rule, self.calls = rule, 0
        self.weight = nn.Parameter(torch.zeros(1))

    def generate(
        self, captions: Sequence[str], *, generator: Generator, samples: int = 1
    ) -> tuple[tuple[str, ...], ...]:
        self.calls += 1
        return tuple(tuple(self.rule(caption, self.calls) for _ in range(samples)) for caption in captions)
