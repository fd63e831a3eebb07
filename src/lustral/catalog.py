"""Every method by name: one plain literal per interface. Listing a method here also tests it (tests/contracts)."""

from __future__ import annotations

from lustral.attacks import BadNets, Blended
from lustral.detectors import MaskArea
from lustral.inverters import MaxEntropy
from lustral.protocols import Attack, CraftedAttack, Detector, Inverter, Purifier
from lustral.purifiers import BaEraser, BNRefresh, FineTuning, Mesa

ATTACKS: dict[str, type[Attack] | type[CraftedAttack]] = {
    "badnets": BadNets,
    "blended": Blended,
}

INVERTERS: dict[str, type[Inverter]] = {
    "max_entropy": MaxEntropy,
}

DETECTORS: dict[str, type[Detector]] = {
    "mask_area": MaskArea,
}

PURIFIERS: dict[str, type[Purifier]] = {
    "baeraser": BaEraser,
    "bn_refresh": BNRefresh,
    "fine_tuning": FineTuning,
    "mesa": Mesa,
}
