"""Purifiers turn a backdoored model and a few clean images into a clean model."""

from lustral.purifiers.anp import ANP
from lustral.purifiers.baeraser import BaEraser
from lustral.purifiers.bn_refresh import BNRefresh
from lustral.purifiers.clp import CLP
from lustral.purifiers.cnpd import CNPD
from lustral.purifiers.fine_pruning import FinePruning
from lustral.purifiers.fine_tuning import FineTuning
from lustral.purifiers.fst import FST
from lustral.purifiers.ft_sam import FTSAM
from lustral.purifiers.i_bau import IBAU
from lustral.purifiers.mesa import Mesa
from lustral.purifiers.nad import NAD
from lustral.purifiers.neural_cleanse import NeuralCleanse
from lustral.purifiers.neural_polarizer import NeuralPolarizer
from lustral.purifiers.rnp import RNP
from lustral.purifiers.sau import SAU
from lustral.purifiers.tsbd import TSBD

__all__ = [
    "ANP",
    "CLP",
    "CNPD",
    "FST",
    "FTSAM",
    "IBAU",
    "NAD",
    "RNP",
    "SAU",
    "TSBD",
    "BNRefresh",
    "BaEraser",
    "FinePruning",
    "FineTuning",
    "Mesa",
    "NeuralCleanse",
    "NeuralPolarizer",
]
