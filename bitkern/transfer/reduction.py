"""The gradients' sums over all processes, on their way while the backward pass goes on."""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping

import torch
from torch import Tensor, nn

from bitkern.nn.layers import WSConv2d
from bitkern.nn.standardized import Sums
from bitkern.reference import compute_dtype
from bitkern.transfer import ranks


class Reduction(Sums):
    """What sums a step's gradients over micro-batches and processes, for ``standardized``.

    In the last micro-batch each gradient is copied to its place in a bucket as it comes, and the
    sum of a full bucket begins. Where a parameter lies depends on the model alone, as does then
    the rounding of its sum: last layers first, in buckets of about ``ranks.BUCKET_BYTES``,
    which begin in this order. Standardization is linear, so of a layer's weight the gradient
    summed is that of the standardized one; with it the gain has its own. What finds no place, as
    when a weight is used both ways, is added up after the backward pass.

    All processes are expected to find gradients for the same parameters. A single one has no
    buckets, and nothing happens but the sum over micro-batches.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameters: list[nn.Parameter] = []  # that are trained
        self.buckets: list[Tensor] = []
        self.counts: list[int] = []  # of the places in each bucket
        self.places: dict[Hashable, tuple[int, Tensor]] = {}  # by parameter or layer
        self.given: dict[Tensor, tuple[Hashable, Tensor]] = {}  # what was copied, by place
        self.waits: list[Callable[[], None]] = []  # of the buckets that have begun
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []  # in the last micro-batch
        if ranks.world_size() == 1:
            return
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        convs = [module for module in model.modules() if isinstance(module, WSConv2d)]
        weight_of = {conv.gain: conv.weight for conv in convs if conv.gain is not None}
        wanted = {weight_of.get(p, p) for p in self.parameters}
        placed = [p for p in reversed([*model.parameters()]) if p in wanted]
        for i, bucket in enumerate(ranks.buckets(placed)):
            sizes = [p.numel() for p in bucket]
            flat = bucket[0].new_zeros(sum(sizes), dtype=compute_dtype(bucket[0].dtype))
            self.buckets.append(flat)
            self.counts.append(len(bucket))
            for p, part in zip(bucket, torch.split(flat, sizes), strict=True):
                self.places[p] = i, part.view(p.shape)
        self.places |= {c: self.places[c.weight] for c in convs if c.weight in self.places}

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """Run the micro-batches of a step; the sums are there after it.

        A process that fails takes part in all of them, so that it leaves no other waiting.
        """
        self.sums, self.given, self.waits = {}, {}, []
        self.missing = [*self.counts]
        try:
            yield
            for p in self.parameters:  # whose gradients came before the last micro-batch alone
                if p.grad is not None:
                    self._take(p)
            for key in [*self.sums]:
                self._put(key)
        except BaseException:
            with contextlib.suppress(ranks.RankError):  # the error at hand matters more
                self._wait()
            raise
        finally:
            for hook in self.hooks:
                hook.remove()
            self.hooks = []
        self._wait()

    def begin(self) -> None:
        """From now on what comes completes the sums over micro-batches."""
        for p in self.parameters:
            hook = p.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
            self.hooks.append(hook)

    def add(self, key: Hashable, grad: Tensor) -> None:
        super().add(key, grad)
        if self.hooks:
            self._put(key)

    def _take(self, p: Tensor) -> None:
        grad, p.grad = p.grad, None
        assert grad is not None
        self.add(p, grad)

    def _put(self, key: Hashable) -> None:
        """Copy a sum to its place, if that is free."""
        if key not in self.places or self.places[key][1] in self.given:
            return
        bucket, place = self.places[key]
        grad = self.sums.pop(key)
        self.given[place] = key, grad
        place.copy_(grad)
        self.missing[bucket] -= 1
        while len(self.waits) < len(self.buckets) and not self.missing[len(self.waits)]:
            self._start()

    def _start(self) -> None:
        self.waits.append(ranks.adding_up(self.buckets[len(self.waits)]))

    def _wait(self) -> None:
        while len(self.waits) < len(self.buckets):
            self._start()
        for wait in self.waits:
            wait()

    @contextlib.contextmanager
    def complete(self) -> Iterator[Mapping[Hashable, Tensor]]:
        """Give the parameters their gradients, those of standardized weights to the block."""
        ranks.add_up(self.sums.values())
        for place, (key, grad) in self.given.items():
            self.add(key, grad.copy_(place))
        for p in self.parameters:
            if p in self.sums:
                p.grad = self.sums.pop(p)
        with ranks.together():
            yield self.sums
        self.sums, self.given = {}, {}
