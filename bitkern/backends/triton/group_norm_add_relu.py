"""Launchers of GroupNorm + residual + ReLU: those of GroupNorm + activation, with a shortcut."""

from functools import partial

from bitkern.backends.backend import add_relu_backward, add_relu_forward
from bitkern.backends.triton import group_norm_act as norm

group_norm_add_relu_forward = partial(add_relu_forward, norm.group_norm_act_forward)
group_norm_add_relu_backward = partial(add_relu_backward, norm.group_norm_act_backward)
