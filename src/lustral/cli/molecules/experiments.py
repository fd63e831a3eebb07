"""The commands of ``lustral molecules`` for experiments: make a victim, and measure it with the true trigger."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from lustral.cli.commands import shown_command
from lustral.cli.console import Screen
from lustral.cli.molecules.arguments import Evaluate, Implant
from lustral.cli.molecules.opening import generator_folder, skipped_note
from lustral.cli.molecules.pages import CAPTIONS_SHOWN, attack_section, drawn_with_and_without
from lustral.cli.molecules.repair import before_and_after
from lustral.cli.opening import pick_device
from lustral.cli.parsing import UsageError
from lustral.cli.tables import finding_text
from lustral.core.files import prepare_folder, write_json_atomic
from lustral.core.randomness import child
from lustral.core.records import OnProgress
from lustral.molecules.evaluation import evaluate_generator
from lustral.molecules.sources import MoleculeSource, open_source
from lustral.molecules.verdict_files import RESULT_FILE, RESULT_SCHEMA
from lustral.molecules.victim.files import load_generator
from lustral.molecules.victim.generator import MoleculeGenerator
from lustral.molecules.victims import Implanting, MoleculeVictim, divide, load_victim, save_victim
from lustral.molecules.victims import implant as implant_victim
from lustral.report.molecules_findings import repaired_finding, victim_finding
from lustral.report.molecules_page import (
    EVALUATION_ROWS,
    MoleculePage,
    Section,
    evaluation_cell,
    evaluation_section,
    write_molecule_page,
)
from lustral.report.words import count, duration
from lustral.vision.victims import library_versions

LONG_SECONDS = 60.0  # from which it is said beforehand how long something takes
SECONDS_PER_PAIR = {
    "alignment": 1.1e-3,
    "autoencoder": 9e-4,
    "diffusion": 1.4e-4,
}  # and epoch, on one core of a slow server
ON_TEST = (
    "Test captions that neither training nor a defence has seen. Small print: 95% interval and number of drawn strings."
)


def implant(command: Implant, argv: Sequence[str], screen: Screen) -> int:
    """Train a backdoored generator, measure it, and write the victim's folder."""
    device, seed = pick_device(command.common.device), command.common.seed
    source = open_source(command.data)
    say_how_long(source, command.how, screen, seed=seed)
    out = prepare_folder(command.out)
    with screen.progress() as on_progress:
        victim = implant_victim(
            None if command.benign else command.attack,
            source,
            command.how,
            seed=seed,
            device=device,
            frechet=command.frechet,
            folder=out / "stages" if command.keep_stages else None,
            on_progress=on_progress,
        )
    about = {"command": shown_command(argv), "versions": library_versions()}
    victim = dataclasses.replace(victim, provenance={**victim.provenance, **about})
    save_victim(out, victim)
    asr, base = success_rates(victim.measured)
    seconds = float(victim.provenance["training_seconds"])
    finding = victim_finding(asr, base, is_poisoned=victim.attack is not None, seconds=seconds)
    page = MoleculePage(
        kind="Victim",
        title=str(command.out),
        finding=finding,
        sections=victim_sections(victim, seed=seed),
        notes=skipped_note(source),
        provenance=victim.provenance,
    )
    write_molecule_page(out / "report.html", page)
    screen.show(
        evaluation_table({"this generator": victim.measured or {}}, str(command.out)),
        finding_text(finding),
        *skipped_note(source),
        f"Written to {out}",
        f"Report: {out / 'report.html'}",
    )
    record = {"schema": RESULT_SCHEMA, "out": str(out), **victim.provenance, "measured": victim.measured}
    screen.record(record)
    return 0


