"""A scan with everything around the detector, alike for every caller: its time limit, and benign models to compare with.

A detector's p-value rests on its null. Benign reference models replace that assumption by a weaker one: where nobody has
tampered with the model, its statistic (``Verdict.score``, of the most suspicious label) is drawn as those of N references are.
Then every rank among the N + 1 is equally likely, and

    p = (1 + number of references whose statistic is at least as large) / (N + 1)

is a p-value (Davison, Hinkley, "Bootstrap Methods and their Application", 1997, section 4.2.3). The least possible one is
1 / (N + 1): 99 references are needed for 1 %.

**The rule.** References only withdraw accusations. A model that the detector calls backdoored stays so if p is at most
max(level, 1 / (N + 1)), with the detector's own level; else the answer is "cannot tell". Every other answer stays as it is.

**Its false-alarm rate.** At most the detector's own, where the detector's null holds. At most max(level, 1 / (N + 1)), where the
references are like the model, whatever the null is worth. With few references the second bound is weak (5 % with 19), and the
basis says so; with 99 or more both are the level. A backdoored model among the references costs detections, not false alarms.

What is compared with, the threshold included, is fixed before the model is scanned, and named by a digest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Generator

from lustral.core.cost import Deadline
from lustral.core.digests import weights_digest
from lustral.core.files import canonical, json_ready
from lustral.core.records import Evidence, OnProgress, Progress
from lustral.vision.interfaces import Detector
from lustral.vision.measures import REFERENCE_RANK
from lustral.vision.records import Answer, DefenderView, Verdict

REFERENCE_NULL = "the model's statistic is drawn as those of the benign reference models"
LEVEL = 0.01  # of a detector that states none
FAR_BELOW = 0.1  # accuracy of references below the model's, from which it is said that they are little alike
SLACK = 1e-9  # for products of the level that are whole numbers


def takes_deadline(detector: Detector | type) -> bool:
    """Say whether a detector, or its class, ends at a deadline."""
    return bool(getattr(detector, "takes_deadline", False))


def inspect_within(
    detector: Detector,
    view: DefenderView,
    *,
    max_time: float | None,
    generator: Generator,
    on_progress: OnProgress | None = None,
    clock: Callable[[], float] | None = None,
) -> Verdict:
    """Scan a model, in so many seconds; None: without a limit, and then every detector will do.

    Raises:
        ValueError: the limit is no positive number, or the detector cannot keep one.
    """
    if max_time is None:
        return detector.inspect(view, generator=generator, on_progress=on_progress)
    require_deadline(detector, max_time)
    deadline = Deadline.after(max_time) if clock is None else Deadline.after(max_time, clock)
    more: dict[str, Any] = {"deadline": deadline}
    return detector.inspect(view, generator=generator, on_progress=on_progress, **more)


def require_deadline(detector: Detector, max_time: float | None) -> None:
    """Raise ``ValueError`` where a time limit is no positive number, or the detector cannot keep it."""
    if max_time is None:
        return
    if not 0 < max_time < math.inf:
        raise ValueError(f"expected a time limit in seconds, above 0; got {max_time}")
    if not takes_deadline(detector):
        raise ValueError(f"{type(detector).__name__} keeps no time limit: leave max_time out, or scan by cascade")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a scan says of one benign model.

    Attributes:
        name: what it is called: its file, or "trained 1".
        weights: SHA-256 of its weights.
        statistic: of its most suspicious label, as ``Verdict.score``.
        outcome: of its scan.
        accuracy: on the clean images, as a fraction; None where the detector does not measure it.
    """

    name: str
    weights: str
    statistic: float
    outcome: Answer
    accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class References:
    """Benign models that were scanned as the suspect will be.

    Attributes:
        models: what their scans say, at least one.
        level: false-alarm rate that the detector states.
        how: how they were scanned: method, settings, seed and the like, JSON-ready.
    """

    models: tuple[Reference, ...]
    level: float
    how: Mapping[str, Any]

    @property
    def least_p_value(self) -> float:
        """The smallest p-value that so many references allow."""
        return 1 / (len(self.models) + 1)

    @property
    def limit(self) -> float:
        """The p-value up to which an accusation stands."""
        return max(self.level, self.least_p_value)

    @property
    def threshold(self) -> float:
        """The statistic that a model's must exceed for an accusation to stand."""
        ordered = sorted((each.statistic for each in self.models), reverse=True)
        return ordered[max(math.floor(self.limit * (len(ordered) + 1) + SLACK) - 1, 0)]

    def p_value(self, statistic: float) -> float:
        """Return the rank p-value of a statistic; see ``rank_p_value``."""
        return rank_p_value(statistic, [each.statistic for each in self.models])

    @property
    def digest(self) -> str:
        """SHA-256 of the record, without this."""
        return hashlib.sha256(canonical(json_ready(self._content()))).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return everything that the comparison rests on, with its digest, ready for JSON."""
        return {**self._content(), "digest": self.digest}

    def _content(self) -> dict[str, Any]:
        return {
            "models": [asdict(each) for each in self.models],
            "level": self.level,
            "threshold": self.threshold,
            "least_p_value": self.least_p_value,
            "how": dict(self.how),
        }


def rank_p_value(statistic: float, references: Sequence[float]) -> float:
    """Return (1 + references at least as large) / (N + 1), the p-value of a rank among N references.

    >>> rank_p_value(3.0, [1.0, 2.0, 2.5]), rank_p_value(2.0, [1.0, 2.0, 2.5]), rank_p_value(2.0, [])
    (0.25, 0.75, 1.0)
    """
    return (1 + sum(each >= statistic for each in references)) / (len(references) + 1)


def scan_references(
    detector: Detector,
    views: Iterable[tuple[str, DefenderView]],
    count: int,
    *,
    suspect: str,
    stream: Callable[[], Generator],
    how: Mapping[str, Any],
    max_time: float | None = None,
    on_progress: OnProgress | None = None,
) -> References:
    """Scan benign models exactly as the suspect will be scanned: same images, settings and random draws.

    Args:
        detector: of the suspect.
        views: name and view of each, opened one after the other, so that one is in memory at a time.
        count: how many there are, for the progress.
        suspect: digest of the suspect's weights, which is no reference.
        stream: returns the stream of a scan from its start.
        how: how the scans are made, JSON-ready.
        max_time: of each scan, seconds; None: no limit.
        on_progress: called before each scan and at the end.

    Raises:
        ValueError: there are none, one does not do its task on the clean images, or one is there twice or is the suspect.
    """
    found: list[Reference] = []
    for name, view in views:
        if on_progress is not None:
            on_progress(Progress(stage="scanning benign references", done=len(found), total=count))
        digest = weights_digest(view.model)
        if digest == suspect:
            raise ValueError(
                f"reference {name}: it is the model to be scanned, by the digest of its weights: take it out"
            )
        if same := next((each.name for each in found if each.weights == digest), None):
            raise ValueError(f"reference {name}: it has the weights of {same}, which would count twice: take one out")
        verdict = inspect_within(detector, view, max_time=max_time, generator=stream())
        if not verdict.evidence:
            raise ValueError(f"reference {name}: nothing can be measured of it. {verdict.basis}")
        found.append(
            Reference(
                name=name,
                weights=digest,
                statistic=verdict.score,
                outcome=verdict.outcome,
                accuracy=verdict.clean_accuracy,
            )
        )
    if not found:
        raise ValueError("expected at least one benign reference model; got none")
    if on_progress is not None:
        on_progress(Progress(stage="scanning benign references", done=len(found), total=count))
    return References(models=tuple(found), level=float(getattr(detector, "false_alarm_rate", LEVEL)), how=how)


def against_references(verdict: Verdict, references: References) -> Verdict:
    """Return a verdict with the rank p-value, its accusation withdrawn where the references do not bear it out."""
    if not verdict.evidence:
        return verdict
    p, number = references.p_value(verdict.score), len(references.models)
    stands = p <= references.limit + SLACK
    basis = (
        f"Against {number} benign reference models p = {p:.2g}, the share of models with so large a statistic, this one among "
        f"them; fixed before the scan, SHA-256 {references.digest[:12]}. {coverage_sentence(references)}"
    )
    outcome = verdict.outcome
    if outcome == "backdoored":
        if stands:
            basis += " References only withdraw accusations, and this one stands."
        else:
            outcome = "cannot tell"
            basis += " A benign model has as large a statistic: the accusation is withdrawn."
    return replace(
        verdict,
        outcome=outcome,
        threshold=max(verdict.threshold, references.threshold),
        basis=f"{basis} The scan itself: {verdict.basis}",
        evidence=(
            *verdict.evidence,
            Evidence(label=None, measure=REFERENCE_RANK, value=verdict.score, null=REFERENCE_NULL, p_value=p),
        ),
        notes=(*verdict.notes, *doubts(references, verdict)),
    )


def coverage_sentence(references: References) -> str:
    """Say what so many references bear out."""
    number = len(references.models)
    if references.least_p_value <= references.level + SLACK:
        return f"They bear out {100 * references.level:.2g} % false alarms without the scan's own null."
    needed = math.ceil(1 / references.level - SLACK) - 1
    return (
        f"The smallest p that {number} allow is {references.least_p_value:.2g}; {references.level:.2g} needs {needed}. "
        "Below that the scan's own null is trusted."
    )


def doubts(references: References, verdict: Verdict) -> tuple[str, ...]:
    """Return what limits the worth of the references."""
    accused = [each.name for each in references.models if each.outcome == "backdoored"]
    notes = []
    if accused:
        notes.append(
            f"The scan accuses {len(accused)} of the references ({', '.join(accused[:5])}): if they are not benign, take them "
            "out."
        )
    known = [each.accuracy for each in references.models if each.accuracy is not None]
    own = verdict.clean_accuracy
    if known and own is not None and (mean := sum(known) / len(known)) < own - FAR_BELOW:
        notes.append(
            f"The references are right on {100 * mean:.0f} % of the clean images, this model on {100 * own:.0f} %: they are "
            "little alike, and p is worth less."
        )
    return tuple(notes)
