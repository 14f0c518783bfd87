"""The interface of a backend: an implementation of some kernels on some devices."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bitkern.reference import Activation
from bitkern.variant import SgdOptions, Variant

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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
