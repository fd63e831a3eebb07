"""Plans: what is refused and with which words, and which cells come out of what is not."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.plans import QUICK, quick_grid
from lustral.bench.columns import attack_label, defence_label
from lustral.bench.expansion import expand
from lustral.bench.grid import Grid
from lustral.bench.kinds import cell_of
from lustral.bench.plan import Plan, PlanError, parse_plan, read_plan
from lustral.bench.sources import Sources
from lustral.bench.survey import default_arch
from lustral.bench.trust import Trust
from lustral.catalog import ATTACKS
from lustral.store.store import content_key
from lustral.training import Trainer
from lustral.vision.attacks import BadNets
from lustral.vision.attacks.sig import Sig

DIGITS: dict[str, Any] = {"name": "digits", "arch": ["small_cnn:width=8"]}
SOURCES = Sources(trust=Trust(paths=True))  # the digits are read once


def grid_of(**changes: Any) -> Grid:
    return expand(parse_plan({**QUICK, **changes}), SOURCES)


def refusal(**changes: Any) -> list[str]:
    """Return the lines of complaint about the quick plan with changes; nothing may be trained for them."""
    with pytest.raises(PlanError) as caught:
        grid_of(**changes)
    return str(caught.value).splitlines()


@pytest.fixture(autouse=True)
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan was being read, and something was trained")

    monkeypatch.setattr(Trainer, "fit", fit)


# What is refused


@pytest.mark.parametrize(
    ("changes", "place", "nearest"),
    [
        ({"seed": [1]}, "seed", "seeds"),
        ({"poison_rate": [0.1]}, "poison_rate", "poison_rates"),
        ({"data": [{"name": "digits", "archs": ["x"]}]}, "data[1].archs", "arch"),
        ({"attacks": [{"method": "none"}, {"method": "none", "lable": "x"}]}, "attacks[2].lable", "label"),
        ({"defences": [{"method": "mesa", "setings": {}}]}, "defences[1].setings", "settings"),
        ({"exclude": [{"reason": "x", "atack": "badnets"}]}, "exclude[1].atack", "attack"),
        ({"run": {"treads": 1}}, "run.treads", "threads"),
    ],
)
def test_an_unknown_key(changes: dict[str, Any], place: str, nearest: str) -> None:
    assert refusal(**changes) == [f"plan: unknown key {place!r}; did you mean {nearest!r}?"]


def attack(method: str = "badnets", **fields: Any) -> dict[str, Any]:
    return {"attacks": [{"method": method, **fields}]}


def defence(method: str = "bn_refresh", **fields: Any) -> dict[str, Any]:
    return {"defences": [{"method": method, **fields}]}


def data(**fields: Any) -> dict[str, Any]:
    return {"data": [{**DIGITS, **fields}]}


def exclude(**fields: Any) -> dict[str, Any]:
    return {"exclude": [{"reason": "dear", **fields}]}


@pytest.mark.parametrize(
    ("changes", "place", "nearest"),
    [
        (attack("badnet"), "attacks[1] badnet: unknown attack", "badnets"),
        (defence("fine_tunin"), "defences[1] fine_tunin: unknown defence", "fine_tuning"),
        (defence("mask_aera"), "defences[1] mask_aera: unknown defence", "mask_area"),
        (attack(settings={"siz": 3}), "attacks[1] badnets: unknown setting 'siz'", "size"),
        (attack(grid={"siz": [3]}), "attacks[1] badnets: unknown setting 'siz'", "size"),
        (
            defence("fine_tuning", settings={"trainer": {"epoch": 1}}),
            "defences[1] fine_tuning: unknown setting 'trainer.epoch'",
            "epochs",
        ),
        ({"trainer": {"epoch": 1}}, "plan: trainer: unknown setting 'epoch'", "epochs"),
        (data(trainer={"augment": {"flp": 1}}), "data digits: trainer: unknown setting 'augment.flp'", "flip"),
        (attack(trainer={"epoch": 1}), "attacks[1] badnets: trainer: unknown setting 'epoch'", "epochs"),
        (attack(data=["digit"]), "attacks[1] badnets: data 'digit' is not in the plan", "digits"),
        (exclude(attack="badnet"), "exclude 'dear': attack 'badnet' is not in the plan", "badnets"),
        (exclude(defence="bn_refersh"), "exclude 'dear': defence 'bn_refersh' is not in the plan", "bn_refresh"),
    ],
)
def test_a_misspelt_name_is_told_the_nearest(changes: dict[str, Any], place: str, nearest: str) -> None:
    assert refusal(**changes) == [f"{place}; did you mean {nearest!r}?"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"name": 3}, ["name: input should be a valid string; got 3"]),
        ({"data": {"name": "digits"}}, ["data: input should be a valid list"]),
        ({"poison_rates": [0]}, ["poison_rates[1]: input should be greater than 0; got 0"]),
        ({"poison_rates": [0.1, 1.01]}, ["poison_rates[2]: input should be less than or equal to 1; got 1.01"]),
        ({"poison_rates": [1e-5]}, ["badnets on digits", "1e-05 of 1150 images poisons none", "at least 0.00087"]),
        (attack(poison_rates=[-0.1]), ["attacks[1].poison_rates[1]", "greater than 0"]),
        (attack(settings={"poison_rate": 2}), ["attacks[1] badnets", "(0, 1]", "got 2"]),
        (attack(target_labels=[3, 10]), ["badnets on digits", "0 .. 9; got 10"]),
        (attack(target_labels=[-1]), ["badnets on digits", "0 .. 9; got -1"]),
        (attack(settings={"size": 33}), ["badnets on digits", "33 pixels", "32x32"]),
        (attack(settings={"corner": "middle"}), ["attacks[1] badnets: corner", "'top_left'"]),
        (attack(settings={"size": "big"}), ["attacks[1] badnets: size", "got 'big'"]),
        (attack("none", settings={"size": 3}), ["attacks[1] none: a benign model takes no settings"]),
        (attack("none", poison_rates=[0.1]), ["attacks[1] none: a benign model takes no settings, rates or labels"]),
        (attack(label="x", grid={"size": [2, 3]}), ["one label for several variants"]),
        (
            attack(poison_rates=[0.1], settings={"poison_rate": 0.2}),
            ["poison_rate is among its settings and in poison_rates; take one of them away"],
        ),
        (
            attack(target_labels=[1], grid={"target_label": [2, 3]}),
            ["target_label is among its settings and in target_labels; take one of them away"],
        ),
        (defence(settings={"passes": 0}), ["defences[1] bn_refresh", "passes >= 1"]),
        (defence(grid={"passes": [1, math.nan]}), ["defences[1].grid.passes[2]: expected a finite number; got nan"]),
        ({"clean": [-1]}, ["clean[1]: expected a number of images", "got -1"]),
        ({"clean": [1.0]}, ["clean[1]", "fraction of the training set, between 0 and 1; got 1.0"]),
        ({"clean": [True]}, ["clean[1]", "got True"]),
        (data(clean=[-5]), ["data[1].clean[1]", "got -5"]),
        (data(arch=["smal_cnn"]), ["data digits: arch 'smal_cnn'", "did you mean 'small_cnn'"]),
        (data(arch=["small_cnn:wdth=8"]), ["unknown option 'wdth'", "did you mean 'width'"]),
        (data(image_size=0), ["data digits", "at least 1 pixel", "got 0"]),
        (data(name="digit"), ["data digit: no data set", "did you mean 'digits'?"]),
        (data(trainer={"learning_rate": math.inf}), ["data[1].trainer.learning_rate", "finite number; got inf"]),
        ({"trainer": {"learning_rate": math.nan}}, ["trainer.learning_rate: expected a finite number; got nan"]),
        (exclude(seed=7), ["exclude 'dear' matches no cell", "correct its fields"]),
        (exclude(), ["exclude 'dear' names no field"]),
        (exclude(data="digits"), ["the plan has no cell", "what it excludes"]),
        ({"exclude": [{"attack": "badnets"}]}, ["exclude[1].reason is missing"]),
        ({"run": {"threads": 0}}, ["run.threads", "greater than or equal to 1; got 0"]),
        ({"run": {"gpus": -1}}, ["run.gpus", "got -1"]),
    ],
)
def test_one_line_says_what_to_change(changes: dict[str, Any], parts: list[str]) -> None:
    lines = refusal(**changes)
    assert len(lines) == 1, lines
    assert all(part in lines[0] for part in parts), lines


@pytest.mark.parametrize(
    "changes",
    [
        *({name: []} for name in ("seeds", "defence_seeds", "poison_rates", "clean", "data", "attacks")),
        *({"data": [{**DIGITS, name: []}]} for name in ("arch", "clean")),
        *(
            {"attacks": [{"method": "badnets", name: []}]}
            for name in ("poison_rates", "target_labels", "data", "seeds")
        ),
        {"attacks": [{"method": "badnets", "grid": {"size": []}}]},
        {"defences": [{"method": "bn_refresh", "clean": []}]},
        {"defences": [{"method": "bn_refresh", "grid": {"passes": []}}]},
    ],
)
def test_an_empty_list_is_no_choice(changes: dict[str, Any]) -> None:
    (line,) = refusal(**changes)
    assert "is empty; give at least one value or take it away" in line


def test_a_clean_budget_must_be_in_the_reserve() -> None:
    line = "defence bn_refresh on digits: a clean budget of {} asks for {} images; the defenders' reserve has 287"
    defences = [{"method": "bn_refresh"}]
    for clean, count in ((288, 288), (0.5, 718), (1, 1), (0.0001, 0)):
        (found,) = refusal(clean=[clean], defences=defences)
        assert found == f"{line.format(clean, count)}: give a budget of 2 to 287 images"
    assert len(grid_of(clean=[2, 287], defences=defences).cells) == 12
    assert len(refusal(clean=[0.5])) == 2  # for each defence
    assert grid_of(clean=[0.5], defences=[]).cells


def test_a_missing_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cifar = [{"name": "cifar10", "arch": ["small_cnn:width=8"]}]
    monkeypatch.delenv("LUSTRAL_DATA", raising=False)
    (line,) = refusal(data=cifar)
    assert line.startswith("data cifar10: ")
    assert "set the environment variable LUSTRAL_DATA to the folder that holds cifar10.npz" in line
    monkeypatch.setenv("LUSTRAL_DATA", str(tmp_path))
    (line,) = refusal(data=cifar)
    assert f"{tmp_path / 'cifar10.npz'} does not exist" in line
    (tmp_path / "cifar10.npz").write_bytes(b"no archive")
    (line,) = refusal(data=cifar)
    assert "cifar10.npz" in line


def test_a_data_set_without_a_test_set(tmp_path: Path) -> None:
    import numpy as np

    images = np.zeros((40, 12, 12, 3), np.uint8)
    np.savez(tmp_path / "plain.npz", images=images, labels=np.arange(40) % 4)
    (line,) = refusal(data=[{"name": str(tmp_path / "plain.npz"), "arch": ["small_cnn:width=8"]}])
    assert "has no test set, which a benchmark needs" in line


def test_a_clean_label_attack_needs_enough_images_of_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTACKS, "sig", Sig)
    (line,) = refusal(attacks=[{"method": "sig", "target_labels": [3], "poison_rates": [0.5]}])
    assert line.startswith("attacks[1] sig on digits: a clean-label attack poisons images of its target class only")
    assert "class 3 has" in line
    assert "0.5 asks for 575" in line
    assert "the largest possible rate is 0.1" in line
    assert len(grid_of(attacks=[{"method": "sig", "poison_rates": [0.05]}]).cells) == 6


def test_all_problems_at_once() -> None:
    """Nobody shall mend a plan by running it eight times."""
    lines = refusal(
        poison_rates=[1e-6],
        clean=[5000],
        data=[{"name": "digits", "arch": ["small_cnn", "big_cnn"], "trainer": {"epoch": 2}}, {"name": "digt"}],
        attacks=[
            {"method": "badnets", "target_labels": [12]},
            {"method": "badnet"},
            {"method": "blended", "settings": {"alpha": 3}},
        ],
        defences=[{"method": "mesa", "settings": {"speed": 1}}, {"method": "bn_refresh"}],
        exclude=[{"reason": "dear", "arch": "small_cn"}],
    )
    for part in (
        "defences[1] mesa: unknown setting 'speed'",
        "attacks[2] badnet: unknown attack",
        "attacks[3] blended: expected a blending weight",
        "exclude 'dear': arch 'small_cn' is not in the plan; did you mean 'small_cnn'?",
        "defence bn_refresh on digits: a clean budget of 5000",
        "data digits: arch 'big_cnn'",
        "data digits: trainer: unknown setting 'epoch'; did you mean 'epochs'?",
        "data digt: no data set",
    ):
        assert sum(part in line for line in lines) == 1, (part, lines)
    assert len(lines) == 8
    lines = refusal(seeds=[], name=None, run={"treads": 2}, attacks=[{"label": "x"}], poison_rates=[2], clean=["all"])
    assert len(lines) == 6
    lines = refusal(poison_rates=[1e-6], attacks=[{"method": "badnets"}, {"method": "blended", "target_labels": [10]}])
    assert len(lines) == 2  # not one for each seed


def test_an_attack_is_looked_at_even_where_the_data_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUSTRAL_DATA", raising=False)
    sets = [{"name": "cifar10"}, {"name": "digits", "arch": ["smal_cnn"]}]
    lines = refusal(data=sets, attacks=[{"method": "badnets", "settings": {"siz": 1}}])
    assert [line.partition(":")[0] for line in lines] == ["attacks[1] badnets", "data cifar10", "data digits"]
    lines = refusal(data=sets[1:], attacks=[{"method": "badnets", "target_labels": [11]}])
    assert [line.partition(":")[0] for line in lines] == ["data digits", "attacks[1] badnets on digits"]


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    for content in (b"name = ", b"[data\n", b"\xff\xfe", b"name = 'x'\nname = 'y'\n"):
        path.write_bytes(content)
        with pytest.raises(PlanError, match=r"plan\.toml is not a readable TOML file"):
            read_plan(path)
    path.write_text("")
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    assert str(caught.value).splitlines() == [f"{path}: {name} is missing" for name in ("name", "data", "attacks")]
    with pytest.raises(FileNotFoundError):
        read_plan(tmp_path / "none.toml")


def test_a_plan_file_reads_as_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(
        'name = "x"\nclean = [0.05, 60]\ntrainer.epochs = 2\n[[data]]\nname = "digits"\n'
        '[[attacks]]\nmethod = "badnets"\ngrid.size = [2, 3]\n[[defences]]\nmethod = "bn_refresh"\n[run]\nthreads = 1\n'
    )
    plan = read_plan(path)
    assert (plan.clean, plan.trainer, plan.attacks[0].grid) == ([0.05, 60], {"epochs": 2}, {"size": [2, 3]})
    grid = expand(plan, SOURCES)
    assert Counter(cell.kind for cell in grid.cells) == {"victims": 2, "purifications": 4}
    assert {cell.spec["clean_images"] for cell in grid.cells if cell.kind == "purifications"} == {72, 60}
    assert {cell.spec["trainer"]["epochs"] for cell in grid.cells if cell.kind == "victims"} == {2}


def test_the_plans_that_come_along_can_be_run() -> None:
    plans = sorted((Path(__file__).parents[2] / "benchmarks" / "plans").glob("*.toml"))
    assert plans
    for path in plans:
        plan = read_plan(path)
        if {data.name for data in plan.data} == {"digits"}:
            assert expand(plan, SOURCES).cells


# What comes out


def kinds(grid: Grid) -> tuple[int, int]:
    count = Counter(cell.kind for cell in grid.cells)
    return count["victims"], count["purifications"]


def test_the_product_is_exact() -> None:
    assert kinds(grid_of()) == (4, 8)
    grid = grid_of(
        seeds=[0, 1, 2],
        defence_seeds=[0, 1],
        poison_rates=[0.1, 0.01],
        clean=[60, 0.1],
        data=[{"name": "digits", "arch": ["small_cnn:width=8", "small_cnn:width=4"]}, {**DIGITS, "image_size": 16}],
        attacks=[
            {"method": "badnets", "grid": {"size": [2, 3], "corner": ["top_left", "bottom_right"]}},
            {"method": "blended", "poison_rates": [0.05]},
            {"method": "none"},
        ],
    )
    victims = 3 * 3 * (2 * 4 + 1 + 1)  # seeds, data x arch, attacks
    assert kinds(grid) == (victims, victims * 2 * 2 * 2)  # defences, budgets, defence seeds
    assert len({cell.key for cell in grid.cells}) == len(grid.cells)
    sizes = Counter(cell.spec["attack"]["settings"].get("size") for cell in grid.cells if cell.kind == "victims")
    assert sizes == {2: 36, 3: 36, None: 18}


@given(
    seeds=st.sets(st.integers(0, 9), min_size=1, max_size=3),
    draws=st.sets(st.integers(0, 9), min_size=1, max_size=2),
    rates=st.sets(st.sampled_from([0.01, 0.05, 0.1, 1]), min_size=1, max_size=3),
    clean=st.sets(st.sampled_from([2, 60, 0.1, 287]), min_size=1, max_size=3),
    passes=st.sets(st.integers(1, 5), min_size=1, max_size=3),
    shards=st.integers(1, 5),
)
@settings(max_examples=8, deadline=None)
def test_any_grid(seeds: set[int], draws: set[int], rates: set[float], clean: Any, passes: Any, shards: int) -> None:
    grid = grid_of(
        seeds=[*seeds],
        defence_seeds=[*draws],
        poison_rates=[*rates],
        clean=[*clean],
        defences=[{"method": "bn_refresh", "grid": {"passes": [*passes]}}],
    )
    victims = len(seeds) * (len(rates) + 1)
    assert kinds(grid) == (victims, victims * len(draws) * len(clean) * len(passes))
    parts = [grid.shard(index, shards).cells for index in range(shards)]
    assert sorted(cell.key for part in parts for cell in part) == sorted(cell.key for cell in grid.cells)
    for part in (grid.cells, *parts):
        seen: set[str] = set()
        for cell in part:
            assert cell.victim_key is None or cell.victim_key in seen, "a result before its victim, or without it"
            seen.add(cell.key)


def test_target_labels_go_with_the_seeds() -> None:
    def labels(**changes: Any) -> list[tuple[int, int]]:
        cells = grid_of(defences=[], **changes).cells
        return [(cell.spec["seed"], cell.spec["attack"]["settings"]["target_label"]) for cell in cells]

    assert labels(seeds=[5, 8, 6], attacks=[{"method": "badnets", "target_labels": [3, 8]}]) == [(5, 3), (8, 8), (6, 3)]
    assert labels(seeds=[4, 5], attacks=[{"method": "badnets"}]) == [(4, 0), (5, 0)]
    assert labels(seeds=[4], attacks=[{"method": "badnets", "settings": {"target_label": 6}}]) == [(4, 6)]
    own = [{"method": "badnets", "seeds": [7, 9], "target_labels": [3, 8]}, {"method": "blended"}]
    assert labels(seeds=[4], attacks=own) == [(7, 3), (9, 8), (4, 0)]


def test_poison_rates_of_settings_attack_and_plan() -> None:
    def rates(attack: dict[str, Any]) -> list[float]:
        cells = grid_of(seeds=[0], poison_rates=[0.2, 0.3], defences=[], attacks=[attack]).cells
        return [cell.spec["attack"]["settings"]["poison_rate"] for cell in cells]

    assert rates({"method": "badnets"}) == [0.2, 0.3]
    assert rates({"method": "badnets", "poison_rates": [0.5]}) == [0.5]
    assert rates({"method": "badnets", "settings": {"poison_rate": 0.6}}) == [0.6]
    assert rates({"method": "badnets", "grid": {"poison_rate": [0.6, 0.7]}}) == [0.6, 0.7]


def test_an_attack_goes_to_its_data_sets_only() -> None:
    data = [{"name": "digits", "arch": ["small_cnn:width=8"]}]
    attacks = [{"method": "badnets", "data": ["digits"]}, {"method": "blended"}]
    assert kinds(grid_of(data=data, attacks=attacks, seeds=[0])) == (2, 4)


def test_a_specification_holds_every_setting() -> None:
    victim, result = grid_of(trainer={"epochs": 7}).cells[:2]
    assert victim.spec["attack"]["settings"].keys() == {field.name for field in fields(BadNets)}
    assert victim.spec["trainer"]["epochs"] == 6  # the data set's own change is the last word
    assert victim.spec["trainer"]["batch_size"] == 64  # the recipe of small sets
    assert result.spec["defence"]["settings"]["trainer"]["learning_rate"] == 0.01  # the method's default, not Trainer's
    assert result.spec["victim"] == victim.spec
    assert json.loads(json.dumps(result.spec)) == result.spec


def test_exclusions_and_their_counts() -> None:
    grid = grid_of(exclude=[{"reason": "dear", "attack": "badnets", "seed": 1}])
    assert (kinds(grid), grid.excluded) == ((3, 6), {"dear": 1})  # the victim and all on it, counted once
    grid = grid_of(exclude=[{"reason": "dear", "defence": "bn_refresh"}])
    assert (kinds(grid), grid.excluded) == ((4, 4), {"dear": 4})
    grid = grid_of(clean=[60, 70], exclude=[{"reason": "dear", "defence": "bn_refresh", "clean": 70, "attack": "none"}])
    assert (kinds(grid), grid.excluded) == ((4, 14), {"dear": 2})
    grid = grid_of(poison_rates=[0.1, 0.2], exclude=[{"reason": "dear", "poison_rate": 0.2}])
    assert (kinds(grid), grid.excluded) == ((4, 8), {"dear": 2})
    overlapping: list[dict[str, Any]] = [
        {"reason": "one", "defence": "bn_refresh"},
        {"reason": "two", "defence": "bn_refresh", "seed": 0},
    ]
    assert grid_of(exclude=overlapping).excluded == {"one": 4}  # the second agrees with cells: no complaint
    assert grid_of(exclude=[{**entry, "reason": "both"} for entry in overlapping]).excluded == {"both": 4}
    twice = [{"method": "badnets"}, {"method": "badnets"}, {"method": "none"}]
    assert grid_of(attacks=twice, exclude=[{"reason": "dear", "attack": "badnets"}]).excluded == {"dear": 2}


def test_an_exclusion_with_the_reason_of_another_must_match_too() -> None:
    exclude = [{"reason": "dear", "seed": 0}, {"reason": "dear", "seed": 7}]
    assert "matches no cell" in refusal(exclude=exclude)[0]


def test_a_cell_of_two_entries_is_there_once() -> None:
    attacks = [
        {"method": "badnets"},
        {"method": "badnets", "grid": {"size": [2, 3]}},
        {"method": "badnets", "poison_rates": [0.1], "settings": {"size": 3}},
    ]
    defences = [{"method": "bn_refresh"}, {"method": "bn_refresh", "grid": {"passes": [1, 2]}, "clean": [60, 60]}]
    assert kinds(grid_of(seeds=[0, 0], attacks=attacks, defences=defences)) == (2, 4)


def test_a_label_belongs_to_no_key() -> None:
    plain = grid_of()
    named = grid_of(
        attacks=[{**attack, "label": f"A{number}"} for number, attack in enumerate(QUICK["attacks"])],
        defences=[{**defence, "label": f"D{number}"} for number, defence in enumerate(QUICK["defences"])],
        run={"threads": 4, "gpus": 0.5, "keep_models": False},
        name="other",
        description="another",
    )
    assert [cell.key for cell in named.cells] == [cell.key for cell in plain.cells]
    assert named.cells[1].title == "D0 against A0 on digits, seed 0"
    assert plain.cells[0].title == "badnets on digits, seed 0"
    assert "trainer.epochs=1 least_steps=4 against badnets on digits, seed 0" in plain.cells[1].title


def test_keys_do_not_change_between_runs() -> None:
    """A change of these names makes every store start from nothing: that must be on purpose."""
    assert all(cell.key == content_key(cell.spec) for cell in grid_of().cells)
    assert [cell.key for cell in grid_of().cells] == [cell.key for cell in quick_grid().cells]
    reordered = {key: QUICK[key] for key in reversed(QUICK)}
    assert [cell.key for cell in expand(parse_plan(reordered), Sources()).cells] == [
        cell.key for cell in grid_of().cells
    ]


def test_victims_keep_the_names_that_stores_know_them_by() -> None:
    """Other names mean that every victim of every store is trained again: raise a class's version only for that."""
    attacks = [
        {"method": "badnets", "target_labels": [3]},
        {"method": "none"},
        {"method": "blended", "fine_tune": True, "settings": {"alpha": 0.1}},
    ]
    data = [{**QUICK["data"][0], "arch": ["small_cnn:width=8", "preact_resnet18:width=16"]}]
    cells = grid_of(seeds=[0], data=data, attacks=attacks, defences=[]).cells
    assert {(cell.spec["attack"]["method"], cell.spec["arch"]): cell.key for cell in cells} == {
        ("badnets", "small_cnn:width=8"): "f886ad8abde8161067d8340f91f8644e1fca5e24ea195a94161c601d343e252d",
        ("none", "small_cnn:width=8"): "31f2e8601b89514e065e1452c42ce06dcbe118fdd5ccd76fd84fefd42e60f6d7",
        ("blended", "small_cnn:width=8"): "be01a1a5d8a3741b559c9857aa493f6c6bd4b09bbf4cda65a84192077abe5f46",
        ("badnets", "preact_resnet18:width=16"): "a5c3713db81c4e78b3dc6464267758b836bafb364673691b60e0d8ee87609abc",
        ("none", "preact_resnet18:width=16"): "f38b1bf60951ef077e75301950a313cb0e3f20350b4adc7af2f95925759626a4",
        ("blended", "preact_resnet18:width=16"): "bd8f824ed930e72092342d5fe82f72d14ad4db25a5e88de1187f912661bca13c",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": [2]},
        {"clean": [61]},
        {"poison_rates": [0.11]},
        {"defence_seeds": [1]},
        {"trainer": {"batch_size": 65}},
        {"data": [{**QUICK["data"][0], "image_size": 31}]},
        {"data": [{**QUICK["data"][0], "images": 900}]},
        {"defences": [{"method": "bn_refresh", "settings": {"passes": 3}}]},
    ],
)
def test_whatever_changes_the_outcome_changes_the_key(changes: dict[str, Any]) -> None:
    attacks = [{"method": "badnets"}]
    here = {cell.key for cell in grid_of(attacks=attacks, seeds=[0]).cells if cell.kind == "purifications"}
    there = {cell.key for cell in grid_of(**({"attacks": attacks, "seeds": [0]} | changes)).cells}
    assert not here & there


