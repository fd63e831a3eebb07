"""The one training loop, its recipes, and the modes of a model."""

from lustral.training.augmentation import Augment
from lustral.training.loop import (
    EpochReport,
    Trainer,
    TrainingDiverged,
    adam_step_ratio,
    cross_entropy,
    learning_rate_factor,
)
from lustral.training.modes import Precision, autocast, frozen, has_fast_bfloat16, set_training_mode
from lustral.training.recipes import default_trainer, fine_tuning_recipe

__all__ = [
    "Augment",
    "EpochReport",
    "Precision",
    "Trainer",
    "TrainingDiverged",
    "adam_step_ratio",
    "autocast",
    "cross_entropy",
    "default_trainer",
    "fine_tuning_recipe",
    "frozen",
    "has_fast_bfloat16",
    "learning_rate_factor",
    "set_training_mode",
]
