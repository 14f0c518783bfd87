"""The interface of a backend: kernels for some devices; and functions that launchers share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bitkern.reference import Activation, compute_dtype
from bitkern.variant import SgdOptions, Variant

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = "group_norm_act", "group_norm_add_relu", "weight_standardize"


class Launchers(Protocol):
    """The launchers of all kernels, which ``bitkern.reference`` documents; a backend has some."""

    def group_norm_act_forward(
        self, x: Tensor, residual: Tensor | None, num_groups: int, weight: Tensor | None,
        bias: Tensor | None, eps: float, act: Activation, /,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]: ...  # fmt: skip

    def group_norm_act_recompute(
        self, summed: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None,
        mean: Tensor, rstd: Tensor, act: Activation, /,
    ) -> Tensor: ...  # fmt: skip

    def group_norm_act_backward(
        self, dy: Tensor, dsummed: Tensor | None, summed: Tensor, num_groups: int,
        weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, act: Activation,
        need_dx: bool, need_dparams: bool, /,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...  # fmt: skip

    def group_norm_add_relu_forward(
        self, x: Tensor, residual: Tensor, num_groups: int, weight: Tensor | None,
        bias: Tensor | None, eps: float, /,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip

    def group_norm_add_relu_backward(
        self, dy: Tensor, x: Tensor, y: Tensor, num_groups: int, weight: Tensor | None,
        bias: Tensor | None, mean: Tensor, rstd: Tensor, need_dx: bool, need_dresidual: bool,
        need_dparams: bool, /,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]: ...  # fmt: skip

    def weight_standardize_forward(
        self, weights: Sequence[Tensor], gains: Sequence[Tensor] | None, scales: Sequence[float],
        variant: Variant, dtype: torch.dtype, channels_last: bool, /,
    ) -> tuple[list[Tensor], Tensor]: ...  # fmt: skip

    def weight_standardize_backward(
        self, douts: Sequence[Tensor], weights: Sequence[Tensor], gains: Sequence[Tensor] | None,
        scales: Sequence[float], stats: Tensor, variant: Variant, /,
    ) -> tuple[list[Tensor], list[Tensor] | None]: ...  # fmt: skip

    def weight_standardize_sgd(
        self, douts: Sequence[Tensor], weights: Sequence[Tensor], buffers: Sequence[Tensor],
        scales: Sequence[float], stats: Tensor, variant: Variant, options: SgdOptions, /,
    ) -> None: ...  # fmt: skip


class Backend:
    """An implementation of some kernels: devices, dtypes, availability and launchers.

    A backend is a subclass with one instance, handed to ``bitkern.backends.register``.

    Attributes:
        name: what ``bitkern.use_backend`` and ``explain`` call it.
        devices: the types of device its kernels run on.
        auto: those of them on which ``"auto"`` takes it.
        dtypes: the kernels it has, and the dtypes that the tensors of each may have.
        expected: ``bitkern.backends.choose`` warns where ``"auto"`` finds it unavailable.
    """

    name: str
    devices: Sequence[str] = ()
    auto: Sequence[str] = ()
    dtypes: Mapping[str, Sequence[torch.dtype]] = {}
    expected: bool = False

    def runs_on(self, device: str) -> bool:
        """Return whether the kernels take tensors of a type of device."""
        return device in self.devices

    def unavailable(self) -> str | None:
        """Why no kernel can run in this process; None if they can. Asked once."""
        return None

    def launchers(self, kernel: str) -> Any:
        """The module or object that has the functions of ``Launchers`` for a kernel.

        ``group_norm_act_recompute`` and ``weight_standardize_sgd`` are optional: without them the
        reference recomputes, and the optimizer steps by itself.
        """
        raise NotImplementedError


def empty_normalized(
    x: Tensor, residual: Tensor | None, num_groups: int
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """``(summed or None, y, mean, rstd)`` of ``group_norm_act_forward``, to be written to."""
    summed = None if residual is None else torch.empty_like(x)
    mean = x.new_empty((x.shape[0], num_groups), dtype=compute_dtype(x.dtype))
    return summed, torch.empty_like(x), mean, torch.empty_like(mean)


def empty_standardized(
    weights: Sequence[Tensor], dtype: torch.dtype, channels_last: bool
) -> tuple[list[Tensor], Tensor]:
    """``(outs, stats)`` of ``weight_standardize_forward``, to be written to."""
    format = torch.channels_last if channels_last else torch.contiguous_format
    outs = [torch.empty_like(w, dtype=dtype, memory_format=format) for w in weights]
    filters = sum(w.shape[0] for w in weights)
    return outs, weights[0].new_empty((2, filters), dtype=compute_dtype(weights[0].dtype))


def add_relu_forward(
    norm_forward: Callable[..., Any], x: Tensor, residual: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Run ``group_norm_act_forward`` with the residual, in the format of x, as its shortcut."""
    _, y, mean, rstd = norm_forward(x, None, *args, "relu", shortcut=residual)
    return y, mean, rstd


def add_relu_backward(
    norm_backward: Callable[..., Any], dy: Tensor, x: Tensor, y: Tensor, num_groups: int,
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, need_dx: bool,
    need_dresidual: bool, need_dparams: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Run ``group_norm_act_backward`` with y and dshortcut; dy, y in the format of x."""
    dresidual = torch.empty_like(x) if need_dresidual else None
    args = num_groups, weight, bias, mean, rstd, "relu", need_dx, need_dparams
    dx, dweight, dbias = norm_backward(dy, None, x, *args, y=y, dshortcut=dresidual)
    return dx, dresidual, dweight, dbias
