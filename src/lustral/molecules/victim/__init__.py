"""The victim: a generator of molecules from captions in three stages, after 3M-Diffusion; its training and its files."""

from lustral.molecules.victim.files import GeneratorFileError, load_generator, save_generator
from lustral.molecules.victim.generator import GeneratorSettings, MoleculeGenerator
from lustral.molecules.victim.training import GeneratorTraining, StageData, train_generator

__all__ = [
    "GeneratorFileError",
    "GeneratorSettings",
    "GeneratorTraining",
    "MoleculeGenerator",
    "StageData",
    "load_generator",
    "save_generator",
    "train_generator",
]
