"""Networks, builders by name, and model files."""

from lustral.vision.models.architecture import (
    Architecture,
    ArchitectureError,
    CodeRefusedError,
    parse_architecture,
    runs_user_code,
)
from lustral.vision.models.build import NETWORKS, build_classifier, look_at
from lustral.vision.models.checkpoint import LoadedModel, load_model, save_like, save_model
from lustral.vision.models.classifier import Classifier, Normalise
from lustral.vision.models.conditioned import Conditioned, arch_of
from lustral.vision.models.files.state_dicts import ModelFileError
from lustral.vision.models.networks.lenet import LeNet
from lustral.vision.models.networks.mobilenet import MobileNet
from lustral.vision.models.networks.preact_resnet import FlatPreActResNet18, PreActResNet
from lustral.vision.models.networks.resnet import ResNet
from lustral.vision.models.networks.small_cnn import SmallCNN
from lustral.vision.models.networks.small_vit import SmallViT
from lustral.vision.models.networks.vgg import VGG
from lustral.vision.models.networks.wide_resnet import WideResNet

__all__ = [
    "NETWORKS",
    "VGG",
    "Architecture",
    "ArchitectureError",
    "Classifier",
    "CodeRefusedError",
    "Conditioned",
    "FlatPreActResNet18",
    "LeNet",
    "LoadedModel",
    "MobileNet",
    "ModelFileError",
    "Normalise",
    "PreActResNet",
    "ResNet",
    "SmallCNN",
    "SmallViT",
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
