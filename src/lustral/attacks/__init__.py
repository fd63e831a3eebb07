"""Attacks: one file, one published method."""

from lustral.attacks.adap_blend import AdapBlend
from lustral.attacks.adap_patch import AdapPatch
from lustral.attacks.badnets import BadNets
from lustral.attacks.blended import Blended
from lustral.attacks.bpp import Bpp
from lustral.attacks.imc import Imc
from lustral.attacks.input_aware import InputAware
from lustral.attacks.label_consistent import LabelConsistent
from lustral.attacks.low_frequency import LowFrequency
from lustral.attacks.sig import Sig
from lustral.attacks.ssba import Ssba
from lustral.attacks.tact import TaCT
from lustral.attacks.trojan_nn import TrojanNN
from lustral.attacks.wanet import WaNet

__all__ = [
    "AdapBlend",
    "AdapPatch",
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
