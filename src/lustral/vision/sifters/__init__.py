"""Sifters find the suspicious images of a training set of unknown origin: one file per published method."""

from lustral.vision.sifters.activation_clustering import ActivationClustering
from lustral.vision.sifters.bn_likelihood import BNLikelihood
from lustral.vision.sifters.combined import Combined
from lustral.vision.sifters.early_loss import EarlyLoss
from lustral.vision.sifters.fct import FCT
from lustral.vision.sifters.spectral import SpectralSignatures
from lustral.vision.sifters.strip import Strip

__all__ = ["FCT", "ActivationClustering", "BNLikelihood", "Combined", "EarlyLoss", "SpectralSignatures", "Strip"]
