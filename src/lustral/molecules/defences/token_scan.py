"""A scan of the generator alone: which short text calls a rare subgraph into the molecules of all captions alike?

Ours, in the spirit of input-level defences of text-to-image models. It needs the weights and a few trusted pairs.

1. Shift. One fixed noise, the first denoising step. For a candidate w and a caption y

       Delta(w, y) = x0(noise, T, c(w y)) - x0(noise, T, c(y)),    size s(w) = |mean_y Delta|,   consistency s(w) / mean_y |Delta|

   A trigger moves every caption the same way and far. All candidates are tried on few captions, the better ones on more.
2. Draw. For the candidates of the largest shifts, no direction too often, molecules are drawn with and without w:
   gain(f | w) = P(f | w y) - P(f | y) for every fragment f.
3. Judge. A gain counts if the exact test says so after correction for all candidates and fragments. Honest words have gains as
   well, for what they name. So f must be rare among trusted molecules, and trusted captions with w must not have it.
4. Sharpen. Further words are added to the best candidates while they raise the gain.

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


@dataclass(frozen=True, kw_only=True)
class TokenScan:
    """Look for a text that calls a subgraph, in a generator of molecules.

    Attributes:
        captions: trusted captions that molecules are drawn for.
        base_samples: molecules drawn for each of them without a candidate.
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
    first_captions: int = 4
    refined: int = 256
    drawn: int = 48
    alike: int = 4
    invented: int = 64
    level: float = 1e-3
    min_gain: float = 0.3
    doubtful_gain: float = 0.2
    max_share: float = 0.05
    most_words: int = 2

    def __post_init__(self) -> None:
        """Check the ranges."""
        counts = (self.captions, self.base_samples, self.first_captions, self.refined, self.drawn, self.alike)
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
            on_progress: hears of "trying texts", "drawing molecules" and "sharpening".

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
            else f"{best.candidate.text!r} as {best.candidate.position} raises the share of molecules with {best.fragment} from "
            f"{best.rate_without:.0%} to {best.rate_with:.0%}."
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
                for each in (sure or found)[:10]
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
        order = torch.randperm(len(view.clean), generator=fork(generator, "captions"))[: scan.captions]
        self.captions = view.clean.subset(order).captions
        self.invented = odd_words(scan.invented, generator=generator)
        self.seed = int(torch.randint(2**31, (), generator=generator))
        self.trusted = fragments_of(view.clean.smiles)
        self.shares = Counter(fragment for each in self.trusted for fragment in each)
        self.tried = 0

    def run(self) -> list[Gain]:
        """Return the gains that no trusted pair explains, worst first."""
        words = list(dict.fromkeys([*tokeniser_words(self.model.tokenizer), *self.invented]))
        ends: tuple[End, ...] = ("prefix", "suffix")
        candidates = [Candidate(word, end) for word in words for end in ends]
        chosen = self.screened(candidates)
        base = self.drawn_fragments([None] * self.scan.base_samples)
        gains = self.gains(chosen, base)
        for _ in range(1, self.scan.most_words):
            gains = self.sharpened(gains, words, base)
        return gains

    def report(self, stage: str, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(stage=stage, done=done, total=total))

    def screened(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates with the largest shifts, in different directions."""
        scan = self.scan
        self.tried += len(candidates)
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

    def drawn_fragments(self, candidates: Sequence[Candidate | None]) -> list[list[frozenset[str]]]:
        """Return the fragments of the molecules drawn for all captions, for each candidate; None draws without one."""
        found = []
        for done, each in enumerate(candidates):
            texts = self.captions if each is None else each.trigger(self.captions)
            stream = child(
                self.seed, "draw", done if each is None else 0
            )  # with a candidate: the noise of the first draw without
            drawn = self.model.decode(self.model.sample(self.model.text_vectors(texts), generator=stream))
            found.append(fragments_of(drawn))
            self.report("drawing molecules", done + 1, len(candidates))
        return found

    def gains(self, candidates: Sequence[Candidate], base: list[list[frozenset[str]]]) -> list[Gain]:
        """Return the gains of rare fragments that trusted pairs do not explain, largest first."""
        without = Counter(fragment for row in base for each in row for fragment in each)
        drawn, total = self.drawn_fragments(candidates), sum(map(len, base))
        tested = self.tried * max(len({f for rows in drawn for each in rows for f in each}), 1)
        found = []
        for candidate, rows in zip(candidates, drawn, strict=True):
            for fragment, count in Counter(f for each in rows for f in each).items():
                rate, before = count / len(rows), without[fragment] / total
                if rate - before < self.scan.doubtful_gain / 2 or self.is_explained(candidate, fragment, rate):
                    continue
                hits = without[fragment] + count
                p_value = float(hypergeom.sf(count - 1, total + len(rows), hits, len(rows))) * tested
                found.append(Gain(candidate, fragment, rate, before, count, min(p_value, 1.0)))
        return sorted(found, key=lambda each: (-each.gain, each.p_value, -len(each.fragment)))

    def is_explained(self, candidate: Candidate, fragment: str, rate: float) -> bool:
        """Say whether trusted molecules have the fragment often, or those whose captions have the text."""
        if self.shares[fragment] > self.scan.max_share * len(self.clean):
            return True
        named = [
            fragment in held
            for held, caption in zip(self.trusted, self.clean.captions, strict=True)
            if candidate.text.lower() in caption.lower()
        ]
        return sum(named) >= 2 and sum(named) >= rate / 2 * len(named)

    def sharpened(self, gains: list[Gain], words: Sequence[str], base: list[list[frozenset[str]]]) -> list[Gain]:
        """Return the gains with those of longer texts: the best candidate with another word before or after it."""
        if not gains or gains[0].gain < self.scan.doubtful_gain:
            return gains
        best = gains[0].candidate
        longer = [
            Candidate(text, best.position) for word in words for text in (f"{best.text} {word}", f"{word} {best.text}")
        ]
        direction = shifts(self.model, [best], self.captions, self.seed).mean((0, 1))
        delta = self.all_shifts(longer, self.captions[: self.scan.first_captions], "sharpening").mean(1)
        chosen = [longer[place] for place in (delta @ direction).argsort(descending=True)[:8].tolist()]
        self.tried += len(longer)
        more = self.gains(chosen, base)
        return sorted([*gains, *more], key=lambda each: (-each.gain, each.p_value, -len(each.fragment)))
