"""What our own JSON holds: the one place that the published JSON Schemas are made from.

``result.json`` and ``--json`` of a command hold the same record. Its ``schema`` is the number of this description: it goes up
when something is renamed, removed or means something else, and stays when something is added. Readers ignore what they do not
know.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = 2  # of what is described here; ``vision.verdict_files`` writes and reads it

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Part(BaseModel):
    """A part of a record; the sentence under a field is its description in the schema."""

    model_config = ConfigDict(use_attribute_docstrings=True, title=None)


class Cost(Part):
    """What a method used."""

    seconds: float
    """Wall time."""
    image_passes: float
    """Images through the model; forward alone counts a third."""
    peak_memory_bytes: int
    """Peak memory of the device, in bytes."""
    clean_images: Count
    """Trusted images used."""


class Rate(Part):
    """A share of images, with its Wilson 95 % interval."""

    value: Share | None
    """The share; null of no images."""
    low: Share | None
    """Lower end of the interval."""
    high: Share | None
    """Upper end of the interval."""
    hits: Count
    """Images that count."""
    n: Count
    """Images looked at."""


class Figure(Part):
    """A figure that an answer rests on."""

    label: int | None
    """The class that it is about; null: the whole model."""
    measure: str
    """What was measured."""
    value: float | None
    """Null: infinite, or no number."""
    null: str
    """What it is compared with."""
    p_value: Share | None
    """How seldom chance alone gives such a value; null: not tested."""


class Trigger(Part):
    """A recovered trigger; its pixels are in triggers.safetensors."""

    target_label: Count
    """The class that it leads to."""
    area: float | None
    """Pixels of opacity that are needed."""
    attack_success_rate: Share | None
    """Share of held-out images of other classes that it sends there."""
    entropy: float | None
    """How much its samples differ, in pixels of full contrast."""
    num_samples: Count
    """Samples that were kept."""
    kind: Literal["patch", "faint"] = "patch"
    """Searched as the smallest mask, or as the faintest change of the whole image."""


class Verdict(Part):
    """The answer of a scan."""

    outcome: Literal["backdoored", "clean", "cannot tell"]
    """The answer."""
    suspect_labels: list[int]
    """Classes that a trigger leads to, the most suspicious first."""
    score: float | None
    """Higher is more suspicious."""
    threshold: float | None
    """Above it a model is called backdoored."""
    basis: str
    """What the score rests on, in a sentence or two."""
    evidence: list[Figure]
    """Every figure that was measured."""
    triggers: list[Trigger]
    """Recovered triggers."""
    cost: Cost
    """What the scan used."""
    clean_accuracy: Share | None
    """Of the model on the clean images; null: not measured."""
    notes: list[str]
    """What limits the answer."""


class ImportedName(Part):
    """A name that a pickle would import."""

    name: str
    """Module and attribute."""
    times: Count
    """How often it is asked for."""
    is_data: bool
    """Whether it builds data alone; false: it would run code."""


class ModelFile(Part):
    """What can be said of a file without opening it."""

    file: str
    """Its path."""
    format: Literal["safetensors", "torch archive", "torch before 1.6", "pickle", "tar archive", "unknown"]
    """How it is written, by its first bytes."""
    bytes: Count
    """Its size."""
    sha256: Digest
    """Of its content."""
    imports: list[ImportedName]
    """Names that its pickles would import."""


class FileSafety(Part):
    """What opening the files of a model would do."""

    runs_code: bool
    """Whether a pickle in them would run code."""
    files: list[ModelFile]
    """The files that hold weights."""


class Handover(Part):
    """What ties a written verdict to a model and to triggers.safetensors."""

    model: Digest
    """SHA-256 of the weights, whatever file they are in."""
    scan: Digest
    """SHA-256 of method, settings and seed."""
    image_shape: list[int]
    """Channels, height, width."""
    num_classes: Count
    """Of the model."""
    triggers: Digest | None
    """SHA-256 of triggers.safetensors; null: none was written."""


class Result(Part):
    """What every record has."""

    schema_: Annotated[Literal[2], Field(alias="schema")]  # ``SCHEMA``
    """Number of this description."""
    command: str
    """The command line."""


class Run(Result):
    """What every method's record has."""

    data: str
    """The images, as they were named."""
    clean_images: Count
    """How many trusted images there were."""
    arch: str
    """The network's architecture."""
    seed: int
    """Every random draw derives from it."""
    device: str
    """What it ran on."""
    method: str
    """Name of the method."""
    settings: dict[str, Any]
    """All settings of the method, defaults filled in."""
    versions: dict[str, str]
    """Of lustral, torch and python."""


