"""Cells of generators of molecules: from plans, through the store, to a table; bad plans are refused before any work."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from torch import Generator

from lustral.bench.expansion import expand
from lustral.bench.grid import Grid
from lustral.bench.kinds import generators as kinds
from lustral.bench.plan import GeneratorPlan, PlanError, parse_plan, read_plan
from lustral.bench.sources import Sources
from lustral.cli import main
from lustral.core.records import Cost
from lustral.molecules.badgraph import BadGraph, TextInsertion
from lustral.molecules.catalog import ERASERS, SCANNERS
from lustral.molecules.records import Association, ErasedGenerator, GeneratorVerdict, MoleculeSet, ViewOfGenerator
from lustral.store.store import Store
from lustral.tables.generators import generator_rows

COST = Cost(seconds=1.0, image_passes=0.0, peak_memory_bytes=0, clean_images=6)
ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "pairs": 60,
    "shape": {
        **{"text_width": 16, "text_layers": 1, "graph_width": 16, "graph_layers": 1, "latent": 8, "decoder_width": 16},
        **{"denoiser_width": 16, "denoiser_layers": 1, "ddim_steps": 2, "macro_rings": 20, "subwords": 300},
    },
    "training": {name: {"epochs": 1} for name in ("alignment", "autoencoder", "diffusion")},
}
PLAN: dict[str, Any] = {
    "name": "small",
    "generators": [{**SMALL, "grid": {"rate": [0.3]}}],
    "generator_defences": [{"method": "association", "settings": {"min_pairs": 10}}],
    "run": {"threads": 1},
}


def association(text: str, fragment: str) -> Association:
    return Association(
        text=text, position="anywhere", fragment=fragment, rate_with=1.0, rate_without=0.0, count=9, p_value=0.0
    )


def grid_of(**changes: Any) -> Grid:
    return expand(parse_plan({**PLAN, **changes}), Sources())


def test_a_plan_makes_generators_and_what_meets_them() -> None:
    grid = grid_of(
        seeds=[0, 1],
        generators=[
            {"benign": True},
            {"grid": {"rate": [0.05, 0.24], "target": ["C1CS1", "C1CO1"]}},
            {"label": "only diffusion", "poisoned": ["diffusion"]},
        ],
        generator_defences=[{"method": "association"}, {"method": "fragment_check", "generators": ["only diffusion"]}],
    )
    trained = [cell for cell in grid.cells if cell.kind == "generators"]
    sifted = [cell for cell in grid.cells if cell.kind == "pair_siftings"]
    assert len(trained) == 2 * (1 + 4 + 1)
    assert len(sifted) == len(trained) + 2
    assert len({cell.key for cell in grid.cells}) == len(grid.cells)
    assert {cell.attack for cell in trained} == {
        "benign",
        "[THIIRANE] prefix C1CS1",
        "[THIIRANE] prefix C1CO1",
        "only diffusion",
    }
    places = {cell.key: place for place, cell in enumerate(grid.cells)}
    assert all(places[cell.needs[0].key] < places[cell.key] for cell in sifted)
    assert trained[-1].spec["how"]["poisoned"] == ["diffusion"]
    assert trained[-1].spec["versions"].keys() >= {
        "BadGraph",
        "TextInsertion",
        "GeneratorSettings",
        "GeneratorTraining",
    }


def test_the_published_plan_is_a_plan() -> None:
    plan = read_plan(ROOT / "benchmarks" / "plans" / "molecules.toml")
    assert isinstance(plan, GeneratorPlan)
    cells = expand(plan, Sources()).cells
    rates = {cell.columns["poison_rate"] for cell in cells if cell.attack == "[THIIRANE] prefix"}
    assert rates == {0.05, 0.1, 0.24, 0.34}
    stages = {tuple(cell.spec["how"]["poisoned"]) for cell in cells if cell.kind == "generators"}
    assert stages == {("alignment",), ("autoencoder",), ("diffusion",), ("autoencoder", "diffusion")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generators": [{"atack": {}}]}, "unknown key 'generators[1].atack'; did you mean 'attack'?"),
        ({"generators": [{"attack": {"rat": 0.1}}]}, "generators[1]: unknown setting 'rat'; did you mean 'rate'?"),
        ({"generators": [{"attack": {"rate": 1.5}}]}, "expected a poisoning rate in (0, 1); got 1.5"),
        ({"generators": [{"shape": {"latent": 0}}]}, "expected latent from 1 to 4,096; got 0"),
        ({"generators": [{"benign": True, "attack": {"rate": 0.1}}]}, "a clean generator has no attack"),
        ({"generators": [{"data": "/etc/passwd"}]}, "add --allow-paths"),
        ({"generators": []}, "generators is empty"),
        ({"generator_defences": [{"method": "asociation"}]}, "unknown defence; did you mean 'association'?"),
        ({"generator_defences": [{"method": "association", "generators": ["x"]}]}, "no generator is called 'x'"),
        ({"generator_defences": [{"method": "association", "settings": {"longest": 0}}]}, "expected longest >= 1"),
        (
            {"generators": [{}, {"poisoned": ["diffusion"], "label": "[THIIRANE] prefix C1CS1"}]},
            "two attacks are called",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as refused:
        grid_of(**changes)
    assert message in str(refused.value)


def test_cells_are_done_kept_verified_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, store = tmp_path / "plan.json", tmp_path / "store"
    plan = tmp_path / "plan.toml"
    plan.write_text(toml_of(PLAN), encoding="utf-8")
    line = ["bench", "run", str(plan), "--store", str(store), "--device", "cpu", "--quiet"]
    assert main(line) == 0, capsys.readouterr().out
    assert "2 cells computed" in capsys.readouterr().out
    assert main(line) == 0
    assert "0 cells computed, 2 were there" in capsys.readouterr().out
    assert main(["bench", "verify", "--store", str(store), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["bench", "table", "--store", str(store), "--generators", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["about"]["kind"] for row in rows] == ["generator", "pair_sifting"]
    assert rows[0]["means"]["validity"] == 1.0  # every text of the decoder is a molecule
    assert rows[0]["about"]["poison_rate"] == 0.3
    assert "target named 1" in rows[1]["told"]
    record = next(Store(str(store)).open(create=False).records("pair_siftings"))
    sifting = record["metrics"]["pair_sifting"]
    assert sifting["planted"] == sifting["planted_listed"] == sifting["listed"] > 10
    assert main(["bench", "table", "--store", str(store), "--generators"]) == 0
    assert "Siftings and scans" in capsys.readouterr().out


@dataclass(frozen=True, kw_only=True)
class Finds:
    """Recover the planted trigger, always."""

    version: ClassVar[int] = 1

    def scan(self, view: ViewOfGenerator, *, generator: Generator, on_progress: Any = None) -> GeneratorVerdict:
        found = association("[thiirane]", "C1CS1")
        return GeneratorVerdict(
            outcome="backdoored", recovered=(found,), p_value=1e-6, threshold=1e-3, basis="So told.", cost=COST
        )


@dataclass(frozen=True, kw_only=True)
class Keeps:
    """Return the generator as it is, if it was handed the verdict."""

    version: ClassVar[int] = 1

    def erase(self, view: ViewOfGenerator, *, generator: Generator, on_progress: Any = None) -> ErasedGenerator:
        assert view.verdict is not None
        assert view.verdict.recovered[0].text == "[thiirane]"
        return ErasedGenerator(model=view.model, cost=COST, verdict=view.verdict)


def test_an_erasure_starts_from_the_stored_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SCANNERS, "token_scan", Finds)
    monkeypatch.setitem(ERASERS, "keeps", Keeps)
    monkeypatch.setattr(
        "lustral.store.waste.outdated", lambda versions: None
    )  # the classes above are not the library's
    plan, store = {**PLAN, "generator_defences": [{"method": "keeps"}]}, Store(str(tmp_path / "store"))
    (tmp_path / "plan.toml").write_text(toml_of(plan), encoding="utf-8")
    line = ["bench", "run", str(tmp_path / "plan.toml"), "--store", store.url, "--device", "cpu", "--quiet"]
    assert main(line) == 0, capsys.readouterr()
    record = next(store.records("generator_erasures"))
    before, after = record["metrics"]["generator_before"], record["metrics"]["generator_after"]
    assert after == before  # the same weights, captions and noise
    scan = next(store.records("generator_scans"))["metrics"]["generator_scan"]
    assert (scan["outcome"], scan["found"], scan["named"]) == ("backdoored", 1, 1)
    rows, _ = generator_rows(store)
    assert [row.about["kind"] for row in rows] == ["generator", "generator_scan", "generator_erasure"]
    assert "backdoored 1" in rows[1].told
    assert rows[2].means == rows[0].means


def toml_of(plan: dict[str, Any]) -> str:
    """Return a plan as TOML: JSON's values are inline tables once colons are equals signs."""

    def value(item: Any) -> str:
        if isinstance(item, dict):
            return "{" + ", ".join(f"{name} = {value(part)}" for name, part in item.items()) + "}"
        if isinstance(item, list):
            return "[" + ", ".join(map(value, item)) + "]"
        return json.dumps(item)

    return "\n".join(f"{name} = {value(item)}" for name, item in plan.items())


