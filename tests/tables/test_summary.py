from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bench.synthetic import defended, defended_keys, synthetic_store
from lustral.core.files import canonical
from lustral.core.rates import wilson_interval
from lustral.store.store import Store, StoreError, content_key
from lustral.tables.rows import ROW_SCHEMA, load_cells, without_outdated
from lustral.tables.summary import METRICS, Query, QueryError, table

NUMBERS = itertools.count()


def cell(**columns: Any) -> dict[str, Any]:
    """A finished result with what a test says about it."""
    row: dict[str, Any] = {
        "key": f"cell {next(NUMBERS)}",
        "kind": "purification",
        "status": "done",
        "data": "digits",
        "arch": "small_cnn",
        "attack": "badnets",
        "attack_method": "badnets",
        "poison_rate": 0.1,
        "defence": "mesa",
        "defence_method": "mesa",
        "defence_kind": "purifier",
        "clean_images": 100,
        "seed": 0,
        "defence_seed": 0,
        "asr0": 1.0,
        "non_finite": False,
        "seconds": 1.0,
        "image_passes": 10.0,
        "peak_memory_bytes": 5,
    }
    row |= columns
    row.setdefault("victim_key", f"{row['data']} {row['attack']} {row['poison_rate']} {row['seed']}")
    return row


def table_of(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([dict(row) for row in rows], schema=ROW_SCHEMA)


def benign(**columns: Any) -> dict[str, Any]:
    return cell(attack="benign", attack_method="none", poison_rate=None, asr0=None, **columns)


def rows_of(cells: Iterable[Mapping[str, Any]], **query: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table(table_of(cells), Query(**query)).rows.to_pylist()
    return rows


def only_row(cells: Iterable[Mapping[str, Any]], **query: Any) -> dict[str, Any]:
    (row,) = rows_of(cells, by=query.pop("by", ("defence",)), **query)
    return row


# -- means and intervals --------------------------------------------------------------------------------------------


def test_one_attack_has_the_usual_t_interval() -> None:
    row = only_row([cell(seed=seed, acc=acc) for seed, acc in enumerate((0.90, 0.92, 0.97))], metrics=("acc",))
    deviation = math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2)
    assert row["acc"] == pytest.approx(0.93)
    assert row["acc_half"] == pytest.approx(4.302653 * deviation / math.sqrt(3), rel=1e-6)
    assert (row["acc_low"], row["acc_high"]) == pytest.approx((0.93 - row["acc_half"], 0.93 + row["acc_half"]))
    assert (row["acc_interval"], row["cells"], row["seeds"], row["attacks"]) == ("t", 3, 3, 1)


def test_attacks_are_fixed_and_only_their_seeds_spread() -> None:
    near = [cell(attack="a", seed=seed, asr=asr) for seed, asr in enumerate((0.10, 0.12))]
    far = [cell(attack="b", seed=seed, asr=asr) for seed, asr in enumerate((0.80, 0.84, 0.82, 0.90))]
    row = only_row([*near, *far], metrics=("asr",))
    first, second = 0.0002 / 2, (0.04**2 + 0.0 + 0.02**2 + 0.06**2) / 3 / 4
    freedom = (first + second) ** 2 / (first**2 / 1 + second**2 / 3)
    assert row["asr"] == pytest.approx((0.11 + 0.84) / 2)  # of attacks, not of the six cells
    assert row["asr_half"] == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(first + second) / 2)


def test_defence_seeds_are_averaged_within_a_seed() -> None:
    cells = [cell(seed=0, defence_seed=draw, acc=acc) for draw, acc in enumerate((0.5, 0.6, 0.7))]
    cells.append(cell(seed=1, acc=0.8))
    row = only_row(cells, metrics=("acc",))
    assert row["acc"] == pytest.approx(0.7)  # 0.6 and 0.8, not the mean of the four
    assert row["acc_half"] == pytest.approx(stats.t.ppf(0.975, 1) * 0.1)
    assert row["cells"] == 4


def test_victims_of_one_attack_may_have_different_target_labels() -> None:
    cells = [cell(seed=seed, target_label=seed, acc=0.9 + 0.01 * seed) for seed in range(3)]
    row = only_row(cells, metrics=("acc",))
    assert (row["attacks"], row["acc_interval"]) == (1, "t")


