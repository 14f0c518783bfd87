"""Layers: ``WSConv2d`` for ``nn.Conv2d`` and ``GroupNormAct`` for ``nn.GroupNorm`` + activation."""

import torch
import torch.nn.functional as F
from torch import nn

from bitkern import ops


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

    def _conv_forward(self, input, weight, bias):
        padding = self.padding
        if self.padding_mode != "zeros":
            mode = self.padding_mode
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=mode)
            padding = 0
        return ops.ws_conv2d(
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.eps,
            gain=self.gain,
            scale=self.scale,
            eps_outside=self.eps_outside,
            unbiased=self.unbiased,
        )


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
