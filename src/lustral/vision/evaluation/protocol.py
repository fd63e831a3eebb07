"""Victim × model → one record: the only place where a defence's result meets the true trigger and the test set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Generator, nn

from lustral.core.rates import Rate
from lustral.vision.evaluation.metrics import (
    NOT_FINITE,
    accuracy,
    attack_metrics,
    der,
    json_number,
    per_class_accuracy,
    predict,
    probe_rate,
    rir,
)
from lustral.vision.records import ImageSet, Victim


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How one model does on the clean and on the triggered test set.

    Attributes:
        acc: clean accuracy on the whole test set.
        asr: attack success rate on the attackable images.
        ra: robust accuracy on the same images.
        natural_rate: share of those images classified as the attacker's label without any trigger.
        per_class: clean accuracy of each true class.
        num_non_finite: clean and triggered images whose logits were not finite.
        probes: further rates of the attack, e.g. "noise_accuracy"; empty for most.
    """

    version: ClassVar[int] = 1

    acc: Rate
    asr: Rate
    ra: Rate
    natural_rate: Rate
    per_class: tuple[Rate, ...]
    num_non_finite: int
    probes: Mapping[str, Rate] = field(default_factory=dict)

    @property
    def non_finite(self) -> bool:
        """Whether the model is broken: then a low ASR means nothing."""
        return self.num_non_finite > 0

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON: each rate as value, Wilson bounds low and high, hits and n."""
        return {
            "acc": self.acc.to_dict(),
            "asr": self.asr.to_dict(),
            "ra": self.ra.to_dict(),
            "natural_rate": self.natural_rate.to_dict(),
            "per_class": [rate.to_dict() for rate in self.per_class],
            "num_non_finite": self.num_non_finite,
            "non_finite": self.non_finite,
            "probes": {name: rate.to_dict() for name, rate in self.probes.items()},
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation that ``to_dict`` described."""
        return cls(
            **{name: _rate(record[name]) for name in ("acc", "asr", "ra", "natural_rate")},
            per_class=tuple(map(_rate, record["per_class"])),
            num_non_finite=record["num_non_finite"],
            probes={name: _rate(rate) for name, rate in record.get("probes", {}).items()},
        )


def _rate(record: Mapping[str, Any]) -> Rate:
    return Rate(hits=record["hits"], total=record["n"])


def evaluate(victim: Victim, model: nn.Module | None, test: ImageSet, *, generator: Generator) -> Evaluation:
    """Measure a model with the victim's true trigger and label rule.

    Args:
        victim: supplies trigger and label rule.
        model: a purified model, or None for the victim's own.
        test: clean test set that no defence has seen.
        generator: stream for triggers that draw; give equal streams to compare two models on equal images.
    """
    if not len(test):
        raise ValueError("expected at least one test image; got an empty set")
    model = victim.model if model is None else model
    predictions = predict(model, test)
    attack = attack_metrics(
        model, test, victim.trigger, victim.relabel, generator=generator, clean_predictions=predictions
    )
    return Evaluation(
        acc=accuracy(predictions, test.labels),
        asr=attack.attack_success_rate,
        ra=attack.robust_accuracy,
        natural_rate=attack.natural_rate,
        per_class=per_class_accuracy(predictions, test.labels, test.num_classes),
        num_non_finite=int((predictions == NOT_FINITE).sum()) + attack.num_non_finite,
        probes={name: probe_rate(model, test, probe, generator=generator) for name, probe in victim.probes.items()},
    )


def unmet_criteria(before: Evaluation, after: Evaluation) -> tuple[str, ...] | None:
    """Return what stands against calling a backdoor erased; nothing if it is, None where a rate is of nothing.

    "finite": the new model gives numbers that are not finite. "asr": the attack is above the noise floor,
    ASR ≥ max(5 %, 1.5 × natural rate). "acc": 3 points of clean accuracy or more are gone. "ra": triggered images are
    not recognised again, RA < 0.8 × ACC.
    """
    if not (before.acc.total and after.acc.total and after.asr.total):
        return None
    met = {
        "finite": not after.non_finite,
        "asr": after.asr.value < max(0.05, 1.5 * after.natural_rate.value),
        "acc": before.acc.value - after.acc.value < 0.03,
        "ra": after.ra.value >= 0.8 * after.acc.value,
    }
    return tuple(name for name, is_met in met.items() if not is_met)


def compare_evaluations(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Return DER, RIR, the changes and "erased" (see ``unmet_criteria``) on one test set, ready for JSON."""
    acc0, asr0, ra0 = before.acc.value, before.asr.value, before.ra.value
    acc1, asr1, ra1 = after.acc.value, after.asr.value, after.ra.value
    unmet = unmet_criteria(before, after)
    return {
        "der": json_number(der(acc0, asr0, acc1, asr1)),
        "rir": json_number(rir(acc0, ra0, acc1, ra1)),
        "acc_loss": json_number(acc0 - acc1),
        "asr_drop": json_number(asr0 - asr1),
        "ra_gain": json_number(ra1 - ra0),
        "erased": None if unmet is None else not unmet,
    }
