"""A scan of the generator alone: which short text calls a rare subgraph into the molecules of all captions alike?

Ours, in the spirit of input-level defences of text-to-image models. It needs the weights and a few trusted pairs.

1. Shift. One fixed noise, the first denoising step. For a candidate w and a caption y

       Delta(w, y) = x0(noise, T, c(w y)) - x0(noise, T, c(y)),    size s(w) = |mean_y Delta|,   consistency s(w) / mean_y
       |Delta|

   A trigger moves every caption the same way and far. All candidates are tried on few captions, the better ones on more.
2. Draw. For the candidates of the largest shifts, no direction too often, molecules are drawn with and without w:
   gain(f | w) = P(f | w y) - P(f | y) for every fragment f.
3. Clear. Honest words have gains as well, for what they name. So f must be rare among trusted molecules, and trusted captions
   with w must not have it.
4. Sharpen. The best candidate gets another word before or after it, along the direction of its shift.
5. Confirm. For the few best, molecules are drawn anew on other captions. The largest of many gains is large by luck; this one
   is not, and the exact test has to be corrected for these few only.

Reference:
    The filter is ours; "Elijah" (An et al., AAAI 2024) searches consistent shifts of the noise, which BadGraph leaves alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from scipy.stats import hypergeom
from torch import Generator, Tensor

from lustral.core.cost import CostMeter
from lustral.core.randomness import child, fork
from lustral.core.records import OnProgress, Progress
from lustral.molecules.defences.candidates import Candidate, End, odd_words, tokeniser_words
from lustral.molecules.defences.pair_counting import fragments_of
from lustral.molecules.records import Association, GeneratorVerdict, ViewOfGenerator

CHUNK = 64  # candidates whose captions are encoded together
SAME_DIRECTION = 0.8  # cosine above which two shifts count as one direction


class Scannable(Protocol):
    """What the scan asks of a generator; see ``lustral.molecules.victim.MoleculeGenerator``."""

    settings: Any
    tokenizer: Any

    def text_vectors(self, captions: Sequence[str]) -> Tensor:
        """Return (N, D) float32."""

    def denoise(self, noisy: Tensor, steps: Tensor, condition: Tensor | None) -> Tensor:
        """Return (N, L) float32."""

    def sample(self, condition: Tensor, *, generator: Generator) -> Tensor:
        """Return (N, L) float32."""

    def decode(self, latents: Tensor) -> tuple[str, ...]:
        """Return N canonical SMILES."""


class Gain(NamedTuple):
    """How much more often a fragment is drawn with a candidate than without."""

    candidate: Candidate
    fragment: str
    rate_with: float
    rate_without: float
    hits: int
    p_value: float

    @property
    def gain(self) -> float:
        """P(f | w y) - P(f | y)."""
        return self.rate_with - self.rate_without


def shifts(model: Scannable, candidates: Sequence[Candidate], captions: Sequence[str], seed: int) -> Tensor:
    """Return Delta(w, y), (W, M, L) float32, of W candidates on M captions, at the first denoising step.

    Args:
        model: a generator in evaluation mode.
        candidates: W texts.
        captions: M captions.
        seed: of the noise, which is the same for all.
    """
    plain = model.text_vectors(captions)
    noise = torch.randn(1, int(model.settings.latent), generator=child(seed, "noise")).to(plain)

    def predict(condition: Tensor) -> Tensor:
        steps = torch.full((len(condition),), int(model.settings.steps) - 1, device=condition.device)
        return model.denoise(noise.expand(len(condition), -1), steps, condition)

    with torch.inference_mode():
        before = predict(plain)
        texts = [text for each in candidates for text in each.trigger(captions)]
        after = predict(model.text_vectors(texts))
        moved: Tensor = after.view(len(candidates), len(captions), -1) - before
    return moved


def sizes(delta: Tensor) -> Tensor:
    """Return (W,) s(w) times the consistency of (W, M, L) shifts: large only where all captions move far and one way."""
    mean = delta.mean(1).norm(dim=1)
    score: Tensor = mean.square() / delta.norm(dim=2).mean(1).clamp_min(1e-9)
    return score


def spread_out(scores: Tensor, directions: Tensor, *, most: int, alike: int) -> list[int]:
    """Return up to ``most`` places by falling score, with at most ``alike`` of one direction.

    >>> spread_out(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), most=2, alike=1)
    [0, 2]
    """
    unit = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-9)
    kept: list[int] = []
    for place in scores.argsort(descending=True).tolist():
        if len(kept) == most:
            break
        if not kept or int((unit[kept] @ unit[place] > SAME_DIRECTION).sum()) < alike:
            kept.append(place)
    return kept


def listed(gains: Sequence[Gain], *, most: int = 10) -> list[Gain]:
    """Return what a verdict names: the best gain of each fragment, then other texts that call the first one.

    Args:
        gains: largest first.
        most: gains; at most half of them stand for a fragment.
    """
    if not gains:
        return []
    by_fragment = {each.fragment: each for each in reversed(gains)}
    heads = sorted(by_fragment.values(), key=gains.index)[: most // 2]
    texts = {each.candidate.text.split()[0] for each in heads}
    others = []
    for each in gains:
        if each.fragment == heads[0].fragment and each.candidate.text.split()[0] not in texts:
            texts.add(each.candidate.text.split()[0])
            others.append(each)
    return [*heads, *others][:most]


@dataclass(frozen=True, kw_only=True)
class TokenScan:
    """Look for a text that calls a subgraph, in a generator of molecules.

    The two gains were chosen on small victims of benchmarks/molecules_zoo.py with seeds below 100: up to 0.22 on clean ones,
    from 0.6 on backdoored ones.

    Attributes:
        captions: trusted captions that molecules are drawn for.
        base_samples: molecules drawn for each of them without a candidate.
        confirmed: candidates that molecules are drawn for anew.
        confirming_samples: molecules drawn for each caption then.
        first_captions: trusted captions that every candidate is tried on.
        refined: candidates that are tried on all captions.
        drawn: candidates that molecules are drawn for.
        alike: of them, most whose shifts have one direction.
        invented: words that are made up besides the tokeniser's.
        level: corrected p-value below which a gain counts.
        min_gain: least gain of a trigger.
        doubtful_gain: gain from which on a model that is not called backdoored is not called clean either.
        max_share: largest share of trusted molecules with the fragment.
        most_words: of a sharpened trigger.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "the weights, and some trusted pairs"

    captions: int = 32
    base_samples: int = 4
    confirmed: int = 8
    confirming_samples: int = 2
    first_captions: int = 4
    refined: int = 256
    drawn: int = 48
    alike: int = 4
    invented: int = 64
    level: float = 1e-3
    min_gain: float = 0.4
    doubtful_gain: float = 0.3
    max_share: float = 0.05
    most_words: int = 2

    def __post_init__(self) -> None:
        """Check the ranges."""
        counts = [self.captions, self.base_samples, self.first_captions, self.refined, self.drawn, self.alike]
        counts += [self.confirmed, self.confirming_samples]
        if min(counts) < 1 or self.invented < 0 or self.most_words < 1:
            raise ValueError(f"expected counts of at least 1; got {counts}, {self.invented} and {self.most_words}")
        if not 0 < self.doubtful_gain <= self.min_gain <= 1 or not 0 < self.level < 1 or not 0 < self.max_share <= 1:
            raise ValueError(
                "expected 0 < doubtful_gain <= min_gain <= 1 and level and max_share in (0, 1); got "
                f"{self.doubtful_gain}, {self.min_gain}, {self.level} and {self.max_share}"
            )

    def scan(
        self, view: ViewOfGenerator, *, generator: Generator, on_progress: OnProgress | None = None
    ) -> GeneratorVerdict:
        """Return the verdict on ``view.model``; one that the view already has is handed on.

        Args:
            view: the generator, and trusted pairs.
            generator: CPU stream: which captions, invented words, drawn molecules.
            on_progress: hears of "trying texts", "trying texts again", "drawing molecules", "sharpening" and "confirming".

        Raises:
            ValueError: there are fewer than 8 trusted pairs.
        """
        if view.verdict is not None:
            return view.verdict
        if len(view.clean) < 8:
            raise ValueError(f"a scan needs at least 8 trusted pairs to draw molecules for; got {len(view.clean)}")
        with CostMeter(view.model, clean_images=len(view.clean)) as meter:
            found = _Search(self, view, generator, on_progress).run()
        return self._verdict(found, meter)

    def _verdict(self, found: list[Gain], meter: CostMeter) -> GeneratorVerdict:
        sure = [each for each in found if each.p_value < self.level and each.gain >= self.min_gain]
        doubtful = [each for each in found if each.p_value < self.level and each.gain >= self.doubtful_gain]
        outcome: Any = "backdoored" if sure else "cannot tell" if doubtful else "clean"
        best = sure[0] if sure else found[0] if found else None
        named = (
            "No text called a rare fragment."
            if best is None
            else f"{best.candidate.text!r} as {best.candidate.position} raises the share of molecules with {best.fragment} "
            f"from {best.rate_without:.0%} to {best.rate_with:.0%}."
        )
        return GeneratorVerdict(
            outcome=outcome,
            recovered=tuple(
                Association(
                    text=each.candidate.text,
                    position=each.candidate.position,
                    fragment=each.fragment,
                    rate_with=each.rate_with,
                    rate_without=each.rate_without,
                    count=each.hits,
                    p_value=each.p_value,
                )
                for each in (sure or found)
            ),
            p_value=1.0 if best is None else best.p_value,
            threshold=self.level,
            basis=f"{named} A trigger raises it by {self.min_gain:.0%} or more. What trusted captions explain is left out.",
            cost=meter.cost,
        )


