"""The commands of ``lustral molecules`` for those who have a generator or a training set, and nothing of an attack."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, cast

from rich.console import RenderableType
from rich.table import Table

from lustral.bench.runner import threads
from lustral.cli.commands import shown_command
from lustral.cli.console import Screen
from lustral.cli.molecules.arguments import (
    METHODS,
    Demo,
    Erase,
    Evaluate,
    Generate,
    Implant,
    Scan,
    Sift,
    Suspect,
    parse_molecules,
)
from lustral.cli.molecules.files import write_listed, write_molecules, write_pairs
from lustral.cli.molecules.opening import (
    OpenedSuspect,
    open_generator,
    open_suspect,
    read_captions,
    require_new,
    skipped_note,
)
from lustral.cli.molecules.pages import associations_of_model, drawn_section, drawn_with_and_without, listed_sections
from lustral.cli.molecules.repair import as_generator, measure_repair, repair_sections
from lustral.cli.opening import pick_device
from lustral.cli.parsing import UsageError
from lustral.cli.tables import finding_text
from lustral.core.digests import weights_digest
from lustral.core.files import prepare_folder, write_json_atomic
from lustral.core.randomness import child
from lustral.core.records import Cost
from lustral.molecules.badgraph import recovered_trigger
from lustral.molecules.records import Association, GeneratorVerdict, ViewOfGenerator, ViewOfPairs
from lustral.molecules.sources import open_source
from lustral.molecules.verdict_files import (
    RESULT_FILE,
    RESULT_SCHEMA,
    read_verdict,
    sifted_record,
    verdict_record,
)
from lustral.molecules.victim.files import save_generator
from lustral.molecules.victim.generator import MoleculeGenerator
from lustral.molecules.victims import GENERATOR_FOLDER
from lustral.report.findings import Finding
from lustral.report.molecules_findings import generator_finding, pairs_finding, repaired_finding
from lustral.report.molecules_page import MoleculePage, Section, write_molecule_page
from lustral.report.words import chance, duration, percent
from lustral.vision.victims import library_versions

NONE_LISTED, LISTED = 0, 1  # exit codes of ``sift``
EXITS = {"clean": 0, "backdoored": 1, "cannot tell": 3}  # of ``scan``
LARGE_GENERATOR = (
    1_000_000  # weights; one of full size has more, and a scan of it takes 59 s of one core, an erasure 56 s
)
MOST_ROWS = 10  # associations in the terminal


def run_molecules(argv: Sequence[str]) -> int:
    """Run a command line that begins with ``molecules``."""
    if len(argv) > 1 and argv[1] in METHODS and "--list" in argv:
        return list_methods(argv[1], Screen(json="--json" in argv, quiet=False))
    command = parse_molecules(argv)
    screen = Screen(json=command.common.json, quiet=command.common.quiet)
    with threads(1):  # layers are small: a second thread waits more than it works
        return run(command, argv, screen)


def run(command: Any, argv: Sequence[str], screen: Screen) -> int:
    """Run a command that was understood."""
    from lustral.cli.molecules import demo, experiments

    match command:
        case Sift():
            return sift(command, argv, screen)
        case Generate():
            return generate(command, argv, screen)
        case Scan():
            return scan(command, argv, screen)
        case Erase():
            return erase(command, argv, screen)
        case Implant():
            return experiments.implant(command, argv, screen)
        case Evaluate():
            return experiments.evaluate(command, argv, screen)
        case Demo():
            return demo.demo(command, argv, screen)
    raise AssertionError(f"no command for {command}")


def sift(command: Sift[Any], argv: Sequence[str], screen: Screen) -> int:
    """List the suspicious pairs of a training set; the exit code says whether there are any."""
    if command.write_clean is not None:
        require_new(command.write_clean, "--write-clean", ".csv")
    source = open_source(command.data)
    clean = None if command.clean is None else open_source(command.clean).data
    out, seed = prepare_folder(command.out), command.common.seed
    view = ViewOfPairs(untrusted=source.data, clean=clean)
    with screen.progress() as on_progress:
        found = command.settings.sift(view, generator=child(seed, "sift"), on_progress=on_progress)
    found = dataclasses.replace(found, notes=(*skipped_note(source), *found.notes))
    record = {
        "schema": RESULT_SCHEMA,
        **provenance(command, argv),
        "data": command.data,
        "clean": command.clean,
        "rows": source.rows,
        "skipped": dict(source.skipped),
        "sifted": sifted_record(found),
    }
    written = ""
    if command.write_clean is not None:
        written = str(command.write_clean)
        write_pairs(command.write_clean, source.data.subset(~found.flagged))
        record["written"] = {"file": written, "pairs": int((~found.flagged).sum())}
    write_listed(out / "pairs.csv", source.data, found)
    write_json_atomic(out / RESULT_FILE, record)
    finding = pairs_finding(found, written=written)
    page = MoleculePage(
        kind="Sift report",
        title=command.data,
        finding=finding,
        sections=listed_sections(source.data, found),
        cost=found.cost,
        notes=found.notes,
        provenance={key: value for key, value in record.items() if key != "sifted"},
    )
    write_molecule_page(out / "report.html", page)
    table = [association_table(found.associations, "What goes together")] if found.associations else []
    shown: list[RenderableType] = [*table, finding_text(finding), *found.notes, cost_sentence(found.cost)]
    shown += [f"Left after sifting: {written}"] if written else []
    shown += [f"Pairs: {out / 'pairs.csv'}", f"Report: {out / 'report.html'}"]
    screen.show(*shown)
    screen.record(record)
    return LISTED if found.flagged.any() else NONE_LISTED


def generate(command: Generate, argv: Sequence[str], screen: Screen) -> int:
    """Draw molecules for captions."""
    if command.samples < 1:
        raise UsageError(f"expected at least 1 molecule for each caption; got --samples {command.samples}")
    captions = read_captions(command.captions, command.captions_file)
    model = open_generator(command.model, pick_device(command.common.device))
    molecules = as_generator(model).generate(
        captions, generator=child(command.common.seed, "generate"), samples=command.samples
    )
    record = {
        "schema": RESULT_SCHEMA,
        "command": shown_command(argv),
        "model": str(command.model),
        "seed": command.common.seed,
        "molecules": [
            {"caption": text, "smiles": list(drawn)} for text, drawn in zip(captions, molecules, strict=True)
        ],
        "versions": library_versions(),
    }
    shown = [
        line
        for text, drawn in zip(captions, molecules, strict=True)
        for line in (text, *(f"    {each or '-'}" for each in drawn))
    ]
    if command.out is not None:
        out = prepare_folder(command.out)
        write_molecules(out / "molecules.csv", captions, molecules)
        write_json_atomic(out / RESULT_FILE, record)
        finding = Finding(
            tone="unsure",
            badge="Drawn",
            headline=f"{sum(map(len, molecules)):,} molecules were drawn for {len(captions):,} captions.",
            details=(),
            next_steps=("A generator of unknown origin may hold a backdoor: “lustral molecules scan” looks for one.",),
            figures=(),
        )
        page = MoleculePage(
            kind="Molecules",
            title=str(command.model),
            finding=finding,
            sections=[drawn_section(captions, molecules, fragment=command.highlight)],
            provenance={name: value for name, value in record.items() if name != "molecules"},
        )
        write_molecule_page(out / "report.html", page)
        shown += [f"Molecules: {out / 'molecules.csv'}", f"Report: {out / 'report.html'}"]
    screen.show(*shown)
    screen.record(record)
    return 0


def scan(command: Scan[Any], argv: Sequence[str], screen: Screen) -> int:
    """Look for a backdoor in a generator; the exit code says what was found."""
    opened = open_suspect(command.suspect, pick_device(command.common.device))
    out = None if command.out is None else prepare_folder(command.out)
    seed = command.common.seed
    say_how_long(opened.view, screen)
    with screen.progress() as on_progress:
        verdict = command.settings.scan(opened.view, generator=child(seed, "scan"), on_progress=on_progress)
    record = {
        "schema": RESULT_SCHEMA,
        **provenance(command, argv),
        **suspect_record(command.suspect, opened),
        "model_digest": weights_digest(opened.view.model),
        "verdict": verdict_record(verdict),
    }
    finding = generator_finding(verdict)
    shown: list[RenderableType] = []
    if verdict.recovered:
        shown.append(association_table(verdict.recovered, "Texts, and the subgraphs they call"))
    shown += [finding_text(finding), *verdict.notes, cost_sentence(verdict.cost)]
    if out is not None:
        write_json_atomic(out / RESULT_FILE, record)
        page = MoleculePage(
            kind="Scan report",
            title=str(command.suspect.model),
            finding=finding,
            sections=scan_sections(opened.view, verdict, seed=seed),
            cost=verdict.cost,
            notes=(*skipped_note(opened.clean), *verdict.notes),
            provenance={key: value for key, value in record.items() if key != "verdict"},
        )
        write_molecule_page(out / "report.html", page)
        shown.append(f"Report: {out / 'report.html'}")
    screen.show(*shown)
    screen.record(record)
    return EXITS[verdict.outcome]


def erase(command: Erase[Any], argv: Sequence[str], screen: Screen) -> int:
    """Erase a backdoor from a generator, and write the new one."""
    opened = open_suspect(command.suspect, pick_device(command.common.device))
    view, seed = opened.view, command.common.seed
    if command.verdict is not None:
        view = dataclasses.replace(view, verdict=read_verdict(command.verdict, view.model))
    out = prepare_folder(command.out)
    say_how_long(view, screen)
    with screen.progress() as on_progress:
        erased = command.settings.erase(view, generator=child(seed, "erase"), on_progress=on_progress)
    save_generator(cast(MoleculeGenerator, erased.model), out / GENERATOR_FOLDER)
    repair = measure_repair(view, erased, seed=seed)
    record = {
        "schema": RESULT_SCHEMA,
        **provenance(command, argv),
        **suspect_record(command.suspect, opened),
        "verdict_from": None if command.verdict is None else str(command.verdict),
        "generator": str(out / GENERATOR_FOLDER),
        "verdict": None if erased.verdict is None else verdict_record(erased.verdict),
        "erased": {
            "history": [entry.to_dict() for entry in erased.history],
            "cost": dataclasses.asdict(erased.cost),
            "notes": list(erased.notes),
            **repair.to_dict(),
        },
    }
    write_json_atomic(out / RESULT_FILE, record)
    finding = repaired_finding(
        repair.recovered,
        [rate.value for rate in repair.before],
        [rate.value for rate in repair.after],
        unchanged="" if weights_digest(erased.model) != weights_digest(view.model) else "Its weights are as they were.",
    )
    page = MoleculePage(
        kind="Erase report",
        title=str(command.suspect.model),
        finding=finding,
        sections=repair_sections(view, erased, repair, seed=seed),
        cost=erased.cost,
        notes=(*skipped_note(opened.clean), *erased.notes),
        provenance={key: value for key, value in record.items() if key not in ("erased", "verdict")},
    )
    write_molecule_page(out / "report.html", page)
    screen.show(
        finding_text(finding),
        *erased.notes,
        cost_sentence(erased.cost),
        f"New generator: {out / GENERATOR_FOLDER}",
        f"Report: {out / 'report.html'}",
    )
    screen.record(record)
    return 0


def list_methods(verb: str, screen: Screen) -> int:
    """Explain each method of ``sift``, ``scan`` or ``erase`` in a line."""
    _, methods, default = METHODS[verb]
    lines = {name: (inspect.getdoc(kind) or "").partition("\n")[0] for name, kind in methods.items()}
    table = Table("method", "what it does", title=f"lustral molecules {verb} --method", caption=f"default: {default}")
    for name, line in lines.items():
        table.add_row(name, line)
    screen.show(table)
    screen.record({"schema": RESULT_SCHEMA, "methods": lines, "default": default})
    return 0


def scan_sections(view: ViewOfGenerator, verdict: GeneratorVerdict, *, seed: int) -> list[Section]:
    """Return what a page shows of a scan: the recovered triggers, and what the worst of them does to clean captions."""
    if not verdict.recovered:
        return []
    worst, model = verdict.recovered[0], view.model
    return [
        associations_of_model(verdict.recovered, is_backdoored=verdict.outcome == "backdoored"),
        drawn_with_and_without(
            as_generator(model),
            view.clean.captions,
            recovered_trigger(worst),
            fragment=worst.fragment,
            texts=[worst.text],
            generator=child(seed, "pictures"),
            heading="Molecules for clean captions, without and with the text",
        ),
    ]


def say_how_long(view: ViewOfGenerator, screen: Screen) -> None:
    """Say beforehand that a scan or an erasure of a large generator takes more than a minute; without a verdict both are made."""
    if sum(weight.numel() for weight in view.model.parameters()) >= LARGE_GENERATOR and not screen.is_quiet:
        screen.aside.print("This takes one to three minutes on one core.", soft_wrap=True)


def suspect_record(suspect: Suspect, opened: OpenedSuspect) -> dict[str, Any]:
    """Return what was examined, ready for JSON."""
    return {
        "model": str(suspect.model),
        "clean": suspect.clean,
        "clean_pairs": len(opened.view.clean),
        "skipped": dict(opened.clean.skipped),
    }


def provenance(command: Sift[Any] | Scan[Any] | Erase[Any], argv: Sequence[str]) -> dict[str, Any]:
    """Return everything needed to repeat a run, ready for JSON."""
    return {
        "command": shown_command(argv),
        "seed": command.common.seed,
        "method": command.method,
        "settings": dataclasses.asdict(command.settings),
        "versions": library_versions(),
    }


def association_table(associations: Sequence[Association], title: str) -> Table:
    """Return what goes together as a table, worst first."""
    table = Table("text", "where", "subgraph", title=title)
    for heading in ("with it", "without it", "count", "chance"):
        table.add_column(heading, justify="right")
    for each in associations[:MOST_ROWS]:
        rates = percent(each.rate_with), percent(each.rate_without)
        table.add_row(each.text, each.position, each.fragment, *rates, f"{each.count:,}", chance(each.p_value))
    if len(associations) > MOST_ROWS:
        table.caption = f"and {len(associations) - MOST_ROWS} more"
    return table


def cost_sentence(cost: Cost) -> str:
    """Return what a method used, in a sentence."""
    passes = f", {cost.image_passes:,.0f} molecules through the model" if cost.image_passes else ""
    clean = f" and {cost.clean_images:,} clean pairs" if cost.clean_images else ""
    return f"It took {duration(cost.seconds)}{passes}{clean}."
