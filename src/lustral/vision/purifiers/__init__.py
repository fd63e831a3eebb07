"""Purifiers turn a backdoored model and a few clean images into a clean model."""

from lustral.vision.purifiers.anp import ANP
from lustral.vision.purifiers.auto import Auto
from lustral.vision.purifiers.baeraser import BaEraser
from lustral.vision.purifiers.bn_refresh import BNRefresh
from lustral.vision.purifiers.clp import CLP
from lustral.vision.purifiers.cnpd import CNPD
from lustral.vision.purifiers.d_br import DBR
from lustral.vision.purifiers.fine_pruning import FinePruning
from lustral.vision.purifiers.fine_tuning import FineTuning
from lustral.vision.purifiers.fst import FST
from lustral.vision.purifiers.ft_sam import FTSAM
from lustral.vision.purifiers.i_bau import IBAU
from lustral.vision.purifiers.mesa import Mesa
from lustral.vision.purifiers.nad import NAD
from lustral.vision.purifiers.neural_cleanse import NeuralCleanse
from lustral.vision.purifiers.neural_polarizer import NeuralPolarizer
from lustral.vision.purifiers.rnp import RNP
from lustral.vision.purifiers.sau import SAU
from lustral.vision.purifiers.tsbd import TSBD

__all__ = [
    "ANP",
    "CLP",
    "CNPD",
    "DBR",
    "FST",
    "FTSAM",
    "IBAU",
    "NAD",
    "RNP",
    "SAU",
    "TSBD",
    "Auto",
    "BNRefresh",
    "BaEraser",
    "FinePruning",
    "FineTuning",
    "Mesa",
    "NeuralCleanse",
    "NeuralPolarizer",
]
