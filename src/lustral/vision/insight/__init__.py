"""What an erasure changed inside a network: where it looks, what it takes for alike, and the way between the weights."""

from lustral.vision.insight.before_after import Insight, look_inside
from lustral.vision.insight.feature_map import FeatureMap, feature_map, principal_plane
from lustral.vision.insight.grad_cam import HeatMaps, grad_cam
from lustral.vision.insight.weight_line import WeightLine, weight_line

__all__ = [
    "FeatureMap",
    "HeatMaps",
    "Insight",
    "WeightLine",
    "feature_map",
    "grad_cam",
    "look_inside",
    "principal_plane",
    "weight_line",
]
