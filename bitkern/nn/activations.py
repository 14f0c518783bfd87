"""The modules of PyTorch whose activation a kernel computes, and those that may do nothing."""

from torch import nn

from bitkern.reference import Activation

ACT_OF: dict[type, Activation] = {nn.ReLU: "relu", nn.SiLU: "silu"}
_DROPOUTS = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d


def act_of(module: nn.Module) -> Activation | None:
    """The activation that a module computes, and a kernel as well; None if it is no such module."""
    return ACT_OF.get(type(module))


def may_be_idle(module: nn.Module) -> bool:
    """Whether a module is of a class that returns its input, always or at times."""
    return type(module) in (nn.Identity, *_DROPOUTS)


def idle(module: nn.Module) -> bool:
    """Whether a module returns its input, as it stands."""
    if isinstance(module, _DROPOUTS) and type(module) in _DROPOUTS:
        return module.p == 0.0 or not module.training
    return type(module) is nn.Identity
