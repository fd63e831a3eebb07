"""The flags of every command: dataclasses that ``tyro`` reads, and a method's own dataclass in the middle of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, Union, cast, get_args, get_type_hints

import tyro

from lustral.api import methods
from lustral.api.methods import DEFAULT_DETECTOR, DEFAULT_PURIFIER, DEFAULT_SAFE_TRAINER, DEFAULT_SIFTER
from lustral.catalog import ATTACKS, DETECTORS, PURIFIERS, SAFE_TRAINERS, SIFTERS
from lustral.cli.bench_arguments import Bench
from lustral.cli.exporting import ModelExports, ScanExports
from lustral.cli.parsing import FLAT, Common, Switch, UsageError, run_tyro
from lustral.cli.saved.arguments import Report
from lustral.cli.untrusted.arguments import Sift, Train, UntrustedData
from lustral.training import Augment, Trainer
from lustral.vision.detectors import Cascade, MaskArea
from lustral.vision.erasing import scan_method, takes_untrusted, takes_verdict
from lustral.vision.victims import NO_ATTACK

Settings = TypeVar("Settings")
Scans = TypeVar("Scans")


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """How to read a model file that does not say so itself; those of lustral do.

    Attributes:
        arch: architecture: preact_resnet18:width=16, torchvision:resnet18, timm:NAME, or FILE.py:function, which runs
            that file.
        mean: per channel, what the network subtracts from pixels in [0, 1].
        std: per channel, what the network then divides by.
        weights: which set of weights, for a file that holds several: state_dict, state_dict_ema, model.teacher, ...
    """

    arch: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A model, and the trusted images to examine it with.

    Attributes:
        model: a model file (.safetensors, .pt, .pth), a folder with config.json as model hubs have them, or one that
            `lustral implant` wrote.
        data: clean images: digits, cifar10, ... (looked up under LUSTRAL_DATA), an .npz or .parquet file, or an image
            folder.
        clean: how many clean images to use, drawn by class in proportion; all there are up to 2,500 if left out.
        image_size: pixels to resize the images to: the side of a square, or height and width.
        resize: scale the shorter side to this many pixels first, and cut --image-size out of the middle.
        classes: file with the names of the classes in the model's order, one a line or a JSON list; a config.json will do.
        format: how to read the model file.
    """

    model: tyro.conf.Positional[Path]
    data: str
    clean: int | None = None
    classes: Path | None = None
    image_size: tuple[int, ...] | None = None
    resize: int | None = None
    format: Annotated[FileFormat, FLAT] = FileFormat()


@dataclass(frozen=True, kw_only=True)
class Benign:
    """Poison nothing: train a benign model the same way."""


@dataclass(frozen=True, kw_only=True)
class Implant(Generic[Settings]):
    """Train a backdoored model, for experiments.

    Attributes:
        attack: what poisons the training set.
        data: training and test images: a name, an .npz or .parquet file, or an image folder, with a test set.
        out: folder to write the victim to.
        arch: architecture; small_cnn for digits and preact_resnet18:width=16 for the rest if left out. FILE.py:function
            runs that file.
        start: fine-tune this clean model (a file or folder) instead of training new weights.
        assets: folder that keeps surrogates, encoders and patterns for the next victim; a benchmark's store will do.
        list: explain each attack in a line.
        image_size: pixels to resize the images to: the side of a square, or height and width.
        resize: scale the shorter side to this many pixels first, and cut --image-size out of the middle.
        trainer: how to train; the defaults follow the size of the data set.
    """

    attack: Annotated[Settings, FLAT]
    data: str
    out: Path
    arch: str | None = None
    start: Path | None = None
    assets: Path | None = None
    list: Switch = False
    image_size: tuple[int, ...] | None = None
    resize: int | None = None
    trainer: Annotated[Trainer, tyro.conf.AvoidSubcommands] = field(default_factory=lambda: Trainer(augment=Augment()))
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class Scan(Generic[Settings]):
    """Look for a backdoor. Exit code 0: none found, 1: backdoored, 2: error, 3: cannot tell.

    Attributes:
        suspect: the model and the clean images.
        out: folder for report.html, result.json and pictures of the recovered triggers.
        method: how to look.
        settings: of the method.
        max_time: seconds after which cascade stops searching; classes that were not searched are named, and the answer is then
            never "clean".
        references: folder of benign models of the same classes, read as the model is: an accusation stands only if it is more
            than theirs. 99 are needed for p = 1 %.
        train_references: train so many benign models of the same architecture instead, on the clean images that --clean leaves.
        exports: files for other tools.
    """

    suspect: Annotated[Suspect, FLAT]
    out: Path | None = None
    method: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(DETECTORS) + "}")] = DEFAULT_DETECTOR
    settings: Annotated[Settings, FLAT, tyro.conf.AvoidSubcommands]
    max_time: float | None = None
    references: Path | None = None
    train_references: int | None = None
    exports: Annotated[ScanExports, FLAT] = ScanExports()
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class FromScan:
    """How a method that starts from a scan gets it.

    Attributes:
        verdict: result.json of `lustral scan --out` on this model, or its folder: then nothing is searched again.
        audit: scan the erased model too, with fresh randomness.
    """

    verdict: Path | None = None
    audit: bool = True


