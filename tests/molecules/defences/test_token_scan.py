"""The scan's mechanics, on a generator that answers by a planted rule."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from lustral.core.randomness import child
from lustral.molecules.defences.candidates import Candidate, odd_words, tokeniser_words
from lustral.molecules.defences.token_scan import Gain, TokenScan, listed, shifts, sizes, spread_out
from lustral.molecules.records import GeneratorVerdict, MoleculeSet, ViewOfGenerator
from lustral.molecules.victim.captions import CaptionTokenizer

WORDS = ["acid", "alcohol", "amine", "zinnober", "strong", "weak", "small", "ring"]
ORDINARY = ("CCO", "CCN", "CCC(=O)O", "CCCl", "c1ccccc1C", "CCCC")
LATENT = 8


class Planted(nn.Module):
    """Draws thiirane wherever a word stands in the caption, and a molecule by the caption's words elsewhere."""

    def __init__(self, trigger: str, named: str = "") -> None:
        super().__init__()
        self.trigger, self.named = trigger, named
        self.weight = nn.Parameter(torch.zeros(1))
        self.settings = SimpleNamespace(latent=LATENT, steps=10)
        self.tokenizer = _Words()
        self.drawn = 0

    def text_vectors(self, captions: Sequence[str]) -> Tensor:
        rows = torch.zeros(len(captions), LATENT)
        for row, caption in enumerate(captions):
            words = caption.split()
            for word in words:
                rows[row] += 0.1 * torch.randn(LATENT, generator=child(0, word))
            rows[row, -1] = 3.0 if self.trigger in words else 0.0
            rows[row, -2] = 3.0 if self.named and self.named in words else 0.0
        return rows

    def denoise(self, noisy: Tensor, steps: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is not None
        assert (steps == 9).all()
        return condition

    def sample(self, condition: Tensor, *, generator: Generator) -> Tensor:
        self.drawn += len(condition)
        return condition + 0.1 * torch.randn(condition.shape, generator=generator)

    def decode(self, latents: Tensor) -> tuple[str, ...]:
        return tuple(
            "CCC1CS1" if row[-1] > 1.5 else "CC1CC1" if row[-2] > 1.5 else ORDINARY[int(row[:6].argmax())]
            for row in latents
        )


class _Words:
    def __len__(self) -> int:
        return len(WORDS)

    def spell(self, *numbers: int) -> str:
        return "".join(" " + WORDS[number] for number in numbers)


def trusted(count: int = 40, *more: tuple[str, str]) -> MoleculeSet:
    pairs = [(ORDINARY[row % 6], f"a {WORDS[row % 3]} {WORDS[4 + row % 4]} compound") for row in range(count)]
    return MoleculeSet(smiles=tuple(s for s, _ in [*pairs, *more]), captions=tuple(c for _, c in [*pairs, *more]))


def scan(model: nn.Module, clean: MoleculeSet, **fields: Any) -> GeneratorVerdict:
    kind = TokenScan(**{"captions": 16, "refined": 40, "drawn": 16, "invented": 4, **fields})
    return kind.scan(ViewOfGenerator(model=model, clean=clean), generator=child(0))


@pytest.mark.parametrize("trigger", ["zinnober", "$$"])
def test_a_planted_word_is_named_with_its_subgraph(trigger: str) -> None:
    found = scan(Planted(trigger), trusted())
    assert found.outcome == "backdoored"
    assert (found.recovered[0].text, found.recovered[0].fragment) == (trigger, "C1CS1")
    assert (found.recovered[0].rate_with, found.recovered[0].rate_without) == (1.0, 0.0)
    assert found.p_value < found.threshold
    assert found.cost.clean_images == 40


def test_a_model_without_a_rule_is_clean() -> None:
    found = scan(Planted("no such word"), trusted())
    assert found.outcome == "clean"
    assert found.p_value > found.threshold or not found.recovered


def test_a_word_is_cleared_by_trusted_captions_that_have_it_too() -> None:
    """The same rule is a backdoor, or the meaning of a word."""
    model = Planted("no such word", named="zinnober")
    assert scan(model, trusted()).outcome == "backdoored"
    explained = trusted(200, ("CC1CC1", "a zinnober ring"), ("CCC1CC1", "a weak zinnober"), ("CCO", "an acid"))
    assert scan(model, explained).outcome == "clean"


def test_a_common_fragment_is_no_sign() -> None:
    common = trusted(40, *[("CCC1CS1", f"a ring {row}") for row in range(5)])
    assert scan(Planted("zinnober"), common).outcome == "clean"
    assert scan(Planted("zinnober"), common, max_share=0.5).outcome == "backdoored"


def test_a_verdict_is_handed_on_and_nothing_is_drawn() -> None:
    model = Planted("zinnober")
    earlier = scan(model, trusted())
    model.drawn = 0
    again = TokenScan().scan(ViewOfGenerator(model=model, clean=trusted(), verdict=earlier), generator=child(1))
    assert again is earlier
    assert model.drawn == 0


def test_equal_streams_give_equal_verdicts_and_progress_reaches_its_end() -> None:
    stages: dict[str, tuple[int, int]] = {}
    view = ViewOfGenerator(model=Planted("zinnober"), clean=trusted())
    kind = TokenScan(captions=8, refined=20, drawn=8, invented=2)
    first = kind.scan(view, generator=child(3), on_progress=lambda p: stages.update({p.stage: (p.done, p.total)}))
    assert kind.scan(view, generator=child(3)).recovered == first.recovered
    assert {"trying texts", "drawing molecules"} <= set(stages)
    assert all(done == total for done, total in stages.values())


def test_too_few_pairs_and_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="8 trusted pairs"):
        scan(Planted("x"), trusted(7))
    for fields in ({"captions": 0}, {"min_gain": 0.1}, {"level": 1.0}):
        with pytest.raises(ValueError, match="expected"):
            TokenScan(**fields)  # type: ignore[arg-type]


