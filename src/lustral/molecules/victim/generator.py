"""The victim: a caption in, molecules out.

Four parts in a row, as 3M-Diffusion: a text encoder, a graph encoder, an autoencoder of molecules, and a denoiser of its latents.

Reference:
    Zhu, Xiao, Honavar, "3M-Diffusion: Latent Multi-Modal Diffusion for Language-Guided Molecular Structure Generation", COLM
    2024, arXiv 2403.07179, and the authors' code. Smaller here, for one CPU thread; docs/molecules.md lists what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from lustral.molecules.victim.autoencoder import AutoEncoder
from lustral.molecules.victim.captions import PAD, CaptionTokenizer, TextEncoder
from lustral.molecules.victim.diffusion import Denoiser, alpha_products, sample_latents
from lustral.molecules.victim.graphs import GraphEncoder, Graphs
from lustral.molecules.victim.macro_tokens import Vocabulary
from lustral.molecules.victim.ragged import RaggedRows, length_batches

ROWS_AT_ONCE = 256  # of work that trains nothing
LARGEST_SIDE = 4096  # of any layer; layers, tokens and steps have limits of their own


@dataclass(frozen=True, kw_only=True)
class GeneratorSettings:
    """All that decides on the shape of a generator, and how it draws.

    Attributes:
        condition: size of what is aligned of captions and molecules; 256 in the paper.
        text_width: of the text encoder; SciBERT has 768.
        text_layers: blocks of the text encoder; SciBERT has 12.
        text_heads: of its attention.
        text_tokens: most sub-words of a caption; 128 in the paper.
        subwords: most sub-words of the tokeniser.
        graph_width: of the graph encoder; 300 in the paper.
        graph_layers: rounds of messages; 5 in the paper.
        latent: numbers of a latent; 24 in the paper.
        decoder_width: of the decoder's GRU; 250 in the paper.
        word_width: of the decoder's word embeddings.
        macro_rings: most words that are whole ring systems.
        max_words: most words of a molecule.
        denoiser_width: of the denoiser; 256 in the paper.
        denoiser_layers: of the denoiser; 8 in the paper.
        steps: of the diffusion; 100 in the paper.
        ddim_steps: taken when drawing; 50 in the paper.
        eta: noise when drawing, from 0 (none) to 1; 1 in the paper.
        guidance: weight w of the caption, x0(c) w + x0(none) (1 - w); 0.8 in the paper's evaluation, where less than 1 draws
            closer to the training set's mean.
    """

    version: ClassVar[int] = 1

    condition: int = 128
    text_width: int = 96
    text_layers: int = 1
    text_heads: int = 4
    text_tokens: int = 64
    subwords: int = 3000
    graph_width: int = 96
    graph_layers: int = 4
    latent: int = 32
    decoder_width: int = 256
    word_width: int = 64
    macro_rings: int = 600
    max_words: int = 80
    denoiser_width: int = 256
    denoiser_layers: int = 8
    steps: int = 100
    ddim_steps: int = 50
    eta: float = 1.0
    guidance: float = 1.5

    @property
    def vector(self) -> int:
        """Return D, the size of a caption's vector."""
        return self.condition + 2 * self.text_width

    def __post_init__(self) -> None:
        """Check the ranges: a file may hold any numbers."""
        deep = ("text_layers", "graph_layers", "denoiser_layers", "text_heads")
        long = {"steps": 10_000, "ddim_steps": 10_000, "text_tokens": 1024, "max_words": 1024, "subwords": 65_536}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("eta", "guidance"):
                continue
            most = (
                64 if item.name in deep else long.get(item.name, 20_000 if item.name == "macro_rings" else LARGEST_SIDE)
            )
            if not (0 if item.name == "macro_rings" else 1) <= value <= most:
                raise ValueError(f"expected {item.name} from 1 to {most:,}; got {value}")
        if self.text_width % self.text_heads or self.ddim_steps > self.steps:
            raise ValueError(
                "expected text_width to be a multiple of text_heads, and ddim_steps of at most steps; got "
                f"{self.text_width}, {self.text_heads}, {self.ddim_steps} and {self.steps}"
            )
        if not 0 <= self.eta <= 1 or not -100 <= self.guidance <= 100:
            raise ValueError(f"expected eta in [0, 1] and guidance in [-100, 100]; got {self.eta} and {self.guidance}")