@pytest.mark.parametrize("column", ["data", "arch", "attack", "poison_rate"])
def test_what_makes_two_attacks(column: str) -> None:
    other = {"data": "cifar10", "arch": "vgg", "attack": "blended", "poison_rate": 0.01}[column]
    row = only_row([cell(acc=0.2), cell(seed=1, acc=0.2), cell(acc=0.8, **{column: other})], metrics=("acc",))
    assert row["attacks"] == 2
    assert row["acc"] == pytest.approx(0.5)


def test_an_attack_with_one_seed_makes_the_interval_unknown() -> None:
    cells = [cell(attack="a", seed=seed, acc=0.9) for seed in range(3)] + [cell(attack="b", acc=0.8)]
    row = only_row(cells, metrics=("acc",))
    assert row["acc"] == pytest.approx(0.85)
    assert [row[f"acc_{end}"] for end in ("half", "low", "high", "interval")] == [None] * 4


def test_a_group_of_one_cell_keeps_its_wilson_interval() -> None:
    low, high = wilson_interval(90, 100)
    row = only_row([cell(acc=0.9, acc_low=low, acc_high=high, der=0.8)], metrics=("acc", "der"))
    assert (row["acc_low"], row["acc_high"], row["acc_interval"]) == (low, high, "wilson")
    assert row["acc_half"] == pytest.approx((high - low) / 2)
    assert (row["der"], row["der_half"], row["der_interval"]) == (0.8, None, None)  # no proportion, so no interval


def test_two_cells_of_one_seed_have_no_wilson_interval() -> None:
    cells = [cell(defence_seed=draw, acc=0.9, acc_low=0.8, acc_high=0.95) for draw in range(2)]
    assert only_row(cells, metrics=("acc",))["acc_interval"] is None


def test_equal_seeds_give_an_interval_of_no_width() -> None:
    row = only_row([cell(seed=seed, asr=0.0) for seed in range(3)], metrics=("asr",))
    assert (row["asr_half"], row["asr_interval"]) == (0.0, "t")


def slow_mean(cells: Sequence[Mapping[str, Any]], metric: str) -> tuple[float | None, float | None]:
    """Mean and half width, one step after the other."""
    attacks: dict[Any, dict[int, list[float]]] = {}
    for row in cells:
        if row[metric] is not None:
            place = row["data"], row["attack"], row["poison_rate"]
            attacks.setdefault(place, {}).setdefault(row["seed"], []).append(row[metric])
    if not attacks:
        return None, None
    means, shares, freedoms = [], [], []
    for seeds in attacks.values():
        values = [sum(draws) / len(draws) for draws in seeds.values()]
        mean, count = sum(values) / len(values), len(values)
        means.append(mean)
        if count > 1:
            shares.append(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
            freedoms.append(count - 1)
    mean = sum(means) / len(means)
    if len(shares) < len(means):
        return mean, None
    if sum(shares) < 1e-20:
        return mean, 0.0
    freedom = sum(shares) ** 2 / sum(share**2 / degrees for share, degrees in zip(shares, freedoms, strict=True))
    return mean, float(stats.t.ppf(0.975, freedom)) * math.sqrt(sum(shares)) / len(means)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["digits", "cifar10"]),
            st.sampled_from(["a", "b"]),
            st.sampled_from([0.1, 0.01]),
            st.integers(0, 2),
            st.sampled_from(["mesa", "nad"]),
            st.one_of(st.none(), st.integers(0, 20)),
        ),
        max_size=30,
    )
)
def test_means_agree_with_a_slow_reference(draws: list[tuple[str, str, float, int, str, int | None]]) -> None:
    cells = [
        cell(data=data, attack=attack, poison_rate=rate, seed=seed, defence=defence, acc=None if k is None else k / 20)
        for data, attack, rate, seed, defence, k in draws
    ]
    found = {row["defence"]: row for row in rows_of(cells, by=("defence",), metrics=("acc",))}
    assert set(found) == {row["defence"] for row in cells}
    for defence, row in found.items():
        members = [member for member in cells if member["defence"] == defence]
        mean, half = slow_mean(members, "acc")
        assert row["acc"] == (None if mean is None else pytest.approx(mean))
        if row["acc_interval"] == "t":
            assert row["acc_half"] == pytest.approx(half, abs=1e-9)
        else:
            assert half is None
        assert row["acc_skipped"] == sum(member["acc"] is None for member in members)