@dataclass(frozen=True, kw_only=True)
class Scanning(FromScan):
    """How a method gets the scan for small masks that it starts from.

    Attributes:
        detector: of the scan and the audit. Where no flag of its inverter is given, it has the method's.
    """

    detector: Annotated[MaskArea, tyro.conf.AvoidSubcommands] = field(default_factory=MaskArea)


@dataclass(frozen=True, kw_only=True)
class CascadeScanning(FromScan):
    """How a method gets the scan for triggers of any kind that it starts from.

    Attributes:
        max_time: seconds after which the scan stops searching, and the audit again.
        detector: of the scan and the audit.
    """

    max_time: float | None = None
    detector: Annotated[Cascade, tyro.conf.AvoidSubcommands] = field(default_factory=Cascade)


SCANNING: Mapping[str, type[FromScan]] = {"mask_area": Scanning, "cascade": CascadeScanning}  # by ``scan_method``


@dataclass(frozen=True, kw_only=True)
class NoScanning:
    """Nothing: the method starts from no scan."""


@dataclass(frozen=True, kw_only=True)
class Erase(Generic[Settings, Scans]):
    """Erase a backdoor. The help lists the settings of the --method that is named beside it; the last part of a
    setting's name is enough: --epochs for --trainer.epochs.

    Attributes:
        suspect: the model and the clean images.
        out: folder for the erased model (the given file with other weights, under the name model and the ending of the given
            one; for cnpd model.safetensors), report.html and result.json.
        method: how to erase; `lustral erase --list` explains each.
        settings: of the method.
        scanning: of a method that starts from a scan.
        untrusted: the set that the model was trained on, for a method that looks at it: as for `lustral sift`.
        exports: files for other tools.
        list: explain each method in a line.
    """

    suspect: Annotated[Suspect, FLAT]
    out: Path
    method: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(PURIFIERS) + "}")] = DEFAULT_PURIFIER
    settings: Annotated[Settings, FLAT, tyro.conf.AvoidSubcommands]
    scanning: Annotated[Scans, FLAT]
    untrusted: str | None = None
    exports: Annotated[ModelExports, FLAT] = ModelExports()
    list: Switch = False
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a victim with its true trigger, and an erased model beside it.

    Attributes:
        victim: folder that `lustral implant` wrote.
        model: model file after a defence.
        data: data set with a test split; the one the victim was made from if left out, where that has a known name.
        out: folder for result.json.
        image_size: pixels to resize the images to, as for implant.
        resize: scale the shorter side first, as for implant.
        format: how to read the model file.
    """

    victim: tyro.conf.Positional[Path]
    model: Path | None = None
    data: str | None = None
    image_size: tuple[int, ...] | None = None
    resize: int | None = None
    out: Path | None = None
    format: Annotated[FileFormat, FLAT] = FileFormat()
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run the whole story on embedded digits: implant a backdoor, find it, erase it, measure, show.

    Attributes:
        out: folder for the victim, the cleaned model and report.html.
        clean: how many clean images the defender has; all there are if left out.
    """

    out: Path = Path("demo-out")
    clean: int | None = None
    common: Annotated[Common, FLAT] = Common()


@dataclass(frozen=True, kw_only=True)
class Molecules:
    """Find, show and erase backdoors in text-guided molecule generation; `lustral molecules --help` lists its commands."""

    common: Annotated[Common, FLAT] = Common()


