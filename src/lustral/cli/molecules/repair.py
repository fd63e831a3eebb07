"""What a defender can measure of an erasure: how often recovered triggers still call their subgraphs, on the clean captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch import Generator, nn

from lustral.cli.molecules.pages import CAPTIONS_SHOWN, SAMPLES_SHOWN, Drawn, comparison_section
from lustral.core.randomness import child
from lustral.molecules.badgraph import TextInsertion, recovered_trigger
from lustral.molecules.evaluation import DrawnRate, target_rates
from lustral.molecules.records import Association, ErasedGenerator, GuidedGenerator, ViewOfGenerator
from lustral.report.molecules_page import Section, TableSection, history_section, rate_cell
from lustral.report.words import quoted

MOST_CAPTIONS = 200  # of the clean set that are drawn for
MOST_TRIGGERS = 3  # recovered ones that are measured


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What became of recovered triggers.

    Attributes:
        recovered: that were measured, worst first.
        before: of each, molecules with its subgraph that the given generator draws for triggered clean captions.
        after: the same of the new generator.
    """

    recovered: tuple[Association, ...]
    before: tuple[DrawnRate, ...]
    after: tuple[DrawnRate, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "recovered": [asdict(each) for each in self.recovered],
            "before": [each.to_dict() for each in self.before],
            "after": [each.to_dict() for each in self.after],
        }


def measure_repair(view: ViewOfGenerator, erased: ErasedGenerator, *, seed: int) -> Repair:
    """Draw molecules for triggered clean captions, by both generators from the same noise."""
    found = () if erased.verdict is None else erased.verdict.recovered[:MOST_TRIGGERS]
    captions = view.clean.captions[:MOST_CAPTIONS]
    rates: list[list[DrawnRate]] = []
    for model in (view.model, erased.model):
        rates.append([fragment_rate(model, captions, each, generator=child(seed, "repair")) for each in found])
    return Repair(recovered=found, before=tuple(rates[0]), after=tuple(rates[1]))


def as_generator(model: nn.Module) -> GuidedGenerator:
    """Return a model as what draws molecules; raises ``TypeError`` for one that does not."""
    if not callable(getattr(model, "generate", None)):
        raise TypeError(f"expected a generator of molecules; got {type(model).__name__}, which has no method generate")
    return cast(GuidedGenerator, model)


def fragment_rate(
    model: nn.Module, captions: Sequence[str], association: Association, *, generator: Generator
) -> DrawnRate:
    """Return the share of molecules with a subgraph that are drawn for captions with its trigger."""
    drawn = as_generator(model).generate(recovered_trigger(association)(captions), generator=generator)
    return target_rates(drawn, association.fragment)[0]


def repair_sections(view: ViewOfGenerator, erased: ErasedGenerator, repair: Repair, *, seed: int) -> list[Section]:
    """Return what a page shows of an erasure: molecules before and after, the rates, the history."""
    sections: list[Section] = []
    if repair.recovered:
        worst = repair.recovered[0]
        sections.append(
            before_and_after(
                {"before": view.model, "after": erased.model},
                view.clean.captions[:CAPTIONS_SHOWN],
                recovered_trigger(worst),
                fragment=worst.fragment,
                seed=seed,
            )
        )
        rows = tuple(
            (
                (quoted(each.text), f"molecules with {each.fragment}"),
                (rate_cell(old.to_dict()), rate_cell(new.to_dict())),
            )
            for each, old, new in zip(repair.recovered, repair.before, repair.after, strict=True)
        )
        sections.append(
            TableSection(
                heading="What the defender can measure",
                text="Clean captions with a recovered trigger, drawn by both generators.",
                columns=("Recovered trigger", "Before", "After"),
                rows=rows,
            )
        )
    if erased.history:
        sections.append(
            history_section(
                erased.history,
                heading="How the erasure went",
                text="Measured during the run, on clean pairs that were held back from it.",
            )
        )
    return sections


def before_and_after(
    models: Mapping[str, nn.Module], captions: Sequence[str], trigger: TextInsertion, *, fragment: str, seed: int
) -> Section:
    """Return molecules that generators draw for the same triggered captions from the same noise, side by side."""
    columns: dict[str, tuple[Sequence[str], Drawn]] = {}
    for label, model in models.items():
        given = trigger(captions)
        molecules = as_generator(model).generate(given, generator=child(seed, "pictures"), samples=SAMPLES_SHOWN)
        columns[label] = given, molecules
    return comparison_section(
        captions,
        columns,
        heading="Molecules for captions with the trigger, before and after",
        text=f"The subgraph {fragment} is highlighted. Both generators started from the same noise.",
        fragment=fragment,
        texts=[trigger.text],
    )