def test_a_part_of_a_data_set_is_another_data_set_in_tables() -> None:
    here = QUICK["data"][0]
    part = {**here, "images": 300}
    changes: dict[str, Any] = {
        "seeds": [0],
        "data": [here, part],
        "defences": [{"method": "bn_refresh", "clean": [0.1]}],
    }
    grid = grid_of(**changes)
    assert [kinds(grid), {cell.columns["data"] for cell in grid.cells}] == [(4, 4), {"digits", "digits images=300"}]
    specs = [cell.spec for cell in grid.cells if cell.kind == "victims"]
    assert [spec["data"] for spec in specs] == 2 * [{"name": "digits", "image_size": None}] + 2 * [
        {"name": "digits", "image_size": None, "images": 300}
    ]
    counts = {(cell.columns["data"], cell.columns["clean_images"]) for cell in grid.cells if cell.kind != "victims"}
    assert ("digits images=300", 30) in counts
    assert ("digits", 30) not in counts
    assert len(counts) == 2
    attacks = [{"method": "badnets", "data": ["digits images=300"]}, {"method": "none", "data": ["digits"]}]
    assert kinds(grid_of(**{**changes, "attacks": attacks})) == (2, 2)
    left = grid_of(**changes, exclude=[{"reason": "small", "data": "digits images=300"}])
    assert {cell.columns["data"] for cell in left.cells} == {"digits"}
    with pytest.raises(PlanError, match="images = 10 to"):
        grid_of(data=[{**here, "images": 9000}])


