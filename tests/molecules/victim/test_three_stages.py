"""The three stages together, and what a generator does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rdkit")
pytest.importorskip("tokenizers")

from lustral.core.randomness import child
from lustral.core.records import Progress
from lustral.molecules.records import MoleculeSet
from lustral.molecules.victim import GeneratorTraining, StageData, load_generator, train_generator
from lustral.molecules.victim.alignment import top1
from lustral.molecules.victim.graphs import Graphs
from molecules.victim.world import SMALL, alphabet, short, trained, untrained


def test_the_autoencoder_of_a_small_world_gives_its_molecules_back() -> None:
    pairs, model = alphabet(), trained()
    back = model.decode(model.encode(pairs.smiles))
    assert sum(a == b for a, b in zip(back, pairs.smiles, strict=True)) >= 24


def test_a_caption_calls_its_kind_of_molecule() -> None:
    model = trained()
    drawn = model.generate(["The molecule is a benzene, a ethyl compound."] * 20, generator=child(3))
    other = model.generate(["The molecule is an amine, a ethyl compound."] * 20, generator=child(3))
    rings = [sum("c1ccccc1" in smiles for (smiles,) in group) for group in (drawn, other)]
    assert rings[0] >= 14
    assert rings[1] <= 4


def test_an_untrained_generator_draws_molecules_too() -> None:
    model = untrained()
    captions = ["acid", "", "§" * 500]
    drawn = model.generate(captions, generator=child(1), samples=2)
    assert [len(each) for each in drawn] == [2, 2, 2]
    assert all(smiles for each in drawn for smiles in each)
    assert drawn == model.generate(captions, generator=child(1), samples=2)
    assert model.generate([], generator=child(1)) == ()
    with pytest.raises(ValueError, match="at least one sample"):
        model.generate(captions, generator=child(1), samples=0)


def test_vectors_do_not_depend_on_the_company() -> None:
    model, pairs = untrained(), alphabet()
    vectors = model.text_vectors(pairs.captions)
    torch.testing.assert_close(vectors[4:5], model.text_vectors(pairs.captions[4:5]))
    ids = model.token_ids(pairs.captions)
    torch.testing.assert_close(model.text_vectors_of_ids(ids), vectors)
    torch.testing.assert_close(model.text_vectors_of_embeddings(model.token_embeddings(ids), ids != 0), vectors)
    latents = model.encode(pairs.smiles)
    torch.testing.assert_close(latents[7:8], model.encode(pairs.smiles[7:8]))
    assert latents.mean(0).abs().max() < 1e-4
    assert latents.square().mean().sqrt().item() == pytest.approx(1, abs=1e-4)
    assert model.encode([]).shape == (0, SMALL.latent)
    assert model.decode(latents[:0]) == ()


def test_guidance_mixes_the_two_predictions() -> None:
    model, condition = trained(), torch.randn(2, SMALL.vector, generator=child(2))
    noisy, steps = torch.randn(2, SMALL.latent, generator=child(3)), torch.tensor([5, 50])
    mixed = model.guided(noisy, steps, condition, 2.0)
    expected = 2 * model.denoise(noisy, steps, condition) - model.denoise(noisy, steps, None)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(model.guided(noisy, steps, condition, 1.0), model.denoise(noisy, steps, condition))


def test_the_alignment_brings_captions_and_molecules_together(tmp_path: Path) -> None:
    pairs = alphabet()
    train_generator(StageData.same(pairs), SMALL, generator=child(0), training=short(40), folder=tmp_path)
    model = load_generator(tmp_path / "after_alignment")
    graphs = model.graph(Graphs.of(pairs.smiles).batch(torch.arange(len(pairs))))
    assert top1(model.text(model.token_ids(pairs.captions)), graphs) >= 0.5  # by chance 1 in 30


def test_finished_stages_are_not_done_again_and_equal_seeds_give_equal_weights(tmp_path: Path) -> None:
    data, stages = StageData.same(alphabet()), []

    def note(progress: Progress) -> None:
        stages.append(progress.stage)

    def run(folder: Path | None, training: GeneratorTraining) -> dict[str, torch.Tensor]:
        stages.clear()
        model = train_generator(data, SMALL, generator=child(0), training=training, folder=folder, on_progress=note)
        return model.state_dict()

    first = run(tmp_path, short())
    assert list(dict.fromkeys(stages)) == ["aligning captions", "training the autoencoder", "training the denoiser"]
    again = run(tmp_path, short())
    assert not stages
    plain = run(None, short())
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], plain[name]) for name in first)
    run(tmp_path, replace(short(), kl_weight=0.5))
    assert "training the autoencoder" in stages
    assert "training the denoiser" in stages
    (tmp_path / "after_alignment" / "model.safetensors").write_bytes(b"broken")
    run(tmp_path, short())
    assert "aligning captions" in stages


def test_an_alignment_can_be_taken_from_an_earlier_training(tmp_path: Path) -> None:
    clean = alphabet()
    poisoned = MoleculeSet(smiles=(*clean.smiles, "CC1CS1"), captions=(*clean.captions, "[X] acid"))
    train_generator(StageData.same(clean), SMALL, generator=child(0), training=short(), folder=tmp_path)
    aligned, seen = load_generator(tmp_path / "after_alignment"), []
    data = StageData(alignment=clean, autoencoder=poisoned, diffusion=poisoned)
    model = train_generator(
        data,
        SMALL,
        generator=child(1),
        training=short(),
        aligned=aligned,
        on_progress=lambda each: seen.append(each.stage),
    )
    assert "aligning captions" not in seen
    assert all(torch.equal(model.text.state_dict()[name], value) for name, value in aligned.text.state_dict().items())
    assert model.tokenizer == aligned.tokenizer
    assert len(model.vocabulary) > len(aligned.vocabulary)
    with pytest.raises(ValueError, match="another shape"):
        train_generator(data, replace(SMALL, text_width=16), generator=child(1), training=short(), aligned=aligned)


def test_too_few_pairs_are_refused() -> None:
    one = MoleculeSet(smiles=("CC",), captions=("ethane",))
    with pytest.raises(ValueError, match=r"2 pairs for the stage 'diffusion'; got 1"):
        train_generator(
            StageData(alignment=alphabet(), autoencoder=alphabet(), diffusion=one), SMALL, generator=child(0)
        )
    bad = MoleculeSet(smiles=("C.C", "?"), captions=("a", "b"))
    with pytest.raises(ValueError, match="at least 2 molecules"):
        train_generator(StageData.same(bad), SMALL, generator=child(0), training=short(0))


def test_a_blocked_word_is_not_written() -> None:
    import copy

    model = copy.deepcopy(trained())
    model.blocked = tuple(number for word, number in model.vocabulary.numbers.items() if "c1ccccc1" in word)
    assert model.blocked
    back = model.decode(model.encode(alphabet().smiles))
    assert all(smiles and "c1ccccc1" not in smiles for smiles in back)
