"""From an attack and captioned molecules to a victim: split, poison, train, measure; and its folder on disk.

    FOLDER/generator/       the generator: all that a defence of a model gets, with clean.csv
    FOLDER/clean.csv        the defender's pairs, held out from training
    FOLDER/training.csv     what the generator was trained on: all that a sifter gets
    FOLDER/test.csv         the evaluator's pairs
    FOLDER/victim.json      the attack and what was measured: for the evaluator alone; written last

Errors::

    ValueError
    └── VictimError    a folder that is no victim's, or is damaged; the message says why
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from lustral.core.files import is_deep, read_regular, write_json_atomic, write_text_atomic
from lustral.core.limits import LARGEST_RECORD
from lustral.core.randomness import child
from lustral.core.records import OnProgress
from lustral.core.settings import SettingsError, build, describe, shortened
from lustral.molecules.badgraph import BadGraph
from lustral.molecules.evaluation import evaluate_generator
from lustral.molecules.records import MoleculeSet, PoisonedMolecules
from lustral.molecules.sources import MoleculeSource, open_pairs, split
from lustral.molecules.victim.files import load_generator, save_generator
from lustral.molecules.victim.generator import GeneratorSettings, MoleculeGenerator
from lustral.molecules.victim.training import GeneratorTraining, StageData, train_generator

SCHEMA = 1
GENERATOR_FOLDER, CLEAN_FILE, TRAINING_FILE, TEST_FILE = "generator", "clean.csv", "training.csv", "test.csv"
RECORD_FILE = "victim.json"
PAIR_COLUMNS = ("smiles", "caption")
STAGES = ("alignment", "autoencoder", "diffusion")
LEAST_TRAINING = 20  # pairs
Stage = Literal["alignment", "autoencoder", "diffusion"]


class VictimError(ValueError):
    """A folder is no victim's, or it is damaged."""


@dataclass(frozen=True, kw_only=True)
class Implanting:
    """How a victim is made.

    Attributes:
        pairs: use only so many pairs of the data, drawn at random; all if None.
        poisoned: stages that get the poisoned pairs; the others get the clean ones.
        test: share of the pairs that is held out to measure on.
        clean: share of the pairs that is held out for the defender.
        most_test: the most pairs of the first.
        most_clean: the most pairs of the second.
        samples: molecules for each test caption when the generator is measured.
        shape: of the generator.
        training: of its stages.
    """

    version: ClassVar[int] = 1

    pairs: int | None = None
    poisoned: tuple[Stage, ...] = ("autoencoder", "diffusion")
    test: float = 0.1
    clean: float = 0.1
    most_test: int = 500
    most_clean: int = 500
    samples: int = 1
    shape: GeneratorSettings = field(default_factory=GeneratorSettings)
    training: GeneratorTraining = field(default_factory=GeneratorTraining)

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (0 < self.test < 1 and 0 < self.clean < 1 and self.test + self.clean < 1):
            raise ValueError(f"expected test and clean in (0, 1), below 1 together; got {self.test} and {self.clean}")
        if min(self.most_test, self.most_clean, self.samples, self.pairs or 1) < 1:
            raise ValueError(
                "expected pairs, most_test, most_clean and samples of at least 1; got "
                f"{self.pairs}, {self.most_test}, {self.most_clean} and {self.samples}"
            )


@dataclass(frozen=True, kw_only=True)
class MoleculeVictim:
    """A generator with what its attacker and its evaluator know.

    Attributes:
        model: the generator.
        attack: None: nothing was poisoned.
        training: what the poisoned stages were trained on; the clean pairs where nothing was poisoned.
        clean: the defender's pairs.
        test: the evaluator's pairs.
        poisoned: how the pairs were poisoned; None where nothing was, and of a victim that was read from disk.
        measured: with the true trigger, as ``GeneratorEvaluation.to_dict`` gives it; None where it was not.
        provenance: everything needed to make it again, ready for JSON.
    """

    model: MoleculeGenerator
    attack: BadGraph | None
    training: MoleculeSet
    clean: MoleculeSet
    test: MoleculeSet
    poisoned: PoisonedMolecules | None = None
    measured: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def known(self) -> BadGraph:
        """The attack whose trigger measures the generator; for a clean one the default attack, as the control."""
        return BadGraph() if self.attack is None else self.attack


@dataclass(frozen=True, kw_only=True)
class DividedPairs:
    """Captioned molecules for the three sides.

    Attributes:
        train: the attacker's, clean as yet.
        clean: the defender's.
        test: the evaluator's.
        unfiltered: molecules before the victim's filter behind the first, which the raw poisoning rate counts.
    """

    train: MoleculeSet
    clean: MoleculeSet
    test: MoleculeSet
    unfiltered: int


def divide(source: MoleculeSource, how: Implanting, *, seed: int) -> DividedPairs:
    """Split by molecule, before anything is poisoned; equal seeds give equal parts.

    Raises:
        ValueError: there are too few pairs.
    """
    data = source.data
    if how.pairs is not None and how.pairs < len(data):
        _, data = split(data, how.pairs, seed=seed)
    test = min(max(round(how.test * len(data)), 1), how.most_test)
    clean = min(max(round(how.clean * len(data)), 1), how.most_clean)
    if len(data) - test - clean < LEAST_TRAINING:
        raise ValueError(
            f"expected at least {LEAST_TRAINING} pairs to train on beside {test} to test and {clean} for the defender; "
            f"{source.name} has {len(data)}"
        )
    rest, tested = split(data, test, seed=seed)
    train, defended = split(rest, clean, seed=seed + 1)
    return DividedPairs(train=train, clean=defended, test=tested, unfiltered=source.unfiltered_share(train))


