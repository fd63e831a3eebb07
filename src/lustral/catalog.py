"""Every method by name: one plain literal per interface. Listing a method here also tests it (tests/contracts)."""

from __future__ import annotations

from lustral.vision.attacks import (
    AdapBlend,
    AdapPatch,
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
from lustral.vision.detectors import MaskArea
from lustral.vision.interfaces import Attack, CraftedAttack, Detector, Inverter, Purifier
from lustral.vision.inverters import MaxEntropy
from lustral.vision.purifiers import (
    ANP,
    CLP,
    CNPD,
    FST,
    FTSAM,
    IBAU,
    NAD,
    RNP,
    SAU,
    TSBD,
    BaEraser,
    BNRefresh,
    FinePruning,
    FineTuning,
    Mesa,
    NeuralCleanse,
    NeuralPolarizer,
)

ATTACKS: dict[str, type[Attack] | type[CraftedAttack]] = {
    "adap_blend": AdapBlend,
    "adap_patch": AdapPatch,
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

THREAT_MODELS: dict[str, str] = {  # what the attacker controls
    "adap_blend": "supplies data: dirty labels, and cover images with true ones",
    "adap_patch": "supplies data: dirty labels, and cover images with true ones",
    "badnets": "supplies data: dirty labels",
    "blended": "supplies data: dirty labels",
    "bpp": "controls training",
    "imc": "controls training, which optimises the trigger too",
    "input_aware": "controls training, and trains trigger networks along",
    "label_consistent": "supplies data: true labels; has a surrogate model",
    "low_frequency": "supplies data: dirty labels; has a surrogate model",
    "sig": "supplies data: true labels",
    "ssba": "supplies data: dirty labels; has an encoder of his own",
    "tact": "supplies data: dirty labels on one source class, cover images with true ones",
    "trojan_nn": "supplies data: dirty labels; has a surrogate model",
    "wanet": "controls training",
}

INVERTERS: dict[str, type[Inverter]] = {
    "max_entropy": MaxEntropy,
}

DETECTORS: dict[str, type[Detector]] = {
    "mask_area": MaskArea,
}

PURIFIERS: dict[str, type[Purifier]] = {
    "anp": ANP,
    "baeraser": BaEraser,
    "bn_refresh": BNRefresh,
    "clp": CLP,
    "cnpd": CNPD,
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

PURIFIER_NEEDS: dict[str, str] = {  # beyond clean images
    "anp": "batch normalisation",
    "baeraser": "a backdoor whose trigger can be searched",
    "bn_refresh": "batch normalisation; a control",
    "clp": "convolutions that go straight into batch normalisation",
    "cnpd": "a convolution or linear layer before the head; changes the architecture",
    "fine_pruning": "a linear head",
    "fine_tuning": "nothing; a control",
    "fst": "a linear head",
    "ft_sam": "nothing",
    "i_bau": "second derivatives",
    "mesa": "a backdoor whose trigger can be searched",
    "nad": "feature maps",
    "neural_cleanse": "a backdoor whose trigger can be searched; five classes",
    "neural_polarizer": "a convolution or linear layer before the head",
    "rnp": "batch normalisation",
    "sau": "nothing",
    "tsbd": "nothing",
}

PURIFIER_COSTS: dict[
    str, float
] = {  # passes of each of 2,500 clean images forward and back (benchmarks/eraser_costs.py)
    "anp": 62,
    "baeraser": 68,
    "bn_refresh": 0.6,
    "clp": 0.2,
    "cnpd": 95,
    "fine_pruning": 17,
    "fine_tuning": 17,
    "fst": 17,
    "ft_sam": 48,
    "i_bau": 14,
    "mesa": 34,
    "nad": 30,
    "neural_cleanse": 19,
    "neural_polarizer": 95,
    "rnp": 18,
    "sau": 102,
    "tsbd": 99,
}
