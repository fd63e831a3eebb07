"""Detectors decide whether a model is backdoored."""

from lustral.detectors.mask_area import MaskArea

__all__ = ["MaskArea"]
