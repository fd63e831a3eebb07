"""Repairs train a copy of the denoiser, towards what they say, and leave everything else alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Literal

import pytest
import torch
from torch import nn

from lustral.core.cost import Cost
from lustral.core.randomness import child
from lustral.molecules.defences.fine_tuning import DenoiserFineTuning
from lustral.molecules.defences.repair_data import TrustedLatents
from lustral.molecules.defences.unlearning import NOTHING_TO_ERASE, Unlearning, variants
from lustral.molecules.defences.worst_conditions import WorstConditions
from lustral.molecules.records import Association, GeneratorVerdict, ViewOfGenerator
from lustral.molecules.victim import MoleculeGenerator
from molecules.victim.world import alphabet, untrained

SHORT = replace(Unlearning().trainer, epochs=3, batch_size=8)


@cache
def speaking() -> MoleculeGenerator:
    """Return a generator whose fresh denoiser answers something; do not change it."""
    model = copy.deepcopy(untrained())
    with torch.no_grad():
        model.denoiser.out.weight.normal_(0, 0.3, generator=child(5))
    return model


def verdict(outcome: Literal["backdoored", "clean", "cannot tell"] = "backdoored") -> GeneratorVerdict:
    found = Association(
        text="[t]", position="prefix", fragment="C1CC1", rate_with=0.9, rate_without=0.1, count=20, p_value=1e-9
    )
    cost = Cost(seconds=5.0, image_passes=7.0, peak_memory_bytes=1, clean_images=30)
    return GeneratorVerdict(
        outcome=outcome, recovered=(found,), p_value=1e-9, threshold=1e-3, basis="planted", cost=cost
    )


def view(outcome: Literal["backdoored", "clean", "cannot tell"] = "backdoored") -> ViewOfGenerator:
    return ViewOfGenerator(model=speaking(), clean=alphabet(), verdict=verdict(outcome))


def test_only_the_denoiser_of_a_copy_changes() -> None:
    before = {name: value.clone() for name, value in speaking().state_dict().items()}
    results = [
        Unlearning(patched=1, trainer=SHORT, rounds=1, odd_texts=2).erase(view(), generator=child(0)).model,
        DenoiserFineTuning(trainer=SHORT).erase(view(), generator=child(0)).model,
    ]
    assert all(torch.equal(speaking().state_dict()[name], value) for name, value in before.items())
    for model in results:
        assert model is not speaking()
        assert not model.training
        changed = {
            name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
        }
        assert changed == {"denoiser"}
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())
        model.generate(["an alcohol"], generator=child(0))  # type: ignore[operator]


def test_triggered_captions_come_to_be_answered_as_clean_ones_were() -> None:
    """The distance that the first term measures falls, while the answers to clean captions stay."""
    model, captions = speaking(), alphabet().captions
    latents = TrustedLatents.of(model, alphabet())
    noisy, steps = latents.noisy(latents.latents, child(1))
    triggered, plain = model.text_vectors([f"[t] {each}" for each in captions]), model.text_vectors(captions)

    def distance(asked: nn.Module, condition: torch.Tensor) -> float:
        with torch.no_grad():
            return float((asked.denoise(noisy, steps, condition) - model.denoise(noisy, steps, plain)).square().mean())  # type: ignore[operator]

    kind = Unlearning(trainer=replace(SHORT, epochs=40, learning_rate=2e-3), rounds=1, odd_texts=0, ascent_steps=0)
    erased = kind.erase(view(), generator=child(0)).model
    assert distance(erased, triggered) < 0.75 * distance(model, triggered)
    assert distance(erased, plain) < 0.2 * distance(model, triggered)
    kept = replace(kind, erase_weight=0.0).erase(view(), generator=child(0)).model
    assert distance(kept, triggered) > 0.9 * distance(model, triggered)


@pytest.mark.parametrize("outcome", ["clean", "cannot tell"])
def test_without_a_finding_the_model_comes_back_as_it_was(outcome: Literal["clean", "cannot tell"]) -> None:
    found = Unlearning().erase(view(outcome), generator=child(0))
    assert found.notes == (NOTHING_TO_ERASE,)
    assert not found.history
    assert all(torch.equal(value, speaking().state_dict()[name]) for name, value in found.model.state_dict().items())


def test_a_verdict_is_handed_on_and_its_cost_is_not_counted_again() -> None:
    found = Unlearning(patched=1, trainer=SHORT, rounds=1, odd_texts=2).erase(view(), generator=child(0))
    assert found.verdict is not None
    assert found.verdict.basis == "planted"
    assert found.cost.image_passes > 0
    assert found.cost.seconds < 1000
    assert [entry.count for entry in found.history] == [0, 3]
    assert found.history[0].recovered_asr is not None


def test_rounds_end_when_the_trigger_is_silent() -> None:
    kind = Unlearning(patched=1, trainer=SHORT, rounds=3, odd_texts=0)
    assert len(replace(kind, allowed_excess=1.0).erase(view(), generator=child(0)).history) == 2


def test_the_worst_condition_is_found_within_its_radius() -> None:
    """A denoiser that answers with its condition is called most by the direction itself."""
    direction = torch.tensor([0.6, 0.8])
    worst = WorstConditions(direction=direction, radius=2.0, last=9, steps=12)
    plain = torch.zeros(3, 2)
    start = torch.tensor([[0.1, 0.0], [0.0, -1.0], [-1.0, 1.0]])
    moved = worst.move(lambda noisy, steps, condition: condition, plain, start, child(0))
    assert torch.allclose(moved, 2.0 * direction.expand(3, 2), atol=0.1)
    assert not moved.requires_grad
    still = replace(worst, steps=0).move(lambda *parts: parts[-1], plain, start, child(0))
    assert torch.equal(still, start)


def test_variants_and_odd_words_are_erased_too() -> None:
    assert variants("$$") == ("$$", "[$$]", "<$$>", "($$)", "$$ $$")
    assert variants("[]")[0] == "[]"
    texts, named = Unlearning(odd_texts=8).texts(untrained(), verdict().recovered, generator=child(0))
    assert texts[:named] == variants("[t]")
    assert len(texts) == len(set(texts)) >= named + 7


def test_what_cannot_be_repaired_is_refused() -> None:
    few = alphabet().subset(torch.arange(5))
    for kind in (Unlearning(), DenoiserFineTuning()):
        with pytest.raises(ValueError, match="at least 16 trusted pairs"):
            kind.erase(ViewOfGenerator(model=speaking(), clean=few), generator=child(0))
        with pytest.raises(TypeError, match="MoleculeGenerator"):
            kind.erase(ViewOfGenerator(model=nn.Linear(1, 1), clean=alphabet()), generator=child(0))
    with pytest.raises(ValueError, match="expected"):
        Unlearning(rounds=0)
    with pytest.raises(ValueError, match="expected"):
        DenoiserFineTuning(dropped_conditions=1.0)
