"""The variants of weight standardization, and of the optimizer's step that its backward takes."""

from typing import NamedTuple

import torch


class Variant(NamedTuple):
    """The options that layers standardized in one launch have in common.

    ``eps`` is added to the variance of a filter, or to its root with ``eps_outside``; ``unbiased``
    divides the sum of squares by K - 1 instead of K. A layer's own ``scale`` and gain are factors.
    """

    eps: float = 1e-10
    eps_outside: bool = False
    unbiased: bool = False


class SgdOptions(NamedTuple):
    """The options of one parameter group of ``torch.optim.SGD``."""

    lr: float | torch.Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool

    def lr_on(self, device: torch.device) -> torch.Tensor:
        """``lr`` where kernels of a device read it, in float32; nothing waits for the device."""
        if not isinstance(self.lr, torch.Tensor):
            return torch.full((), self.lr, dtype=torch.float32, device=device)
        lr = self.lr.float()
        return lr if lr.device == device else lr.to(device, non_blocking=True)