def implant(
    attack: BadGraph | None,
    source: MoleculeSource,
    how: Implanting,
    *,
    seed: int,
    device: torch.device | None = None,
    frechet: bool = True,
    folder: Path | None = None,
    on_progress: OnProgress | None = None,
) -> MoleculeVictim:
    """Train a generator on poisoned pairs and measure it with the true trigger.

    Args:
        attack: None trains on clean pairs; the default attack's trigger then measures the control.
        source: captioned molecules.
        how: the settings.
        seed: every random draw derives from it.
        device: to train on; the CPU by default.
        frechet: whether to compute the Fréchet ChemNet distance.
        folder: keeps finished stages; a later call goes on after them.
        on_progress: called a few times a second.

    Raises:
        ValueError: too few pairs, a subgraph that fits none, or a rate that cannot be reached.
    """
    parts = divide(source, how, seed=seed)
    known = BadGraph() if attack is None else attack
    poisoned = None
    if attack is not None:
        poisoned = attack.poison(parts.train, generator=child(seed, "poison"), unfiltered=parts.unfiltered)
    sets = {stage: parts.train if poisoned is None or stage not in how.poisoned else poisoned.data for stage in STAGES}
    started = time.perf_counter()
    model = train_generator(
        StageData(**sets),
        how.shape,
        training=how.training,
        generator=child(seed, "train"),
        folder=folder,
        on_progress=on_progress,
        device=device,
    )
    seconds = time.perf_counter() - started
    measured = evaluate_generator(
        model,
        parts.test,
        known.trigger,
        known.target,
        generator=child(seed, "evaluation"),
        samples=how.samples,
        frechet=frechet,
        on_progress=on_progress,
    )
    return MoleculeVictim(
        model=model,
        attack=attack,
        poisoned=poisoned,
        training=parts.train if poisoned is None else poisoned.data,
        clean=parts.clean,
        test=parts.test,
        measured=measured.to_dict(),
        provenance={
            "data": source.name,
            "seed": seed,
            "settings": describe(how),
            "attack": None if attack is None else describe(attack),
            "training_pairs": len(sets["diffusion"]),
            "poisoned_pairs": 0 if poisoned is None else int(poisoned.is_poisoned.sum()),
            "raw_rate": 0.0 if poisoned is None else poisoned.raw_rate,
            "effective_rate": 0.0 if poisoned is None else poisoned.effective_rate,
            "not_attachable": 0 if poisoned is None else poisoned.skipped,
            "training_seconds": seconds,
        },
    )


def save_victim(folder: Path, victim: MoleculeVictim) -> None:
    """Write a victim's folder; its record is written last, so a folder with one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD_FILE).unlink(missing_ok=True)
    save_generator(victim.model, folder / GENERATOR_FOLDER)
    for name, data in ((CLEAN_FILE, victim.clean), (TRAINING_FILE, victim.training), (TEST_FILE, victim.test)):
        write_text_atomic(folder / name, pairs_text(data))
    record = {
        "schema": SCHEMA,
        "kind": "molecule victim",
        **victim.provenance,
        "attack": None if victim.attack is None else describe(victim.attack),
        "measured": victim.measured,
    }
    write_json_atomic(folder / RECORD_FILE, record)


def load_victim(folder: Path, *, device: torch.device | None = None) -> MoleculeVictim:
    """Open a victim's folder; nothing in it is run.

    Raises:
        VictimError: it is none, or its record is damaged.
        ValueError: its tables or its generator cannot be read.
    """
    file = folder / RECORD_FILE
    try:
        record = json.loads(read_regular(file, most=LARGEST_RECORD).decode("utf-8"))
    except FileNotFoundError as error:
        raise VictimError(
            f"{folder} holds no {RECORD_FILE}; expected a folder of `lustral molecules implant`"
        ) from error
    except (ValueError, RecursionError) as error:
        raise VictimError(f"{file} is not readable ({shortened(str(error))}); make the victim again") from error
    if not isinstance(record, dict) or record.get("kind") != "molecule victim" or record.get("schema") != SCHEMA:
        raise VictimError(f"{file}: expected the record of a molecule victim, schema {SCHEMA}; make the victim again")
    if is_deep(record, 8):
        raise VictimError(f"{file} is nested too deeply; make the victim again")
    attack = None
    try:
        if record.get("attack") is not None:
            attack = build(BadGraph, record["attack"])
    except SettingsError as error:
        raise VictimError(f"{file}: attack: {shortened(str(error), 300)}") from error
    measured = record.get("measured")
    return MoleculeVictim(
        model=load_generator(folder / GENERATOR_FOLDER, device=device),
        attack=attack,
        training=open_pairs(folder / TRAINING_FILE).data,
        clean=open_pairs(folder / CLEAN_FILE).data,
        test=open_pairs(folder / TEST_FILE).data,
        measured=measured if isinstance(measured, dict) else None,
        provenance={name: value for name, value in record.items() if name not in ("attack", "measured")},
    )


def pairs_text(data: MoleculeSet) -> str:
    r"""Return pairs as the text of a .csv table that ``open_pairs`` reads again, each text as it is.

    >>> pairs_text(MoleculeSet(smiles=("CCO",), captions=("an alcohol, small",)))
    'smiles,caption\nCCO,"an alcohol, small"\n'
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(PAIR_COLUMNS)
    writer.writerows(zip(data.smiles, data.captions, strict=True))
    return text.getvalue()
