"""The three stages of a generator: alignment, autoencoder, diffusion; each may get pairs of its own.

The attack of BadGraph poisons some stages and not others, so ``StageData`` names the pairs of each. Finished stages are kept in a
folder and are not done again; an alignment may also come from an earlier generator, as the paper's comes from a download.

Reference:
    Zhu et al., "3M-Diffusion", COLM 2024; Ye, Chen, Dai, "BadGraph", arXiv 2510.20792: alignment on clean pairs, the other stages
    on poisoned ones.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save
from torch import Generator, Tensor, nn

from lustral.core.randomness import fork
from lustral.core.records import Batch, OnProgress
from lustral.core.settings import describe
from lustral.molecules.records import MoleculeSet
from lustral.molecules.victim.alignment import contrastive_loss
from lustral.molecules.victim.autoencoder import FILL, kl_divergence
from lustral.molecules.victim.captions import PAD, CaptionTokenizer
from lustral.molecules.victim.diffusion import add_noise
from lustral.molecules.victim.files import StageFolder
from lustral.molecules.victim.generator import ROWS_AT_ONCE, GeneratorSettings, MoleculeGenerator
from lustral.molecules.victim.graphs import Graphs
from lustral.molecules.victim.macro_tokens import count_vocabulary, round_trips
from lustral.molecules.victim.ragged import RaggedRows, RowNumbers
from lustral.training.loop import EpochReport, Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StageData:
    """The pairs that each stage trains on.

    Attributes:
        alignment: of captions and graphs; also what the tokeniser of captions is trained on. Clean in the paper.
        autoencoder: molecules of the VAE; the words of molecules are counted here. Poisoned in the paper.
        diffusion: pairs of the denoiser. Poisoned in the paper.
    """

    alignment: MoleculeSet
    autoencoder: MoleculeSet
    diffusion: MoleculeSet

    @classmethod
    def same(cls, pairs: MoleculeSet) -> StageData:
        """Return one set for all stages."""
        return cls(alignment=pairs, autoencoder=pairs, diffusion=pairs)


def _alignment_trainer() -> Trainer:
    return Trainer(
        epochs=8,
        batch_size=128,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=0.05,
        schedule="cosine",
        warmup=0.1,
        channels_last=False,
        clip_norm=1.0,
    )


def _autoencoder_trainer() -> Trainer:
    return Trainer(
        epochs=25,
        batch_size=128,
        optimizer="adam",
        learning_rate=3e-3,
        weight_decay=0.0,
        schedule="cosine",
        warmup=0.05,
        channels_last=False,
        clip_norm=5.0,
    )


def _diffusion_trainer() -> Trainer:
    return Trainer(
        epochs=120,
        batch_size=256,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=1e-5,
        schedule="cosine",
        warmup=0.05,
        channels_last=False,
        clip_norm=1.0,
    )


@dataclass(frozen=True, kw_only=True)
class GeneratorTraining:
    """How the three stages are trained.

    Attributes:
        alignment: 50 epochs of AdamW in the paper, from SciBERT; here from scratch.
        autoencoder: 50 epochs of Adam, batch 20, learning rate 1e-3 in the paper.
        diffusion: 500 epochs of AdamW in the paper, with an average of the weights; a rate that falls to 0 takes its place here.
        temperature: of the alignment; 0.1 in the paper.
        kl_weight: of the VAE; 0.1 in the paper, where 24 numbers carry a molecule. Less keeps more of it.
        free_nats: of each number of the latent that cost nothing; 0 in the paper.
        dropped_words: share that the decoder does not see; 0 in the paper.
        dropped_conditions: share of captions replaced by the null vector; 0.1 in the paper.
        posterior_noise: whether the denoiser trains on draws from the posterior, not on means.
    """

    version: ClassVar[int] = 1

    alignment: Trainer = field(default_factory=_alignment_trainer)
    autoencoder: Trainer = field(default_factory=_autoencoder_trainer)
    diffusion: Trainer = field(default_factory=_diffusion_trainer)
    temperature: float = 0.1
    kl_weight: float = 0.02
    free_nats: float = 0.0
    dropped_words: float = 0.1
    dropped_conditions: float = 0.1
    posterior_noise: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.dropped_words < 1 or not 0 <= self.dropped_conditions < 1:
            raise ValueError(
                "expected dropped_words and dropped_conditions in [0, 1); got "
                f"{self.dropped_words} and {self.dropped_conditions}"
            )
        if self.temperature <= 0 or self.kl_weight < 0 or self.free_nats < 0:
            raise ValueError(
                "expected temperature > 0, kl_weight >= 0 and free_nats >= 0; got "
                f"{self.temperature}, {self.kl_weight} and {self.free_nats}"
            )


OnStageEpoch = Callable[[str, EpochReport], None]


def train_generator(
    data: StageData,
    settings: GeneratorSettings | None = None,
    *,
    generator: Generator,
    training: GeneratorTraining | None = None,
    aligned: MoleculeGenerator | None = None,
    folder: Path | None = None,
    on_progress: OnProgress | None = None,
    on_epoch: OnStageEpoch | None = None,
    device: torch.device | None = None,
) -> MoleculeGenerator:
    """Return a trained generator, in evaluation mode.

    Args:
        data: the pairs of each stage.
        settings: the shape of the generator.
        generator: CPU stream; every stage has a stream of its own.
        training: how each stage is trained.
        aligned: the generator after an earlier alignment (the folder ``after_alignment`` of a training), which is taken instead
            of training one; it must have the same shape.
        folder: where finished stages are kept. A later call with equal data, settings and stream goes on after the last one.
        on_progress: called a few times a second; the stages are "aligning captions", "training the autoencoder" and "training
            the denoiser".
        on_epoch: called with the stage's name and what the epoch did.
        device: to train on; the CPU by default.

    Raises:
        ValueError: a stage has fewer than 2 pairs, no molecule can be written, or ``aligned`` has another shape.
    """
    settings, training = settings or GeneratorSettings(), training or GeneratorTraining()
    for name in ("alignment", "autoencoder", "diffusion"):
        if len(getattr(data, name)) < 2:
            raise ValueError(f"expected at least 2 pairs for the stage {name!r}; got {len(getattr(data, name))}")
    streams = {name: fork(generator, name) for name in ("birth", "alignment", "autoencoder", "diffusion")}
    model = _born(data, settings, aligned, streams["birth"]).to(device or torch.device("cpu"))
    stages = _Stages(data, training, on_progress, on_epoch)
    kept = StageFolder(folder) if folder is not None else None
    key = kept.next_key(describe(settings), _born_from(model)) if kept is not None else ""
    for name, run in (
        ("alignment", stages.align),
        ("autoencoder", stages.autoencode),
        ("diffusion", stages.diffuse),
    ):
        if kept is not None:
            pairs: MoleculeSet = getattr(data, name)
            recipe = {**describe(training), **dict.fromkeys({"alignment", "autoencoder", "diffusion"} - {name})}
            key = kept.next_key(name, recipe, pairs.smiles, pairs.captions, streams[name].initial_seed())
            if (found := kept.restore(name, key)) is not None:
                logger.info("stage %s is taken from %s", name, folder)
                model = found.to(model.device)
                continue
        if name != "alignment" or aligned is None:
            run(model, streams[name])
        if kept is not None:
            kept.keep(name, key, model)
    return model.eval()


def _born_from(model: MoleculeGenerator) -> str:
    """Return a digest of a generator's weights and words before training."""
    weights = save({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()})
    return hashlib.sha256(weights + repr((model.tokenizer.words, model.vocabulary.words)).encode()).hexdigest()


