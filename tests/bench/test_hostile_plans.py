"""Plan files from anywhere: refused in a line, soon and without taking memory, whatever they hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bench.plans import QUICK, quick_grid
from lustral.bench.plan import MOST_BYTES, MOST_CELLS, PlanError, most_cells, parse_plan, read_plan
from lustral.cli import main

HEAD = 'name = "x"\n[[data]]\nname = "digits"\n[[attacks]]\nmethod = "badnets"\n'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = " + "[" * 60_000, "nested too deeply"),
        ("a = " + "{a = " * 20_000, "nested too deeply"),
        (HEAD + "[attacks.settings]\nsize = " + "[" * 40 + "]" * 40, "nested too deeply"),
        (HEAD + "trainer." + ".".join("a" * 200) + " = 1", "nested too deeply"),
        ("a." * 60_000 + "a = 1", "more than 1,000 dots"),
        ("seeds = [" + "9" * 5_000 + "]", "is not a readable TOML file"),
        ('name = "' + "x" * MOST_BYTES + '"', f"larger than the {MOST_BYTES:,} bytes"),
        ("name = '\udcff'", "is not a readable TOML file"),
        (HEAD.replace('"x"', '"x"\nseeds = [' + "9" * 4_000 + "]"), "at most 2^63 - 1"),
    ],
)
def test_a_hostile_file_is_refused_in_a_line(
    text: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert main(["bench", "plan", str(path)]) == 2
    shown = capsys.readouterr().err
    assert reason in shown
    assert shown.count("\n") == 1
    assert len(shown) < 1000


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    for path in (tmp_path / "pipe.toml", Path("/dev/zero"), tmp_path):
        with pytest.raises(PlanError, match="no regular file; name a plan file"):
            read_plan(path)
    (tmp_path / "plan.toml").write_text(HEAD)
    (tmp_path / "link.toml").symlink_to("plan.toml")
    assert read_plan(tmp_path / "link.toml").name == "x"


def grids(**grid: int) -> dict[str, list[int]]:
    return {name: list(range(1, number + 1)) for name, number in grid.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"attacks": [{"method": "badnets", "grid": grids(size=10_000, margin=10_000, pattern_seed=10_000)}]},
        {"defences": [{"method": "bn_refresh", "grid": grids(passes=10_000, batch_size=10_000)}]},
        {"seeds": list(range(1000)), "defence_seeds": list(range(1000))},
        {"seeds": list(range(2000)), "poison_rates": [0.1] * 2000},
    ],
)
def test_products_are_counted_before_they_are_made(changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=f"a plan has at most {MOST_CELLS:,}: split it"):
        parse_plan({**QUICK, **changes})


def test_the_count_is_that_of_the_cells() -> None:
    plan = parse_plan({**QUICK, "attacks": [{"method": "badnets", "grid": {"size": [2, 3]}}], "defence_seeds": [0, 1]})
    assert most_cells(plan) == len(
        quick_grid(attacks=[{"method": "badnets", "grid": {"size": [2, 3]}}], defence_seeds=[0, 1]).cells
    )


REFRESH: dict[str, Any] = {"method": "bn_refresh"}
MEANS = "which means that there is no"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"attacks": [{"method": "badnets", "label": "a"}, {"method": "blended", "label": "a"}]},
            "two attacks are called 'a'; give one of them another label",
        ),
        (
            {"attacks": [{"method": "badnets"}, {"method": "blended", "label": "badnets"}]},
            "two attacks are called 'badnets'; give one of them another label",
        ),
        (
            {
                "defences": [
                    {"method": "bn_refresh", "label": "d"},
                    {"method": "bn_refresh", "settings": {"passes": 9}, "label": "d"},
                ]
            },
            "two defences are called 'd'; give one of them another label",
        ),
        (
            {"attacks": [{"method": "badnets", "label": "benign"}]},
            "badnets cannot be called 'benign', which means that there is no attack",
        ),
        (
            {"defences": [{"method": "bn_refresh", "label": "none"}]},
            "bn_refresh cannot be called 'none', which means that there is no defence",
        ),
    ],
)
def test_a_name_stands_for_one_thing(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(PlanError) as refused:
        quick_grid(**changes)
    assert str(refused.value) == line