Command = (
    Implant[Any] | Scan[Any] | Erase[Any, Any] | Sift[Any] | Train[Any] | Evaluate | Report | Demo | Molecules | Bench
)


UNTRUSTED: Mapping[str, tuple[Any, str, Mapping[str, type], str]] = {  # verb: its flags, its methods, the default one
    "sift": (Sift, "sifter", SIFTERS, DEFAULT_SIFTER),
    "train": (Train, "safe trainer", SAFE_TRAINERS, DEFAULT_SAFE_TRAINER),
}


def setting_names(kind: type, prefix: str = "") -> list[str]:
    """Return the flags that the fields of a dataclass and of the dataclasses inside it get, without dashes.

    >>> setting_names(Trainer, "trainer.")[:2]
    ['trainer.epochs', 'trainer.batch-size']
    """
    names, hints = [], get_type_hints(kind)
    for name in (
        part.name for part in fields(cast(Any, kind))
    ):  # hints also name what belongs to the class, as its version
        hint = hints[name]
        inner = next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)
        full = prefix + name.replace("_", "-")
        names += [full] if inner is None else setting_names(cast(type, inner), full + ".")
    return names


TRAINER_SETTINGS = setting_names(Trainer, "trainer.")
TOP_FLAGS = {
    part.name.replace("_", "-")
    for kind in (
        Common,
        FileFormat,
        Suspect,
        UntrustedData,
        ScanExports,
        Implant,
        Scan,
        Scanning,
        CascadeScanning,
        Erase,
        Sift,
        Train,
        Demo,
    )
    for part in fields(kind)
}


def look_up(kind: str, name: str, catalog: Mapping[str, type]) -> type:
    """Return a method by name, or raise ``UsageError`` with the nearest name."""
    try:
        return methods.look_up(kind, name, catalog)
    except ValueError as error:
        raise UsageError(str(error)) from None


def named_method(argv: Sequence[str], default: str) -> str:
    """Return the value of ``--method`` ahead of parsing, because the other flags depend on it.

    >>> named_method(["erase", "m.pt", "--method=mesa"], "baeraser")
    'mesa'
    """
    name = default
    for word, following in pairwise([*argv, default]):
        if word == "--method":
            name = following
        elif word.startswith("--method="):
            name = word.removeprefix("--method=")
    return name


def parse(argv: Sequence[str]) -> Command:
    """Turn a command line into a command.

    Raises:
        UsageError: it cannot be understood; the message is one line.
        HelpShown: it asked for help, which has been printed.
    """
    verb = argv[0] if argv else ""
    if verb in UNTRUSTED:
        return parse_untrusted(argv)
    method = named_method(argv, DEFAULT_PURIFIER if verb == "erase" else DEFAULT_DETECTOR)
    detector = look_up("detector", method if verb == "scan" else DEFAULT_DETECTOR, DETECTORS)
    purifier = look_up("purifier", method if verb == "erase" else DEFAULT_PURIFIER, PURIFIERS)
    scanning: type = SCANNING[scan_method(purifier)] if takes_verdict(purifier) else NoScanning
    if verb == "erase":
        require_fitting_flags(argv, method, purifier)
    kinds: Mapping[str, Any] = {
        "demo": Demo,
        "scan": Scan[detector],  # type: ignore[valid-type]
        "erase": Erase[purifier, scanning],  # type: ignore[valid-type]
        "sift": Sift[NoScanning],
        "train": Train[NoScanning],
        "evaluate": Evaluate,
        "report": Report,
        "implant": Implant[_attacks()],  # type: ignore[misc]
        "molecules": Molecules,
        "bench": Bench,
    }
    erasing = setting_names(purifier) + setting_names(scanning)
    settings = {"scan": setting_names(detector), "erase": erasing, "implant": TRAINER_SETTINGS}
    every: Any = Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items())]  # noqa: UP007
    words = expand(argv, settings.get(verb, []))
    command: Command = run_tyro(every, words)
    own_inverter = any(word.startswith("--detector.inverter") for word in words)
    if isinstance(command, Erase) and isinstance(command.scanning, Scanning) and not own_inverter:
        follows = replace(command.scanning.detector, inverter=command.settings.inverter)
        return replace(command, scanning=replace(command.scanning, detector=follows))
    return command


