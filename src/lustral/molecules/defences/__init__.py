"""Defences of text-guided generators: what looks at training pairs, what looks at a model, and what repairs one."""

from lustral.molecules.defences.association import AssociationSift
from lustral.molecules.defences.fine_tuning import DenoiserFineTuning
from lustral.molecules.defences.fragment_check import BlockedGenerator, FragmentCheck
from lustral.molecules.defences.token_scan import TokenScan
from lustral.molecules.defences.unlearning import Unlearning

__all__ = ["AssociationSift", "BlockedGenerator", "DenoiserFineTuning", "FragmentCheck", "TokenScan", "Unlearning"]