def test_fine_tuned_victims_bring_the_benign_one_along() -> None:
    attack = {"method": "badnets", "fine_tune": True, "trainer": {"epochs": 1}}
    grid = grid_of(attacks=[attack])
    victims = [cell for cell in grid.cells if cell.kind == "victims"]
    assert kinds(grid) == (4, 4)  # results on the fine-tuned ones only
    starts = {cell.key: cell for cell in victims if cell.spec["attack"]["method"] == "none"}
    tuned = [cell for cell in victims if cell.spec["attack"]["method"] == "badnets"]
    assert (
        [starts[cell.victim_key or ""].spec["seed"] for cell in tuned]
        == [cell.spec["seed"] for cell in tuned]
        == [0, 1]
    )
    assert [cell.spec["trainer"]["epochs"] for cell in tuned] == [1, 1]
    assert {cell.spec["trainer"]["epochs"] for cell in starts.values()} == {6}
    assert {cell.attack for cell in tuned} == {"badnets (fine-tuned)"}
    for index in range(2):
        part = grid.shard(index, 2)
        assert kinds(part) == (2, 2)
        assert len({cell.spec.get("victim", cell.spec)["seed"] for cell in part.cells}) == 1


def test_the_benign_start_is_the_plans_own_benign_victim() -> None:
    attacks = [{"method": "badnets", "fine_tune": True}, {"method": "none", "label": "clean"}]
    grid = grid_of(attacks=attacks, seeds=[0])
    assert kinds(grid) == (2, 4)
    assert [cell.attack for cell in grid.cells if cell.kind == "victims"] == ["clean", "badnets (fine-tuned)"]


