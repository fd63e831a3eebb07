"""Detectors decide whether a model is backdoored."""

from lustral.vision.detectors.cascade import Cascade
from lustral.vision.detectors.mask_area import MaskArea

__all__ = ["Cascade", "MaskArea"]
