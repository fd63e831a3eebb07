"""What the JSON of ``lustral molecules`` holds; ``records`` says how such descriptions are kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lustral.exchange.records import Cost, Count, Part, Rate, Share

MOLECULE_SCHEMA = 1  # of what is described here; ``molecules.verdict_files`` writes and reads it


class Association(Part):
    """A piece of text and a subgraph that go together more than chance explains."""

    text: str
    """The piece of text, in lower case."""
    position: Literal["prefix", "infix", "suffix", "anywhere"]
    """Where in a caption it stands."""
    fragment: str
    """SMILES of the subgraph."""
    rate_with: Share
    """Share of molecules with the subgraph, among captions with the text."""
    rate_without: Share
    """The same among captions without it."""
    count: Count
    """Pairs with both; of a scan, molecules."""
    p_value: Share
    """One-sided, corrected for everything that was tried."""


class GeneratorVerdict(Part):
    """The answer of a scan."""

    outcome: Literal["backdoored", "clean", "cannot tell"]
    """The answer."""
    recovered: list[Association]
    """Triggers with the subgraphs that they call, worst first."""
    p_value: Share
    """Of the worst of them."""
    threshold: Share
    """Below it a generator is called backdoored."""
    basis: str
    """What the answer rests on, in a sentence or two."""
    cost: Cost
    """What the scan used."""
    notes: list[str]
    """What limits the answer."""


class SiftedPairs(Part):
    """What a sifter listed."""

    listed: list[Count]
    """Rows of the listed pairs, from 0."""
    pairs: Count
    """How many were looked at."""
    associations: list[Association]
    """The suspicious ones, worst first."""
    basis: str
    """What was measured, against what."""
    cost: Cost
    """What it used."""
    notes: list[str]
    """What the user should read."""


class Quality(Part):
    """What molecules are like that were drawn for clean captions."""

    validity: Rate
    """Molecules over drawn strings."""
    similarity: Rate
    """Like the caption's own molecule."""
    novelty: Rate
    """Not in the training set, of those."""
    diversity: float | None
    """Mean distance of the molecules of a caption; null of fewer than two."""
    frechet: float | None
    """Fréchet ChemNet distance; null: not asked for."""


class GeneratorMeasured(Part):
    """A generator measured with the attacker's true trigger and target."""

    attack_success: Rate
    """Drawn for triggered captions and with the target, over drawn strings."""
    attack_success_valid: Rate
    """The same over molecules."""
    base_rate: Rate
    """The same captions without the trigger, over drawn strings."""
    base_rate_valid: Rate
    """The same over molecules."""
    quality: Quality
    """Of what is drawn for clean captions."""
    validity_triggered: Rate
    """Molecules over strings that were drawn for triggered captions."""
    shuffled_similarity: Rate
    """Similarity to another caption's molecule: the control."""
    captions: Count
    """Test captions."""
    left_out: Count
    """Captions whose own molecule holds the target."""
    samples: Count
    """Molecules for each caption."""
    target: str
    """SMILES of the target."""


class MoleculeResult(Part):
    """What every record has."""

    schema_: Annotated[Literal[1], Field(alias="schema")]  # ``MOLECULE_SCHEMA``
    """Number of this description."""


class MoleculeRun(MoleculeResult):
    """What the record of every command has that uses random draws."""

    command: str
    """The command line."""
    seed: int
    """Every random draw derives from it."""
    versions: dict[str, str]
    """Of lustral, torch and python."""


class MethodRun(MoleculeRun):
    """What every method's record has."""

    method: str
    """Name of the method."""
    settings: dict[str, Any]
    """All settings of the method, defaults filled in."""
    clean: str | None
    """The trusted pairs, as they were named."""
    skipped: dict[str, Count]
    """Rows that were left out, by reason."""


class CleanPairs(Part):
    """The pairs that are not listed."""

    file: str
    """Where."""
    pairs: Count
    """How many."""


