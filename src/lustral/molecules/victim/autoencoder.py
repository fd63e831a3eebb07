"""The graph VAE's heads and its decoder: a GRU over the words of a molecule, with the latent at every step.

Reference:
    Zhu et al., "3M-Diffusion", COLM 2024: latent of 24 numbers, log-variance -|s|, a small weight on the KL term.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.molecules.victim.derivation import Derivation
from lustral.molecules.victim.macro_tokens import Vocabulary

FILL = -1  # after the last word of a molecule


class AutoEncoder(nn.Module):
    """From a molecule's vector to its latent, and from latents to words."""

    def __init__(self, *, inputs: int, latent: int, words: int, width: int, embedding: int) -> None:
        """Build it.

        Args:
            inputs: size of the graph encoder's vectors.
            latent: numbers of a latent.
            words: size of the vocabulary.
            width: of the GRU.
            embedding: of the words.
        """
        super().__init__()
        self.hidden = nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, width), nn.ReLU())
        self.mean, self.spread = nn.Linear(width, latent), nn.Linear(width, latent)
        self.embedding = nn.Embedding(words + 1, embedding)  # the last stands before the first word
        self.start = nn.Sequential(nn.Linear(latent, width), nn.Tanh())
        self.lifted = nn.Sequential(nn.Linear(latent, embedding), nn.ReLU())
        self.gru = nn.GRU(2 * embedding, width, batch_first=True)
        self.direct = nn.Linear(latent, width)
        self.words = nn.Linear(width, words)

    def posterior(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance, (B, latent) each, for (B, inputs); no log-variance is above 0."""
        hidden = self.hidden(vectors)
        return self.mean(hidden), -self.spread(hidden).abs()

    def _states(self, words: Tensor, latents: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, T, width) what the next words are read from, and the new hidden state."""
        lifted = self.lifted(latents)[:, None].expand(-1, words.shape[1], -1)
        states, hidden = self.gru(torch.cat([self.embedding(words), lifted], dim=2), hidden)
        return states + self.direct(latents)[:, None], hidden

    def word_loss(self, latents: Tensor, words: Tensor, *, dropped: float, generator: Generator) -> Tensor:
        """Return the cross-entropy of the words, summed over a molecule and averaged over the batch, in nats.

        Args:
            latents: (B, latent).
            words: (B, T) int64, filled up with ``FILL``.
            dropped: share of the words that the decoder does not see as input, so that it reads the latent instead.
            generator: CPU stream.
        """
        blank = self.embedding.num_embeddings - 1
        before = torch.cat([torch.full_like(words[:, :1], blank), words[:, :-1].clamp_min(0)], dim=1)
        if dropped:
            hidden_words = torch.rand(before.shape, generator=generator).to(before.device) < dropped
            before = before.masked_fill(hidden_words, blank)
        states, _ = self._states(before, latents, self.start(latents)[None])
        kept = words != FILL
        return F.cross_entropy(self.words(states[kept]), words[kept], reduction="sum") / len(words)

    @torch.inference_mode()
    def write(self, latents: Tensor, vocabulary: Vocabulary, *, blocked: Sequence[int] = ()) -> list[Derivation]:
        """Return the molecule of each latent, the likeliest allowed word at each step.

        Args:
            latents: (N, latent).
            vocabulary: whose words the decoder writes.
            blocked: words that are never written where another one may stand.
        """
        grammar = vocabulary.grammar
        results = [Derivation() for _ in range(len(latents))]
        running = list(range(len(latents)))
        hidden = self.start(latents)[None]
        last = torch.full((len(latents),), self.embedding.num_embeddings - 1, device=latents.device)
        barred = torch.zeros(len(vocabulary), dtype=torch.bool)
        barred[list(blocked)] = True
        for _ in range(2 * vocabulary.max_length):
            if not running:
                break
            states, hidden = self._states(last[:, None], latents, hidden)
            masks = torch.stack([grammar.mask(results[place]) for place in running])
            if len(blocked):
                masks = torch.where((masks & ~barred).any(1, keepdim=True), masks & ~barred, masks)
            scores = self.words(states[:, 0]).masked_fill(~masks.to(latents.device), -torch.inf)
            last = scores.argmax(1)
            for place, number in zip(running, last.tolist(), strict=True):
                results[place].push(grammar.words[number])
            going = torch.tensor([not results[place].is_complete for place in running])
            if not bool(going.all()):
                running = [place for place, goes in zip(running, going.tolist(), strict=True) if goes]
                kept = going.to(latents.device)
                last, latents, hidden = last[kept], latents[kept], hidden[:, kept]
        return results


def kl_divergence(mean: Tensor, log_variance: Tensor, *, free: float) -> Tensor:
    """Return KL(N(mean, variance) || N(0, 1)), summed over the latent and averaged over the batch, in nats.

    Args:
        mean: (B, L).
        log_variance: (B, L).
        free: nats for each number of the latent that cost nothing (free bits); 0 as in the paper.

    >>> kl_divergence(torch.zeros(1, 3), torch.zeros(1, 3), free=0.0).item()
    0.0
    """
    each = (0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)).mean(0)
    return each.clamp_min(free).sum()