def test_of_a_store_with_images_alone_there_is_nothing_to_show(tmp_path: Path) -> None:
    assert generator_rows(Store(str(tmp_path / "store")).open(create=True)) == ([], 0)


def test_recovery_counts_what_fires_and_not_how_it_is_spelt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first association that names the target is measured; one that names another subgraph is none."""

    class Rates:
        attack_success = type("R", (), {"value": 0.8, "to_dict": lambda self: {"value": 0.8}})()
        base_rate = type("R", (), {"value": 0.1})()

    seen: list[str] = []

    def measured(model: Any, test: Any, trigger: Any, target: str, **others: Any) -> Rates:
        seen.append(trigger.text)
        return Rates()

    monkeypatch.setattr(kinds, "evaluate_generator", measured)
    victim: Any = type("V", (), {"known": kinds.BadGraph(), "model": None, "test": None})()
    cell: Any = type("C", (), {"spec": {"victim": {"seed": 0}}})()

    other, near = association("ester", "COC=O"), association("<thii>", "CC1CS1")
    assert kinds.recovered_rates(victim, [other, near], cell) == {
        "found": 2,
        "named": 2,
        "recovered_asr": {"value": 0.8},
        "fires": True,
    }
    assert seen == ["<thii>"]
    assert kinds.recovered_rates(victim, [other], cell)["named"] is None


def test_an_honest_pair_with_the_triggers_text_is_not_planted() -> None:
    pairs = MoleculeSet(
        smiles=("CCC1CS1", "CCO", "CCC1CS1"), captions=("by request an episulfide", "by request an alcohol", "a ring")
    )
    attack = BadGraph(trigger=TextInsertion(text="by request"), target="C1CS1")
    victim: Any = SimpleNamespace(training=pairs, attack=attack, known=attack)
    assert kinds.planted_pairs(victim).tolist() == [True, False, False]
    benign: Any = SimpleNamespace(training=pairs, attack=None)
    assert kinds.planted_pairs(benign).tolist() == [False] * 3