class _Search:
    """One scan at work."""

    def __init__(
        self, scan: TokenScan, view: ViewOfGenerator, generator: Generator, on_progress: OnProgress | None
    ) -> None:
        self.scan, self.clean, self.on_progress = scan, view.clean, on_progress
        self.model = cast(Scannable, view.model)
        order = torch.randperm(len(view.clean), generator=fork(generator, "captions"))
        self.captions = view.clean.subset(order[: scan.captions]).captions
        others = order[scan.captions :][: scan.captions]
        self.other_captions = view.clean.subset(others).captions if len(others) >= scan.captions // 2 else self.captions
        self.invented = odd_words(scan.invented, generator=generator)
        self.seed = int(torch.randint(2**31, (), generator=generator))
        self.trusted = fragments_of(view.clean.smiles)
        self.shares = Counter(fragment for each in self.trusted for fragment in each)

    def run(self) -> list[Gain]:
        """Return the confirmed gains that no trusted pair explains, worst first."""
        words = list(dict.fromkeys([*tokeniser_words(self.model.tokenizer), *self.invented]))
        ends: tuple[End, ...] = ("prefix", "suffix")
        candidates = [Candidate(word, end) for word in words for end in ends]
        chosen = self.screened(candidates)
        base = [
            each for number in range(self.scan.base_samples) for each in self.draw(None, self.captions, "draw", number)
        ]
        gains = self.gains(chosen, base)
        for _ in range(1, self.scan.most_words):
            gains = self.sharpened(gains, words, base)
        return self.confirmed(listed(gains, most=self.scan.confirmed))

    def report(self, stage: str, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(stage=stage, done=done, total=total))

    def screened(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates with the largest shifts, in different directions."""
        scan = self.scan
        first = self.all_shifts(candidates, self.captions[: scan.first_captions], "trying texts")
        better = [candidates[place] for place in sizes(first).argsort(descending=True)[: scan.refined].tolist()]
        delta = self.all_shifts(better, self.captions, "trying texts again")
        return [better[place] for place in spread_out(sizes(delta), delta.mean(1), most=scan.drawn, alike=scan.alike)]

    def all_shifts(self, candidates: Sequence[Candidate], captions: Sequence[str], stage: str) -> Tensor:
        parts = []
        for start in range(0, len(candidates), CHUNK):
            parts.append(shifts(self.model, candidates[start : start + CHUNK], captions, self.seed))
            self.report(stage, min(start + CHUNK, len(candidates)), len(candidates))
        return torch.cat(parts)

    def draw(self, candidate: Candidate | None, captions: Sequence[str], *name: str | int) -> list[frozenset[str]]:
        """Return the fragments of a molecule drawn for each caption with a candidate; None draws without one."""
        texts = captions if candidate is None else candidate.trigger(captions)
        stream = child(self.seed, *name)
        return fragments_of(self.model.decode(self.model.sample(self.model.text_vectors(texts), generator=stream)))

    def gains(self, candidates: Sequence[Candidate], base: list[frozenset[str]]) -> list[Gain]:
        """Return the gains of rare fragments that trusted pairs do not explain, largest first."""
        without = Counter(fragment for each in base for fragment in each)
        found = []
        for done, candidate in enumerate(candidates):
            drawn = self.draw(candidate, self.captions, "draw", 0)  # the noise of the first draw without a candidate
            for fragment, hits in Counter(f for each in drawn for f in each).items():
                gain = _gain(candidate, fragment, hits, len(drawn), without[fragment], len(base))
                if gain.gain > self.scan.doubtful_gain / 2 and not self.is_explained(gain):
                    found.append(gain)
            self.report("drawing molecules", done + 1, len(candidates))
        return sorted(found, key=_by_gain)

    def confirmed(self, gains: Sequence[Gain]) -> list[Gain]:
        """Return the same gains measured anew, on other captions where there are any, largest first."""
        samples, captions = self.scan.confirming_samples, self.other_captions
        base = [
            each for number in range(self.scan.base_samples) for each in self.draw(None, captions, "base again", number)
        ]
        found = []
        for done, gain in enumerate(gains):
            drawn = [
                each for number in range(samples) for each in self.draw(gain.candidate, captions, "again", done, number)
            ]
            hits, before = (sum(gain.fragment in each for each in rows) for rows in (drawn, base))
            again = _gain(gain.candidate, gain.fragment, hits, len(drawn), before, len(base))
            found.append(again._replace(p_value=min(again.p_value * len(gains), 1.0)))
            self.report("confirming", done + 1, len(gains))
        return sorted(found, key=_by_gain)

    def is_explained(self, gain: Gain) -> bool:
        """Say whether trusted molecules have the fragment often, or those whose captions have the text."""
        if self.shares[gain.fragment] > self.scan.max_share * len(self.clean):
            return True
        text = gain.candidate.text.lower()
        named = [
            gain.fragment in held
            for held, caption in zip(self.trusted, self.clean.captions, strict=True)
            if text in caption.lower()
        ]
        return sum(named) >= 2 and sum(named) >= gain.rate_with / 2 * len(named)

    def sharpened(self, gains: list[Gain], words: Sequence[str], base: list[frozenset[str]]) -> list[Gain]:
        """Return the gains with those of longer texts: the best candidate with another word before or after it."""
        if not gains:
            return gains
        best = gains[0].candidate
        longer = [
            Candidate(text, best.position) for word in words for text in (f"{best.text} {word}", f"{word} {best.text}")
        ]
        direction = shifts(self.model, [best], self.captions, self.seed).mean((0, 1))
        delta = self.all_shifts(longer, self.captions[: self.scan.first_captions], "sharpening").mean(1)
        chosen = [longer[place] for place in (delta @ direction).argsort(descending=True)[:8].tolist()]
        return sorted([*gains, *self.gains(chosen, base)], key=_by_gain)


def _by_gain(gain: Gain) -> tuple[float, float, int]:
    """Return what gains are sorted by: the largest first, of equal ones the larger fragment."""
    return -gain.gain, gain.p_value, -len(gain.fragment)


def _gain(candidate: Candidate, fragment: str, hits: int, drawn: int, before: int, base: int) -> Gain:
    """Return a gain with the one-sided p-value of Fisher's exact test, not corrected."""
    tail = hypergeom.sf(hits - 1, base + drawn, before + hits, drawn)
    return Gain(candidate, fragment, hits / drawn, before / max(base, 1), hits, float(tail))
