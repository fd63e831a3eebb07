"""Attacks: one file, one published method."""

from lustral.vision.attacks.adap_blend import AdapBlend
from lustral.vision.attacks.adap_patch import AdapPatch
from lustral.vision.attacks.adaptive_trap import AdaptiveTrap
from lustral.vision.attacks.additive import Additive
from lustral.vision.attacks.badnets import BadNets
from lustral.vision.attacks.blended import Blended
from lustral.vision.attacks.bpp import Bpp
from lustral.vision.attacks.imc import Imc
from lustral.vision.attacks.input_aware import InputAware
from lustral.vision.attacks.label_consistent import LabelConsistent
from lustral.vision.attacks.low_frequency import LowFrequency
from lustral.vision.attacks.sig import Sig
from lustral.vision.attacks.ssba import Ssba
from lustral.vision.attacks.tact import TaCT
from lustral.vision.attacks.trojan_nn import TrojanNN
from lustral.vision.attacks.wanet import WaNet

__all__ = [
    "AdapBlend",
    "AdapPatch",
    "AdaptiveTrap",
    "Additive",
    "BadNets",
    "Blended",
    "Bpp",
    "Imc",
    "InputAware",
    "LabelConsistent",
    "LowFrequency",
    "Sig",
    "Ssba",
    "TaCT",
    "TrojanNN",
    "WaNet",
]
