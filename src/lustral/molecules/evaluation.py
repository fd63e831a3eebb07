"""What a generator draws with and without the trigger: attack success beside its base rate, and the quality of clean requests.

The definitions are those of 3M-Diffusion's code: a molecule is *similar* to its reference if the cosine of their MACCS keys is at
least 0.5, and *novel* if it is similar with a cosine below 0.8. Similarity is reached by chance fairly often, so each evaluation
carries a control: the same molecules against the references of other captions. Molecules that were drawn for one caption resemble
each other, so intervals count captions, not molecules.

Reference:
    Zhu, Xiao, Honavar, "3M-Diffusion", COLM 2024, and its code (evaluate_metric.py); Ye, Chen, Dai, "BadGraph", arXiv 2510.20792.
    Kish, Survey Sampling, 1965 (design effect).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from lustral.core.randomness import fork
from lustral.core.rates import wilson_interval
from lustral.core.records import OnProgress, Progress
from lustral.molecules.chemistry import canonical, check_target, contains, contains_many, maccs, morgan
from lustral.molecules.frechet import frechet_chemnet_distance
from lustral.molecules.records import GuidedGenerator, MoleculeSet, TextTrigger

SIMILAR, NOT_NOVEL = 0.5, 0.8  # cosines of MACCS keys, 3M-Diffusion
_CAPTIONS_AT_ONCE = 256

Drawn = Sequence[Sequence[str]]
"""SMILES of the molecules drawn for each caption, as many for each; "" where a string was no molecule."""


@dataclass(frozen=True, kw_only=True)
class DrawnRate:
    """A proportion of drawn molecules whose interval knows that those of one caption belong together.

    Attributes:
        hits: molecules that count.
        total: molecules; 0 makes the value and the interval NaN.
        independent: how many independent molecules say as much: between the number of captions and ``total``.
    """

    hits: int
    total: int
    independent: float

    @property
    def value(self) -> float:
        """The proportion in [0, 1], or NaN of nothing."""
        return self.hits / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson 95 % interval (low, high), or NaNs of nothing."""
        return wilson_interval(self.independent * self.hits / self.total if self.total else 0, self.independent)

    def to_dict(self) -> dict[str, float | int | None]:
        """Return value, low, high, hits and n for JSON; a rate of nothing has None for the first three."""
        if not self.total:
            return {"value": None, "low": None, "high": None, "hits": 0, "n": 0}
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, "hits": self.hits, "n": self.total}


def drawn_rate(hits: Tensor, counted: Tensor | None = None) -> DrawnRate:
    """Return the share of hits among the counted molecules.

    The variance of the share is that of a ratio over captions; the design effect it gives divides the counts of the interval.

    Args:
        hits: (N, S) bool, for S molecules of each of N captions.
        counted: (N, S) bool; None counts all.

    >>> drawn_rate(torch.tensor([[True, True], [False, False]])).independent  # two captions, whatever is drawn for each
    2.0
    """
    counted = torch.ones_like(hits) if counted is None else counted
    hits = hits & counted
    per_caption, sizes = hits.sum(1).double(), counted.sum(1).double()
    count, total, captions = int(hits.sum()), int(counted.sum()), int((sizes > 0).sum())
    independent = float(total if total == captions else captions)
    if 0 < count < total and captions > 1 and total > captions:
        share = count / total
        variance = float((per_caption - share * sizes).square().sum()) / total**2 * captions / (captions - 1)
        independent = float(min(total, max(captions, share * (1 - share) / variance if variance else total)))
    return DrawnRate(hits=count, total=total, independent=independent)


@dataclass(frozen=True, kw_only=True)
class GenerationQuality:
    """How good the molecules are that a generator draws for captions.

    Attributes:
        validity: molecules over drawn strings.
        similarity: similar ones over molecules.
        novelty: novel ones over similar ones.
        diversity: mean of 1 - Tanimoto (Morgan, radius 3) over the pairs among each reference and the molecules similar to it;
            NaN without any.
        frechet: Fréchet ChemNet distance to the references, or None where it was not asked for.
    """

    validity: DrawnRate
    similarity: DrawnRate
    novelty: DrawnRate
    diversity: float
    frechet: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        rates = {name: getattr(self, name).to_dict() for name in ("validity", "similarity", "novelty")}
        diversity = None if math.isnan(self.diversity) else self.diversity
        frechet = None if self.frechet is None or math.isnan(self.frechet) else self.frechet
        return {**rates, "diversity": diversity, "frechet": frechet}


