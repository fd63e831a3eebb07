"""Every attack and purifier has a card with the published number beside ours; on real data the numbers hold."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lustral.catalog import ATTACKS, PURIFIERS
from lustral.cli import main
from lustral.core.randomness import child
from lustral.store.store import Store
from lustral.training import default_trainer
from lustral.vision.attacks import BadNets
from lustral.vision.detectors import MaskArea
from lustral.vision.erasing import erase
from lustral.vision.evaluation import evaluate
from lustral.vision.purifiers import BaEraser
from lustral.vision.records import DefenderView
from lustral.vision.sources import load_source
from lustral.vision.victims import implant

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "tests" / "cards"
CHEAP = "badnets/zoo/zoo_toy/s0,ft_sam/erasers/erasers_toy/s0/attack=badnets"  # two minutes on two cores
TOLERANCE = {
    "acc": 0.03,
    "acc_before": 0.03,
    "asr": 0.06,
    "asr_before": 0.06,
}  # several spreads of a rate over processors


def numbers(node: Any) -> Iterator[tuple[str, float]]:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node if isinstance(node, list) else []):
        if isinstance(value, float):
            yield str(key), value
        else:
            yield from numbers(value)


@pytest.mark.parametrize("name", sorted({*ATTACKS, *PURIFIERS}))
def test_every_method_has_a_card_and_a_page(name: str) -> None:
    card = json.loads((CARDS / f"{name}.json").read_text())
    assert card["method"] == name
    assert card["published"]["source"]
    assert card["ours"]["command"].startswith("lustral bench run benchmarks/plans/")
    assert card["ours"]["victims"], "a card without our number is no card"
    rates = [value for key, value in numbers(card) if key in {"acc", "asr", "ra", "worst_asr", "asr_before"}]
    assert rates
    assert all(0 <= rate <= 1 for rate in rates)
    page = {"fine_tuning": "controls", "bn_refresh": "controls"}.get(name, name)
    docs = CARDS.parent.parent / "docs"
    text = (docs / "methods" / f"{page}.md").read_text()
    if name in ATTACKS:
        assert f"(../images/attacks/{name}.png)" in text
        assert (docs / "images" / "attacks" / f"{name}.png").is_file()


def test_the_costs_that_are_listed_are_the_measured_ones() -> None:
    kept = CARDS.parent.parent / "benchmarks" / "results" / "eraser_costs.json"  # of benchmarks/eraser_costs.py
    measured = json.loads(kept.read_text())["passes"]
    listed = {name: kind.cost_passes for name, kind in PURIFIERS.items()}
    assert measured == pytest.approx(listed, rel=0.05, abs=0.5)


@pytest.mark.slow
def test_baeraser_keeps_the_promise_of_its_card(data_root: Path) -> None:
    """A BadNets victim on a third of the recipe, scanned and erased: about five minutes on two cores."""
    source = load_source("cifar10", root=data_root)
    assert source.test is not None
    train, _ = source.training_split()
    trainer = replace(default_trainer(flip=True, num_images=len(train)), epochs=4)
    victim = implant(
        BadNets(target_label=6),
        train,
        source.test,
        arch="preact_resnet18:width=16",
        trainer=trainer,
        seed=11,
        data_name="cifar10",
    )
    assert victim.metrics["asr"]["value"] > 0.9
    view = DefenderView(model=victim.model, clean=source.defender_pool())
    verdict = MaskArea().inspect(view, generator=child(11, "scan"))
    assert (verdict.outcome, verdict.suspect_labels) == ("backdoored", (6,))
    purified = erase(BaEraser(), view, detector=MaskArea(), generator=child(11, "erase"))
    after = evaluate(victim, purified.model, source.test, generator=child(11, "evaluation"))
    card = json.loads((CARDS / "baeraser.json").read_text())["ours"]["victims"]
    (promise,) = (row for row in card if row["attack"] == "badnets" and "name" not in row)
    assert after.asr.value <= promise["asr"] + 0.03
    assert victim.metrics["acc"]["value"] - after.acc.value <= promise["acc_before"] - promise["acc"] + 0.02


def claims() -> Iterator[tuple[str, str, list[str], dict[str, float]]]:
    """Yield every victim on a card that a plan makes: a name, the card's command, what chooses it there, and its rates."""
    for path in sorted(CARDS.glob("*.json")):
        yield from _claims_of(path.stem, path.stem, json.loads(path.read_text()))


def _claims_of(
    name: str, method: str, part: Mapping[str, Any]
) -> Iterator[tuple[str, str, list[str], dict[str, float]]]:
    if str(part.get("command", "")).startswith("lustral bench run"):
        for victim in part["victims"]:
            if "name" in victim:  # other settings or networks than the method's own
                continue
            chosen = [f"attack={victim.get('attack', method)}", f"seed={victim['seed']}"]
            if method in PURIFIERS:
                chosen += [f"defence={method}", f"clean_images={victim['clean_images']}"]
            rates = {rate: victim[rate] for rate in TOLERANCE if rate in victim}
            yield f"{name}/s{victim['seed']}/{chosen[0]}", part["command"], chosen, rates
    else:
        for key, inner in part.items():
            if isinstance(inner, dict):
                yield from _claims_of(f"{name}/{key}", method, inner)


def wanted() -> list[Any]:
    """Return the claims whose names hold a part of ``LUSTRAL_CARDS``, with commas; the cheap ones where it is not set."""
    parts = os.environ.get("LUSTRAL_CARDS", CHEAP).split(",")
    return [pytest.param(*claim[1:], id=claim[0]) for claim in claims() if any(part in claim[0] for part in parts)]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "chosen", "rates"), wanted())
def test_a_run_reproduces_the_number_on_a_card(
    command: str, chosen: list[str], rates: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of the card, for the one victim: ``LUSTRAL_CARDS=sau/ours`` runs all of that part of a card."""
    monkeypatch.chdir(ROOT)
    words = [str(tmp_path / "store") if word == "STORE" else word for word in shlex.split(command)]
    assert main([*words[1:], "--where", *chosen]) == 0
    store = Store(str(tmp_path / "store")).open(create=False)
    kind = "purifications" if any(word.startswith("defence=") for word in chosen) else "victims"
    (record,) = store.records(kind)
    metrics = record["metrics"]
    found = {rate: metrics["before"][rate]["value"] for rate in ("acc", "asr")}
    if kind == "purifications":
        after = {rate: metrics["after"][rate]["value"] for rate in ("acc", "asr")}
        found = {**after, **{f"{rate}_before": value for rate, value in found.items()}}
    for rate, value in rates.items():
        assert found[rate] == pytest.approx(value, abs=TOLERANCE[rate]), rate


def test_every_card_that_a_plan_makes_can_be_run_again() -> None:
    found = list(claims())
    cards = {path.stem: json.loads(path.read_text()) for path in CARDS.glob("*.json")}
    made_by_plans = {name for name, card in cards.items() if any("name" not in row for row in card["ours"]["victims"])}
    assert {name.split("/")[0] for name, *_ in found} == made_by_plans
    for _, command, _, rates in found:
        assert (ROOT / shlex.split(command)[3]).is_file()
        assert rates
    assert wanted()