# -- what counts ----------------------------------------------------------------------------------------------------


def test_der_leaves_out_victims_whose_attack_hardly_worked() -> None:
    cells = [
        cell(attack="a", asr0=0.9, der=0.9, acc=0.9),
        cell(attack="b", asr0=0.5, der=0.5, acc=0.7),  # the threshold itself is not above it
        cell(attack="c", asr0=0.3, der=0.6, acc=0.7),
    ]
    made = table(table_of(cells), Query(by=("defence",), metrics=("der", "acc")))
    (row,) = made.rows.to_pylist()
    assert (row["der"], row["der_skipped"], row["left_out"]) == (0.9, 2, 2)
    assert row["acc"] == pytest.approx(2.3 / 3)  # the rates themselves are not left out
    assert "above 50 % before the defence (2 cells left out)" in made.caption

    (row,) = table(table_of(cells), Query(by=("defence",), metrics=("der",), least_asr=0.2)).rows.to_pylist()
    assert (row["der"], row["left_out"]) == (pytest.approx(2 / 3), 0)


def test_the_caption_speaks_of_der_only_where_it_is_shown() -> None:
    made = table(table_of([cell(asr0=0.1, der=0.5, acc=0.9)]), Query(by=("defence",), metrics=("acc",)))
    assert "left out" not in made.caption


def test_der_is_averaged_and_not_computed_from_averages() -> None:
    better = cell(seed=0, asr0=1.0, asr=0.0, acc0=0.9, acc=0.95, der=1.0)  # a gain of accuracy is no merit
    worse = cell(seed=1, asr0=1.0, asr=0.0, acc0=0.9, acc=0.85, der=0.975)
    assert only_row([better, worse], metrics=("der",))["der"] == pytest.approx(0.9875)  # of the averages: 1.0


def test_what_is_not_known_is_skipped_and_counted() -> None:
    row = only_row([cell(seed=0, ra=0.5), cell(seed=1, ra=None), cell(seed=2, ra=0.7)], metrics=("ra", "rir"))
    assert (row["ra"], row["ra_skipped"]) == (pytest.approx(0.6), 1)
    assert (row["rir"], row["rir_skipped"]) == (None, 3)


def test_failures_are_counted_and_measure_nothing() -> None:
    failed = cell(status="failed", seed=1, asr0=None, seconds=None, image_passes=None, peak_memory_bytes=None)
    row = only_row([cell(acc=0.9), failed], metrics=("acc",))
    assert (row["cells"], row["failed"], row["seeds"], row["acc"], row["acc_skipped"]) == (1, 1, 1, 0.9, 0)
    row = only_row([failed], metrics=("acc",))
    assert (row["cells"], row["failed"], row["acc"], row["seconds_median"]) == (0, 1, None, None)


def test_yes_and_no_are_averaged_as_shares() -> None:
    cells = [cell(seed=seed, erased=seed == 0, alarm=True, correct=None) for seed in range(4)]
    row = only_row(cells, metrics=("erased", "alarm", "correct"))
    assert (row["erased"], row["alarm"], row["correct"]) == (0.25, 1.0, None)


def test_costs_are_medians_and_the_largest_memory() -> None:
    cells = [
        cell(seed=seed, seconds=seconds, image_passes=10 * seconds, peak_memory_bytes=memory)
        for seed, (seconds, memory) in enumerate([(1.0, 7), (2.0, 9), (30.0, 8)])
    ]
    row = only_row(cells)
    assert (row["seconds_median"], row["image_passes_median"], row["peak_memory_bytes_max"]) == (2.0, 20.0, 9)


def test_broken_models_are_counted() -> None:
    made = table(table_of([cell(non_finite=True, asr=0.0), cell(seed=1, asr=0.0)]), Query(by=("defence",)))
    assert made.rows.to_pylist()[0]["broken"] == 1
    assert "not finite" in made.caption