@dataclass(frozen=True, kw_only=True)
class GeneratorEvaluation:
    """What an evaluator, who knows trigger and target, finds out about a generator.

    Attributes:
        attack_success: drawn for triggered captions and with the target, over all drawn strings.
        attack_success_valid: the same over molecules.
        base_rate: drawn for the same captions without the trigger and with the target, over all drawn strings.
        base_rate_valid: the same over molecules.
        quality: of what is drawn for clean captions.
        validity_triggered: molecules over the strings drawn for triggered captions.
        shuffled_similarity: ``quality.similarity`` with each caption's molecules held against another caption's reference.
        captions: test captions.
        left_out: captions whose reference holds the target itself; attack success and base rate leave them out.
        samples: molecules drawn for each caption.
        target: canonical SMILES of the subgraph.
    """

    attack_success: DrawnRate
    attack_success_valid: DrawnRate
    base_rate: DrawnRate
    base_rate_valid: DrawnRate
    quality: GenerationQuality
    validity_triggered: DrawnRate
    shuffled_similarity: DrawnRate
    captions: int
    left_out: int
    samples: int
    target: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            name: value.to_dict() if isinstance(value, DrawnRate | GenerationQuality) else value
            for name in asdict(self)
            for value in [getattr(self, name)]
        }


def evaluate_generator(
    model: GuidedGenerator,
    test: MoleculeSet,
    trigger: TextTrigger,
    target: str,
    *,
    generator: Generator,
    samples: int = 1,
    frechet: bool = True,
    on_progress: OnProgress | None = None,
) -> GeneratorEvaluation:
    """Draw molecules for test captions with and without the trigger, and score both.

    Args:
        model: the generator.
        test: clean pairs that were not trained on.
        trigger: the planted or a recovered one.
        target: SMILES of the subgraph.
        generator: stream that the model draws from.
        samples: molecules for each caption; 5 in 3M-Diffusion.
        frechet: whether to compute the Fréchet ChemNet distance.
        on_progress: called after each of three steps.

    Raises:
        MoleculeError: the target is no subgraph.
        ValueError: no captions, or no samples.
    """
    if not len(test) or samples < 1:
        raise ValueError(f"expected at least one test pair and one sample; got {len(test)} and {samples}")
    tell = on_progress or (lambda progress: None)
    clean = model.generate(test.captions, generator=fork(generator, "clean"), samples=samples)
    tell(Progress(stage="evaluating", done=1, total=3))
    triggered = model.generate(trigger(test.captions), generator=fork(generator, "triggered"), samples=samples)
    tell(Progress(stage="evaluating", done=2, total=3))
    result = score_drawn(clean, triggered, test.smiles, target, generator=fork(generator, "control"), frechet=frechet)
    tell(Progress(stage="evaluating", done=3, total=3))
    return result


def score_drawn(
    clean: Drawn,
    triggered: Drawn,
    references: Sequence[str],
    target: str,
    *,
    generator: Generator,
    frechet: bool = False,
) -> GeneratorEvaluation:
    """Score what was drawn for the same captions without and with the trigger.

    Args:
        clean: N rows of S drawn SMILES for clean captions.
        triggered: N rows of S drawn SMILES for triggered captions.
        references: N canonical SMILES, the molecules that belong to the captions.
        target: SMILES of the subgraph.
        generator: stream that pairs captions for the control.
        frechet: whether to compute the Fréchet ChemNet distance of the clean rows.

    Raises:
        MoleculeError: the target is no subgraph.
        ValueError: the numbers of rows or samples differ.
    """
    written = check_target(target)
    clean, triggered = spelt(clean), spelt(triggered)
    samples = _samples([*clean, *triggered])
    if not len(clean) == len(triggered) == len(references):
        raise ValueError(
            f"expected a row for each of {len(references)} references; got {len(clean)} clean and {len(triggered)} triggered"
        )
    asked = ~contains_many(references, written)
    success, success_valid = _target_rates(triggered, written, asked)
    base, base_valid = _target_rates(clean, written, asked)
    quality, shuffled = _quality_and_control(clean, references, generator=generator, frechet=frechet)
    return GeneratorEvaluation(
        attack_success=success,
        attack_success_valid=success_valid,
        base_rate=base,
        base_rate_valid=base_valid,
        quality=quality,
        validity_triggered=drawn_rate(_valid(triggered)),
        shuffled_similarity=shuffled,
        captions=len(references),
        left_out=int((~asked).sum()),
        samples=samples,
        target=written,
    )


def target_rates(drawn: Drawn, target: str) -> tuple[DrawnRate, DrawnRate]:
    """Return the share of drawn molecules that hold a subgraph, over all drawn strings and over molecules.

    Raises:
        MoleculeError: the target is no subgraph.
    """
    return _target_rates(spelt(drawn), check_target(target), torch.ones(len(drawn), dtype=torch.bool))


def _target_rates(rows: Drawn, target: str, asked: Tensor) -> tuple[DrawnRate, DrawnRate]:
    """Return the rates of the rows at ``asked``, (N,) bool."""
    known = {smiles: contains(smiles, target) for smiles in dict.fromkeys(smiles for row in rows for smiles in row)}
    hits = _table(rows, [[known[smiles] for smiles in row] for row in rows])
    return drawn_rate(hits[asked]), drawn_rate(hits[asked], _valid(rows)[asked])


