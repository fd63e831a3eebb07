"""Text-guided molecule generation and its backdoor: the second modality, beside ``vision`` and never importing it.

What it needs beyond the core (RDKit, SELFIES, tokenizers, FCD) is the extra ``lustral[molecules]``.
"""
