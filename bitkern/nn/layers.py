"""Layers, and their description of what can be fused with their neighbours."""

from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from bitkern import _torch
from bitkern.nn.current import current
from bitkern.ops import Conv, group_norm_act
from bitkern.ops.convolution import numeric_padding
from bitkern.ops.group_norm_act import check_act, check_companion, modulated
from bitkern.ops.ws_conv2d import standardize_for
from bitkern.reference import Activation, compute_dtype
from bitkern.variant import Variant

# torch.fx records calls of these as they are.
torch.fx.wrap("group_norm_act")
torch.fx.wrap("standardize_for")

Pair = int | tuple[int, int]


def _refuse_to_script(module: nn.Module) -> NoReturn:
    raise RuntimeError(
        f"torch.jit.script cannot compile {type(module).__name__}, whose kernels are called from "
        "Python: use torch.export, or script the model before bitkern.convert"
    )


def conv_fusion(conv: Any) -> Conv | None:
    """The arguments of a convolution of PyTorch; None if they cannot be fused."""
    padding = numeric_padding(conv.padding, conv.dilation, conv.kernel_size)
    if padding is None or conv.padding_mode != "zeros":
        return None
    more = conv.transposed, conv.output_padding, conv.groups
    return Conv(conv.stride, padding, conv.dilation, *more)


class WSConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose weight is standardized per output filter before every convolution.

    Takes the arguments and has the ``state_dict`` of ``nn.Conv2d``. The keyword-only arguments
    are those of ``bitkern.ops.weight_standardize``; with ``gain=True`` the layer owns a
    learnable ``gain`` of shape (out_channels, 1, 1, 1), as in NFNets (arXiv 2101.08692).
    """

    folded: ClassVar[Any] = nn.Conv2d  # the class that bitkern.fold assigns
    __prepare_scriptable__ = _refuse_to_script

    gain: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-10,
        gain: bool = False,
        scale: float = 1.0,
        eps_outside: bool = False,
        unbiased: bool = False,
    ) -> None:
        shape = in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        super().__init__(*shape, bias, padding_mode, device, dtype)  # type: ignore[arg-type]
        self.eps = eps
        self.scale = scale
        self.eps_outside = eps_outside
        self.unbiased = unbiased
        self.gain = None
        if gain:
            self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1, device=device, dtype=dtype))

    @property
    def variant(self) -> Variant:
        """The variant of the formula, shared by layers that are standardized in one launch."""
        return Variant(self.eps, self.eps_outside, self.unbiased)

    def standardize(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Standardize ``weight``, by default the layer's own, for a convolution of ``x``.

        The result has the dtype and the layout that the convolution works in.
        """
        weight = self.weight if weight is None else weight
        weights = None if torch.compiler.is_compiling() else current()
        shared = None if weights is None else weights.get(self, weight, x)
        if shared is not None:
            return shared
        return standardize_for(x, weight, self.variant, gain=self.gain, scale=self.scale)

    def fusion(self) -> Conv | None:
        """The convolution that the layer computes; None in a subclass that computes more."""
        cls = type(self)
        own = cls.forward is nn.Conv2d.forward and cls._conv_forward is WSConv2d._conv_forward
        return conv_fusion(self) if own else None

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.standardize(input, weight)
        bias = None if bias is None else bias.to(weight.dtype)
        y: Tensor = _torch.conv_forward(self, input, weight, bias)
        return y


def _per_sample(name: str, tensor: Tensor, x: Tensor) -> Tensor:
    """A scale or shift as (N, C), in the dtype of the arithmetic."""
    shape = x.shape[:2]
    with_pixels = *shape, *[1] * (x.ndim - 2)
    if tensor.shape not in (shape, with_pixels):
        raise ValueError(
            f"{name}: expected shape {tuple(shape)} or {with_pixels} for the channels of input, "
            f"got {tuple(tensor.shape)}"
        )
    check_companion(name, tensor, x)
    return tensor.reshape(shape).to(compute_dtype(tensor.dtype))


class GroupNormAct(nn.GroupNorm):
    """``nn.GroupNorm`` followed by an activation, fused.

    Takes the arguments and has the ``state_dict`` of ``nn.GroupNorm``; ``act`` is that of
    ``bitkern.ops.group_norm_act``.
    """

    __prepare_scriptable__ = _refuse_to_script

    act: Activation

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        act: Activation = "relu",
    ) -> None:
        check_act(act)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.act = act

    def takes(self, input: Tensor) -> bool:
        """Return whether the kernel is used for an input, instead of a fallback."""
        return True

    def fusion(self) -> tuple[Activation, tuple[nn.Module, ...]]:
        """The activation that the kernel applies, and the modules that are called after it."""
        return self.act, ()

    def forward(
        self, input: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """Maps (N, num_channels, *) -> the same shape, dtype and memory format.

        With ``scale`` or ``shift`` it is ``act(norm(input) * (1 + scale) + shift)``, as in the
        conditional norms of diffusion models, and as fast: one norm whose weight and bias are
        those of each sample.

        Args:
            input: (N, num_channels, *), any floating dtype and strides.
            scale, shift: (N, num_channels), or (N, num_channels, 1, …) with as many dimensions as
                ``input``; any floating dtype and strides, or None for 0.

        Raises:
            ValueError: a shape or a device does not fit.
            TypeError: a dtype does not fit.
        """
        act, modules = self.fusion()
        if scale is not None:
            scale = 1 + _per_sample("scale", scale, input)
        if shift is not None:
            shift = _per_sample("shift", shift, input)
        weight, bias = modulated(self.weight, self.bias, scale, shift)
        y = group_norm_act(input, self.num_groups, weight, bias, self.eps, act)
        for module in modules:
            y = module(y)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"