def test_benign_models_have_a_column_of_their_own() -> None:
    cells = [
        cell(acc=0.9, acc_loss=0.3),
        cell(seed=1, acc=0.9, acc_loss=0.3),
        benign(acc=0.1, acc_loss=0.02),
        benign(seed=1, acc=0.1, acc_loss=0.04),
        benign(defence="nad", acc=0.1, acc_loss=0.5),
        benign(defence="scan", acc=None, alarm=True),
        benign(defence="scan", acc=None, alarm=False, seed=1),
        cell(defence="scan", alarm=True),
        cell(defence="nad", acc=0.8),
    ]
    found = {row["defence"]: row for row in rows_of(cells, by=("defence",), metrics=("acc", "benign_alarm"))}
    assert (found["mesa"]["acc"], found["mesa"]["cells"]) == (0.9, 2)
    assert found["mesa"]["benign_acc_loss"] == pytest.approx(0.03)
    assert found["nad"]["benign_acc_loss"] == 0.5
    assert (found["scan"]["benign_alarm"], found["mesa"]["benign_alarm"]) == (0.5, None)
    by_attack = rows_of(cells, by=("defence", "attack"), metrics=("acc",), where={"defence": ["mesa"]})
    assert [(row["attack"], row["acc"]) for row in by_attack] == [("badnets", 0.9), ("benign", pytest.approx(0.1))]
    assert [row["benign_acc_loss"] for row in by_attack] == pytest.approx([0.03, 0.03])


def test_the_benign_column_agrees_with_the_group() -> None:
    cells = [cell(clean_images=count, data=data, acc=0.5) for count in (100, 500) for data in ("digits", "cifar10")] + [
        benign(clean_images=100, data="digits", acc_loss=0.01),
        benign(clean_images=500, data="digits", acc_loss=0.03),
        benign(clean_images=500, data="cifar10", acc_loss=0.05),
    ]
    rows = rows_of(cells, by=("defence", "data", "clean_images"), metrics=("acc",))
    assert {(row["data"], row["clean_images"]): row["benign_acc_loss"] for row in rows} == {
        ("digits", 100): 0.01,
        ("digits", 500): 0.03,
        ("cifar10", 500): 0.05,
        ("cifar10", 100): None,
    }
    for chosen in ({"attack": ["badnets"]}, {"poison_rate": [0.1]}):  # a choice of attacks does not empty the column
        row = only_row(cells, metrics=("acc",), where={"clean_images": [500], **chosen})
        assert row["benign_acc_loss"] == pytest.approx(0.04)


def test_victims_without_a_defence_stay_out_unless_asked_for() -> None:
    bare = cell(kind="victim", defence="none", defence_method="none", defence_kind="none", clean_images=0, asr=1.0)
    cells = [cell(asr=0.0), bare]
    assert only_row(cells, by=("attack",), metrics=("asr",))["asr"] == 0.0
    assert {row["defence"]: row["asr"] for row in rows_of(cells, by=("defence",))} == {"mesa": 0.0, "none": 1.0}
    assert only_row(cells, by=("attack",), metrics=("asr",), where={"defence": ["none"]})["asr"] == 1.0


def test_the_worst_attack_and_the_share_of_gone_ones() -> None:
    cells = [
        cell(attack=attack, seed=seed, asr=asr + 0.02 * seed)
        for attack, asr in (("a", 0.05), ("b", 0.09), ("c", 0.6), ("d", 0.0))
        for seed in range(2)
    ]
    row = only_row(cells, metrics=("max_asr", "share_low_asr"))
    assert row["max_asr"] == pytest.approx(0.61)
    assert row["share_low_asr"] == 0.5  # a and d; b averages 10 %
    assert "asr" not in row


def test_victims_that_differ_behind_equal_facts_are_mentioned() -> None:
    cells = [cell(acc=0.9), cell(acc=0.8, victim_key="trained otherwise"), cell(seed=1, acc=0.9)]
    assert "averaged as one seed (1 times)" in table(table_of(cells), Query()).caption
    assert "as one seed" not in table(table_of(cells[1:]), Query()).caption


# -- groups and filters ---------------------------------------------------------------------------------------------


