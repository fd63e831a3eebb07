"""Safe trainers learn from a training set of unknown origin without its backdoor: one file per published method."""

from lustral.vision.safe_training.abl import ABL
from lustral.vision.safe_training.d_st import DST
from lustral.vision.safe_training.plain import PlainTraining
from lustral.vision.safe_training.sift_first import SiftFirst
from lustral.vision.safe_training.trap_and_replace import TrapAndReplace

__all__ = ["ABL", "DST", "PlainTraining", "SiftFirst", "TrapAndReplace"]
