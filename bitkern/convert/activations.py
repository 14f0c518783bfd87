"""The modules of PyTorch whose activation a kernel computes."""

from torch import nn

from bitkern.reference import Activation

ACT_OF: dict[type, Activation] = {nn.ReLU: "relu", nn.SiLU: "silu"}
