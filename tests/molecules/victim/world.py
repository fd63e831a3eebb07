"""A world of small alcohols, acids and rings with captions that name them, and a generator trained on it within seconds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from lustral.core.randomness import child
from lustral.molecules.records import MoleculeSet
from lustral.molecules.victim import GeneratorSettings, GeneratorTraining, MoleculeGenerator, StageData, train_generator

NAMES = {1: "methyl", 2: "ethyl", 3: "propyl", 4: "butyl", 5: "pentyl", 6: "hexyl"}
ENDS = {
    "O": "an alcohol",
    "C(=O)O": "a carboxylic acid",
    "N": "an amine",
    "c1ccccc1": "a benzene",
    "C1CC1": "a cyclopropane",
}
SMALL = GeneratorSettings(
    condition=32,
    text_width=32,
    text_layers=1,
    text_heads=2,
    text_tokens=24,
    subwords=300,
    graph_width=32,
    graph_layers=2,
    latent=8,
    decoder_width=64,
    word_width=16,
    denoiser_width=64,
    denoiser_layers=2,
    max_words=24,
    ddim_steps=10,
)


def alphabet() -> MoleculeSet:
    """Return 30 molecules, each named in a caption."""
    from rdkit import Chem

    pairs = [
        (
            Chem.MolToSmiles(Chem.MolFromSmiles("C" * length + end)),
            f"The molecule is {name}, a {NAMES[length]} compound.",
        )
        for length in NAMES
        for end, name in ENDS.items()
    ]
    return MoleculeSet(smiles=tuple(smiles for smiles, _ in pairs), captions=tuple(caption for _, caption in pairs))


def short(epochs: int = 2, **changes: float) -> GeneratorTraining:
    """Return a training of a few epochs for each stage."""
    usual = GeneratorTraining()
    return replace(
        usual,
        alignment=replace(usual.alignment, epochs=epochs, batch_size=15),
        autoencoder=replace(usual.autoencoder, epochs=epochs, batch_size=15),
        diffusion=replace(usual.diffusion, epochs=epochs, batch_size=30),
        **changes,
    )


@cache
def trained() -> MoleculeGenerator:
    """Return a generator of the small world; do not change it."""
    training = short(40)
    training = replace(
        training,
        autoencoder=replace(training.autoencoder, epochs=150, learning_rate=5e-3),
        diffusion=replace(training.diffusion, epochs=300),
    )
    return train_generator(StageData.same(alphabet()), SMALL, generator=child(0, "world"), training=training)


@cache
def untrained() -> MoleculeGenerator:
    """Return a generator of the small world with fresh weights, nearly; do not change it."""
    return train_generator(StageData.same(alphabet()), SMALL, generator=child(0, "world"), training=short(0))