class ModelRun(Run):
    """What scan and erase say of the given model."""

    model: str
    """Its path, as it was named."""
    weights: str
    """Which of the file's sets of weights was read; "." where it has one."""
    other_weights: list[str]
    """Sets of weights that were not looked at."""
    sha256: str
    """Of the file, or of each file of a folder, with blanks between."""
    classes: list[str] = []
    """Names of the classes, in the order of the logits."""
    image_shape: list[int] = []
    """Channels, height, width."""
    file_safety: FileSafety | None = None
    """What opening the given files would do."""


class Reference(Part):
    """What a scan said of one benign model."""

    name: str
    """Its file, or its number."""
    weights: Digest
    """SHA-256 of its weights."""
    statistic: float | None
    """Of its most suspicious class: minus the logarithm (base 10) of the least p-value."""
    outcome: Literal["backdoored", "clean", "cannot tell"]
    """The answer that it would have got."""
    accuracy: Share | None
    """On the clean images; null: not measured."""


class References(Part):
    """Benign models, scanned before the model itself; alone in references.json of --out."""

    models: list[Reference]
    """Each of them."""
    level: Share
    """False-alarm rate that the detector states."""
    threshold: float
    """Statistic that the model's must exceed, or the accusation is withdrawn."""
    least_p_value: Share
    """The smallest p-value that so many references allow."""
    how: dict[str, Any]
    """What their scans share with the model's."""
    digest: Digest
    """SHA-256 of the rest, as JSON with sorted keys and no blanks."""


class ScanResult(ModelRun):
    """What `lustral scan` found."""

    verdict: Verdict
    """The answer."""
    max_time: float | None = None
    """Seconds after which searching stopped; null: no limit."""
    references: References | None = None
    """What the model was compared with, fixed before it was scanned."""
    handover: Handover | None = None
    """Written with --out: what `lustral erase --verdict` checks."""


class Purified(Part):
    """How a model was erased."""

    history: list[dict[str, int | float | None]]
    """What was measured on the way: an epoch, round or cut, and figures by name."""
    selected: int | None
    """Which entry's weights were kept; null: the model is unchanged, or the method has one end."""
    cost: Cost
    """What it used."""
    verdict: Verdict | None
    """The scan that it started from."""
    audit: Verdict | None
    """The scan of the new model."""
    notes: list[str]
    """What the user should read."""


class Evaluation(Part):
    """A model measured with the attacker's true trigger."""

    acc: Rate
    """Clean accuracy."""
    asr: Rate
    """Attack success rate."""
    ra: Rate
    """Robust accuracy: triggered images that are recognised."""
    natural_rate: Rate
    """Images without trigger that get the attacker's label anyway."""
    per_class: list[Rate]
    """Clean accuracy of each class."""
    num_non_finite: Count
    """Images whose logits are no numbers."""
    non_finite: bool
    """Whether there are such."""
    probes: dict[str, Rate]
    """Further rates of an attack, by name."""


class Change(Part):
    """Two evaluations compared; null where one of them has no images."""

    der: float | None
    """Defence effectiveness."""
    rir: float | None
    """Robust improvement."""
    acc_loss: float | None
    """Accuracy lost."""
    asr_drop: float | None
    """Attack success lost."""
    ra_gain: float | None
    """Robust accuracy gained."""
    erased: bool | None
    """Whether the backdoor counts as erased."""


class Scanning(Part):
    """How an eraser that starts from a scan gets and makes scans."""

    verdict: str | None
    """The result.json that was taken over."""
    detector: dict[str, Any]
    """Settings of the detector."""
    audit: bool
    """Whether the new model was scanned."""
    max_time: float | None = None
    """Seconds after which each scan stopped searching; null: no limit."""


class BeforeAfter(Part):
    """A rate of the given and of the new model."""

    before: Rate
    """Of the given model."""
    after: Rate
    """Of the new model."""


class RecoveredRate(Part):
    """How often a recovered trigger works on clean images of other classes."""

    class_: Annotated[str, Field(alias="class")]
    """The class that it leads to."""
    before: Rate
    """Of the given model."""
    after: Rate
    """Of the new model."""


class WeightLine(Part):
    """The loss on the straight line from the given to the new weights."""

    images: Count
    """Clean images that it was measured on."""
    are_unseen: bool
    """Whether the eraser saw none of them."""
    has_true_trigger: bool
    """Whether the triggered ones carry the attacker's trigger; false: a recovered one, or there are none."""
    shares: Annotated[list[Share], Field(min_length=2, max_length=1000)]
    """Of the way, from 0 to 1."""
    clean: list[float | None]
    """Mean cross-entropy of the clean images, for each share; null: no number."""
    triggered: list[float | None]
    """Likewise of triggered images, by their true classes; empty: no trigger is known."""


