"""Networks, builders by name, and model files."""

from lustral.models.architecture import (
    Architecture,
    ArchitectureError,
    CodeRefusedError,
    parse_architecture,
    runs_user_code,
)
from lustral.models.build import NETWORKS, build_classifier, look_at
from lustral.models.checkpoint import LoadedModel, load_model, save_like, save_model
from lustral.models.classifier import Classifier, Normalise
from lustral.models.conditioned import Conditioned, arch_of
from lustral.models.preact_resnet import FlatPreActResNet18, PreActResNet
from lustral.models.resnet import ResNet
from lustral.models.small_cnn import SmallCNN
from lustral.models.state_dicts import ModelFileError
from lustral.models.vgg import VGG
from lustral.models.wide_resnet import WideResNet

__all__ = [
    "NETWORKS",
    "VGG",
    "Architecture",
    "ArchitectureError",
    "Classifier",
    "CodeRefusedError",
    "Conditioned",
    "FlatPreActResNet18",
    "LoadedModel",
    "ModelFileError",
    "Normalise",
    "PreActResNet",
    "ResNet",
    "SmallCNN",
    "WideResNet",
    "arch_of",
    "build_classifier",
    "load_model",
    "look_at",
    "parse_architecture",
    "runs_user_code",
    "save_like",
    "save_model",
]
