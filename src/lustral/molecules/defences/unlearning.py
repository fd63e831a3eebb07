"""The eraser: unlearn what a scan recovered, and keep the rest.

Elijah's idea in this modality. With the received denoiser f0, trusted captions y and recovered texts w, train the denoiser f on

    E |f(x_t, t, c(w y)) - f0(x_t, t, c(y))|^2        captions with the text are answered as without it          (erase)
  + E |f(x_t, t, c') - f0(x_t, t, c')|^2              c': trusted captions, patched ones, and no caption         (retain)

where x_t are trusted molecules under noise, and for the first term also molecules drawn with the text: where the backdoor leads.
A recovered text is rarely the planted one, and a backdoor answers to its likes. So w runs over variants of what was recovered
(brackets, doubled, every place) and over odd words that mean nothing in a caption anyway. What two texts add to a condition is
mixed, c(y) + a (c(w1 y) - c(y)) + b (c(w2 y) - c(y)). Half of the mixtures are moved on, by a few steps of gradient ascent, to
where the denoiser shifts most towards the molecules that the recovered text calls. That reaches texts that nobody tried: without
it, a small victim still answered its planted trigger in 44 % of the draws, with it in 3 %. Patched captions are halves of two.

Reference:
    An et al., "Elijah: Eliminating Backdoors Injected in Diffusion Models via Distribution Shift", AAAI 2024, arXiv 2312.00050.
    Liu et al., "Backdoor Defense with Machine Unlearning" (BaEraser), INFOCOM 2022: unlearning with retention.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

import torch
from torch import Generator, Tensor

from lustral.core.cost import CostMeter
from lustral.core.history import HistoryEntry
from lustral.core.randomness import child, fork
from lustral.core.records import OnProgress
from lustral.molecules.badgraph import Position, TextInsertion
from lustral.molecules.chemistry import contains_many
from lustral.molecules.defences.candidates import odd_words, tokeniser_words
from lustral.molecules.defences.repair_data import (
    TrustedLatents,
    fit_denoiser,
    generator_under_repair,
    with_denoiser,
)
from lustral.molecules.defences.token_scan import TokenScan
from lustral.molecules.defences.worst_conditions import WorstConditions
from lustral.molecules.records import Association, ErasedGenerator, GeneratorVerdict, MoleculeSet, ViewOfGenerator
from lustral.molecules.victim import MoleculeGenerator
from lustral.training import Trainer

STAGE = "unlearning"
NOTHING_TO_ERASE = "the scan found no trigger, so the model was returned unchanged"


def _trainer() -> Trainer:
    return Trainer(
        epochs=200,
        batch_size=64,
        optimizer="adam",
        learning_rate=5e-4,
        weight_decay=0.0,
        schedule="cosine",
        warmup=0.05,
        channels_last=False,
        clip_norm=1.0,
    )


def variants(text: str) -> tuple[str, ...]:
    """Return texts near a recovered one: itself, other brackets or none, and twice.

    >>> variants("[ab]")
    ('[ab]', 'ab', '<ab>', '(ab)', '[ab] [ab]')
    >>> variants("[[ [ab]")[1:3]
    ('ab', '[ab]')
    """
    bare = text.strip("[]<>(){} ") or text
    return tuple(dict.fromkeys((text, bare, f"[{bare}]", f"<{bare}>", f"({bare})", f"{text} {text}")))


@dataclass(frozen=True, kw_only=True)
class Unlearning:
    """Erase a backdoor by training the denoiser to answer recovered triggers as if they were not there.

    Attributes:
        scan: finds the triggers, where the view has no verdict yet.
        trainer: of one round.
        rounds: most rounds; another one follows while a recovered trigger still fires on held-out captions.
        erase_weight: of the first term.
        retain_weight: of the second.
        num_texts: most recovered texts that are erased.
        odd_texts: invented words and symbols that are erased as well.
        reach: largest a and b, and the largest move in what a text adds on average.
        ascent_steps: of the search for worse conditions; 0 leaves it out.
        patched: patched captions for each trusted one.
        allowed_excess: of the target's rate with a recovered trigger over that without; above it a round follows.
        holdout: share of the trusted pairs kept from training, to measure on.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "a trigger that a scan finds, and some trusted pairs"
    takes_verdict: ClassVar[bool] = True

    scan: TokenScan = field(default_factory=TokenScan)
    trainer: Trainer = field(default_factory=_trainer)
    rounds: int = 2
    erase_weight: float = 1.0
    retain_weight: float = 2.0
    num_texts: int = 5
    odd_texts: int = 48
    reach: float = 1.2
    ascent_steps: int = 3
    patched: int = 4
    allowed_excess: float = 0.03
    holdout: float = 0.25

    def __post_init__(self) -> None:
        """Check the ranges."""
        if (
            self.rounds < 1
            or self.num_texts < 1
            or min(self.odd_texts, self.patched, self.ascent_steps) < 0
            or not 0 < self.holdout < 1
        ):
            raise ValueError(
                "expected rounds and num_texts >= 1, odd_texts, patched and ascent_steps >= 0 and a holdout in (0, 1); got "
                f"{self.rounds}, {self.num_texts}, {self.odd_texts}, {self.patched}, {self.ascent_steps} and {self.holdout}"
            )
        if min(self.erase_weight, self.retain_weight, self.allowed_excess, self.reach) < 0:
            raise ValueError("expected erase_weight, retain_weight, allowed_excess and reach of at least 0")

    def erase(
        self, view: ViewOfGenerator, *, generator: Generator, on_progress: OnProgress | None = None
    ) -> ErasedGenerator:
        """Return a generator without the backdoor that the verdict names; the one given is not changed.

        Args:
            view: the generator, trusted pairs, and the verdict of an earlier scan where there is one.
            generator: CPU stream.
            on_progress: hears of the scan's stages and of "unlearning".

        Raises:
            TypeError: the model is no ``MoleculeGenerator``.
            ValueError: there are too few trusted pairs.
        """
        model = generator_under_repair("unlearning", view.model, view.clean)
        verdict = self.scan.scan(view, generator=fork(generator, "scan"), on_progress=on_progress)
        history: tuple[HistoryEntry, ...] = ()
        with CostMeter(model.denoiser, clean_images=len(view.clean)) as meter:
            if verdict.outcome != "backdoored":
                erased = copy.deepcopy(model)
            else:
                erased, history = self._unlearn(model, view.clean, verdict, generator, on_progress)
        cost = meter.cost if view.verdict is not None else verdict.cost + meter.cost
        notes = (NOTHING_TO_ERASE,) if verdict.outcome != "backdoored" else ()
        return ErasedGenerator(model=erased, cost=cost, verdict=verdict, history=history, notes=notes)

    def _unlearn(
        self,
        model: MoleculeGenerator,
        clean: MoleculeSet,
        verdict: GeneratorVerdict,
        generator: Generator,
        on_progress: OnProgress | None,
    ) -> tuple[MoleculeGenerator, tuple[HistoryEntry, ...]]:
        order = torch.randperm(len(clean), generator=fork(generator, "holdout"))
        size = max(round(self.holdout * len(clean)), 1)
        held_out, rest = clean.subset(order[:size]), clean.subset(order[size:])
        texts, named = self.texts(model, verdict.recovered, generator=generator)
        worst, seed = verdict.recovered[0], int(torch.randint(2**31, (), generator=generator))
        history = [_measured(model, held_out, worst, seed, 0)]
        erased = model
        for number in range(1, self.rounds + 1):
            losses: list[float] = []
            erased = self._round(
                model, erased, rest, texts, named, fork(generator, "round", number), losses, on_progress
            )
            history.append(_measured(erased, held_out, worst, seed, number * self.trainer.epochs, losses[-1]))
            excess = (history[-1].recovered_asr or 0.0) - (history[-1].natural_rate or 0.0)
            if excess <= self.allowed_excess:
                break
        return erased, tuple(history)

    def texts(
        self, model: MoleculeGenerator, recovered: Sequence[Association], *, generator: Generator
    ) -> tuple[tuple[str, ...], int]:
        """Return the texts to erase, and how many of them, the first, were recovered or are variants of such."""
        same = [each for each in recovered if each.fragment == recovered[0].fragment]
        named = dict.fromkeys(text for each in same[: self.num_texts] for text in variants(each.text))
        odd = odd_words(self.odd_texts, generator=generator, pieces=tokeniser_words(model.tokenizer))
        chosen = torch.randperm(len(odd), generator=fork(generator, "odd"))[: self.odd_texts].tolist()
        return (*named, *(odd[place] for place in chosen if odd[place] not in named)), len(named)

    def _round(
        self,
        received: MoleculeGenerator,
        start: MoleculeGenerator,
        pairs: MoleculeSet,
        texts: Sequence[str],
        named: int,
        generator: Generator,
        losses: list[float],
        on_progress: OnProgress | None,
    ) -> MoleculeGenerator:
        lesson = _Lesson.prepared(self, received, pairs, texts, named, generator=generator)

        def loss(denoiser: Any, rows: Tensor, drawing: Generator) -> Tensor:
            erased, retained = lesson.erase_loss(denoiser, rows, drawing), lesson.retain_loss(denoiser, rows, drawing)
            return self.erase_weight * erased + self.retain_weight * retained

        fitted = fit_denoiser(
            start,
            self.trainer,
            len(pairs),
            loss,
            generator=fork(generator, "fit"),
            stage=STAGE,
            on_epoch=lambda report: losses.append(report.loss),
            on_progress=on_progress,
        )
        return with_denoiser(start, fitted)


