"""Every method by name: one plain literal per interface. Listing a method here also tests it (tests/contracts).

What a method needs, costs or asks of the attacker stands in its class, beside its version.
"""

from __future__ import annotations

from lustral.vision.attacks import (
    AdapBlend,
    AdapPatch,
    AdaptiveTrap,
    Additive,
    BadNets,
    Blended,
    Bpp,
    Imc,
    InputAware,
    LabelConsistent,
    LowFrequency,
    Sig,
    Ssba,
    TaCT,
    TrojanNN,
    WaNet,
)
from lustral.vision.detectors import Cascade, MaskArea
from lustral.vision.interfaces import CraftedAttack, Detector, Inverter, Purifier, ReadyAttack, SafeTrainer, Sifter
from lustral.vision.inverters import MaxEntropy
from lustral.vision.purifiers import (
    ANP,
    CLP,
    CNPD,
    DBR,
    FST,
    FTSAM,
    IBAU,
    NAD,
    RNP,
    SAU,
    TSBD,
    Auto,
    BaEraser,
    BNRefresh,
    FinePruning,
    FineTuning,
    Mesa,
    NeuralCleanse,
    NeuralPolarizer,
)
from lustral.vision.safe_training import ABL, DST, PlainTraining, SiftFirst, TrapAndReplace
from lustral.vision.sifters import (
    FCT,
    ActivationClustering,
    BNLikelihood,
    Combined,
    EarlyLoss,
    SpectralSignatures,
    Strip,
)

ATTACKS: dict[str, type[ReadyAttack] | type[CraftedAttack]] = {
    "adap_blend": AdapBlend,
    "adap_patch": AdapPatch,
    "adaptive_trap": AdaptiveTrap,
    "additive": Additive,
    "badnets": BadNets,
    "blended": Blended,
    "bpp": Bpp,
    "imc": Imc,
    "input_aware": InputAware,
    "label_consistent": LabelConsistent,
    "low_frequency": LowFrequency,
    "sig": Sig,
    "ssba": Ssba,
    "tact": TaCT,
    "trojan_nn": TrojanNN,
    "wanet": WaNet,
}

INVERTERS: dict[str, type[Inverter]] = {
    "max_entropy": MaxEntropy,
}

DETECTORS: dict[str, type[Detector]] = {
    "cascade": Cascade,
    "mask_area": MaskArea,
}

PURIFIERS: dict[str, type[Purifier]] = {
    "anp": ANP,
    "auto": Auto,
    "baeraser": BaEraser,
    "bn_refresh": BNRefresh,
    "clp": CLP,
    "cnpd": CNPD,
    "d_br": DBR,
    "fine_pruning": FinePruning,
    "fine_tuning": FineTuning,
    "fst": FST,
    "ft_sam": FTSAM,
    "i_bau": IBAU,
    "mesa": Mesa,
    "nad": NAD,
    "neural_cleanse": NeuralCleanse,
    "neural_polarizer": NeuralPolarizer,
    "rnp": RNP,
    "sau": SAU,
    "tsbd": TSBD,
}

WHEN_TO_USE: dict[str, str] = {  # what `lustral erase --list` says beside a purifier; not every one is anybody's choice
    "auto": "first: it scans, and unlearns every trigger that is found; --anyway where none is",
    "baeraser": "the published loop of auto, for patches",
    "bn_refresh": "as a control",
    "d_br": "with the training set at hand",
    "fine_tuning": "as a control",
    "ft_sam": "a scan names nothing, and doubt remains",
    "fst": "a scan names nothing, and doubt remains",
}

SIFTERS: dict[str, type[Sifter]] = {
    "activation_clustering": ActivationClustering,
    "bn_likelihood": BNLikelihood,
    "combined": Combined,
    "early_loss": EarlyLoss,
    "fct": FCT,
    "spectral": SpectralSignatures,
    "strip": Strip,
}

SAFE_TRAINERS: dict[str, type[SafeTrainer]] = {
    "abl": ABL,
    "d_st": DST,
    "plain": PlainTraining,
    "sift_first": SiftFirst,
    "trap_and_replace": TrapAndReplace,
}
