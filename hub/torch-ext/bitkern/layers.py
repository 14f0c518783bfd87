"""Layers whose forward ``kernels.kernelize`` puts into layers of PyTorch, timm or transformers.

Each has the name of the class that it stands for. ``WSConv2d``
is for a subclass of ``nn.Conv2d`` that standardizes as BiT does and has no eps of its own.
"""

from torch import Tensor, nn

from .nn.activations import act_of, is_noop
from .nn.fused import has_hooks
from .ops import group_norm_act, ws_conv2d


class _Layer(nn.Module):
    has_backward: bool = True
    can_torch_compile: bool = True


def _refuse_subclass(module: nn.Module) -> None:
    """Raise TypeError for a forward below the class that a layer stands for: it would be lost."""
    for cls in type(module).__mro__:
        if "kernel_layer_name" in vars(cls):
            return
        if "forward" in vars(cls):
            raise TypeError(
                f"kernelize: {cls.__name__} has a forward of its own, which the kernel would "
                "replace: map its base with condition=lambda module: type(module) is Base"
            )


class _Norm(_Layer):
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class _Conv(_Layer):
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int


def _group_norm_act(norm: _Norm, x: Tensor, *after: nn.Module) -> Tensor:
    """The norm and what comes after it, an activation that is last in the same kernel."""
    _refuse_subclass(norm)
    affine = norm.num_groups, norm.weight, norm.bias, norm.eps
    *between, last = after
    act = act_of(last)
    if act is not None and all(map(is_noop, between)) and not any(map(has_hooks, after)):
        return group_norm_act(x, *affine, act)
    x = group_norm_act(x, *affine, "none")
    for module in after:
        x = module(x)
    return x


def _ws_conv2d(conv: _Conv, x: Tensor, eps: float, gain: Tensor | None = None, scale: float = 1.0):
    _refuse_subclass(conv)
    args = conv.stride, conv.padding, conv.dilation, conv.groups, eps
    return ws_conv2d(x, conv.weight, conv.bias, *args, gain=gain, scale=scale)


class GroupNorm(_Norm):
    """PyTorch's, and timm's."""

    def forward(self, input: Tensor) -> Tensor:
        _refuse_subclass(self)
        return group_norm_act(input, self.num_groups, self.weight, self.bias, self.eps, "none")


class GroupNormAct(_Norm):
    """timm's."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return _group_norm_act(self, x, self.drop, self.act)


class BitGroupNormActivation(_Norm):
    """transformers'."""

    activation: nn.Module

    def forward(self, hidden_state: Tensor) -> Tensor:
        return _group_norm_act(self, hidden_state, self.activation)


class WSConv2d(_Conv):
    """BiT's own, with an eps of 1e-10."""

    padding_mode: str

    def forward(self, input: Tensor) -> Tensor:
        if self.padding_mode != "zeros":
            raise ValueError(f"padding_mode: expected 'zeros', got {self.padding_mode!r}")
        return _ws_conv2d(self, input, 1e-10)


class StdConv2d(_Conv):
    """timm's."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return _ws_conv2d(self, x, self.eps)


class ScaledStdConv2d(_Conv):
    """timm's, of NFNets."""

    eps: float
    gain: Tensor
    scale: float

    def forward(self, x: Tensor) -> Tensor:
        return _ws_conv2d(self, x, self.eps, self.gain, self.scale)


class WeightStandardizedConv2d(_Conv):
    """transformers'."""

    eps: float
    pad: nn.Module | None

    def forward(self, hidden_state: Tensor) -> Tensor:
        if self.pad is not None:
            hidden_state = self.pad(hidden_state)
        return _ws_conv2d(self, hidden_state, self.eps)
