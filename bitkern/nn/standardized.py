"""All standardized weights of a model at once: for one forward pass, or for an optimizer step.

The weights are standardized when the first layer asks for its own, because only then dtype and
layout are known, and in one launch for all layers of a kind.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bitkern import _torch, ops
from bitkern.nn.current import current, using
from bitkern.nn.layers import WSConv2d
from bitkern.ops.weight_standardize import weight_standardize_detached
from bitkern.ops.ws_conv2d import conv_channels_last, conv_dtype


class Sums:
    """The gradients of layers' standardized weights, summed over micro-batches."""

    def __init__(self) -> None:
        self.sums: dict[Hashable, Tensor] = {}

    def add(self, key: Hashable, grad: Tensor) -> None:
        """Add to the sum of a layer, which takes ``grad`` over if it is the first."""
        self.sums[key] = self.sums[key].add_(grad) if key in self.sums else grad

    @contextlib.contextmanager
    def complete(self) -> Iterator[Mapping[Hashable, Tensor]]:
        """The sums by layer, for the block that carries them to the weights."""
        yield self.sums


def _collector(sums: Sums, conv: WSConv2d, dtype: torch.dtype) -> Callable[[Tensor], None]:
    # Must not hold the weight that it is a hook of: that is a cycle which Python does not see.
    def collect(out: Tensor) -> None:
        # In float32 where the compute dtype has 16 bits: rounded sums would not be exact.
        assert out.grad is not None
        grad = out.grad.to(dtype)
        out.grad = None
        sums.add(conv, grad)

    return collect


class _Kind:
    """Layers of one kind: same variant of the formula, dtype, device and need of a gradient."""

    def __init__(self, convs: Sequence[WSConv2d]) -> None:
        self.convs = convs
        self.variant = convs[0].variant
        self.scales = [conv.scale for conv in convs]
        self.weights: list[Tensor] = [conv.weight for conv in convs]
        gains = [conv.gain for conv in convs if conv.gain is not None]
        self.gains: list[Tensor] | None = [*gains] or None

    @staticmethod
    def key(conv: WSConv2d) -> Hashable:
        gain = conv.gain
        needs_grad = conv.weight.requires_grad or gain is not None and gain.requires_grad
        dtype, device = conv.weight.dtype, conv.weight.device
        return conv.variant, gain is None, type(conv.weight), dtype, device, needs_grad

    def standardize(self, dtype: torch.dtype, channels_last: bool) -> list[Tensor]:
        """Differentiable: the gradient reaches the weights with the backward pass."""
        return ops.weight_standardize_all(
            self.weights,
            self.variant,
            gains=self.gains,
            scales=self.scales,
            dtype=dtype,
            channels_last=channels_last,
        )

    def finish(self, sums: Mapping[Hashable, Tensor]) -> None:
        """What is left to do when the weights are no longer used."""


class _StepKind(_Kind):
    """A kind whose gradients are collected until ``finish`` carries them to the weights."""

    def __init__(self, convs: Sequence[WSConv2d], sums: Sums) -> None:
        super().__init__(convs)
        self.sums = sums

    def standardize(self, dtype: torch.dtype, channels_last: bool) -> list[Tensor]:
        ddp = _torch.active_ddp()
        if ddp is not None and (ddp.find_unused_parameters or ddp.static_graph):
            raise ValueError(
                "standardized: expected DistributedDataParallel without find_unused_parameters and "
                "static_graph, which take weights for unused whose gradients come after the block"
            )
        self.detached = weight_standardize_detached(
            self.weights,
            self.variant,
            gains=self.gains,
            scales=self.scales,
            dtype=dtype,
            channels_last=channels_last,
        )
        for i, out in enumerate(self.detached.outs):
            if self.weights[i].requires_grad or self.gains and self.gains[i].requires_grad:
                collect = _collector(self.sums, self.convs[i], self.detached.stats.dtype)
                out.requires_grad_().register_post_accumulate_grad_hook(collect)  # type: ignore[no-untyped-call]
        return self.detached.outs

    def finish(self, sums: Mapping[Hashable, Tensor]) -> None:
        """Standardization's backward: linear in the gradients, hence once for their sum."""
        grads = {i: sums[conv] for i, conv in enumerate(self.convs) if conv in sums}
        if not grads:
            return
        dweights, dgains = self.detached.backward(grads)
        pairs = [(self.weights[i], grad) for i, grad in dweights.items()]
        if self.gains:
            pairs += [(self.gains[i], grad) for i, grad in dgains.items()]
        wanted = [(p, grad) for p, grad in pairs if p.requires_grad]
        # Through autograd, so that the hooks of the parameters (DDP's among them) fire.
        torch.autograd.backward([p for p, _ in wanted], [grad for _, grad in wanted])


