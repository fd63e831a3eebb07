"""Purifiers turn a backdoored model and a few clean images into a clean model."""

from lustral.purifiers.baeraser import BaEraser
from lustral.purifiers.bn_refresh import BNRefresh
from lustral.purifiers.fine_tuning import FineTuning
from lustral.purifiers.mesa import Mesa

__all__ = ["BNRefresh", "BaEraser", "FineTuning", "Mesa"]