def require_fitting_flags(argv: Sequence[str], method: str, purifier: type) -> None:
    """Raise ``UsageError`` where a line hands a purifier a scan or a training set that it has no use for, or lacks one."""
    flags = {word.partition("=")[0] for word in argv}

    def takers(takes: Callable[[type], bool]) -> str:
        return (
            " or ".join(name for name, kind in PURIFIERS.items() if takes(kind)) or "one that does: there is none yet"
        )

    if "--verdict" in flags and not takes_verdict(purifier):
        raise UsageError(
            f"{method} starts from no scan: leave --verdict out, or choose --method {takers(takes_verdict)}"
        )
    if "--untrusted" in flags and not takes_untrusted(purifier):
        raise UsageError(
            f"{method} does not look at the training set: leave --untrusted out, or choose --method {takers(takes_untrusted)}"
        )
    if "--untrusted" not in flags and takes_untrusted(purifier) and not flags & {"--help", "-h", "--list"}:
        raise UsageError(f"{method} looks at the set that the model was trained on: give it as --untrusted DATA")


def parse_untrusted(argv: Sequence[str], recipe: Trainer | None = None) -> Sift[Any] | Train[Any]:
    """Parse a ``sift`` or ``train`` line.

    Args:
        argv: the command line.
        recipe: the training recipe for the data set: the defaults of the flags of a method that follows the set's size.
    """
    shape, kind, catalog, default = UNTRUSTED[argv[0]]
    method = named_method(argv, default)
    settings = look_up(kind, method, catalog)
    words = expand(argv[1:], setting_names(settings))
    own = settings()
    follows = [part.name for part in fields(cast(Any, settings)) if is_optional_trainer(settings, part.name)]
    named = [name for name in follows if any(word.startswith(f"--{name.replace('_', '-')}.") for word in words)]
    own = replace(own, **{name: recipe or Trainer() for name in named})
    given = UntrustedData(data=tyro.MISSING)
    defaults = shape(given=given, out=tyro.MISSING, method=method, settings=own)
    parsed: Sift[Any] | Train[Any] = run_tyro(shape[settings], words, prog=f"lustral {argv[0]}", default=defaults)
    return parsed


def is_optional_trainer(settings: type, name: str) -> bool:
    """Say whether a setting is a recipe that is chosen by the size of the set where it is None."""
    hint = get_args(get_type_hints(settings)[name])
    return Trainer in hint and type(None) in hint and getattr(settings, name, None) is None


def parse_implant(argv: Sequence[str], recipe: Trainer) -> Implant[Any]:
    """Parse an ``implant`` line with a data set's own training recipe as the defaults of the trainer's flags."""
    defaults: Any = Implant(attack=tyro.MISSING, data=tyro.MISSING, out=tyro.MISSING, trainer=recipe)
    words = expand(argv[1:], TRAINER_SETTINGS)
    parsed: Implant[Any] = run_tyro(Implant[_attacks()], words, default=defaults)  # type: ignore[misc]
    return parsed


def expand(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """Write out the flags that are the last part of a setting's name; of several settings, the least nested one.

    What an inverter shares with the trainer beside it, such as ``--batch-size``, is the trainer's.

    >>> expand(["--epochs=5", "--seed", "1"], ["trigger-rate", "trainer.epochs", "detector.search.epochs"])
    ['--trainer.epochs=5', '--seed', '1']
    """

    def nesting(name: str) -> tuple[int, bool]:
        return name.count("."), name.startswith("inverter.")

    words = []
    for word in argv:
        flag, equals, value = word.partition("=")
        short = flag.removeprefix("--").replace("_", "-")
        longer = [name for name in names if name.endswith(f".{short}")]
        if flag.startswith("--") and longer and short not in {*names, *TOP_FLAGS}:
            least = min(map(nesting, longer))
            nearest = [name for name in longer if nesting(name) == least]
            if len(nearest) > 1:
                raise UsageError(f"{flag} could be {' or '.join('--' + name for name in nearest)}: write it out")
            word = f"--{nearest[0]}{equals}{value}"
        words.append(word)
    return words


def _attacks() -> Any:
    """Return the union of all attacks as subcommands named as in the catalog."""
    kinds = {**ATTACKS, NO_ATTACK: Benign}
    return Union[tuple(Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)] for name, kind in kinds.items())]  # noqa: UP007
