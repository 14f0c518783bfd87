"""The operators: checks, choice of implementation, autograd, registration with torch.library."""

from bitkern.ops.convolution import Conv
from bitkern.ops.group_norm_act import add_group_norm_act, group_norm_act
from bitkern.ops.group_norm_act_conv import group_norm_act_conv
from bitkern.ops.group_norm_add_relu import group_norm_add_relu
from bitkern.ops.weight_standardize import weight_standardize, weight_standardize_all
from bitkern.ops.ws_conv2d import ws_conv2d

__all__ = [
    "Conv",
    "add_group_norm_act",
    "group_norm_act",
    "group_norm_act_conv",
    "group_norm_add_relu",
    "weight_standardize",
    "weight_standardize_all",
    "ws_conv2d",
]
