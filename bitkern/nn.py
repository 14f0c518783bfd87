"""Layers: ``WSConv2d`` for ``nn.Conv2d`` and ``GroupNormAct`` for ``nn.GroupNorm`` + activation."""

import contextvars

import torch
from torch import nn

from bitkern import ops
from bitkern.ops.group_norm_act_conv2d import Conv

# Where bitkern.standardized keeps the weights of a whole model, standardized in one launch.
pool = contextvars.ContextVar("bitkern_standardized_weights", default=None)


class WSConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose weight is standardized per output filter before every convolution.

    Takes the arguments and has the ``state_dict`` of ``nn.Conv2d``. The keyword-only arguments
    are those of :func:`bitkern.ops.weight_standardize`; with ``gain=True`` the layer owns a
    learnable ``gain`` of shape (out_channels, 1, 1, 1), as in NFNets (arXiv 2101.08692).
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        device=None,
        dtype=None,
        *,
        eps=1e-10,
        gain=False,
        scale=1.0,
        eps_outside=False,
        unbiased=False,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.eps = eps
        self.scale = scale
        self.eps_outside = eps_outside
        self.unbiased = unbiased
        self.gain = None
        if gain:
            self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1, device=device, dtype=dtype))

    def standardize(self, x):
        """The standardized weight for a convolution of ``x``: its dtype, its layout."""
        weights = None if torch.compiler.is_compiling() else pool.get()
        weight = None if weights is None else weights.get(self, x)
        if weight is not None:
            return weight
        return ops.standardize_for(
            x,
            self.weight,
            self.eps,
            gain=self.gain,
            scale=self.scale,
            eps_outside=self.eps_outside,
            unbiased=self.unbiased,
        )

    def _conv_forward(self, input, weight, bias):
        weight = self.standardize(input)  # of self.weight, which nn.Conv2d hands in
        bias = None if bias is None else bias.to(weight.dtype)
        return super()._conv_forward(input, weight, bias)


class GroupNormAct(nn.GroupNorm):
    """``nn.GroupNorm`` followed by an activation (``"relu"``, ``"silu"`` or ``"none"``), fused.

    Takes the arguments and has the ``state_dict`` of ``nn.GroupNorm``.
    """

    def __init__(
        self,
        num_groups,
        num_channels,
        eps=1e-5,
        affine=True,
        device=None,
        dtype=None,
        *,
        act="relu",
    ):
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.act = ops.checked_act(act)

    def forward(self, input):
        return ops.group_norm_act(
            input, self.num_groups, self.weight, self.bias, self.eps, self.act
        )

    def extra_repr(self):
        return f"{super().extra_repr()}, act={self.act!r}"


def watched(module):
    """Whether hooks want to see a module being called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _fusible_conv(module):
    """The convolution that a module is and nothing but; None if it cannot be fused."""
    if type(module) is nn.Sequential and len(module) == 1 and not watched(module):
        return _fusible_conv(module[0])
    plain = type(module) in (WSConv2d, nn.Conv2d) and not watched(module)
    if plain and module.bias is None and module.padding_mode == "zeros":
        return None if isinstance(module.padding, str) else module
    return None


def norm_act_conv(norm, convs, x, residual=None, recompute=True):
    """``s = x (+ residual)`` and ``[conv(norm(s)) for conv in convs]``, fused; returns (s, list).

    What a pre-activation block is made of. For backward it keeps s and computes ``norm(s)`` once
    more (:func:`bitkern.ops.group_norm_act_conv2d`); with ``recompute=False`` it keeps both.
    Modules with hooks are called as modules, so that the hooks see what they always see.

    Args:
        norm: a :class:`GroupNormAct`.
        convs: modules applied to ``norm(s)``; fused where they are bare :class:`WSConv2d` or
            ``nn.Conv2d``.
        x, residual: (N, C, H, W); residual may be None.
    """
    if type(norm) is not GroupNormAct or watched(norm):
        s = x if residual is None else x + residual
        activation = norm(s)
        return s, [conv(activation) for conv in convs]
    affine = norm.num_groups, norm.weight, norm.bias, norm.eps, norm.act
    fusible = [_fusible_conv(conv) for conv in convs]
    if recompute and None not in fusible and not torch.compiler.is_compiling():
        weights = [c.standardize(x) if isinstance(c, WSConv2d) else c.weight for c in fusible]
        if all(w.dtype == x.dtype for w in weights):
            specs = [Conv(c.stride, c.padding, c.dilation, c.groups) for c in fusible]
            return ops.group_norm_act_conv2d(x, residual, *affine, weights, specs)
    if residual is None:
        s, activation = x, ops.group_norm_act(x, *affine)
    else:
        s, activation = ops.add_group_norm_act(x, residual, *affine)
    return s, [conv(activation) for conv in convs]
