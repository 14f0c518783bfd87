"""Layers: ``WSConv2d`` for ``nn.Conv2d`` and ``GroupNormAct`` for ``nn.GroupNorm`` + activation."""

import contextvars

import torch
from torch import nn

from bitkern import ops
from bitkern.backend import requested, transformed
from bitkern.ops import group_norm_act, standardize_for
from bitkern.ops.group_norm_act_conv2d import Conv

# torch.fx records calls of these as they are.
torch.fx.wrap("group_norm_act")
torch.fx.wrap("standardize_for")


class _Scope:
    """Where bitkern.standardized keeps the weights of a whole model, standardized in one launch.

    None outside, and in what checkpointing will run again in backward, when they are gone: there
    they were never, unless set inside. Told by the hooks on saved tensors, which it works by.
    """

    def __init__(self):
        self.variable = contextvars.ContextVar("bitkern_standardized_weights", default=None)
        self.reset = self.variable.reset

    def set(self, weights):
        return self.variable.set((weights, _saved_tensors_hooks()))

    def get(self):
        weights, hooks = self.variable.get() or (None, None)
        return weights if weights is None or hooks == _saved_tensors_hooks() else None


def _saved_tensors_hooks():
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


pool = _Scope()


def _refuse_to_script(module):
    raise RuntimeError(
        f"torch.jit.script cannot compile {type(module).__name__}, whose kernels are called from "
        "Python: use torch.export, or script the model before bitkern.convert"
    )


class WSConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose weight is standardized per output filter before every convolution.

    Takes the arguments and has the ``state_dict`` of ``nn.Conv2d``. The keyword-only arguments
    are those of :func:`bitkern.ops.weight_standardize`; with ``gain=True`` the layer owns a
    learnable ``gain`` of shape (out_channels, 1, 1, 1), as in NFNets (arXiv 2101.08692).
    """

    folded = nn.Conv2d  # what bitkern.fold makes of it
    __prepare_scriptable__ = _refuse_to_script

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
        if weights is not None and not self._forward_pre_hooks:  # which may change the weight
            weight = weights.get(self, x)
            if weight is not None and self._serves(weight, x):
                return weight
        return standardize_for(
            x,
            self.weight,
            self.eps,
            gain=self.gain,
            scale=self.scale,
            eps_outside=self.eps_outside,
            unbiased=self.unbiased,
        )

    def _serves(self, weight, x):
        """Whether a weight from the pool, made for another map, serves x as well."""
        trained = self.weight.requires_grad or self.gain is not None and self.gain.requires_grad
        same_dtype = weight.dtype == ops.compute_dtype(x, self.weight)
        return same_dtype and (weight.requires_grad or not (trained and torch.is_grad_enabled()))

    def _conv_forward(self, input, weight, bias):
        weight = self.standardize(input)  # of self.weight, which nn.Conv2d hands in
        bias = None if bias is None else bias.to(weight.dtype)
        return super()._conv_forward(input, weight, bias)


class GroupNormAct(nn.GroupNorm):
    """``nn.GroupNorm`` followed by an activation (``"relu"``, ``"silu"`` or ``"none"``), fused.

    Takes the arguments and has the ``state_dict`` of ``nn.GroupNorm``.
    """

    __prepare_scriptable__ = _refuse_to_script

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

    def fusion(self):
        """The activation that the kernel applies, and the modules that are called after it."""
        return self.act, ()

    def forward(self, input):
        act, modules = self.fusion()
        y = group_norm_act(input, self.num_groups, self.weight, self.bias, self.eps, act)
        for module in modules:
            y = module(y)
        return y

    def extra_repr(self):
        return f"{super().extra_repr()}, act={self.act!r}"


def watched(module):
    """Whether somebody sees a module being called: a hook, or a forward put over its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def fused_act(norm):
    """The activation of a norm that a kernel computes with it; None if it is no such module."""
    # By the function, not the class: classes that bitkern.convert puts in have it, and a subclass
    # with a forward of its own has not.
    if getattr(type(norm), "forward", None) is not GroupNormAct.forward or watched(norm):
        return None
    act, modules = norm.fusion()
    return None if modules else act


def _fusible_conv(module):
    """The convolution that a module is and nothing but; None if it cannot be fused."""
    if type(module) is nn.Sequential and len(module) == 1 and not watched(module):
        return _fusible_conv(module[0])
    if not isinstance(module, nn.Conv2d) or watched(module):
        return None
    forwards = type(module).forward, type(module)._conv_forward
    if forwards[0] is not nn.Conv2d.forward or forwards[1] not in _CONV_FORWARDS:
        return None
    plain = module.bias is None and module.padding_mode == "zeros"
    return module if plain and not isinstance(module.padding, str) else None


_CONV_FORWARDS = nn.Conv2d._conv_forward, WSConv2d._conv_forward


def norm_act_conv(norm, convs, x, residual=None, recompute=True):
    """``s = x (+ residual)`` and ``[conv(norm(s)) for conv in convs]``, fused; returns (s, list).

    What a pre-activation block is made of. For backward it keeps s and computes ``norm(s)`` once
    more (:func:`bitkern.ops.group_norm_act_conv2d`); with ``recompute=False`` it keeps both.
    Modules with hooks are called as modules, so that the hooks see what they always see.

    Args:
        norm: a :class:`GroupNormAct`; any other module is called.
        convs: modules applied to ``norm(s)``; fused where they are bare :class:`WSConv2d` or
            ``nn.Conv2d``.
        x, residual: (N, C, H, W); residual may be None.
    """
    act = fused_act(norm)
    if act is None:
        s = x if residual is None else x + residual
        activation = norm(s)
        return s, [conv(activation) for conv in convs]
    affine = norm.num_groups, norm.weight, norm.bias, norm.eps, act
    fusible = [_fusible_conv(conv) for conv in convs]
    # The node is eager and differentiated once. Whoever asks for plain PyTorch gets it.
    plain = torch.compiler.is_compiling() or requested() == "reference" or transformed()
    if recompute and None not in fusible and not plain:
        weights = [c.standardize(x) if isinstance(c, WSConv2d) else c.weight for c in fusible]
        if all(w.dtype == x.dtype for w in weights):
            specs = [Conv(c.stride, c.padding, c.dilation, c.groups) for c in fusible]
            return ops.group_norm_act_conv2d(x, residual, *affine, weights, specs)
    if residual is None:
        s, activation = x, group_norm_act(x, *affine)
    else:
        s, activation = ops.add_group_norm_act(x, residual, *affine)
    return s, [conv(activation) for conv in convs]