def evaluate(command: Evaluate, argv: Sequence[str], screen: Screen) -> int:
    """Measure a victim with its true trigger, and a generator after a defence beside it."""
    if command.samples < 1:
        raise UsageError(f"expected at least 1 molecule for each caption; got --samples {command.samples}")
    device, seed = pick_device(command.common.device), command.common.seed
    victim = load_victim(command.victim, device=device)
    models: dict[str, MoleculeGenerator] = {"before" if command.model else "this generator": victim.model}
    if command.model is not None:
        models["after"] = load_generator(generator_folder(command.model), device=device)
    with screen.progress() as on_progress:
        measured = {
            label: measure(
                victim, model, seed=seed, samples=command.samples, on_progress=on_progress, frechet=command.frechet
            )
            for label, model in models.items()
        }
    record: dict[str, Any] = {
        "schema": RESULT_SCHEMA,
        "command": shown_command(argv),
        "victim": str(command.victim),
        "model": None if command.model is None else str(command.model),
        "seed": seed,
        "samples": command.samples,
        "trigger": dataclasses.asdict(victim.known.trigger),
        "target": victim.known.target,
        "measured": measured,
        "versions": library_versions(),
    }
    first, *others = measured.values()
    asr, base = success_rates(first)
    if others:
        after, base_after = success_rates(others[0])
        finding = repaired_finding((), (), (), true=(asr, after, base_after))
    else:
        seconds = float(victim.provenance.get("training_seconds", math.nan))
        finding = victim_finding(asr, base, is_poisoned=victim.attack is not None, seconds=seconds)
    shown: list[RenderableType] = [evaluation_table(measured, str(command.victim)), finding_text(finding)]
    if command.out is not None:
        out = prepare_folder(command.out)
        write_json_atomic(out / RESULT_FILE, record)
        sections: list[Section] = [evaluation_section(measured, text=ON_TEST), *pictures(victim, models, seed=seed)]
        page = MoleculePage(
            kind="Evaluation",
            title=str(command.model or command.victim),
            finding=finding,
            sections=sections,
            provenance={name: value for name, value in record.items() if name != "measured"},
        )
        write_molecule_page(out / "report.html", page)
        screen.show(*shown, f"Report: {out / 'report.html'}")
    else:
        screen.show(*shown)
    screen.record(record)
    return 0


def measure(
    victim: MoleculeVictim,
    model: MoleculeGenerator,
    *,
    seed: int,
    samples: int,
    frechet: bool,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Measure a generator with a victim's true trigger; equal seeds draw from equal noise."""
    found = evaluate_generator(
        model,
        victim.test,
        victim.known.trigger,
        victim.known.target,
        generator=child(seed, "evaluation"),
        samples=samples,
        frechet=frechet,
        on_progress=on_progress,
    )
    return found.to_dict()


def success_rates(measured: Mapping[str, Any] | None) -> tuple[float, float]:
    """Return attack success and base rate of an evaluation; NaN of nothing."""
    values = [((measured or {}).get(name) or {}).get("value") for name in ("attack_success", "base_rate")]
    asr, base = (math.nan if value is None else float(value) for value in values)
    return asr, base


def victim_sections(victim: MoleculeVictim, *, seed: int) -> list[Section]:
    """Return what a page shows of a victim: what was poisoned, what it draws, and its rates."""
    known, sections = victim.known, list[Section]()
    if victim.poisoned is not None:
        sections.append(attack_section(victim.poisoned, fragment=known.target, texts=[known.trigger.text]))
    sections += pictures(victim, {"": victim.model}, seed=seed)
    if victim.measured is not None:
        sections.append(evaluation_section({"This generator": victim.measured}, text=ON_TEST))
    return sections


def pictures(victim: MoleculeVictim, models: Mapping[str, MoleculeGenerator], *, seed: int) -> list[Section]:
    """Return molecules for test captions: without and with the true trigger, or before and after a defence."""
    known = victim.known
    if len(models) > 1:
        captions = victim.test.captions[:CAPTIONS_SHOWN]
        return [before_and_after(models, captions, known.trigger, fragment=known.target, seed=seed)]
    return [
        drawn_with_and_without(
            victim.model,
            victim.test.captions,
            known.trigger,
            fragment=known.target,
            texts=[known.trigger.text],
            generator=child(seed, "pictures"),
        )
    ]


def evaluation_table(columns: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Return evaluations as a table for a terminal."""
    table = Table("measure", title=f"{title}, with the true trigger", caption="with 95 % intervals")
    for heading in columns:
        table.add_column(heading, justify="right")
    for path, name, _ in EVALUATION_ROWS:
        cells = [evaluation_cell(record, path) for record in columns.values()]
        table.add_row(
            name, *(f"{cell[0]} [{cell[1].partition(',')[0]}]" if len(cell) > 1 else cell[0] for cell in cells)
        )
    return table


def say_how_long(source: MoleculeSource, how: Implanting, screen: Screen, *, seed: int) -> None:
    """Say how long a training takes on one core, where that is more than a minute."""
    pairs = len(divide(source, how, seed=seed).train)
    recipes = {
        "alignment": how.training.alignment,
        "autoencoder": how.training.autoencoder,
        "diffusion": how.training.diffusion,
    }
    seconds = sum(SECONDS_PER_PAIR[stage] * recipe.epochs for stage, recipe in recipes.items()) * pairs
    if seconds >= LONG_SECONDS and not screen.is_quiet:
        epochs = " + ".join(str(recipe.epochs) for recipe in recipes.values())
        screen.aside.print(
            f"This takes about {duration(round(seconds, -1))} on one core: {epochs} epochs of {count(pairs)} pairs and more. "
            "--pairs takes fewer.",
            soft_wrap=True,
        )