def test_groups_are_sorted_by_their_columns_with_unknowns_last() -> None:
    cells = [cell(poison_rate=rate, attack="badnets", acc=0.5) for rate in (0.1, 0.01, 0.05)] + [benign(acc=0.5)]
    rows = rows_of(cells, by=("poison_rate",), metrics=("acc",))
    assert [row["poison_rate"] for row in rows] == [0.01, 0.05, 0.1, None]


def test_no_columns_make_one_group_and_no_cells_make_none() -> None:
    assert only_row([cell(acc=0.2), cell(attack="b", acc=0.4)], by=(), metrics=("acc",))["acc"] == pytest.approx(0.3)
    for by in ((), ("defence",)):
        made = table(table_of([]), Query(by=by, metrics=tuple(METRICS), where={"defence": ["any"]}))
        assert made.rows.num_rows == 0
        assert "acc_half" in made.rows.column_names


def test_filters_convert_text_and_know_about_nothing() -> None:
    cells = [cell(poison_rate=rate, seed=seed, acc=0.5) for rate in (0.1, 0.01) for seed in (0, 1)] + [benign(acc=0.5)]
    row = only_row(cells, by=(), where={"poison_rate": ["0.01"], "seed": ["0", 1]}, metrics=("acc",))
    assert row["cells"] == 2
    assert only_row(cells, by=(), where={"poison_rate": [None]}, metrics=("acc",))["cells"] == 1
    assert only_row(cells, by=(), where={"poison_rate": [None, 0.1]}, metrics=("acc",))["cells"] == 3


def test_names_in_filters_are_data_and_never_code() -> None:
    name = "x' OR '1'='1"
    cells = [cell(defence=name, acc=0.1), cell(acc=0.9)]
    assert only_row(cells, where={"defence": [name]}, metrics=("acc",))["acc"] == 0.1


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"by": ("defense",)}, "unknown column 'defense'; did you mean 'defence'?"),
        ({"metrics": ("derr",)}, "unknown metric 'derr'; did you mean 'der'?"),
        ({"where": {"sede": ["1"]}}, "unknown column 'sede'; did you mean 'seed'?"),
        ({"by": ("data", "data")}, "'data' is named twice"),
        ({"metrics": ()}, "expected at least one metric of acc"),
        ({"least_asr": 50}, r"expected least_asr in \[0, 1\), a fraction; got 50"),
        ({"where": {"seed": ["one"]}}, "seed: expected a whole number; got 'one'"),
        ({"where": {"seed": [1.5]}}, "seed: expected a whole number; got 1.5"),
        ({"where": {"poison_rate": ["high"]}}, "poison_rate: expected a number; got 'high'"),
        ({"where": {"data": "digits"}}, "data: expected a list with at least one value; got 'digits'"),
        ({"where": {"data": []}}, "data: expected a list with at least one value"),
    ],
)
def test_errors_name_what_was_meant(query: dict[str, Any], words: str) -> None:
    with pytest.raises(QueryError, match=words):
        Query(**query)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(QueryError) as caught:
        Query(by=("defense",), metrics=("derr",), where={"seed": ["one"]})
    assert len(str(caught.value).splitlines()) == 3


def test_values_that_do_not_occur_are_errors() -> None:
    cells = table_of([cell(acc=0.5)])
    with pytest.raises(QueryError, match=r"no cell has defence 'mese'; did you mean 'mesa'\?"):
        table(cells, Query(where={"defence": ["mese"]}))
    with pytest.raises(QueryError, match="no cell has clean_images 7; expected one of 100"):
        table(cells, Query(where={"clean_images": [7]}))


# -- the flat table -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("store") / "bench"
    return synthetic_store(root, results=300, attacks=4, defences=5, seeds=3, failures=2)


def test_every_record_is_one_row(store: Store) -> None:
    cells = load_cells(store)
    assert cells.schema == ROW_SCHEMA
    keys = set().union(*(store.keys(kind) for kind in ("victims", "scans", "purifications", "failures")))
    assert sorted(cells.column("key").to_pylist()) == sorted(keys)