def _is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2's ``fully_shard`` wraps the module; told without the slow import of FSDP2."""
    return hasattr(type(module), "unshard")


class Pool:
    """The standardized weights of a module's WSConv2d layers, made when first asked for."""

    def __init__(self, module: nn.Module, kind: Callable[[Sequence[WSConv2d]], _Kind]) -> None:
        # What FSDP2 wraps further down has whole weights only while it runs itself.
        wrapped = [m for m in module.modules() if m is not module and _is_fsdp(m)]
        others = {conv for m in wrapped for conv in m.modules()}
        kinds = defaultdict(list)
        for conv in module.modules():
            if isinstance(conv, WSConv2d) and conv not in others:
                kinds[_Kind.key(conv)].append(conv)
        self.kinds = [kind(convs) for convs in kinds.values()]
        self.outs: dict[nn.Module, Tensor] | None = None

    def get(self, conv: nn.Module, x: Tensor) -> Tensor | None:
        """The standardized weight of ``conv`` for a convolution of ``x``; None if not its own."""
        if self.outs is None:
            self.outs = {}
            for kind in self.kinds:
                weight = kind.weights[0]
                outs = kind.standardize(conv_dtype(x, weight), conv_channels_last(x, weight))
                self.outs.update(zip(kind.convs, outs, strict=True))
        return self.outs.get(conv)

    def finish(self, sums: Mapping[Hashable, Tensor]) -> None:
        """Carry collected gradients to the weights."""
        for kind in self.kinds if self.outs is not None else ():
            kind.finish(sums)


def per_forward(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Standardize all weights of ``module`` in one launch during the block, a forward pass.

    Does nothing inside ``standardized``, whose weights are there already, and under the
    compiler, which cannot trace it: there each layer standardizes its own.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return using(current() or Pool(module, _Kind))


@contextlib.contextmanager
def standardized(module: nn.Module, *, sums: Sums | None = None) -> Iterator[None]:
    """Standardize all weights of ``module`` once for the forward and backward passes inside.

    For the micro-batches of one optimizer step::

        with bitkern.standardized(model):
            for x, y in micro_batches:
                loss(model(x), y).backward()
        optimizer.step()

    The gradients of the standardized weights are summed (in float32) and carried to the weights
    when the block ends, by a single backward of the standardization. It is linear in them, so the
    result is that of a backward per micro-batch. The gradients of the layers' weights and gains
    are complete only after the block, and the weights must not change inside it.

    ``sums`` collects the gradients, for who does more with them than to sum them.

    With DistributedDataParallel all micro-batches but the last run under its ``no_sync``. Does
    nothing to a module that FSDP2 wraps, whose weights are whole only during a forward pass.

    Raises ValueError in the forward pass of a DistributedDataParallel that is told to
    ``find_unused_parameters`` or has a ``static_graph``.
    """
    if _is_fsdp(module):
        yield
        return
    sums = sums or Sums()
    pool = Pool(module, partial(_StepKind, sums=sums))
    with using(pool):
        yield
    with sums.complete() as totals:
        pool.finish(totals)
