"""Every defence of this modality by name: one plain literal per interface. Importing it loads no RDKit and no tokenizers."""

from __future__ import annotations

from typing import Any

from lustral.molecules.defences import AssociationSift, DenoiserFineTuning, FragmentCheck, TokenScan, Unlearning

PAIR_SIFTERS: dict[str, type[Any]] = {
    "association": AssociationSift,
    "fragment_check": FragmentCheck,
}

SCANNERS: dict[str, type[Any]] = {
    "token_scan": TokenScan,
}

ERASERS: dict[str, type[Any]] = {
    "unlearning": Unlearning,
    "denoiser_fine_tuning": DenoiserFineTuning,
}
