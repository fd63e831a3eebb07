"""The plan of strangers: every recipe builds, and both halves of the split have every kind of model."""

from __future__ import annotations

from pathlib import Path

import pytest

from lustral.bench.plan import Plan, read_plan
from lustral.catalog import ATTACKS
from lustral.core.settings import build
from lustral.training import Trainer
from lustral.vision.models import look_at, parse_architecture

PLAN = Path(__file__).parents[2] / "benchmarks" / "plans" / "strangers.toml"
SHAPES = {"digits": (3, 32, 32), "mnist": (1, 28, 28), "gtsrb": (3, 32, 32), "cifar10": (3, 32, 32)}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return read_plan(PLAN)


def test_every_recipe_builds(plan: Plan) -> None:
    for data in plan.data:
        build(Trainer, data.trainer)
        for arch in data.arch:
            shape = SHAPES[data.name]
            look_at(parse_architecture(arch, allow_code=False), num_classes=10, image_shape=shape)
    for entry in plan.attacks:
        if entry.method != "none":
            build(ATTACKS[entry.method], {**entry.settings, "poison_rate": entry.poison_rates[0]})  # type: ignore[arg-type]


def test_recipes_differ_from_ours_and_from_each_other(plan: Plan) -> None:
    assert len({arch for data in plan.data for arch in data.arch}) == len(plan.data)
    assert len({arch.partition(":")[0] for data in plan.data for arch in data.arch}) >= 8
    assert not any("preact" in arch for data in plan.data for arch in data.arch)
    optimizers = {data.trainer.get("optimizer", "sgd") for data in plan.data}
    assert {"sgd", "adam", "adamw", "rmsprop"} <= optimizers


def test_both_halves_have_every_kind_of_model(plan: Plan) -> None:
    counts = {"backdoored": [0, 0], "benign": [0, 0]}
    for entry in plan.attacks:
        kind = "benign" if entry.method == "none" else "backdoored"
        for half in (0, 1):
            seeds = [seed for seed in entry.seeds or plan.seeds if seed % 2 == half]
            assert seeds, f"{entry.label} has no model in one half"
            counts[kind][half] += len(seeds) * len(entry.data)
    assert counts == {"backdoored": [13, 13], "benign": [20, 20]}
    assert all(entry.data for entry in plan.attacks)
    assert {label for entry in plan.attacks for label in entry.data} == {data.label for data in plan.data}