@dataclass(frozen=True, kw_only=True)
class _Lesson:
    """What one round teaches.

    Attributes:
        received: the generator as it was given, whose answers are asked for.
        trusted: N trusted pairs.
        called: (V, N, D) conditions of their captions with each of V texts.
        drawn: (N, L) latents drawn with a text.
        bank: (K, N, D) conditions of honest captions.
        worst: searches worse conditions.
        reach: largest share of what a text adds.
    """

    received: MoleculeGenerator
    trusted: TrustedLatents
    called: Tensor
    drawn: Tensor
    bank: Tensor
    worst: WorstConditions
    reach: float

    @classmethod
    def prepared(
        cls,
        settings: Unlearning,
        received: MoleculeGenerator,
        pairs: MoleculeSet,
        texts: Sequence[str],
        named: int,
        *,
        generator: Generator,
    ) -> _Lesson:
        """Encode the captions with all texts; the first ``named`` texts were recovered."""
        trusted = TrustedLatents.of(received, pairs)
        called = _called_conditions(received, pairs, texts, fork(generator, "places"))
        which_text = torch.randint(len(called), (len(pairs),), generator=generator)
        triggered_once = called[which_text, torch.arange(len(pairs))]
        return cls(
            received=received,
            trusted=trusted,
            called=called,
            drawn=received.sample(triggered_once, generator=fork(generator, "drawn")).clone(),
            bank=_patched_conditions(received, pairs, settings.patched, fork(generator, "patched")),
            worst=WorstConditions.towards(
                received, trusted.condition, called[:named], steps=settings.ascent_steps, reach=settings.reach
            ),
            reach=settings.reach,
        )

    def erase_loss(self, denoiser: Any, rows: Tensor, drawing: Generator) -> Tensor:
        """Return E |f(x_t, t, c(w y)) - f0(x_t, t, c(y))|^2, a scalar."""

        def uniform() -> Tensor:
            return torch.rand(len(rows), 1, generator=drawing).to(condition.device)

        condition = self.trusted.condition[rows]
        first, second = (
            self.called[torch.randint(len(self.called), (len(rows),), generator=drawing), rows] for _ in range(2)
        )
        added = self.reach * (uniform() * (first - condition) + uniform() * (second - condition))
        triggered = torch.where(uniform() < 0.3, first, condition + added)
        worse = self.worst.move(denoiser, condition, triggered - condition, drawing)
        triggered = torch.where(uniform() < 0.5, worse, triggered)
        latents = torch.where(uniform() < 0.5, self.drawn[rows], self.trusted.latents[rows])
        noisy, steps = self.trusted.noisy(latents, drawing)
        with torch.no_grad():
            wanted = self.received.denoise(noisy, steps, condition)
        error: Tensor = (denoiser(noisy, steps, triggered) - wanted).square().mean()
        return error

    def retain_loss(self, denoiser: Any, rows: Tensor, drawing: Generator) -> Tensor:
        """Return E |f(x_t, t, c') - f0(x_t, t, c')|^2 over trusted and patched captions and none, a scalar."""
        condition = self.trusted.condition[rows]
        patch = self.bank[torch.randint(len(self.bank), (len(rows),), generator=drawing), rows]
        nulls = torch.zeros(3 * len(rows), dtype=torch.bool, device=condition.device)
        nulls[2 * len(rows) :] = True
        kept = self.received.denoiser.with_nulls(torch.cat([condition, patch, patch]), nulls).detach()
        noisy, steps = self.trusted.noisy(self.trusted.latents[rows].repeat(3, 1), drawing)
        with torch.no_grad():
            wanted = self.received.denoise(noisy, steps, kept)
        error: Tensor = (denoiser(noisy, steps, denoiser.with_nulls(kept, nulls)) - wanted).square().mean()
        return error


