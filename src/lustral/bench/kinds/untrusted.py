"""What siftings and trainings share: a method meets a victim's training set, which is poisoned again as it was for the victim."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lustral.bench.cells import Cell, CellKind, Need, make_cell
from lustral.bench.columns import defence_columns
from lustral.core.versions import versions_of
from lustral.vision.evaluation import Evaluation, SiftingRates
from lustral.vision.sources import DataSource

if TYPE_CHECKING:
    from lustral.bench.expansion import Expansion, Meeting


class UntrustedKind(CellKind):
    """A kind of cell whose method looks at a victim's training set.

    Attributes:
        methods: the methods of the kind by name, a table of the catalog.
    """

    methods: ClassVar[Mapping[str, Any]]

    def expand(self, expansion: Expansion) -> Iterator[Cell]:
        """Yield a cell for every victim of the plan, method, clean budget and defence seed."""
        for meeting in expansion.meetings(self.methods):
            cell = make_cell(
                self,
                untrusted_spec(self.noun, meeting),
                attack=meeting.victim.attack,
                defence=meeting.defence.entry.label,
                data=meeting.victim.data,
            )
            if expansion.has_training_set(cell):
                yield cell

    def needs(self, spec: Mapping[str, Any]) -> tuple[Need, ...]:
        """Return the victim: its training set is looked at, and its trigger measures what comes of it."""
        return (Need(kind="victims", spec=spec["victim"]),)

    def columns(self, spec: Mapping[str, Any], *, attack: str | None, defence: str | None) -> dict[str, Any]:
        """Return what tables group by; see ``CellKind.columns``."""
        return defence_columns(spec, attack=attack, defence=defence)


def untrusted_spec(noun: str, meeting: Meeting) -> dict[str, Any]:
    """Return the specification of a sifting or a training; ``own_model`` is in it only where it is set."""
    defence = meeting.defence
    own: dict[str, Any] = {"method": defence.entry.method, "settings": defence.settings}
    if defence.entry.own_model:
        own["own_model"] = True
    return {
        "kind": noun,
        "victim": meeting.victim.spec,
        "defence": own,
        "clean_images": meeting.clean_images,
        "seed": meeting.seed,
        "versions": {**defence.versions, **versions_of(DataSource, Evaluation, SiftingRates)},
    }