def test_an_excluded_fine_tuned_victim_brings_nothing_along() -> None:
    attacks = [{"method": "badnets", "fine_tune": True}, {"method": "blended"}]
    grid = grid_of(attacks=attacks, exclude=[{"reason": "dear", "attack": "badnets"}])
    assert {cell.spec["attack"]["method"] for cell in grid.cells if cell.kind == "victims"} == {"blended"}
    grid = grid_of(attacks=[attacks[0], {"method": "none"}], exclude=[{"reason": "dear", "attack": "none"}])
    assert kinds(grid) == (4, 4)  # the start is needed, but nothing is measured on it


def test_shards() -> None:
    grid = grid_of(seeds=[0, 1, 2])
    parts = [grid.shard(index, 4) for index in range(4)]
    assert [kinds(part) for part in parts] == [(2, 4), (2, 4), (1, 2), (1, 2)]
    assert len({cell.key for part in parts for cell in part.cells}) == len(grid.cells)
    assert grid.shard(0, 1).cells == grid.cells
    assert [kinds(grid.shard(index, 9))[0] for index in range(9)] == [1] * 6 + [0] * 3
    for index, count in ((-1, 2), (2, 2), (0, 0)):
        with pytest.raises(PlanError, match="1 <= I <= N"):
            grid.shard(index, count)