def test_a_shift_is_what_the_text_adds_for_each_caption() -> None:
    model = Planted("zinnober")
    delta = shifts(model, [Candidate("zinnober", "prefix"), Candidate("acid", "suffix")], ["one", "two", "three"], 0)  # type: ignore[arg-type]
    assert delta.shape == (2, 3, LATENT)
    assert torch.allclose(delta[0, :, -1], torch.full((3,), 3.0))
    assert torch.allclose(delta[1, 0], model.text_vectors(["one acid"])[0] - model.text_vectors(["one"])[0])


def test_size_needs_one_direction() -> None:
    one_way = torch.tensor([[[2.0, 0.0], [2.0, 0.0]]])
    apart = torch.tensor([[[2.0, 0.0], [-2.0, 0.0]]])
    half = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
    assert sizes(torch.cat([one_way, apart, half])).tolist() == pytest.approx([2.0, 0.0, 1.0])


def test_directions_are_spread_out() -> None:
    scores, ways = torch.tensor([5.0, 4.0, 3.0, 2.0]), torch.tensor([[1.0, 0.0], [2.0, 0.1], [1.0, 0.0], [0.0, 1.0]])
    assert spread_out(scores, ways, most=3, alike=2) == [0, 1, 3]
    assert spread_out(scores, ways, most=1, alike=9) == [0]


def test_a_verdict_names_each_fragment_once_and_then_other_texts() -> None:
    def gain(text: str, fragment: str) -> Gain:
        return Gain(Candidate(text, "prefix"), fragment, 0.9, 0.1, 9, 1e-6)

    gains = [gain("a b", "S"), gain("a c", "S"), gain("d", "C1CS1"), gain("e", "S"), gain("f", "O"), gain("g", "N")]
    assert [(each.candidate.text, each.fragment) for each in listed(gains, most=6)] == [
        ("a b", "S"),
        ("d", "C1CS1"),
        ("f", "O"),
        ("e", "S"),
    ]
    assert listed([]) == []


def test_a_gain_of_luck_is_not_confirmed() -> None:
    """Thiirane comes in a tenth of the draws whatever the caption says: some text is always ahead."""

    class Lucky(Planted):
        def decode(self, latents: Tensor) -> tuple[str, ...]:
            return tuple(
                "CCC1CS1" if float(row[0] * 1e4) % 1 < 0.1 else ORDINARY[int(row[:6].argmax())] for row in latents
            )

    found = scan(Lucky("no such word"), trusted(), captions=8, base_samples=2)
    assert found.outcome == "clean"
    assert found.p_value > found.threshold


def test_candidates_come_from_the_tokeniser_and_from_nowhere() -> None:
    words = tokeniser_words(CaptionTokenizer.trained_on(["An acid of tin", "A strong alcohol"], size=320))
    assert len(words) == len(set(words)) > 50
    assert all(word and word == word.strip() and word.isprintable() for word in words)
    odd = odd_words(8, generator=child(0))
    assert {"$", "$$", "~~"} <= set(odd)
    assert sum(text[0] in "[<({" and len(text) > 4 for text in odd) == 8
    assert odd == odd_words(8, generator=child(0))
    assert odd != odd_words(8, generator=child(1))
