"""SGD whose step takes standardized weights' gradients, in one pass with their backward.

In separate steps a weight is read by standardization's backward, its gradient written and read
again, the weight read once more. Here a filter's gradient is made, used and forgotten in cache:
weights, gradients and momentum are read once, weights and momentum written.
"""

from collections.abc import Iterator, Set

import torch
from torch import Tensor

from bitkern import _torch
from bitkern.variant import SgdOptions


class SGD(torch.optim.SGD):
    """``torch.optim.SGD``, the same in all but what ``bitkern.standardized`` does with it.

    It has the same arguments, ``step``, hooks and ``state_dict``: each loads the other's. A block
    that is given the optimizer ends with its step::

        optimizer = bitkern.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
        with bitkern.standardized(model, optimizer=optimizer):
            for x, y in micro_batches:
                loss(model(x), y).backward()

    which is that of ``torch.optim.SGD`` but for rounding, faster. See ``bitkern.standardized``.
    """

    @property
    def has_hooks(self) -> bool:
        """True if step hooks are registered, which may read gradients."""
        return _torch.step_hooked(self)

    def momenta(self, params: Set[Tensor]) -> Iterator[tuple[SgdOptions, dict[Tensor, Tensor]]]:
        """The buffers of those parameters that have momentum by now, group by group.

        The first step of a parameter, which makes its buffer, is PyTorch's.
        """
        for group in self.param_groups:
            if group["momentum"] == 0 or group["maximize"] or group["differentiable"]:
                continue
            found = {p: self.state[p] for p in group["params"] if p in params and p in self.state}
            buffers = {p: state.get("momentum_buffer") for p, state in found.items()}
            yield (
                SgdOptions(*(group[name] for name in SgdOptions._fields)),
                {p: buffer for p, buffer in buffers.items() if buffer is not None},
            )
