"""Defences of text-guided generators: what looks at training pairs, what looks at a model, and what repairs one."""

from lustral.molecules.defences.association import AssociationSift
from lustral.molecules.defences.fragment_check import BlockedGenerator, FragmentCheck

__all__ = ["AssociationSift", "BlockedGenerator", "FragmentCheck"]
