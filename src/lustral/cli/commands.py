"""The commands: read the flags, build the objects, call the library, show and write the result."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lustral.api.model_files import (
    given_files,
    require_copyable,
    require_nameable,
    write_erased,
    written_files,
)
from lustral.api.opening import Opened, model_file, require_test_set, require_victims_images
from lustral.api.results import (
    EraseResult,
    ScanResult,
    defender_accuracies,
    run_record,
    true_evaluation,
    true_evaluations,
    write_scan,
)
from lustral.bench.workbench import StoreAssets
from lustral.catalog import ATTACKS, PURIFIERS, WHEN_TO_USE
from lustral.cli.arguments import (
    Benign,
    Demo,
    Erase,
    Evaluate,
    FromScan,
    Implant,
    Scan,
    Scanning,
    Suspect,
    parse,
    parse_implant,
)
from lustral.cli.console import Screen
from lustral.cli.exporting import (
    prepare_exports,
    refusal_told,
    write_erase_exports,
    write_scan_exports,
)
from lustral.cli.opening import compare_first, granted_view, open_suspect, pick_device
from lustral.cli.tables import (
    cost_sentence,
    defender_table,
    finding_text,
    metrics_table,
    verdict_table,
    weights_sentence,
)
from lustral.core.files import prepare_folder, write_json_atomic
from lustral.core.randomness import child
from lustral.core.records import Assets
from lustral.store.store import Store
from lustral.training import default_trainer
from lustral.vision import victims
from lustral.vision.erasing import erase as run_eraser
from lustral.vision.evaluation import compare_evaluations
from lustral.vision.models import (
    Classifier,
    load_model,
    parse_architecture,
    runs_user_code,
)
from lustral.vision.models.architecture import innermost
from lustral.vision.models.files.safety import FileFacts, safety_record
from lustral.vision.purifiers import BaEraser
from lustral.vision.records import Verdict, Victim
from lustral.vision.scanning import against_references, inspect_within
from lustral.vision.sources import load_source, source_names
from lustral.vision.verdict_files import RESULT_FILE, RESULT_SCHEMA

EXIT_CODES = {"clean": 0, "backdoored": 1, "cannot tell": 3}  # of ``scan``


def implant(command: Implant[Any], argv: Sequence[str], screen: Screen) -> int:
    """Train a victim, or a benign model, and write its folder."""
    device, out = pick_device(command.common.device), prepare_folder(command.out)
    source = load_source(command.data, image_size=command.image_size, resize=command.resize)
    test = require_test_set(source).to(device)
    train = source.training_split()[0].to(device)
    recipe = default_trainer(flip=source.flip, num_images=len(train))
    command = parse_implant(argv, recipe)
    arch = command.arch or ("small_cnn" if command.data == "digits" else "preact_resnet18:width=16")
    assets: Assets = victims.NoAssets()
    if command.assets is not None:
        assets = StoreAssets(Store(str(command.assets.resolve())).open(create=True))
    start: Classifier | None = None
    if command.start is not None:
        file = model_file(command.start)
        loaded = load_model(file, arch=command.arch, num_classes=train.num_classes, image_shape=train.image_shape)
        start, arch = loaded.model, loaded.arch
    with screen.progress() as on_progress:
        victim = victims.implant(
            None if isinstance(command.attack, Benign) else command.attack,
            train,
            test,
            arch=arch,
            trainer=command.trainer,
            seed=command.common.seed,
            data_name=command.data,
            start=start,
            assets=assets,
            on_progress=on_progress,
        )
    victims.save_victim(out, victim, test)
    attack = victim.provenance["attack"]
    screen.show(metrics_table({attack: victim.metrics}, f"{attack} on {source.name}"), f"Written to {out}")
    record = {**victim.provenance, "schema": RESULT_SCHEMA, "command": shown_command(argv), "out": str(out)}
    screen.record({**record, "metrics": victim.metrics})
    return 0


def scan(command: Scan[Any], argv: Sequence[str], screen: Screen) -> int:
    """Look for a backdoor; the exit code is the answer."""
    prepare_exports(command.exports, command.suspect.model)
    with refusal_told(command.exports, command.suspect.model, shown_command(argv)):
        opened = open_suspect(command.suspect, seed=command.common.seed, device=pick_device(command.common.device))
    files = given_files(opened.loaded)
    out = None if command.out is None else prepare_folder(command.out)
    about = provenance(command, argv, opened, files)
    compared = compare_first(command, opened, about, screen)
    with screen.progress() as on_progress:
        verdict: Verdict = inspect_within(
            command.settings,
            opened.view,
            max_time=command.max_time,
            generator=child(command.common.seed, "scan"),
            on_progress=on_progress,
        )
    if compared is not None:
        about, verdict = about | {"references": compared.to_dict()}, against_references(verdict, compared)
    result = ScanResult(
        verdict=verdict,
        model=opened.view.model,
        clean=opened.view.clean,
        title=str(command.suspect.model),
        about=about,
        true_trigger=opened.true_trigger,
        files=files,
    )
    record = result.to_dict()
    shown: list[RenderableType] = [weights_sentence(command.suspect.model, opened.loaded)]
    if verdict.evidence:
        shown.append(verdict_table(verdict, result.page.class_names))
    shown += screen.trigger_pictures(verdict, result.page)
    shown += [finding_text(result.finding), cost_sentence(verdict.cost)]
    try:
        if out is not None:
            record = write_scan(out, result)
            shown.append(f"Report: {out / 'report.html'}")
        shown += write_scan_exports(command.exports, record, code=EXIT_CODES[verdict.outcome])
    finally:  # after the files, which a failing terminal must not lose; and without them, if they cannot be written
        screen.show(*shown)
        screen.record(record)
    return EXIT_CODES[verdict.outcome]


def erase(command: Erase[Any, Any], argv: Sequence[str], screen: Screen) -> int:
    """Erase a backdoor, write the clean model, and show what changed."""
    prepare_exports(command.exports, command.suspect.model)
    opened = open_suspect(command.suspect, seed=command.common.seed, device=pick_device(command.common.device))
    require_nameable(command.settings, opened.loaded)
    require_copyable(opened.loaded, command.out)
    scanning: dict[str, Any] = dict(vars(command.scanning))
    taken: Path | None = scanning.pop("verdict", None)
    view = granted_view(command, opened, taken)
    out, files = prepare_folder(command.out), given_files(opened.loaded)
    with screen.progress() as on_progress:
        purified = run_eraser(
            command.settings,
            view,
            **scanning,
            generator=child(command.common.seed, "erase"),
            on_progress=on_progress,
        )
    model = purified.model
    assert isinstance(model, Classifier)
    before, after = true_evaluations(opened, model, seed=command.common.seed)
    result = EraseResult(
        purified=purified,
        given=opened.loaded,
        clean=opened.view.clean,
        title=str(command.suspect.model),
        about=provenance(command, argv, opened, files),
        accuracies=defender_accuracies(opened, model),
        before=before,
        after=after,
        true_trigger=opened.true_trigger,
        files=files,
        unseen=opened.test,
    )
    record = result.to_dict()
    file = write_erased(out, model, opened.loaded, record)
    record |= {"out": str(out), "written": str(file)}
    record["written_safety"] = safety_record(written_files(file, opened.loaded))
    shown: list[RenderableType] = [weights_sentence(command.suspect.model, opened.loaded)]
    if taken is not None:
        shown.append(f"Scan: taken over from {taken}")
    elif purified.verdict is not None and purified.verdict.evidence:
        shown.append(verdict_table(purified.verdict, result.page.class_names))
    shown += screen.trigger_pictures(purified.verdict, result.page)
    shown.append(defender_table(result.accuracies, purified))
    if before is not None and after is not None:
        shown.append(metrics_table({"before": before, "after": after}, "Measured with the true trigger", result.change))
    shown += [finding_text(result.finding), *purified.notes, cost_sentence(purified.cost)]
    shown.append(f"Model: {file}")
    try:
        write_json_atomic(out / "result.json", record)
        result.report(out / "report.html")
        shown += [f"Report: {out / 'report.html'}", *write_erase_exports(command.exports, record)]
    finally:
        screen.show(*shown)
        screen.record(record)
    return 0


def list_attacks(screen: Screen) -> int:
    """Explain each attack in a line, with what its attacker controls."""
    table = Table("attack", "what it does", "the attacker", title="lustral implant")
    lines = {name: module_line(kind) for name, kind in ATTACKS.items()}
    for name, line in lines.items():
        table.add_row(name, line, ATTACKS[name].threat_model)
    screen.show(table)
    records = {name: {"does": line, "attacker": ATTACKS[name].threat_model} for name, line in lines.items()}
    screen.record({"schema": RESULT_SCHEMA, "attacks": records})
    return 0


def module_line(kind: type) -> str:
    """Return what the file of a method says it does, without the paper.

    >>> module_line(ATTACKS["badnets"])
    'a small opaque patch'
    """
    text = " ".join((inspect.getdoc(inspect.getmodule(kind)) or "").split())
    return text.partition(": ")[2].partition(" (")[0]


def list_purifiers(screen: Screen) -> int:
    """Explain each purifier in a line, with what it needs beyond clean images and what it costs."""
    lines = {name: (inspect.getdoc(kind) or "").partition("\n")[0] for name, kind in PURIFIERS.items()}
    table = Table("method", "what it does", "when", "needs", "cost", title="lustral erase --method")
    table.caption = "cost: passes of each of 2,500 clean images through the network and back"
    for name, line in lines.items():
        when, needs = WHEN_TO_USE.get(name, ""), PURIFIERS[name].needs
        table.add_row(name, line, when, needs, str(PURIFIERS[name].cost_passes))
    screen.show(table)
    records = {
        name: {
            "does": line,
            "when": WHEN_TO_USE.get(name, ""),
            "needs": PURIFIERS[name].needs,
            "passes": PURIFIERS[name].cost_passes,
        }
        for name, line in lines.items()
    }
    screen.record({"schema": RESULT_SCHEMA, "methods": records})
    return 0


def evaluate(command: Evaluate, argv: Sequence[str], screen: Screen) -> int:
    """Measure a victim with its true trigger, and the model after a defence beside it."""
    device, seed = pick_device(command.common.device), command.common.seed
    victim = victims.load_victim(command.victim, arch=own_code(command.format.arch))
    data = command.data or named_data(victim)
    test = require_test_set(load_source(data, image_size=command.image_size, resize=command.resize)).to(device)
    require_victims_images(victim, test, data)
    before = true_evaluation(victim, victim.model.to(device), test, seed=seed)
    columns = {"victim": before}
    shown: list[RenderableType] = []
    record: dict[str, Any] = {
        "schema": RESULT_SCHEMA,
        "command": shown_command(argv),
        "data": data,
        "before": before.to_dict(),
    }
    if command.model is not None:
        loaded = load_model(
            model_file(command.model),
            num_classes=test.num_classes,
            image_shape=test.image_shape,
            **vars(command.format),
        )
        shown.append(weights_sentence(command.model, loaded))
        after = columns["after"] = true_evaluation(victim, loaded.model.to(device), test, seed=seed)
        record |= {
            "model": str(command.model),
            "weights": loaded.weights,
            "after": after.to_dict(),
            "change": compare_evaluations(before, after),
        }
    if command.out is not None:
        write_json_atomic(prepare_folder(command.out) / "result.json", record)
    screen.show(*shown, metrics_table(columns, f"{command.victim} on {data}", record.get("change")))
    screen.record(record)
    return 0


def own_code(arch: str | None) -> str | None:
    """Return the user's own network in what ``--arch`` says of a model after a defence; None if there is none.

    >>> own_code("conditioned:fc@net.py:build"), own_code("small_cnn")
    ('net.py:build', None)
    """
    return str(innermost(parse_architecture(arch, allow_code=True))) if arch and runs_user_code(arch) else None


def named_data(victim: Victim) -> str:
    """Return the name of the data set that a victim was made from.

    Raises:
        VictimError: it was a path or a download; a file does not choose what is read.
    """
    data = victim.provenance["data"]
    if data not in source_names():
        raise victims.VictimError(
            f"the victim was made from {str(data)[:200]!r}, which is no known name ({', '.join(source_names())}); a victim "
            "folder opens no path and starts no download by itself: pass it as --data"
        )
    return str(data)


def demo(command: Demo, argv: Sequence[str], screen: Screen) -> int:
    """Implant a backdoor in a digits model, find it, erase it, measure, show."""
    common, victim = command.common, command.out / "victim"
    aside = Screen(json=False, quiet=common.quiet, hidden=common.json)
    aside.show(Text.assemble(("1. An attacker poisons the training set", "bold"), ": a white 3x3 corner means “3”."))
    line = ["implant", "badnets", "--data", "digits", "--out", str(victim), "--target-label", "3", "--size", "3"]
    line += ["--seed", str(common.seed), "--device", common.device]
    attacking = parse(line)
    assert isinstance(attacking, Implant)
    implant(attacking, line, aside)
    second = "2. The defender gets the model and some clean images"
    aside.show(Text.assemble((second, "bold"), ", and scans."))
    suspect, found = Suspect(model=victim, data="digits", clean=command.clean), command.out / "scan"
    line = ["scan", str(victim), "--data", "digits", "--out", str(found), *line[-4:]]
    line += [] if command.clean is None else ["--clean", str(command.clean)]
    scanning = parse(line)
    assert isinstance(scanning, Scan)
    scan(scanning, line, aside)
    aside.show(Text.assemble(("3. The defender erases what was found", "bold"), ", and scans again."))
    taken = Scanning(verdict=found / RESULT_FILE)
    return erase(
        Erase(suspect=suspect, out=command.out, method="baeraser", settings=BaEraser(), scanning=taken, common=common),
        argv,
        screen,
    )


def provenance(
    command: Scan[Any] | Erase[Any, Any], argv: Sequence[str], opened: Opened, files: Sequence[FileFacts]
) -> dict[str, Any]:
    """Return everything needed to repeat a run, ready for JSON."""
    more = scanning_record(command)
    if isinstance(command, Erase) and command.untrusted:
        more["untrusted"] = command.untrusted
    return run_record(
        opened,
        command=shown_command(argv),
        model=str(command.suspect.model),
        data=command.suspect.data,
        method=command.method,
        settings=command.settings,
        seed=command.common.seed,
        files=files,
        **more,
    )


def scanning_record(command: Scan[Any] | Erase[Any, Any]) -> dict[str, Any]:
    """Return how an eraser gets and makes scans, ready for JSON; nothing of one that starts from no scan; a scan's limit."""
    if isinstance(command, Scan):
        return {} if command.max_time is None else {"max_time": command.max_time}
    if not isinstance(command.scanning, FromScan):
        return {}
    taken = command.scanning.verdict
    record = dataclasses.asdict(command.scanning) | {"verdict": None if taken is None else str(taken)}
    return {"scanning": record}


def shown_command(argv: Sequence[str]) -> str:
    """Return a command line as one would type it."""
    return shlex.join(["lustral", *argv])
