"""The modules whose activation a kernel computes, and those that may do nothing."""

from collections.abc import Mapping

from torch import nn

from bitkern.reference import Activation

# The classes of PyTorch; a file of bitkern.convert.libraries has those of its library.
ACTS: dict[type, Activation] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.LeakyReLU: "leaky_relu",
    nn.GELU: "gelu",
    nn.Mish: "mish",
    nn.Hardswish: "hardswish",
}
_DROPOUTS = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d


def act_of(module: nn.Module, acts: Mapping[type, Activation] = ACTS) -> Activation | None:
    """The activation that a module is; None for a subclass, or with other arguments."""
    if type(module) is nn.LeakyReLU and module.negative_slope != 0.01:
        return None
    if type(module) is nn.GELU and module.approximate != "none":
        return None
    return acts.get(type(module))


def is_noop(module: nn.Module) -> bool:
    """Return True if a module returns its input unchanged."""
    if isinstance(module, _DROPOUTS) and type(module) in _DROPOUTS:
        return module.p == 0.0 or not module.training
    return type(module) is nn.Identity