def test_rows_repeat_what_the_records_say(store: Store) -> None:
    rows = {row["key"]: row for row in load_cells(store).to_pylist()}
    victims = {record["key"]: record for record in store.records("victims")}
    kinds = set()
    for record in defended(store):
        row, metrics, facts = rows[record["key"]], record["metrics"], record["facts"]
        kinds.add(facts["defence_kind"])
        assert {name: row[name] for name in facts} == facts
        assert (row["kind"], row["status"], row["title"]) == (record["kind"], "done", record["title"])
        assert row["victim_key"] == record["victim_key"]
        assert row["victim_seconds"] == victims[record["victim_key"]]["cost"]["seconds"]
        assert (row["acc0"], row["asr0"]) == tuple(metrics["before"][name]["value"] for name in ("acc", "asr"))
        assert (row["seconds"], row["peak_memory_bytes"]) == tuple(
            record["cost"][name] for name in ("seconds", "peak_memory_bytes")
        )
        assert (row["device"], row["threads"], row["at"]) == ("cpu", 2, record["made"]["at"])
        if "after" in metrics:
            after = metrics["after"]
            assert (row["asr"], row["asr_low"], row["asr_high"]) == tuple(
                after["asr"][name] for name in ("value", "low", "high")
            )
            assert row["natural_rate"] == after["natural_rate"]["value"]
            assert (row["der"], row["erased"]) == (metrics["compare"]["der"], metrics["compare"]["erased"])
            assert (row["outcome"], row["alarm"], row["error"]) == (None, None, None)
        else:
            assert (row["acc"], row["der"], row["acc_loss"]) == (None, None, None)
            assert {name: row[name] for name in ("outcome", "correct", "alarm")} == {
                name: metrics["detection"][name] for name in ("outcome", "correct", "alarm")
            }
    assert kinds == {"purifier", "detector"}


def test_victims_are_rows_without_a_defence(store: Store) -> None:
    rows = {row["key"]: row for row in load_cells(store).to_pylist()}
    for record in store.records("victims"):
        row = rows[record["key"]]
        assert (row["kind"], row["defence"], row["defence_kind"], row["clean_images"]) == ("victim", "none", "none", 0)
        assert (row["victim_key"], row["defence_seed"]) == (record["key"], None)
        assert (row["acc"], row["asr"], row["ra"]) == (row["acc0"], row["asr0"], row["ra0"])
        even = None if row["attack"] == "benign" else 0.5
        assert (row["der"], row["rir"], row["acc_loss"], row["seconds"]) == (even, even, 0.0, 0.0)
        assert row["victim_seconds"] == record["cost"]["seconds"]


def test_a_failure_that_succeeded_later_is_no_failure(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "bench", results=6, attacks=1, defences=1, seeds=2, failures=1, details=False)
    result = defended(store)[0]
    note = next(record for record in store.records("failures") if record["kind"] != "victim")
    path = Path(store.path("failures", result["key"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(canonical({**note, "key": result["key"], "facts": result["facts"]}))
    rows = [row for row in load_cells(store).to_pylist() if row["key"] == result["key"]]
    assert [row["status"] for row in rows] == ["done"]


def test_an_empty_store_is_an_empty_table(tmp_path: Path) -> None:
    cells = load_cells(Store(str(tmp_path / "bench")).open(create=True))
    assert (cells.num_rows, cells.schema) == (0, ROW_SCHEMA)


def test_stores_behind_a_url_are_read_too(store: Store) -> None:
    remote = Store("memory://summary-test").open(create=True)
    for kind in ("victims", "scans", "purifications", "failures"):
        for path, content in store.contents(kind):
            remote.disk.fs.pipe_file(f"{remote.root}/{kind}/ab/{Path(path).name}", content)
    assert sorted(load_cells(remote).to_pylist(), key=str) == sorted(load_cells(store).to_pylist(), key=str)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b'{"key": "a", "kind": "scan"}', b'{"kind": "scan", "facts"'], ids=repr
)
def test_records_that_cannot_be_read_are_named(content: bytes, tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "bench", results=2, attacks=1, defences=1, seeds=1, failures=0, details=False)
    path = Path(store.path("purifications", "ab" * 32))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"abab\.json is not a readable record of this version"):
        load_cells(store)


