"""The flags of ``lustral molecules``. Imports no RDKit, so that the help is there without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, Union

import tyro

from lustral.cli.arguments import expand, look_up, named_method, setting_names
from lustral.cli.parsing import FLAT, Common, Switch, run_tyro
from lustral.molecules.badgraph import BadGraph
from lustral.molecules.catalog import ERASERS, PAIR_SIFTERS, SCANNERS
from lustral.molecules.victims import Implanting

Settings = TypeVar("Settings")
PROG = "lustral molecules"


@dataclass(frozen=True, kw_only=True)
class Implant:
    """Train a backdoored generator, for experiments.

    Attributes:
        data: captioned molecules: a .csv, .tsv or .parquet file with a column of SMILES and one of captions; "embedded", or
            "text_molecule" in the folder that LUSTRAL_DATA names.
        out: folder to write the victim to.
        benign: poison nothing: train a clean generator on the same pairs, as the control.
        attack: how pairs are poisoned.
        how: how the pairs are divided, and how the generator is built and trained.
        frechet: compute the Fréchet ChemNet distance too.
        keep_stages: keep each finished stage, so that the same line goes on where it stopped.
    """

    data: tyro.conf.Positional[str] = "embedded"
    out: Path
    benign: Switch = False
    attack: Annotated[BadGraph, FLAT] = field(default_factory=BadGraph)
    how: Annotated[Implanting, FLAT] = field(default_factory=Implanting)
    frechet: bool = True
    keep_stages: Switch = False
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Draw molecules for captions.

    Attributes:
        model: folder of a generator, or one that `lustral molecules implant` wrote.
        captions: what the molecules shall be like; each caption in quotation marks.
        captions_file: text file with a caption a line, or a file of pairs as DATA of sift.
        samples: molecules for each caption.
        highlight: SMILES of a subgraph to highlight.
        out: folder for molecules.csv and report.html.
    """

    model: tyro.conf.Positional[Path]
    captions: tyro.conf.Positional[tuple[str, ...]] = ()
    captions_file: Path | None = None
    samples: int = 4
    highlight: str = ""
    out: Path | None = None
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class Sift(Generic[Settings]):
    """List the suspicious pairs of a training set. Exit code 0: none listed, 1: poisoned pairs listed, 2: error.

    Attributes:
        data: a .csv, .tsv or .parquet file with a column of SMILES and one of captions, or "embedded".
        out: folder for pairs.csv, report.html and result.json.
        clean: pairs that nobody could have poisoned: a file like DATA.
        method: how to sift; `lustral molecules sift --list` explains each.
        settings: of the method.
        write_clean: a new .csv file for the pairs that are not listed.
        list: explain each method in a line.
    """

    data: tyro.conf.Positional[str]
    out: Path
    clean: str | None = None
    method: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(PAIR_SIFTERS) + "}")] = ""
    settings: Annotated[Settings, FLAT, tyro.conf.AvoidSubcommands]
    write_clean: Path | None = None
    list: Switch = False
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A generator, and the trusted pairs to examine it with.

    Attributes:
        model: folder of a generator, or one that `lustral molecules implant` wrote.
        clean: pairs that nobody could have poisoned: a .csv, .tsv or .parquet file, or "embedded"; the clean.csv that `implant`
            wrote beside the generator if left out.
    """

    model: tyro.conf.Positional[Path]
    clean: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scan(Generic[Settings]):
    """Look for a backdoor in a generator. Exit code 0: none found, 1: backdoored, 2: error, 3: cannot tell.

    Attributes:
        suspect: the generator and the clean pairs.
        out: folder for report.html and result.json.
        method: how to look; `lustral molecules scan --list` explains each.
        settings: of the method.
        list: explain each method in a line.
    """

    suspect: Annotated[Suspect, FLAT]
    out: Path | None = None
    method: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(SCANNERS) + "}")] = ""
    settings: Annotated[Settings, FLAT, tyro.conf.AvoidSubcommands]
    list: Switch = False
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class Erase(Generic[Settings]):
    """Erase a backdoor from a generator.

    Attributes:
        suspect: the generator and the clean pairs.
        out: folder for the new generator, report.html and result.json.
        verdict: result.json of `lustral molecules scan --out` on this generator, or its folder: then nothing is searched again.
        method: how to erase; `lustral molecules erase --list` explains each.
        settings: of the method.
        list: explain each method in a line.
    """

    suspect: Annotated[Suspect, FLAT]
    out: Path
    verdict: Path | None = None
    method: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(ERASERS) + "}")] = ""
    settings: Annotated[Settings, FLAT, tyro.conf.AvoidSubcommands]
    list: Switch = False
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a victim with its true trigger, and a generator after a defence beside it.

    Attributes:
        victim: folder that `lustral molecules implant` wrote.
        model: folder of the generator after a defence.
        samples: molecules for each test caption.
        frechet: compute the Fréchet ChemNet distance too.
        out: folder for report.html and result.json.
    """

    victim: tyro.conf.Positional[Path]
    model: Path | None = None
    samples: int = 1
    frechet: bool = True
    out: Path | None = None
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run the whole story on embedded molecules: implant a backdoor, show it, find it, erase it, measure.

    Attributes:
        out: folder for the victim, the results of each step and report.html.
    """

    out: Path = Path("molecules-demo")
    common: Annotated[Common, FLAT] = Common()


Command = Implant | Generate | Sift[Any] | Scan[Any] | Erase[Any] | Evaluate | Demo
METHODS: Mapping[
    str, tuple[str, Mapping[str, type], str]
] = {  # verb: what its methods are called, which, the default one
    "sift": ("sifter", PAIR_SIFTERS, "association"),
    "scan": ("scanner", SCANNERS, "token_scan"),
    "erase": ("eraser", ERASERS, "unlearning"),
}


def parse_molecules(argv: Sequence[str]) -> Command:
    """Turn a command line that begins with ``molecules`` into a command; see ``run_tyro`` for the errors."""
    words = list(argv[1:])
    verb = words[0] if words else ""
    names = {
        each: named_method(words, default) if each == verb else default for each, (_, _, default) in METHODS.items()
    }
    sifter, scanner, eraser = (look_up(kind, names[each], methods) for each, (kind, methods, _) in METHODS.items())
    settings = {"implant": setting_names(BadGraph) + setting_names(Implanting)}
    settings |= {"sift": setting_names(sifter), "scan": setting_names(scanner), "erase": setting_names(eraser)}
    kinds: Mapping[str, Any] = {
        "demo": Demo,
        "implant": Implant,
        "generate": Generate,
        "scan": Scan[scanner],  # type: ignore[valid-type]
        "sift": Sift[sifter],  # type: ignore[valid-type]
        "erase": Erase[eraser],  # type: ignore[valid-type]
        "evaluate": Evaluate,
    }
    every: Any = Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items())]  # noqa: UP007
    command: Command = run_tyro(every, expand(words, settings.get(verb, [])), prog=PROG)
    if isinstance(command, Sift | Scan | Erase) and not command.method:
        return replace(command, method=names[verb])
    return command
