"""What a backend is: an implementation of some kernels on some devices."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Backend:
    """Where kernels run, what they take, why they cannot, and their launchers.

    A backend is a subclass with one instance, handed to ``bitkern.backends.register``.

    Attributes:
        name: what ``bitkern.use_backend`` and ``explain`` call it.
        devices: the types of device its kernels run on.
        auto: those of them on which ``"auto"`` takes it.
        dtypes: the kernels it has, and the dtypes that the tensors of each may have.
    """

    name: str
    devices: Sequence[str] = ()
    auto: Sequence[str] = ()
    dtypes: Mapping[str, Sequence[torch.dtype]] = {}

    def runs_on(self, device: str) -> bool:
        """Whether the kernels take tensors of a type of device."""
        return device in self.devices

    def unavailable(self) -> str | None:
        """Why no kernel can run in this process; None if they can. Asked once."""
        return None

    def launchers(self, kernel: str) -> Any:
        """What holds ``<kernel>_forward``, ``<kernel>_backward`` and maybe ``<kernel>_recompute``.

        For ``weight_standardize`` maybe ``weight_standardize_sgd``, too: without it the optimizer
        steps by itself. Their signatures are those of ``bitkern.reference``.
        """
        raise NotImplementedError