def test_labels() -> None:
    cells = grid_of(attacks=[{"method": "blended", "settings": {"alpha": 0.1}, "target_labels": [3]}]).cells
    assert attack_label(cells[0].spec) == "blended alpha=0.1"
    assert defence_label(cells[1].spec["defence"]) == "fine_tuning trainer.epochs=1 least_steps=4"
    assert (default_arch("digits"), default_arch("cifar10")) == ("small_cnn", "preact_resnet18:width=16")
    assert cell_of(cells[1].spec, attack="a", defence="d").title == "d against a on digits, seed 0"
    assert cell_of(cells[1].spec).victim_key == cells[0].key


def test_reading_a_plan_draws_no_random_numbers() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    grid_of()
    assert torch.equal(torch.rand(2), expected)


def test_a_plan_is_frozen() -> None:
    plan = parse_plan(QUICK)
    with pytest.raises(ValueError, match="frozen"):
        setattr(plan, "name", "other")  # noqa: B010
    assert Plan.model_validate(plan.model_dump(exclude_defaults=True)) == plan


def test_a_part_of_a_grid_by_its_columns() -> None:
    grid = quick_grid()
    part = grid.where({"defence_method": ("bn_refresh",), "attack": ("badnets",), "seed": ("1",)})
    assert [cell.kind for cell in part.cells] == ["victims", "purifications"]
    assert part.cells[1].victim_key == part.cells[0].key
    assert part.cells[1].spec["defence"]["method"] == "bn_refresh"
    victims = grid.where({"attack": ("benign",)})  # no column of a defence: victims and all results on them
    assert kinds(victims) == (2, 4)
    assert grid.where({}).cells == grid.cells
    both = grid.where({"defence_method": ("bn_refresh", "fine_tuning")})
    assert {cell.key for cell in both.cells} == {cell.key for cell in grid.cells}
    for wrong in ({"colour": ("red",)}, {"attack": ("blended",)}):
        with pytest.raises(PlanError, match="there are"):
            grid.where(wrong)


