"""Inverters recover triggers from a model."""

from lustral.vision.inverters.mask_search import FoundMasks, MaskSearch
from lustral.vision.inverters.max_entropy import MaxEntropy

__all__ = ["FoundMasks", "MaskSearch", "MaxEntropy"]