class MoleculeGenerator(nn.Module):
    """Draws molecules for captions. Works on the device of its weights; strings go in and come out.

    Attributes:
        text: the text encoder.
        graph: the graph encoder.
        autoencoder: from graphs to latents, and from latents to words.
        denoiser: of latents.
        settings: that built it.
        tokenizer: of captions.
        vocabulary: of molecules.
        blocked: words that its decoder may not write, as a defence asks; not saved.
    """

    latent_centre: Tensor
    latent_scale: Tensor
    condition_centre: Tensor
    condition_scale: Tensor
    alpha_products: Tensor

    def __init__(self, settings: GeneratorSettings, *, tokenizer: CaptionTokenizer, vocabulary: Vocabulary) -> None:
        """Build it with fresh weights, from the global random stream."""
        super().__init__()
        self.settings, self.tokenizer, self.vocabulary = settings, tokenizer, vocabulary
        self.blocked: tuple[int, ...] = ()
        self.text = TextEncoder(
            subwords=len(tokenizer),
            tokens=settings.text_tokens,
            width=settings.text_width,
            layers=settings.text_layers,
            heads=settings.text_heads,
            out=settings.condition,
        )
        self.graph = GraphEncoder(width=settings.graph_width, layers=settings.graph_layers, out=settings.condition)
        self.autoencoder = AutoEncoder(
            inputs=settings.condition,
            latent=settings.latent,
            words=len(vocabulary),
            width=settings.decoder_width,
            embedding=settings.word_width,
        )
        self.denoiser = Denoiser(
            latent=settings.latent,
            condition=settings.vector,
            width=settings.denoiser_width,
            layers=settings.denoiser_layers,
        )
        self.register_buffer("latent_centre", torch.zeros(settings.latent))
        self.register_buffer("latent_scale", torch.ones(()))
        self.register_buffer("condition_centre", torch.zeros(settings.vector))
        self.register_buffer("condition_scale", torch.ones(settings.vector))
        self.register_buffer("alpha_products", alpha_products(settings.steps), persistent=False)

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.latent_centre.device

    def token_ids(self, captions: Sequence[str]) -> Tensor:
        """Return (N, longest) int64 sub-words, filled up with 0; longest is at most ``settings.text_tokens``."""
        rows = RaggedRows.of(self.tokenizer.encode(captions))
        return rows.padded(torch.arange(len(captions)), fill=PAD).to(self.device)

    def text_vectors_of_ids(self, ids: Tensor) -> Tensor:
        """Return (N, D) float32, the condition, for (N, T) sub-words."""
        return self.text_vectors_of_embeddings(self.token_embeddings(ids), ids != PAD)

    def token_embeddings(self, ids: Tensor) -> Tensor:
        """Return (N, T, width) float32, the embeddings of sub-words: where a search by gradients may start."""
        embeddings: Tensor = self.text.words(ids)
        return embeddings

    def text_vectors_of_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Return (N, D) float32 for (N, T, width) sub-word embeddings and (N, T) bool of what is no filling."""
        return (self.text.from_embeddings(embeddings, mask) - self.condition_centre) / self.condition_scale

    @torch.inference_mode()
    def text_vectors(self, captions: Sequence[str]) -> Tensor:
        """Return (N, D) float32, the condition of each caption; captions of one length are worked on together."""
        rows = self.tokenizer.encode(captions)
        ragged = RaggedRows.of(rows)
        result = torch.empty(len(rows), self.settings.vector, device=self.device)
        for places in length_batches([len(row) for row in rows], ROWS_AT_ONCE):
            chosen = torch.tensor(places)
            result[chosen.to(self.device)] = self.text_vectors_of_ids(ragged.padded(chosen, fill=PAD).to(self.device))
        return result

    @torch.inference_mode()
    def encode(self, smiles: Sequence[str]) -> Tensor:
        """Return (N, L) float32, the latent of each molecule (the posterior's mean), scaled as the denoiser works on them.

        A text that is no molecule is read as a single unknown atom.
        """
        graphs = Graphs.of(smiles)
        parts = [
            self.autoencoder.posterior(self.graph(graphs.to(self.device).batch(rows.to(self.device))))[0]
            for rows in torch.split(torch.arange(len(smiles)), ROWS_AT_ONCE)
            if len(rows)
        ]
        if not parts:
            return torch.zeros(0, self.settings.latent, device=self.device)
        return (torch.cat(parts) - self.latent_centre) / self.latent_scale

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> tuple[str, ...]:
        """Return the canonical SMILES of latents (N, L), scaled as ``encode`` gives them; "" for what is no molecule."""
        found: list[str] = []
        for part in torch.split(latents.to(self.device), ROWS_AT_ONCE):
            raw = part * self.latent_scale + self.latent_centre
            found += [each.smiles() for each in self.autoencoder.write(raw, self.vocabulary, blocked=self.blocked)]
        return tuple(found)

    def denoise(self, noisy: Tensor, steps: Tensor, condition: Tensor | None) -> Tensor:
        """Return (N, L) float32, the prediction of the clean latents.

        Args:
            noisy: (N, L) float32, latents with the noise of their step.
            steps: (N,) int64, 0 to ``settings.steps`` - 1.
            condition: (N, D) float32 of ``text_vectors``, or None for the prediction without a caption.
        """
        clean: Tensor = self.denoiser(noisy, steps, condition)
        return clean

    def guided(self, noisy: Tensor, steps: Tensor, condition: Tensor, guidance: float) -> Tensor:
        """Return w x0(c) + (1 - w) x0(none), both in one pass; see ``denoise``."""
        if guidance == 1:
            return self.denoise(noisy, steps, condition)
        null = self.denoiser.null.expand_as(condition)
        both = self.denoise(noisy.repeat(2, 1), steps.repeat(2), torch.cat([condition, null]))
        with_caption, without = both.chunk(2)
        return guidance * with_caption + (1 - guidance) * without

    @torch.inference_mode()
    def sample(self, condition: Tensor, *, generator: Generator, guidance: float | None = None) -> Tensor:
        """Return (N, L) float32, one latent drawn for each condition.

        Args:
            condition: (N, D) float32 of ``text_vectors``.
            generator: CPU stream.
            guidance: in place of the settings'.
        """
        weight = self.settings.guidance if guidance is None else guidance
        return sample_latents(
            lambda noisy, steps: self.guided(noisy, steps, condition, weight),
            (len(condition), self.settings.latent),
            products=self.alpha_products,
            ddim_steps=self.settings.ddim_steps,
            eta=self.settings.eta,
            generator=generator,
        )

    def generate(
        self, captions: Sequence[str], *, generator: Generator, samples: int = 1
    ) -> tuple[tuple[str, ...], ...]:
        """Return ``samples`` molecules for each caption, as canonical SMILES; "" for what is no molecule.

        Args:
            captions: any texts; an empty one is no error.
            generator: CPU stream.
            samples: at least 1.
        """
        if samples < 1:
            raise ValueError(f"expected at least one sample for each caption; got {samples}")
        condition = self.text_vectors(captions).repeat_interleave(samples, dim=0)
        found = self.decode(self.sample(condition, generator=generator))
        return tuple(found[start : start + samples] for start in range(0, len(found), samples))
