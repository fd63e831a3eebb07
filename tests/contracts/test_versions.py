"""What every class that results depend on says of itself: a version, part of the results' names, and what a method asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

from lustral.bench.expansion import expand
from lustral.bench.grid import Grid
from lustral.bench.plan import parse_plan
from lustral.bench.sources import Sources
from lustral.catalog import ATTACKS, DETECTORS, INVERTERS, PURIFIERS, SAFE_TRAINERS, SIFTERS
from lustral.core.versions import class_variables, current_versions, listed_methods, outdated, versions_of
from lustral.training import Trainer
from lustral.vision.evaluation import Evaluation, Reactivation
from lustral.vision.models import Classifier
from lustral.vision.models.build import NETWORKS
from lustral.vision.models.conditioned import Conditioned
from lustral.vision.models.networks.small_cnn import SmallCNN
from lustral.vision.sources import DataSource

METHODS: dict[str, type[Any]] = {
    **ATTACKS,
    **DETECTORS,
    **INVERTERS,
    **PURIFIERS,
    **SIFTERS,
    **SAFE_TRAINERS,
}
RECIPES = (Trainer, Evaluation, Reactivation, DataSource, Conditioned)


def parts(settings: Any) -> Iterator[Any]:
    """Yield a dataclass instance and those in its fields."""
    if dataclasses.is_dataclass(settings):
        yield settings
        for field in dataclasses.fields(settings):
            yield from parts(getattr(settings, field.name))


def grid_of(**plan: Any) -> Grid:
    whole = {"name": "one", "clean": [60], "data": [{"name": "digits"}], **plan}
    return expand(parse_plan(whole), Sources())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_and_every_recipe_in_its_settings_have_a_version(name: str) -> None:
    for part in parts(METHODS[name]()):
        kind = type(part)
        assert vars(kind).get("version", 0) >= 1, f"{kind.__name__} has no version of its own"
        assert "version" not in {field.name for field in dataclasses.fields(part)}
        assert current_versions()[kind.__name__] == kind.version


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack_says_what_its_attacker_controls(name: str) -> None:
    says = vars(ATTACKS[name])["threat_model"]
    assert says.startswith(("supplies data: ", "controls training"))
    assert class_variables()[ATTACKS[name].__name__]["threat_model"] == says


@pytest.mark.parametrize("name", sorted({**PURIFIERS, **SIFTERS, **SAFE_TRAINERS}))
def test_a_defence_says_what_it_needs_and_costs(name: str) -> None:
    own = vars(METHODS[name])
    assert own["needs"].strip()
    assert not own["needs"].endswith("."), "a phrase for a column, no sentence"
    assert 0 < own["cost_passes"] < 1000


def test_the_catalog_is_read_from_the_source_as_it_is() -> None:
    names = (
        "version",
        "threat_model",
        "needs",
        "cost_passes",
        "takes_verdict",
        "takes_untrusted",
        "scans_by",
        "takes_deadline",
    )
    own = {name: {key: vars(kind)[key] for key in names if key in vars(kind)} for name, kind in METHODS.items()}
    assert listed_methods() == own


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_network_has_a_version(name: str) -> None:
    network: nn.Module = NETWORKS[name](num_classes=3, in_channels=1, width=8)
    assert versions_of(network) == {type(network).__name__: current_versions()[type(network).__name__]}


def test_recipes_have_a_version() -> None:
    assert versions_of(*RECIPES) == {kind.__name__: current_versions()[kind.__name__] for kind in RECIPES}


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_another_version_of_an_attack_has_another_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attacks = [{"method": name, "poison_rates": [0.05]}]
    (before,) = grid_of(attacks=attacks).cells
    monkeypatch.setattr(ATTACKS[name], "version", 99)
    (after,) = grid_of(attacks=attacks).cells
    assert before.key != after.key
    assert after.spec["versions"][ATTACKS[name].__name__] == 99
    assert {**before.spec, "versions": None} == {**after.spec, "versions": None}


@pytest.mark.parametrize("name", sorted({**PURIFIERS, **DETECTORS}))
def test_another_version_of_a_defence_has_another_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"attacks": [{"method": "badnets"}], "defences": [{"method": name}]}
    victim, *_, before = grid_of(**plan).cells  # a scan between them, where the method starts from one
    for part in {type(part) for part in parts(METHODS[name]())}:
        with monkeypatch.context() as patch:
            patch.setattr(part, "version", 99)
            same, *_, after = grid_of(**plan).cells
            assert after.key != before.key
            assert after.spec["versions"][part.__name__] == 99
            assert (same.key != victim.key) == (part.__name__ in victim.spec["versions"])


@pytest.mark.parametrize("part", ["SmallCNN", "Classifier", "Trainer", "DataSource", "Evaluation"])
def test_another_network_recipe_or_measure_has_another_key(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"attacks": [{"method": "none"}], "defences": [{"method": "bn_refresh"}]}
    before = grid_of(**plan).cells
    classes = {kind.__name__: kind for kind in (*RECIPES, Classifier, SmallCNN)}
    monkeypatch.setattr(classes[part], "version", 99)
    after = grid_of(**plan).cells
    assert not {cell.key for cell in before} & {cell.key for cell in after}


def test_versions_that_differ_are_named() -> None:
    now = {name: current_versions()[name] for name in ("SAU", "Trainer")}
    assert outdated(now) is None
    assert outdated(None) == "no versions recorded"
    assert outdated({**now, "SAU": 0, "Left": 3}) == f"SAU 0, now {now['SAU']}, Left 3, now gone"
