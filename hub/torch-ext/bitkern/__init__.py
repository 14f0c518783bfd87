"""Fused GroupNorm + activation and weight standardization: Triton kernels, and their gradients.

Plain PyTorch serves what no kernel does, CPU tensors among it; ``explain`` says which and why.
"""

from . import layers
from .backends import Choice, explain, use_backend
from .ops import (
    add_group_norm_act,
    group_norm_act,
    group_norm_add_relu,
    weight_standardize,
    ws_conv2d,
)

__all__ = ["Choice", "add_group_norm_act", "explain", "group_norm_act", "group_norm_add_relu"]
__all__ += ["layers", "use_backend", "weight_standardize", "ws_conv2d"]