def test_a_data_set_may_come_twice_under_labels() -> None:
    recipes = [
        {"name": "digits", "label": "one", "arch": ["lenet:width=3"], "trainer": {"optimizer": "rmsprop"}},
        {"name": "digits", "label": "two", "arch": ["small_cnn:width=8"], "normalisation": "none"},
        {"name": "digits"},
    ]
    attacks = [{"method": "badnets", "data": ["two"]}, {"method": "none", "data": ["one", "digits"], "seeds": [0]}]
    grid = grid_of(
        data=recipes, attacks=attacks, exclude=[{"reason": "dear", "data": "digits", "defence": "bn_refresh"}]
    )
    named = {(cell.data, cell.spec["arch"], cell.attack) for cell in grid.cells if cell.kind == "victims"}
    assert named == {
        ("two", "small_cnn:width=8", "badnets"),
        ("one", "lenet:width=3", "benign"),
        ("digits", "small_cnn", "benign"),
    }
    assert {cell.data for cell in grid.cells if cell.kind == "purifications"} == {"one", "two", "digits"}
    assert not any("label" in str(cell.spec["data"]) for cell in grid.cells if cell.kind == "victims")
    assert next(cell.spec["data"].get("normalisation") for cell in grid.cells if cell.data == "two") == "none"
    with pytest.raises(PlanError, match="another data set is called 'one' too"):
        grid_of(data=[recipes[0], recipes[0]], attacks=[{"method": "none"}])
    with pytest.raises(PlanError, match="data 'three' is not in the plan"):
        grid_of(data=recipes, attacks=[{"method": "none", "data": ["three"]}])


def test_a_label_leaves_the_name_of_a_cell_as_it_was() -> None:
    plain, labelled = (grid_of(data=[{"name": "digits", **more}]) for more in ({}, {"label": "mine"}))
    assert [cell.key for cell in plain.cells] == [cell.key for cell in labelled.cells]
    assert plain.cells[0].data == "digits"