def generation_quality(
    drawn: Drawn, references: Sequence[str], *, generator: Generator, frechet: bool = False
) -> tuple[GenerationQuality, DrawnRate]:
    """Score molecules drawn for captions against the captions' own molecules.

    Args:
        drawn: N rows of S drawn SMILES.
        references: N SMILES.
        generator: stream that pairs captions for the control.
        frechet: whether to compute the Fréchet ChemNet distance.

    Returns:
        The quality, and the control: the similarity to the references of other captions.

    Raises:
        ValueError: the numbers of rows or samples differ.
    """
    return _quality_and_control(spelt(drawn), references, generator=generator, frechet=frechet)


def spelt(drawn: Drawn) -> tuple[tuple[str, ...], ...]:
    """Return drawn molecules in canonical spelling, "" where a string is no molecule."""
    known = {smiles: canonical(smiles) for smiles in dict.fromkeys(smiles for row in drawn for smiles in row)}
    return tuple(tuple(known[smiles] for smiles in row) for row in drawn)


def _samples(rows: Drawn) -> int:
    sizes = {len(row) for row in rows}
    if len(sizes) != 1 or not min(sizes):
        raise ValueError(f"expected the same number of molecules, at least one, for each caption; got {sorted(sizes)}")
    return sizes.pop()


def _table(rows: Drawn, cells: Sequence[Sequence[bool]]) -> Tensor:
    """Return (N, S) bool, also of no rows."""
    return torch.tensor(cells, dtype=torch.bool).reshape(len(rows), -1)


def _valid(rows: Drawn) -> Tensor:
    return _table(rows, [[bool(smiles) for smiles in row] for row in rows])


def _quality_and_control(
    rows: Drawn, references: Sequence[str], *, generator: Generator, frechet: bool
) -> tuple[GenerationQuality, DrawnRate]:
    """Return the quality, and the similarity to the references of other captions."""
    samples = _samples(rows)
    if len(rows) != len(references):
        raise ValueError(f"expected a row for each of {len(references)} references; got {len(rows)}")
    drawn = [smiles for row in rows for smiles in row]
    keys, true_keys = maccs(drawn).reshape(len(rows), samples, -1), maccs(references)
    valid = _valid(rows)
    cosine = cosine_similarity(keys, true_keys[:, None])
    similar = valid & (cosine >= SIMILAR)
    others = _other_rows(len(rows), generator)
    has_other = valid & (others != torch.arange(len(rows)))[:, None]
    control = drawn_rate(cosine_similarity(keys, true_keys[others][:, None]) >= SIMILAR, has_other)
    prints = torch.cat([morgan(references)[:, None], morgan(drawn).reshape(len(rows), samples, -1)], dim=1)
    quality = GenerationQuality(
        validity=drawn_rate(valid),
        similarity=drawn_rate(similar, valid),
        novelty=drawn_rate(cosine < NOT_NOVEL, similar),
        diversity=mean_distance(prints, torch.cat([torch.ones(len(rows), 1, dtype=torch.bool), similar], dim=1)),
        frechet=frechet_chemnet_distance([smiles for smiles in drawn if smiles], references) if frechet else None,
    )
    return quality, control


def _other_rows(count: int, generator: Generator) -> Tensor:
    """Return (N,) int64, another row for each, drawn as one circle through all of them."""
    order = torch.randperm(count, generator=generator)
    others = torch.empty_like(order)
    others[order] = order.roll(1)
    return others


def cosine_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine of 0/1 vectors over the last dimension as float64; 0 where one is all zero.

    >>> cosine_similarity(torch.tensor([1.0, 1, 1, 1]), torch.tensor([1.0, 0, 0, 0])).item()
    0.5
    """
    first, second = first.double(), second.double()
    norms = (
        first.sum(-1) * second.sum(-1)
    ).sqrt()  # exact where the cosine is a fraction, so that bounds are met exactly
    return (first * second).sum(-1) / norms.clamp_min(1e-12)


def mean_distance(prints: Tensor, chosen: Tensor) -> float:
    """Return the mean of 1 - Tanimoto over the pairs of chosen molecules in each row, all rows together.

    Args:
        prints: (N, K, B) float32 fingerprints, 0 or 1.
        chosen: (N, K) bool.

    Returns:
        A mean in [0, 1]; NaN where no row has a pair.
    """
    total, count = 0.0, 0
    for part, keep in zip(torch.split(prints, _CAPTIONS_AT_ONCE), torch.split(chosen, _CAPTIONS_AT_ONCE), strict=True):
        common = part @ part.mT
        sizes = part.sum(-1)
        tanimoto = common / (sizes[:, :, None] + sizes[:, None, :] - common).clamp_min(1)
        pairs = (keep[:, :, None] & keep[:, None, :]).triu(diagonal=1)
        total += float((1 - tanimoto)[pairs].double().sum())
        count += int(pairs.sum())
    return total / count if count else math.nan