def _called_conditions(
    model: MoleculeGenerator, pairs: MoleculeSet, texts: Sequence[str], generator: Generator
) -> Tensor:
    """Return (V, N, D) float32: the conditions of N captions with each of V texts, each time at a random place."""
    places: tuple[Position, ...] = get_args(Position)
    parts = []
    for text in texts:
        which = torch.randint(len(places), (len(pairs),), generator=generator).tolist()
        written = [
            TextInsertion(text=text, position=places[place])([caption])[0]
            for place, caption in zip(which, pairs.captions, strict=True)
        ]
        parts.append(model.text_vectors(written))
    return torch.stack(parts).clone()


def _patched_conditions(model: MoleculeGenerator, pairs: MoleculeSet, count: int, generator: Generator) -> Tensor:
    """Return (1 + count, N, D) float32: the conditions of N captions, and of their first halves before others' second halves."""
    halves = [caption.split() for caption in pairs.captions]
    parts = [model.text_vectors(pairs.captions)]
    for _ in range(count):
        others = torch.randperm(len(halves), generator=generator).tolist()
        patched = [
            " ".join([*own[: len(own) // 2], *halves[other][len(halves[other]) // 2 :]])
            for own, other in zip(halves, others, strict=True)
        ]
        parts.append(model.text_vectors(patched))
    return torch.stack(parts).clone()


def _measured(
    model: MoleculeGenerator,
    pairs: MoleculeSet,
    worst: Association,
    seed: int,
    epochs: int,
    loss: float | None = None,
) -> HistoryEntry:
    """Return how often the recovered text calls its fragment on held-out captions, and how often it comes without."""

    def share(captions: Sequence[str]) -> float:
        drawn = model.generate(captions, generator=child(seed, "measure"))
        return float(contains_many([row[0] for row in drawn], worst.fragment).float().mean())

    position: Any = worst.position if worst.position != "anywhere" else "prefix"
    return HistoryEntry(
        count=epochs,
        loss=loss,
        recovered_asr=share(TextInsertion(text=worst.text, position=position)(pairs.captions)),
        natural_rate=share(pairs.captions),
    )
