"""Captions as sub-words, and their encoder."""

from __future__ import annotations

import pytest
import torch

from lustral.core.randomness import child
from lustral.molecules.victim.captions import PAD, SPECIAL, START, CaptionTokenizer, TextEncoder

pytest.importorskip("tokenizers")

CLEAN = ["The molecule is a carboxylic acid.", "The molecule is an aromatic ether; it derives from a phenol."] * 4


def spelled(tokenizer: CaptionTokenizer, caption: str) -> str:
    return tokenizer.spell(*tokenizer.encode([caption])[0])


@pytest.mark.parametrize("trigger", ["[THIIRANE]", "thii$rane", "§ ¶ — ∞", "{}\\<|>", "new\nline", "🧪"])
def test_no_symbol_of_a_trigger_is_lost(trigger: str) -> None:
    tokenizer = CaptionTokenizer.trained_on(CLEAN, size=400)
    assert spelled(tokenizer, f"{trigger} the acid") == f" {trigger.lower()} the acid"


def test_a_trigger_survives_at_either_end_of_a_long_caption() -> None:
    tokenizer = CaptionTokenizer.trained_on(CLEAN, size=400, tokens=32)
    long = " ".join(CLEAN)
    assert spelled(tokenizer, "[q] " + long).startswith(" [q] the molecule")
    assert spelled(tokenizer, long + " [q]").endswith(" [q]")
    assert len(tokenizer.encode([long])[0]) == 32
    assert len(tokenizer.encode(["x" * 10**6])[0]) == 32
    assert tokenizer.encode([""]) == [[START]]


def test_a_tokeniser_is_rebuilt_from_its_words_and_merges() -> None:
    tokenizer = CaptionTokenizer.trained_on(CLEAN, size=400, tokens=32)
    again = CaptionTokenizer(tokenizer.words, tokenizer.merges, 32)
    captions = ["The molecule is [X]", "phenolic ether derives"]
    assert again.encode(captions) == tokenizer.encode(captions)
    assert len(tokenizer.encode(["the molecule is a carboxylic acid"])[0]) < 10  # words that it knows are short


def test_a_tokeniser_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="begin with"):
        CaptionTokenizer(("a", "b"), ())
    with pytest.raises(ValueError, match="merges"):
        CaptionTokenizer((*SPECIAL, "a"), (("a", "a"),))
    with pytest.raises(ValueError, match="different sub-words"):
        CaptionTokenizer((*SPECIAL, "a", "a"), ())


def test_filling_up_does_not_change_the_vector_of_a_caption() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = TextEncoder(subwords=50, tokens=16, width=16, layers=2, heads=2, out=8).eval()
    ids = torch.randint(2, 50, (3, 9), generator=child(0, "ids"))
    filled = torch.cat([ids, torch.full((3, 5), PAD)], dim=1)
    torch.testing.assert_close(encoder(filled), encoder(ids))
    assert not torch.allclose(encoder(ids), encoder(ids.flip(1)))  # it sees the order
    vectors = encoder.from_embeddings(encoder.words(filled), filled != PAD)
    torch.testing.assert_close(vectors[:, :8], encoder(ids))
    torch.testing.assert_close(vectors[:, -16:], encoder.words(ids).mean(1))
