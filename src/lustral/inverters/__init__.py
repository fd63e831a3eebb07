"""Inverters recover triggers from a model."""

from lustral.inverters.mask_search import FoundMasks, MaskSearch
from lustral.inverters.max_entropy import MaxEntropy

__all__ = ["FoundMasks", "MaskSearch", "MaxEntropy"]
