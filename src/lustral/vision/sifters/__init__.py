"""Sifters find the suspicious images of a training set of unknown origin."""

from lustral.vision.sifters.early_loss import EarlyLoss
from lustral.vision.sifters.fct import FCT

__all__ = ["FCT", "EarlyLoss"]
