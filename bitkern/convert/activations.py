"""The modules whose activation a kernel computes."""

from collections.abc import Mapping

from torch import nn

from bitkern.reference import Activation

_ACTS: Mapping[type, Activation] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.LeakyReLU: "leaky_relu",
    nn.GELU: "gelu",
    nn.Mish: "mish",
    nn.Hardswish: "hardswish",
}


def act_of(module: nn.Module, more: Mapping[type, Activation] | None = None) -> Activation | None:
    """The activation that a module is; None for a subclass, or other arguments than the kernels'.

    ``more`` are classes of a library's own.
    """
    if type(module) is nn.LeakyReLU and module.negative_slope != 0.01:
        return None
    if type(module) is nn.GELU and module.approximate != "none":
        return None
    return _ACTS.get(type(module)) or (more or {}).get(type(module))