class EraseResult(ModelRun):
    """What `lustral erase` did."""

    out: str
    """Folder of the results."""
    written: str
    """The new model."""
    accuracy: dict[str, BeforeAfter]
    """Clean accuracy on what a defender has."""
    purified: Purified
    """How the model came about."""
    written_safety: FileSafety | None = None
    """What opening the new files would do."""
    recovered: list[RecoveredRate] = []
    """What the triggers of the scan do to the given and the new model."""
    weight_line: WeightLine | None = None
    """The loss between the given and the new weights; null: there is no line between them."""
    scanning: Scanning | None = None
    """Of a method that starts from a scan."""
    untrusted: str | None = None
    """The training set that was handed over."""
    before: Evaluation | None = None
    """The given model, where the true trigger is known."""
    after: Evaluation | None = None
    """The new model, where the true trigger is known."""
    change: Change | None = None
    """The two evaluations compared."""


class SiftedPart(Part):
    """What one of several sifters said."""

    listed: Count
    """Images that it lists."""
    threshold: float | None
    """The score from which an image is listed; null: none is."""
    basis: str
    """What the scores measure, and where the line was drawn."""


class Sifted(SiftedPart):
    """What a sifter listed; the scores are in scores.csv."""

    files: list[str]
    """The listed images: files below ``folder``, or positions."""
    named_by: Literal["file", "position"] = "file"
    """What the entries of ``files`` are."""
    cost: Cost
    """What it used."""
    parts: dict[str, SiftedPart]
    """What each method said, where several were combined."""
    notes: list[str]
    """What the user should read."""


class Unreadable(Part):
    """A picture that was left out."""

    file: str
    """Which."""
    problem: str
    """Why."""


class CleanCopy(Part):
    """What was written of the rest."""

    folder: str
    """Where."""
    as_: Annotated[Literal["copies", "list"], Field(alias="as")]
    """In which form."""
    images: Count
    """How many."""


class SetRun(Run):
    """What sift and train say of the training set."""

    images: Count
    """How many."""
    classes: list[str]
    """Names of the classes, in the order of their numbers."""
    image_shape: list[int]
    """Channels, height, width."""
    clean: str | CleanCopy | None
    """The trusted images, as they were named; with --write-clean what was written of the rest."""
    flip: bool
    """Whether a mirrored image keeps its meaning."""
    expected_seconds: float | None
    """Said beforehand; null: short."""
    unreadable: list[Unreadable]
    """Pictures that were left out."""
    folder: str = ""
    """What names of files are relative to; empty where images are no files."""


class SiftResult(SetRun):
    """What `lustral sift` listed."""

    sifted: Sifted
    """The list."""


class TrainResult(SetRun):
    """What `lustral train` trained."""

    model: str
    """The model's file."""
    accuracy: Rate | None
    """On the test set; null: there is none."""
    history: list[dict[str, int | float | None]]
    """What each epoch measured."""
    cost: Cost
    """What it used."""
    notes: list[str]
    """What the user should read."""
    sifted: Sifted | None
    """What was found suspicious on the way."""


class EvaluateResult(Result):
    """What `lustral evaluate` measured."""

    data: str
    """The test set, as it was named."""
    before: Evaluation
    """The victim."""
    model: str | None = None
    """The model after a defence, where one was given."""
    weights: str | None = None
    """Which of its sets of weights was read."""
    after: Evaluation | None = None
    """The model after a defence."""
    change: Change | None = None
    """The two evaluations compared."""


class ImplantResult(Result):
    """What `lustral implant` trained: a victim, or a benign model."""

    out: str
    """Folder of the victim."""
    attack: str
    """Name of the attack; "none" of a benign model."""
    settings: dict[str, Any]
    """All settings of the attack, defaults filled in."""
    data: str
    """The training images, as they were named."""
    arch: str
    """The network's architecture."""
    trainer: dict[str, Any]
    """All settings of the training."""
    fine_tuned_from_clean: bool
    """Whether it started from a model that was given."""
    seed: int
    """Every random draw derives from it."""
    num_training_images: Count
    """Images it was trained on."""
    num_poisoned: Count
    """Of them, those with the trigger and the attacker's label."""
    num_cover: Count
    """Of them, those with the trigger and their own label."""
    image_shape: list[int]
    """Channels, height, width."""
    num_classes: Count
    """How many classes it knows."""
    class_names: list[str]
    """Their names, where the data have some."""
    versions: dict[str, str]
    """Of lustral, torch and python."""
    metrics: Evaluation
    """The new model, measured with the true trigger."""


class ReportResult(Result):
    """What `lustral report` wrote."""

    page: str
    """The page."""
    missing: list[str]
    """What the record does not hold, so that the page cannot show it."""


RESULTS: dict[str, type[Result]] = {
    "implant": ImplantResult,
    "scan": ScanResult,
    "erase": EraseResult,
    "sift": SiftResult,
    "train": TrainResult,
    "evaluate": EvaluateResult,
    "report": ReportResult,
}
