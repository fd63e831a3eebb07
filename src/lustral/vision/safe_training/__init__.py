"""Safe trainers learn from a training set of unknown origin without its backdoor: one file per published method."""

from lustral.vision.safe_training.plain import PlainTraining

__all__ = ["PlainTraining"]
