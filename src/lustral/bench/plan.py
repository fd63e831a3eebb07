"""Plan files: which attacks meet which defences, on what data, how often. TOML, checked key by key.

What the keys mean for data sets and methods is looked at when a plan is expanded: ``lustral.bench.expansion``.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from lustral.core.files import NotRegularError, is_deep, read_regular
from lustral.core.settings import shortened, suggest


class PlanError(ValueError):
    """A plan cannot be run; the message has one line for each problem."""


def _budget(value: object) -> int | float:
    """Check a clean budget."""
    if (type(value) is int and value >= 0) or (type(value) is float and 0 < value < 1):
        return value
    raise ValueError("expected a number of images (a whole number) or a fraction of the training set, between 0 and 1")


MOST_BYTES = 1 << 17  # of a plan file; ours have a few kilobytes
MOST_DOTS = 1000  # in a line: the time that a key with dots takes grows with their square
MOST_CELLS = 100_000  # of a plan, counted before any is made
DEEPEST = 16  # tables and lists inside each other
LARGEST = 2**63 - 1  # of whole numbers, either way: what tensors and tables hold

T = TypeVar("T")
Rate = Annotated[float, Field(gt=0, le=1)]
Clean = Annotated[int | float, PlainValidator(_budget)]
Some = Annotated[list[T], Field(min_length=1)]  # an empty list would quietly make no cell, or stand for a default


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataTable(_Table):
    """A data set of a plan.

    Attributes:
        name: as ``--data`` takes it: digits, cifar10, a file, a folder.
        label: what tables call it, and ``data`` of attacks and exclusions; no part of a cell's name. With labels a plan can have
            a data set several times, each with other architectures and another training recipe.
        arch: architectures; small_cnn for digits and preact_resnet18:width=16 for the rest if left out.
        images: train on so many of the training images only, every class in proportion; all if left out. The defenders' reserve
            is taken off before, and the test set stays whole.
        image_size: side in pixels to resize to, or height and width.
        normalisation: what networks do to pixels first: "none", or "half" for [-1, 1]; by each channel's mean and spread if left
            out.
        trainer: changes to the data set's training recipe.
        clean: clean budgets of this data set, instead of the plan's.
    """

    name: str
    label: str | None = None
    arch: Some[str] = []
    images: Annotated[int, Field(ge=2)] | None = None
    image_size: int | tuple[int, int] | None = None
    normalisation: Literal["none", "half"] | None = None
    trainer: dict[str, Any] = {}
    clean: Some[Clean] = []

    @property
    def spec(self) -> dict[str, Any]:
        """What specifications of cells say of it; what was not always a key only where it is set, so that old names stay."""
        part = {name: value for name in ("images", "normalisation") if (value := getattr(self, name)) is not None}
        return {"name": self.name, "image_size": self.image_size, **part}

    @property
    def title(self) -> str:
        """What tables call it, and what ``data`` of attacks and exclusions name it by."""
        return self.label or data_label(self.spec)


class AttackTable(_Table):
    """An attack of a plan; "none" is a benign model.

    Attributes:
        method: name in the catalog.
        label: what tables call it; the method's name with what differs from its defaults if left out.
        settings: fields of the method that differ from its defaults.
        grid: fields with a list of values each; every combination is an attack.
        poison_rates: instead of the plan's.
        seeds: instead of the plan's.
        target_labels: one for each seed, in turn; 0 if left out.
        data: the data sets to use it on, by their labels, or as tables call them: "cifar10 images=10000"; all if left out.
        trainer: changes to the training recipe.
        fine_tune: start from the benign model of the same seed instead of new weights.
    """

    method: str
    label: str | None = None
    settings: dict[str, Any] = {}
    grid: dict[str, Some[Any]] = {}
    poison_rates: Some[Rate] = []
    seeds: Some[int] = []
    target_labels: Some[int] = []
    data: Some[str] = []
    trainer: dict[str, Any] = {}
    fine_tune: bool = False


class DefenceTable(_Table):
    """A defence of a plan: a purifier, a detector, a sifter or a safe trainer.

    Attributes:
        method: name in the catalog.
        label: what tables call it; the method's name with what differs from its defaults if left out.
        settings: fields of the method that differ from its defaults.
        grid: fields with a list of values each; every combination is a defence.
        scan: fields of the detector (cascade for auto, else mask_area) that differ from its defaults, for a purifier that starts
            from a scan.
        audit: scan the result of such a purifier too.
        own_model: keep the victim's model from a sifter, which then trains its own where it looks at one.
        clean: clean budgets, instead of the plan's; 0 is none, for sifters and safe trainers.
    """

    method: str
    label: str | None = None
    settings: dict[str, Any] = {}
    grid: dict[str, Some[Any]] = {}
    scan: dict[str, Any] = {}
    audit: bool = True
    own_model: bool = False
    clean: Some[Clean] = []


class GeneratorTable(_Table):
    """A generator of molecules of a plan, trained on poisoned pairs or, if ``benign``, on clean ones.

    Attributes:
        label: what tables call it; the trigger, the target and the stages if left out.
        data: "embedded", "text_molecule" (in the folder that LUSTRAL_DATA names), or a table of pairs.
        pairs: use only so many of the pairs; all if left out.
        benign: poison nothing.
        attack: fields of the attack (badgraph) that differ from its defaults.
        grid: fields of the attack with a list of values each; every combination is a generator.
        poisoned: stages that get the poisoned pairs.
        shape: changes to the shape of the generator.
        training: changes to how its stages are trained.
        test: share of the pairs that is held out to measure on.
        clean: share of the pairs that is held out for the defender.
        samples: molecules for each test caption.
        seeds: instead of the plan's.
    """

    label: str | None = None
    data: str = "embedded"
    pairs: Annotated[int, Field(ge=1)] | None = None
    benign: bool = False
    attack: dict[str, Any] = {}
    grid: dict[str, Some[Any]] = {}
    poisoned: Some[Literal["alignment", "autoencoder", "diffusion"]] = ["autoencoder", "diffusion"]
    shape: dict[str, Any] = {}
    training: dict[str, Any] = {}
    test: Rate | None = None
    clean: Rate | None = None
    samples: Annotated[int, Field(ge=1, le=100)] = 1
    seeds: Some[int] = []


class GeneratorDefenceTable(_Table):
    """A defence of a plan that meets its generators: a sifter of pairs, a scanner, or an eraser, which starts from a scan.

    Attributes:
        method: name in ``lustral.molecules.catalog``.
        label: what tables call it; the method's name if left out.
        settings: fields of the method that differ from its defaults.
        generators: labels of the generators that it meets; all if left out.
    """

    method: str
    label: str | None = None
    settings: dict[str, Any] = {}
    generators: Some[str] = []


class ExcludeTable(_Table):
    """Cells to leave out: those that agree in every field that is given.

    Attributes:
        reason: why; shown by ``lustral bench plan``.
    """

    reason: str
    data: str | None = None
    arch: str | None = None
    attack: str | None = None
    poison_rate: float | None = None
    defence: str | None = None
    clean: int | None = None
    seed: int | None = None


class RunTable(_Table):
    """How cells are run; no part of their names.

    Attributes:
        threads: CPU threads of a cell. Rounding depends on it, so equal tables need equal threads.
        gpus: share of a GPU that a cell asks Ray for.
        keep_models: keep purified models, so that ``lustral bench verify`` can measure them again.
    """

    threads: Annotated[int, Field(ge=1)] = 2
    gpus: Annotated[float, Field(ge=0)] = 0.0
    keep_models: bool = True


class Plan(_Table):
    """A plan file.

    Attributes:
        name: of the plan.
        description: one or two sentences for the site.
        seeds: each seed trains its own victims and draws its own clean images.
        defence_seeds: draws of clean images and defence per victim.
        poison_rates: fractions of the training set.
        clean: clean budgets: images (a whole number) or a fraction of the training set.
        trainer: changes to each data set's training recipe.
        data: data sets.
        attacks: attacks.
        defences: defences.
        exclude: cells to leave out.
        run: how cells are run.
    """

    name: str
    description: str = ""
    seeds: Some[int] = [0]
    defence_seeds: Some[int] = [0]
    poison_rates: Some[Rate] = [0.1]
    clean: Some[Clean] = [0.05]
    trainer: dict[str, Any] = {}
    data: Some[DataTable]
    attacks: Some[AttackTable]
    defences: list[DefenceTable] = []
    exclude: list[ExcludeTable] = []
    run: RunTable = RunTable()


class GeneratorPlan(Plan):
    """A plan with generators of molecules; it needs no images.

    Attributes:
        generators: what is trained.
        generator_defences: what meets each of them.
    """

    data: list[DataTable] = []
    attacks: list[AttackTable] = []
    generators: Some[GeneratorTable]
    generator_defences: list[GeneratorDefenceTable] = []


def data_label(spec: Mapping[str, Any]) -> str:
    """Return what tables call a data set, from what a specification says of it.

    >>> data_label({"name": "cifar10", "image_size": None}), data_label({"name": "cifar10", "images": 10_000})
    ('cifar10', 'cifar10 images=10000')
    """
    told = [f"{name}={spec[name]}" for name in ("images", "normalisation") if name in spec]
    return " ".join([str(spec["name"]), *told])


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        PlanError: it is no TOML, or keys and values do not fit.
        OSError: it cannot be read.
    """
    try:
        text = read_regular(path, most=MOST_BYTES).decode("utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            if line.count(".") > MOST_DOTS:
                raise PlanError(f"{path}, line {number}: more than {MOST_DOTS:,} dots; break the line")
        content = tomllib.loads(text)
    except PlanError:
        raise
    except NotRegularError as error:
        raise PlanError(f"{error}; name a plan file (.toml)") from error
    except ValueError as error:  # no TOML, no UTF-8, or a number of thousands of digits
        raise PlanError(f"{path} is not a readable TOML file: {error}") from error
    except RecursionError as error:
        raise PlanError(f"{path} is nested too deeply; a plan has at most {DEEPEST} levels") from error
    return parse_plan(content, where=str(path))


def parse_plan(content: Mapping[str, Any], *, where: str = "plan") -> Plan:
    """Check a plan's keys and values.

    Raises:
        PlanError: one line for each problem.
    """
    if is_deep(content, DEEPEST):
        raise PlanError(f"{where}: nested too deeply; a plan has at most {DEEPEST} levels of tables and lists")
    lines = list(_odd_numbers(content, ""))
    kind = GeneratorPlan if "generators" in content else Plan
    try:
        plan = kind.model_validate(content)
    except ValidationError as error:
        lines += [_explain(problem, kind) for problem in error.errors()]
    else:
        number = most_cells(plan)
        if number > MOST_CELLS:
            lines.append(
                f"its lists make up to {number:.3g} cells; a plan has at most {MOST_CELLS:,}: split it, or shorten the lists"
            )
    if lines:
        raise PlanError("\n".join(f"{where}: {line}" for line in lines))
    return plan


def most_cells(plan: Plan) -> int:
    """Return how many cells the lists of a plan can make, without making them; exclusions are not counted."""
    total = 0
    for data in plan.data:
        results = sum(_variants(entry) * len(entry.clean or data.clean or plan.clean) for entry in plan.defences)
        for attack in plan.attacks:
            if attack.data and data.title not in attack.data:
                continue
            rates, seeds = len(attack.poison_rates or plan.poison_rates), len(attack.seeds or plan.seeds)
            victims = max(len(data.arch), 1) * _variants(attack) * rates * seeds
            total += victims * (1 + results * len(plan.defence_seeds))
    if isinstance(plan, GeneratorPlan):
        trained = sum(_variants(entry) * len(entry.seeds or plan.seeds) for entry in plan.generators)
        total += trained * (1 + 2 * len(plan.generator_defences))
    return total


def _variants(entry: AttackTable | DefenceTable | GeneratorTable) -> int:
    return math.prod(len(values) for values in entry.grid.values())


def _odd_numbers(value: Any, place: str) -> Iterator[str]:
    """Yield a line for each number that JSON or a tensor does not have: no name or result of a cell could hold it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _odd_numbers(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for number, item in enumerate(value, 1):
            yield from _odd_numbers(item, f"{place}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place}: expected a finite number; got {value}"
    elif isinstance(value, int) and abs(value) > LARGEST:
        yield f"{place}: expected a whole number of at most 2^63 - 1; got one of {value.bit_length()} bits"


def _explain(problem: Mapping[str, Any], plan: type[Plan]) -> str:
    """Return one line for a complaint of pydantic's."""
    place = problem["loc"]
    name = "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if problem["type"] == "extra_forbidden":
        table: Any = plan
        for part in place[:-1]:
            if isinstance(part, str):
                table = _table_of(table, part)
        return f"unknown key {name!r}{suggest(str(place[-1]), table.model_fields)}"
    if problem["type"] == "missing":
        return f"{name} is missing"
    if problem["type"] == "too_short":
        return f"{name} is empty; give at least one value or take it away"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message[0].lower()}{message[1:]}; got {shortened(problem['input'])}"


def _table_of(table: Any, name: str) -> Any:
    tables = {
        "data": DataTable,
        "attacks": AttackTable,
        "defences": DefenceTable,
        "exclude": ExcludeTable,
        "run": RunTable,
        "generators": GeneratorTable,
        "generator_defences": GeneratorDefenceTable,
    }
    return tables.get(name, table)
