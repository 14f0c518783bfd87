"""Big Transfer models: the pre-activation ResNet, its variants by name, and checkpoints."""

from bitkern.models.checkpoints import (
    load_npz,
    load_state_dict,
    read_checkpoint,
    read_metadata,
    save_npz,
    save_safetensors,
)
from bitkern.models.registry import create_model
from bitkern.models.resnetv2 import ARCHITECTURES, Architecture, FeatureNet, ResNetV2

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "FeatureNet",
    "ResNetV2",
    "create_model",
    "load_npz",
    "load_state_dict",
    "read_checkpoint",
    "read_metadata",
    "save_npz",
    "save_safetensors",
]
