"""Attacks: one file, one published method."""

from lustral.attacks.badnets import BadNets
from lustral.attacks.blended import Blended

__all__ = ["BadNets", "Blended"]