class MoleculeSiftResult(MethodRun):
    """What `lustral molecules sift` listed."""

    data: str
    """The pairs, as they were named."""
    rows: Count
    """How many rows the file has."""
    sifted: SiftedPairs
    """The list."""
    written: CleanPairs | None = None
    """With --write-clean."""


class GeneratorRun(MethodRun):
    """What scan and erase say of the given generator."""

    model: str
    """Its folder."""
    clean_pairs: Count
    """How many trusted pairs there were."""


class MoleculeScanResult(GeneratorRun):
    """What `lustral molecules scan` found."""

    model_digest: str
    """SHA-256 of the weights; `erase --verdict` checks it."""
    verdict: GeneratorVerdict
    """The answer."""


class Erased(Part):
    """How a generator was erased, and what became of the recovered triggers."""

    history: list[dict[str, Any]]
    """What was measured on the way."""
    cost: Cost
    """What it used."""
    notes: list[str]
    """What the user should read."""
    recovered: list[Association]
    """Triggers that were drawn with."""
    before: list[Rate]
    """Of each, molecules with its subgraph by the given generator."""
    after: list[Rate]
    """The same by the new one."""


class MoleculeEraseResult(GeneratorRun):
    """What `lustral molecules erase` did."""

    verdict_from: str | None
    """The result.json that was taken over."""
    generator: str
    """Folder of the new generator."""
    verdict: GeneratorVerdict | None
    """The scan that it started from."""
    erased: Erased
    """How it came about."""


class Drawn(Part):
    """Molecules for a caption."""

    caption: str
    """The text."""
    smiles: list[str]
    """One for each sample; empty: no molecule came out."""


class MoleculeGenerateResult(MoleculeRun):
    """What `lustral molecules generate` drew."""

    model: str
    """Folder of the generator."""
    molecules: list[Drawn]
    """In the order of the captions."""


class MoleculeEvaluateResult(MoleculeRun):
    """What `lustral molecules evaluate` measured."""

    victim: str
    """Its folder."""
    model: str | None
    """A generator after a defence."""
    samples: Count
    """Molecules for each caption."""
    trigger: dict[str, Any]
    """The attacker's."""
    target: str
    """SMILES of the attacker's subgraph."""
    measured: dict[str, GeneratorMeasured]
    """By what was measured: "before" and "after", or "this generator"."""


class Provenance(Part):
    """How a victim came about."""

    data: str
    """Its pairs, as they were named."""
    seed: int
    """Every random draw derives from it."""
    settings: dict[str, Any]
    """All settings, defaults filled in."""
    attack: dict[str, Any] | None
    """Settings of the attack; null: none."""
    training_pairs: Count
    """How many it was trained on."""
    poisoned_pairs: Count
    """Of these."""
    raw_rate: Share
    """Poisoned pairs over all, before the size filter."""
    effective_rate: Share
    """Poisoned pairs over those that are trained on."""
    not_attachable: Count
    """Pairs that were chosen and could not take the subgraph."""
    training_seconds: float
    """Wall time."""


class MoleculeImplantResult(MoleculeResult, Provenance):
    """What `lustral molecules implant` made."""

    command: str
    """The command line."""
    versions: dict[str, str]
    """Of lustral, torch and python."""
    out: str
    """Its folder."""
    measured: GeneratorMeasured | None
    """With the true trigger."""


class MoleculeDemoResult(MoleculeRun):
    """What happened in `lustral molecules demo`."""

    seconds: float
    """Wall time."""
    victim: Provenance
    """How it came about."""
    before: GeneratorMeasured | None
    """The victim."""
    sifted: SiftedPairs
    """Of its training set."""
    verdict: GeneratorVerdict
    """Of the victim."""
    after: GeneratorMeasured
    """The erased generator."""


MOLECULE_RESULTS: dict[str, type[MoleculeResult]] = {
    "implant": MoleculeImplantResult,
    "generate": MoleculeGenerateResult,
    "scan": MoleculeScanResult,
    "sift": MoleculeSiftResult,
    "erase": MoleculeEraseResult,
    "evaluate": MoleculeEvaluateResult,
    "demo": MoleculeDemoResult,
}