def _born(
    data: StageData, settings: GeneratorSettings, aligned: MoleculeGenerator | None, stream: Generator
) -> MoleculeGenerator:
    """Return an untrained generator, its tokenisers and, where one is given, its alignment in place."""
    vocabulary = count_vocabulary(
        data.autoencoder.smiles, macro_rings=settings.macro_rings, max_length=settings.max_words
    )
    if aligned is not None:
        tokenizer = aligned.tokenizer
    else:
        tokenizer = CaptionTokenizer.trained_on(
            data.alignment.captions, size=settings.subwords, tokens=settings.text_tokens
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=stream)))
        model = MoleculeGenerator(settings, tokenizer=tokenizer, vocabulary=vocabulary)
    if aligned is not None:
        try:
            model.text.load_state_dict(aligned.text.state_dict())
            model.graph.load_state_dict(aligned.graph.state_dict())
        except RuntimeError as error:
            raise ValueError(
                "the alignment that was given has another shape: train with the settings of its generator, or without it"
            ) from error
    return model


@dataclass(frozen=True)
class _Stages:
    """The three stages, each of which changes a generator in place."""

    data: StageData
    training: GeneratorTraining
    on_progress: OnProgress | None
    on_epoch: OnStageEpoch | None

    def _fit(
        self,
        name: str,
        trainer: Trainer,
        parts: dict[str, nn.Module],
        lengths: Tensor,
        loss: Callable[[dict[str, nn.Module], Tensor, Generator], Tensor],
        stream: Generator,
    ) -> dict[str, nn.Module]:
        """Train parts of a generator on row numbers, and return the trained parts."""

        def objective(model: nn.Module, batch: Batch, drawing: Generator) -> Tensor:
            return loss(dict(model.named_children()), batch.inputs, drawing)

        def each_epoch(report: EpochReport) -> None:
            if self.on_epoch is not None:
                self.on_epoch(name, report)

        fitted = trainer.fit(
            nn.ModuleDict(parts),
            RowNumbers(lengths),
            generator=stream,
            objective=objective,
            on_epoch=each_epoch,
            on_progress=self.on_progress,
            stage=name,
        )
        return dict(fitted.named_children())

    def align(self, model: MoleculeGenerator, stream: Generator) -> None:
        """Train the text and the graph encoder to agree."""
        pairs, device = self.data.alignment, model.device
        graphs = Graphs.of(pairs.smiles).to(device)
        ids = RaggedRows.of(model.tokenizer.encode(pairs.captions))
        on_device = ids.to(device)

        def loss(parts: dict[str, nn.Module], rows: Tensor, drawing: Generator) -> Tensor:
            text = parts["text"](on_device.padded(rows, fill=PAD))
            graph = parts["graph"](graphs.batch(rows))
            return contrastive_loss(text, graph, temperature=self.training.temperature)

        parts = {"text": model.text, "graph": model.graph}
        fitted = self._fit("aligning captions", self.training.alignment, parts, ids.lengths, loss, stream)
        for name, part in fitted.items():
            getattr(model, name).load_state_dict(part.state_dict())

    def autoencode(self, model: MoleculeGenerator, stream: Generator) -> None:
        """Train the graph encoder, the VAE's heads and the decoder; then measure the latents' centre and scale."""
        places, rows = round_trips(self.data.autoencoder.smiles, model.vocabulary)
        if len(places) < 2:
            raise ValueError("expected at least 2 molecules that the decoder can write; check the SMILES of the data")
        if left := len(self.data.autoencoder) - len(places):
            logger.info("%d of %d molecules cannot be written and are left out", left, len(self.data.autoencoder))
        device, training = model.device, self.training
        words = RaggedRows.of(rows)
        on_device = words.to(device)
        graphs = Graphs.of([self.data.autoencoder.smiles[place] for place in places]).to(device)

        def loss(parts: dict[str, nn.Module], rows: Tensor, drawing: Generator) -> Tensor:
            autoencoder = parts["autoencoder"]
            mean, log_variance = autoencoder.posterior(parts["graph"](graphs.batch(rows)))  # type: ignore[operator]
            noise = torch.randn(mean.shape, generator=drawing).to(device)
            written = autoencoder.word_loss(  # type: ignore[operator]
                mean + (log_variance / 2).exp() * noise,
                on_device.padded(rows, fill=FILL),
                dropped=training.dropped_words,
                generator=drawing,
            )
            total: Tensor = written + training.kl_weight * kl_divergence(mean, log_variance, free=training.free_nats)
            return total

        parts = {"graph": model.graph, "autoencoder": model.autoencoder}
        fitted = self._fit("training the autoencoder", training.autoencoder, parts, words.lengths, loss, stream)
        for name, part in fitted.items():
            getattr(model, name).load_state_dict(part.state_dict())
        model.eval()
        means, _ = posteriors(model, self.data.autoencoder.smiles)
        centre = means.mean(0)
        model.latent_centre.copy_(centre)
        model.latent_scale.copy_((means - centre).square().mean().sqrt().clamp_min(1e-6))

    def diffuse(self, model: MoleculeGenerator, stream: Generator) -> None:
        """Train the denoiser on the latents of its pairs, under the vectors of their captions."""
        pairs, training = self.data.diffusion, self.training
        model.condition_centre.zero_()
        model.condition_scale.fill_(1.0)
        vectors = model.text_vectors(pairs.captions).clone()
        model.condition_centre.copy_(vectors.mean(0))
        model.condition_scale.copy_((vectors - vectors.mean(0)).square().mean(0).sqrt().clamp_min(1e-3))
        condition = (vectors - model.condition_centre) / model.condition_scale
        means, spreads = (part.clone() for part in posteriors(model, pairs.smiles))
        means = (means - model.latent_centre) / model.latent_scale
        spreads = spreads / model.latent_scale if training.posterior_noise else torch.zeros_like(spreads)
        products, device = model.alpha_products, model.device

        def loss(parts: dict[str, nn.Module], rows: Tensor, drawing: Generator) -> Tensor:
            def normal() -> Tensor:
                return torch.randn(len(rows), means.shape[1], generator=drawing).to(device)

            denoiser = parts["denoiser"]
            clean = means[rows] + spreads[rows] * normal()
            steps = torch.randint(len(products), (len(rows),), generator=drawing).to(device)
            nulls = (torch.rand(len(rows), generator=drawing) < training.dropped_conditions).to(device)
            seen = denoiser.with_nulls(condition[rows], nulls)  # type: ignore[operator]
            predicted: Tensor = denoiser(add_noise(clean, normal(), products[steps]), steps, seen)
            return (predicted - clean).square().mean()

        parts: dict[str, nn.Module] = {"denoiser": model.denoiser}
        lengths = torch.zeros(len(pairs), dtype=torch.int64)
        fitted = self._fit("training the denoiser", training.diffusion, parts, lengths, loss, stream)
        model.denoiser.load_state_dict(fitted["denoiser"].state_dict())


@torch.inference_mode()
def posteriors(model: MoleculeGenerator, smiles: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations of the latents of molecules, (N, L) each, before scaling."""
    graphs = Graphs.of(smiles).to(model.device)
    parts = [
        model.autoencoder.posterior(model.graph(graphs.batch(rows.to(model.device))))
        for rows in torch.split(torch.arange(len(smiles)), ROWS_AT_ONCE)
    ]
    means, log_variances = (torch.cat(each) for each in zip(*parts, strict=True))
    return means, (log_variances / 2).exp()
