"""All-reduce of gradients in buckets, overlapped with the backward pass."""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping

import torch
from torch import Tensor, nn

from bitkern.nn.layers import WSConv2d
from bitkern.nn.standardized import GradAccumulator
from bitkern.reference import compute_dtype
from bitkern.transfer import ranks


class GradientReducer(GradAccumulator):
    """Sums a step's gradients over micro-batches and processes, for ``standardized``.

    In the last micro-batch each gradient is copied to its slot in a bucket when it is ready, and
    the all-reduce of a full bucket starts. Slots depend on the model alone, so the rounding of sums
    does too: last layers first, in buckets of about ``ranks.BUCKET_BYTES``, reduced in this order.
    Standardization is linear, so for a layer's weight the gradient of the standardized weight is
    summed, from which the gain's follows. A gradient without a free slot, as when a weight is used
    both ways, is summed after the backward pass.

    All processes must have gradients for the same parameters. A single process has no buckets, and
    sums over micro-batches only.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameters: list[nn.Parameter] = []  # those that require gradients
        self.buckets: list[Tensor] = []
        self.slot_counts: list[int] = []  # of each bucket
        self.slots: dict[Hashable, tuple[int, Tensor]] = {}  # (bucket, view) by parameter or layer
        self.filled: dict[Tensor, tuple[Hashable, Tensor]] = {}  # (key, gradient) by slot
        self.waits: list[Callable[[], None]] = []  # of the all-reduces that have started
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []  # in the last micro-batch
        if ranks.world_size() == 1:
            return
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        convs = [module for module in model.modules() if isinstance(module, WSConv2d)]
        weight_of = {conv.gain: conv.weight for conv in convs if conv.gain is not None}
        reduced = {weight_of.get(p, p) for p in self.parameters}
        ordered = [p for p in reversed([*model.parameters()]) if p in reduced]
        for i, bucket in enumerate(ranks.buckets(ordered)):
            sizes = [p.numel() for p in bucket]
            flat = bucket[0].new_zeros(sum(sizes), dtype=compute_dtype(bucket[0].dtype))
            self.buckets.append(flat)
            self.slot_counts.append(len(bucket))
            for p, part in zip(bucket, torch.split(flat, sizes), strict=True):
                self.slots[p] = i, part.view(p.shape)
        self.slots |= {c: self.slots[c.weight] for c in convs if c.weight in self.slots}

    @contextlib.contextmanager
    def reduce(self) -> Iterator[None]:
        """Run the micro-batches of a step; the sums are complete after the block.

        A process that fails takes part in all collectives, so that no other waits for it.
        """
        self.sums, self.filled, self.waits = {}, {}, []
        self.missing = [*self.slot_counts]
        try:
            yield
            for p in self.parameters:  # without a gradient in the last micro-batch
                if p.grad is not None:
                    self._take(p)
            for key in [*self.sums]:
                self._fill_slot(key)
        except BaseException:
            with contextlib.suppress(ranks.RankError):  # the original error matters more
                self._wait()
            raise
        finally:
            for hook in self.hooks:
                hook.remove()
            self.hooks = []
        self._wait()

    def begin_last_micro_batch(self) -> None:
        """Reduce gradients when they are ready, from now on."""
        for p in self.parameters:
            hook = p.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
            self.hooks.append(hook)

    def add(self, key: Hashable, grad: Tensor) -> None:
        super().add(key, grad)
        if self.hooks:
            self._fill_slot(key)

    def _take(self, p: Tensor) -> None:
        grad, p.grad = p.grad, None
        assert grad is not None
        self.add(p, grad)

    def _fill_slot(self, key: Hashable) -> None:
        """Copy a sum to its slot, if that is free."""
        if key not in self.slots or self.slots[key][1] in self.filled:
            return
        bucket, slot = self.slots[key]
        grad = self.sums.pop(key)
        self.filled[slot] = key, grad
        slot.copy_(grad)
        self.missing[bucket] -= 1
        while len(self.waits) < len(self.buckets) and not self.missing[len(self.waits)]:
            self._start()

    def _start(self) -> None:
        self.waits.append(ranks.all_reduce_async(self.buckets[len(self.waits)]))

    def _wait(self) -> None:
        while len(self.waits) < len(self.buckets):
            self._start()
        for wait in self.waits:
            wait()

    @contextlib.contextmanager
    def complete(self) -> Iterator[Mapping[Hashable, Tensor]]:
        """Assign the parameters' gradients, and yield those of standardized weights."""
        ranks.all_reduce_tensors(self.sums.values())
        for slot, (key, grad) in self.filled.items():
            self.add(key, grad.copy_(slot))
        for p in self.parameters:
            if p in self.sums:
                p.grad = self.sums.pop(p)
        with ranks.propagate_errors():
            yield self.sums
        self.sums, self.filled = {}, {}
