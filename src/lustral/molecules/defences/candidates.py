"""The texts that a scan tries as triggers: every word of the model's own tokeniser, and odd ones that no caption has."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator

from lustral.core.randomness import fork
from lustral.molecules.badgraph import TextInsertion

End = Literal["prefix", "suffix"]
VOWELS, CONSONANTS = "aeiou", "bcdfghklmnprstvwxz"
BRACKETS = ("[{}]", "<{}>", "({})", "{{{}}}")


class Candidate(NamedTuple):
    """A text at one end of a caption."""

    text: str
    position: End

    @property
    def trigger(self) -> TextInsertion:
        """The candidate as a trigger."""
        return TextInsertion(text=self.text, position=self.position)


def tokeniser_words(tokenizer: Any) -> list[str]:
    """Return the texts of a tokeniser's sub-words: printable, without blanks at their ends, each once.

    Args:
        tokenizer: with a length and ``spell(number)``.
    """
    spelt = (tokenizer.spell(number).strip() for number in range(len(tokenizer)))
    return list(dict.fromkeys(text for text in spelt if text and text.isprintable() and " " not in text))


def odd_words(count: int, *, generator: Generator, pieces: Sequence[str] = ()) -> list[str]:
    """Return texts that captions hardly have: symbols alone and twice, and invented words, bare and in brackets.

    Args:
        count: of invented words; each is tried bare and in one kind of brackets.
        generator: draws them.
        pieces: as many more words are put together from two or three of these.
    """
    stream = fork(generator, "odd words")
    invented = list(_invented(count, stream))
    if pieces:
        draws = torch.randint(len(pieces), (count, 3), generator=stream).tolist()
        invented += ["".join(pieces[place] for place in row[: 2 + row[0] % 2]) for row in draws]
    bracketed = [BRACKETS[place % len(BRACKETS)].format(word) for place, word in enumerate(invented)]
    return [sign * times for times in (1, 2) for sign in string.punctuation] + bracketed + invented


def _invented(count: int, generator: Generator) -> Iterator[str]:
    for _ in range(count):
        draws = torch.randint(10_000, (7,), generator=generator).tolist()
        letters = [(CONSONANTS, VOWELS)[place % 2] for place in range(5 + 2 * (draws[-1] % 2))]
        yield "".join(kind[draw % len(kind)] for kind, draw in zip(letters, draws, strict=False))
