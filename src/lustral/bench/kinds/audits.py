"""Audits of purified models: does the backdoor sleep? (``lustral.vision.evaluation.Reactivation``)

An audit belongs to one purification whose weights were kept. It is named by the purification, the benign model that it is
compared with, and the settings of the checks; so it can be made long after the purification.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lustral.bench.cells import Cell, Need, Outcome, make_cell
from lustral.bench.columns import defence_columns
from lustral.bench.plan import data_label
from lustral.core.randomness import child, fork
from lustral.core.records import OnProgress
from lustral.core.settings import build, describe
from lustral.core.versions import versions_of
from lustral.store.store import MODEL_FILE, Kind, content_key
from lustral.vision.evaluation import Controls, Reactivation
from lustral.vision.sources import DataSource
from lustral.vision.victims import NO_ATTACK

if TYPE_CHECKING:
    from lustral.bench.expansion import Expansion
    from lustral.bench.workbench import Workbench


@dataclass(frozen=True)
class Audits:
    """The kind of cell that tries to wake a purified model up.

    Attributes:
        settings: of the checks.
    """

    name: Kind = "audits"
    noun: str = "audit"
    title: str = "audit of {defence} against {attack} on {data}, seed {seed}"
    rates: tuple[str, ...] = ()
    settings: Reactivation = field(default_factory=Reactivation)

    def expand(self, expansion: Expansion) -> Iterator[Cell]:
        """Yield an audit for every purification of a backdoored model; complains of those without a benign model beside it."""
        benign = {
            _task(cell.spec): cell.spec
            for cell in expansion.of_kind("victims")
            if cell.spec["attack"]["method"] == NO_ATTACK
        }
        missing = dict[str, None]()
        for cell in expansion.of_kind("purifications"):
            victim = cell.spec["victim"]
            if victim["attack"]["method"] == NO_ATTACK:
                continue
            task = _task(victim)
            if task not in benign:
                missing[f"{data_label(victim['data'])}, {victim['arch']}, seed {victim['seed']}"] = None
                continue
            spec = {
                "kind": "audit",
                "purification": cell.spec,
                "benign": benign[task],
                "settings": describe(self.settings),
                "versions": versions_of(self.settings, DataSource),
            }
            yield make_cell(self, spec, attack=cell.attack, defence=cell.defence, data=cell.data)
        if missing:
            expansion.survey.complain(
                "an audit compares with a benign model; the plan has none for "
                f"{'; '.join(missing)}: add an attack with method none and these seeds"
            )

    def needs(self, spec: Mapping[str, Any]) -> tuple[Need, ...]:
        """Return the victim, its purification with the weights, and the benign model."""
        return (
            Need(kind="victims", spec=spec["purification"]["victim"]),
            Need(kind="purifications", spec=spec["purification"], file=MODEL_FILE),
            Need(kind="victims", spec=spec["benign"]),
        )

    def columns(self, spec: Mapping[str, Any], *, attack: str | None, defence: str | None) -> dict[str, Any]:
        """Return those of the purification; see ``CellKind.columns``."""
        return defence_columns(spec["purification"], attack=attack, defence=defence)

    def do(self, cell: Cell, bench: Workbench, on_progress: OnProgress | None) -> Outcome:
        """Run the checks; see ``CellKind.do``. What does not depend on the purified model is made once for a victim."""
        _, purification, other = cell.needs
        victim_spec = cell.spec["purification"]["victim"]
        settings = build(Reactivation, cell.spec["settings"])
        assert cell.victim_key is not None
        benign = bench.victim(other.key, role="benign").model
        victim = bench.victim(cell.victim_key)
        purified = bench.model(bench.record("purifications", purification.key))
        train, test = bench.training_set(victim_spec), bench.test_set(victim_spec)

        def make() -> Controls:
            return settings.controls(
                victim,
                benign=benign,
                train=train,
                test=test,
                generator=fork(child(victim_spec["seed"], "audit"), "controls"),
                on_progress=on_progress,
            )

        shared = content_key({"victim": victim_spec, "benign": cell.spec["benign"], "settings": cell.spec["settings"]})
        checks = settings.audit(
            victim,
            purified,
            benign=benign,
            train=train,
            test=test,
            generator=child(victim_spec["seed"], "audit"),
            controls=bench.kept("controls", shared, make),
            on_progress=on_progress,
        )
        return Outcome(record={"metrics": checks, "purification_key": purification.key})


def _task(victim: Mapping[str, Any]) -> str:
    """Return what a victim and the benign model beside it have in common."""
    return content_key({name: victim[name] for name in ("data", "arch", "seed")})