def test_a_column_of_another_type_is_an_error_of_the_store(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "bench", results=2, attacks=1, defences=1, seeds=1, failures=0, details=False)
    record = defended(store)[0]
    record["facts"]["seed"] = "many"
    Path(store.path(f"{record['kind']}s", record["key"])).write_bytes(canonical(record))
    with pytest.raises(StoreError, match="unexpected seed"):
        load_cells(store)


# -- speed, and what is loaded --------------------------------------------------------------------------------------


def test_tables_do_not_wait_for_torch() -> None:
    code = (
        "import sys; import lustral.tables.summary, lustral.tables.comparison, lustral.tables.exports; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_ten_thousand_results_take_two_seconds(tmp_path: Path) -> None:
    root = tmp_path / "bench"
    synthetic_store(root, results=10_000, attacks=24, defences=20, seeds=3, pictures=False, details=False)
    code = (
        "import time; from lustral.tables.rows import load_cells; from lustral.store.store import Store\n"
        "from lustral.tables.summary import Query, table\n"
        f"made = table(load_cells(Store({str(root)!r}).open(create=False)), Query())\n"
        "assert made.rows.num_rows == 42; print(time.process_time())"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds) <= 2.0


# -- the synthetic store itself -------------------------------------------------------------------------------------


def test_synthetic_records_are_valid(store: Store) -> None:
    assert len(defended_keys(store)) == 300
    assert len(store.keys("victims")) == 2 * 5 * 3
    assert len(store.keys("failures")) == 2 + 1
    for kind in ("victims", "scans", "purifications", "failures"):
        for record in store.records(kind, check=True):
            assert record["key"] == content_key(record["spec"])
            for name in record["files"]:
                assert store.file(record, name)  # compares with its checksum
            if kind in ("scans", "purifications"):
                assert record["victim_key"] == content_key(record["spec"]["victim"])
    assert store.leftovers(grace_seconds=-1) == []


def test_synthetic_stores_repeat(tmp_path: Path) -> None:
    first, second = (
        synthetic_store(tmp_path / name, results=20, attacks=2, defences=3, seeds=1) for name in ("one", "two")
    )
    assert list(defended(first)) == list(defended(second))


def aged(store: Store, change: Callable[[dict[str, Any]], None]) -> Store:
    """Write every record again with a changed specification."""
    for kind in ("victims", "scans", "purifications"):
        for record in [*store.records(kind)]:
            store.remove(kind, record["key"])
            change(record["spec"])
            store.put(kind, content_key(record["spec"]), {**record, "files": {}})
    return store


@pytest.fixture
def small_store(tmp_path: Path) -> Store:
    return synthetic_store(
        tmp_path / "s", results=8, attacks=2, defences=2, seeds=1, data=("digits",), failures=0, details=False
    )


def test_results_of_older_versions_are_left_out_and_counted(small_store: Store) -> None:
    whole = load_cells(small_store)
    assert without_outdated(whole) == (whole, None)
    result = next(record for record in small_store.records("purifications"))
    result["spec"]["versions"]["Evaluation"] = 0
    small_store.put("purifications", content_key(result["spec"]), result)
    now, note = without_outdated(load_cells(small_store))
    assert now.equals(whole)
    assert note is not None
    assert note.startswith("1 of 12 cells were made by older versions and are left out (Evaluation 0, now ")


def test_an_older_victim_makes_its_results_old(small_store: Store) -> None:
    def change(spec: dict[str, Any]) -> None:
        spec.get("victim", spec)["versions"] = {"Trainer": 0}

    now, note = without_outdated(load_cells(aged(small_store, change)))
    assert (now.num_rows, note is None) == (0, False)


def test_a_store_without_versions_is_read_as_such(small_store: Store) -> None:
    def change(spec: dict[str, Any]) -> None:
        spec.pop("versions")
        spec.get("victim", {}).pop("versions", None)

    cells = load_cells(aged(small_store, change))
    assert set(cells.column("outdated").to_pylist()) == {"no versions recorded"}
    now, note = without_outdated(cells)
    assert now.num_rows == 0
    assert note == "11 of 11 cells were made by older versions and are left out (no versions recorded)."
    (row,) = table(cells, Query(by=("outdated",), metrics=("acc",))).rows.to_pylist()
    assert (row["outdated"], row["acc"] > 0) == ("no versions recorded", True)
