"""Text-guided molecule generation and its backdoor: the second modality, beside ``vision`` and never importing it."""
