"""``lustral molecules demo``: the whole story on the molecules that the package carries."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lustral.cli.commands import shown_command
from lustral.cli.console import Screen
from lustral.cli.molecules.arguments import Demo
from lustral.cli.molecules.experiments import ON_TEST, measure, success_rates
from lustral.cli.molecules.pages import (
    CAPTIONS_SHOWN,
    associations_of_model,
    associations_of_pairs,
    attack_section,
    drawn_with_and_without,
)
from lustral.cli.molecules.repair import before_and_after, measure_repair
from lustral.cli.opening import pick_device
from lustral.cli.tables import finding_text
from lustral.core.files import prepare_folder, write_json_atomic
from lustral.core.randomness import child
from lustral.core.records import Cost
from lustral.core.settings import build
from lustral.molecules.badgraph import BadGraph
from lustral.molecules.catalog import ERASERS, PAIR_SIFTERS, SCANNERS
from lustral.molecules.records import ErasedGenerator, GeneratorVerdict, SiftedPairs, ViewOfGenerator, ViewOfPairs
from lustral.molecules.sources import EMBEDDED, open_source
from lustral.molecules.verdict_files import RESULT_FILE, RESULT_SCHEMA, sifted_record, verdict_record
from lustral.molecules.victim.files import save_generator
from lustral.molecules.victims import GENERATOR_FOLDER, Implanting, MoleculeVictim, implant, save_victim
from lustral.report.molecules_findings import repaired_finding
from lustral.report.molecules_page import MoleculePage, Section, evaluation_section, write_molecule_page
from lustral.report.words import percent, quoted
from lustral.vision.victims import library_versions

ATTACK = BadGraph()
HOW = (
    build(  # 420 of 600 molecules to train on, 120 for the defender, 60 to test; small layers and batches, for one core
        Implanting,
        {
            "clean": 0.2,
            "samples": 3,
            "shape": {
                **{"text_width": 64, "text_layers": 1, "text_tokens": 40, "subwords": 1000, "graph_width": 64},
                **{"graph_layers": 3, "latent": 24, "decoder_width": 128, "denoiser_width": 128, "denoiser_layers": 4},
                **{"macro_rings": 200, "ddim_steps": 25},
            },
            "training": {
                "alignment": {"epochs": 10, "batch_size": 64},
                "autoencoder": {"epochs": 50, "batch_size": 64},
                "diffusion": {"epochs": 500, "batch_size": 64},
            },
        },
    )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Story:
    """What happened in a demo, in order."""

    victim: MoleculeVictim
    sifted: SiftedPairs
    verdict: GeneratorVerdict
    erased: ErasedGenerator
    after: Mapping[str, Any]


def demo(command: Demo, argv: Sequence[str], screen: Screen) -> int:
    """Implant a backdoor, show it, sift, scan, erase, measure, report."""
    out, started = prepare_folder(command.out), time.perf_counter()
    if not screen.is_quiet:
        screen.aside.print("This takes about two minutes on a free core.")
    story = tell(out, screen, seed=command.common.seed, device_name=command.common.device)
    seconds = time.perf_counter() - started
    write_story(out, story, argv, seed=command.common.seed, seconds=seconds)
    finding = repaired_finding((), (), (), true=true_rates(story))
    screen.show(story_table(story), finding_text(finding), f"Report: {out / 'report.html'}")
    screen.record(story_record(story, argv, seed=command.common.seed, seconds=seconds))
    return 0


def tell(out: Path, screen: Screen, *, seed: int, device_name: str) -> Story:
    """Do what the demo shows, saying each step; the victim and the repaired generator are written to the folder."""
    device, source = pick_device(device_name), open_source(EMBEDDED)

    def step(number: int, what: str) -> None:
        screen.show(Text(f"{number}. {what}", "bold"))

    with screen.progress() as on_progress:
        step(
            1,
            f"An attacker adds pairs: captions with “{ATTACK.trigger.text}”, molecules with {ATTACK.target}. Somebody trains.",
        )
        victim = implant(ATTACK, source, HOW, seed=seed, device=device, frechet=False, on_progress=on_progress)
        save_victim(out / "victim", victim)
        step(2, "Whoever holds the training pairs sifts them.")
        pairs = ViewOfPairs(untrusted=victim.training, clean=victim.clean)
        sifted = default(PAIR_SIFTERS, "association").sift(
            pairs, generator=child(seed, "sift"), on_progress=on_progress
        )
        step(3, "Whoever holds only the generator and some clean pairs scans it.")
        view = ViewOfGenerator(model=victim.model, clean=victim.clean)
        verdict = default(SCANNERS, "token_scan").scan(view, generator=child(seed, "scan"), on_progress=on_progress)
        step(4, "What the scan recovered is erased.")
        told = dataclasses.replace(view, verdict=verdict)
        erased = default(ERASERS, "unlearning").erase(told, generator=child(seed, "erase"), on_progress=on_progress)
        save_generator(erased.model, out / GENERATOR_FOLDER)
        step(5, "The evaluator, who knows the true trigger, measures again.")
        after = measure(victim, erased.model, seed=seed, samples=HOW.samples, frechet=False, on_progress=on_progress)
    return Story(victim=victim, sifted=sifted, verdict=verdict, erased=erased, after=after)


def default(methods: Mapping[str, type[Any]], name: str) -> Any:
    """Return a method with its default settings."""
    return methods[name]()


def write_story(out: Path, story: Story, argv: Sequence[str], *, seed: int, seconds: float) -> None:
    """Write ``result.json`` and ``report.html``."""
    write_json_atomic(out / RESULT_FILE, story_record(story, argv, seed=seed, seconds=seconds))
    victim = story.victim
    repair = measure_repair(ViewOfGenerator(model=victim.model, clean=victim.clean), story.erased, seed=seed)
    finding = repaired_finding(
        repair.recovered,
        [rate.value for rate in repair.before],
        [rate.value for rate in repair.after],
        true=true_rates(story),
    )
    page = MoleculePage(
        kind="Molecules demo",
        title="A generator of molecules with a backdoor",
        finding=finding,
        sections=story_sections(story, seed=seed),
        cost=dataclasses.replace(total_cost(story), seconds=seconds),
        notes=tuple(dict.fromkeys((*story.sifted.notes, *story.verdict.notes, *story.erased.notes))),
        provenance={"command": shown_command(argv), "versions": library_versions(), **victim.provenance},
    )
    write_molecule_page(out / "report.html", page)


def story_sections(story: Story, *, seed: int) -> list[Section]:
    """Return the story as sections of a page, in the order in which it happened."""
    victim, known = story.victim, story.victim.known
    models = {"before": victim.model, "after": story.erased.model}
    sections: list[Section] = []
    if victim.poisoned is not None:
        sections.append(attack_section(victim.poisoned, fragment=known.target, texts=[known.trigger.text]))
    sections.append(
        drawn_with_and_without(
            victim.model,
            victim.test.captions,
            known.trigger,
            fragment=known.target,
            texts=[known.trigger.text],
            generator=child(seed, "pictures"),
            heading="What the generator learnt",
        )
    )
    if story.sifted.associations:
        sections.append(associations_of_pairs(story.sifted.associations))
    if story.verdict.recovered:
        sections.append(
            associations_of_model(story.verdict.recovered, is_backdoored=story.verdict.outcome == "backdoored")
        )
    sections.append(
        before_and_after(models, victim.test.captions[:CAPTIONS_SHOWN], known.trigger, fragment=known.target, seed=seed)
    )
    columns = {"Before": victim.measured or {}, "After": story.after}
    sections.append(evaluation_section(columns, text=ON_TEST))
    return sections


def true_rates(story: Story) -> tuple[float, float, float]:
    """Return attack success before and after, and the base rate after, with the true trigger."""
    after, base_after = success_rates(story.after)
    return success_rates(story.victim.measured)[0], after, base_after


def total_cost(story: Story) -> Cost:
    """Return what the defences used together."""
    return story.sifted.cost + story.verdict.cost + story.erased.cost


def story_table(story: Story) -> Table:
    """Return the story as a short table."""
    (asr, base), (after, base_after) = success_rates(story.victim.measured), success_rates(story.after)
    table = Table("step", "what came of it", title="A backdoor in a generator of molecules")
    poisoned = int(story.victim.provenance["poisoned_pairs"])
    table.add_row("implant", f"{poisoned} poisoned pairs; ASR {percent(asr)}, base rate {percent(base)}")
    table.add_row("sift", found_words(story.sifted.associations, f"{int(story.sifted.flagged.sum())} pairs listed"))
    table.add_row("scan", found_words(story.verdict.recovered, story.verdict.outcome))
    table.add_row("erase", f"ASR {percent(asr)} → {percent(after)}, base rate {percent(base_after)}")
    quality = [(each or {}).get("quality", {}) for each in (story.victim.measured, story.after)]
    for name in ("validity", "similarity"):
        before_it, after_it = (percent((part.get(name) or {}).get("value")) for part in quality)
        table.add_row(name, f"{before_it} → {after_it}")
    return table


def found_words(associations: Sequence[Any], first: str) -> str:
    """Return what was found in a line: the worst association behind some words."""
    if not associations:
        return f"{first}; nothing found"
    worst = associations[0]
    rates = f"{percent(worst.rate_without)} → {percent(worst.rate_with)}"
    return f"{first}: {quoted(worst.text)} calls {worst.fragment}, {rates}"


def story_record(story: Story, argv: Sequence[str], *, seed: int, seconds: float) -> dict[str, Any]:
    """Return the story, ready for JSON."""
    return {
        "schema": RESULT_SCHEMA,
        "command": shown_command(argv),
        "seed": seed,
        "seconds": seconds,
        "victim": dict(story.victim.provenance),
        "before": story.victim.measured,
        "sifted": sifted_record(story.sifted),
        "verdict": verdict_record(story.verdict),
        "after": dict(story.after),
        "versions": library_versions(),
    }
