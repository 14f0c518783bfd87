"""Standardization of all weights of a model at once, for a forward pass or an optimizer step.

The weights are standardized when the first layer asks for its own, because only then dtype and
layout are known, in one launch for each group of layers. A layer whose weight is computed or set
when it is called standardizes that itself.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bitkern import _torch, ops
from bitkern.nn.current import current, using
from bitkern.nn.layers import WSConv2d
from bitkern.ops.detached import weight_standardize_detached
from bitkern.ops.ws_conv2d import conv_channels_last, conv_dtype
from bitkern.optim import SGD

_FORM = """write
    with bitkern.standardized(model):
        for x, y in micro_batches:
            loss(model(x), y).backward()
    optimizer.step()"""


class GradAccumulator:
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


class LayerGroup:
    """Layers standardized in one launch: same variant, dtype, device and need of a gradient."""

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
        """Standardize the weights; the backward pass carries the gradient to them."""
        return ops.weight_standardize_all(
            self.weights,
            self.variant,
            gains=self.gains,
            scales=self.scales,
            dtype=dtype,
            channels_last=channels_last,
        )


class _Carried(torch.autograd.Function):
    """Hands gradients to parameters, which take them over without a copy."""

    @staticmethod
    def forward(ctx: Any, backward: Callable[[], list[Tensor]], *parameters: Tensor) -> Tensor:
        ctx.backward_of_all = backward
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return None, *ctx.backward_of_all()


class _StepLayerGroup(LayerGroup):
    """A group whose gradients are collected until ``finish`` carries them to the weights."""

    def __init__(self, convs: Sequence[WSConv2d], sums: GradAccumulator) -> None:
        super().__init__(convs)
        self.sums = sums
        self.arrived = self.closed = False

    def standardize(self, dtype: torch.dtype, channels_last: bool) -> list[Tensor]:
        ddp = _torch.active_ddp()
        if ddp is not None and (ddp.find_unused_parameters or ddp.static_graph):
            raise ValueError(
                "standardized: expected DistributedDataParallel without find_unused_parameters and "
                "static_graph, which take weights for unused whose gradients come after the block"
            )
        detached = weight_standardize_detached(
            self.weights,
            self.variant,
            gains=self.gains,
            scales=self.scales,
            dtype=dtype,
            channels_last=channels_last,
        )
        self.state = _torch.version_key([*self.weights, *(self.gains or ())])
        # A result held by its own hook would be a reference cycle that Python cannot collect.
        self.detached = detached._replace(outs=[])
        for i, out in enumerate(detached.outs):
            if self.weights[i].requires_grad or self.gains and self.gains[i].requires_grad:
                collect = partial(self._collect, i)
                out.requires_grad_().register_post_accumulate_grad_hook(collect)  # type: ignore[no-untyped-call]
        return detached.outs

    def _collect(self, i: int, out: Tensor) -> None:
        assert out.grad is not None
        if out.grad.requires_grad:
            raise RuntimeError(
                "standardized: expected backward without create_graph=True: gradients of the "
                "weights come after the block, without a graph"
            )
        # In float32 where the compute dtype has 16 bits: rounded sums would not be exact.
        grad, out.grad = out.grad.to(self.detached.stats.dtype), None
        self.arrived = True
        if self.closed:
            if _torch.version_key([*self.weights, *(self.gains or ())]) != self.state:
                raise RuntimeError(
                    "standardized: a backward pass after the block, of weights that have changed "
                    f"since: {_FORM}"
                )
            self._carry({i: grad})
        else:
            self.sums.add(self.convs[i], grad)

    def finish(
        self, sums: Mapping[Hashable, Tensor], optimizer: SGD | None, fused: Set[Tensor]
    ) -> None:
        """Carry collected gradients to the weights; those of ``fused`` step if they can."""
        grads = {i: sums[conv] for i, conv in enumerate(self.convs) if conv in sums}
        if optimizer is not None:
            can_step = self.detached.can_step
            for options, buffers in optimizer.momenta({self.weights[i] for i in grads} & fused):
                found = {i: buffers[w] for i, w in enumerate(self.weights) if w in buffers}
                layers = {i: b for i, b in found.items() if can_step(i, self.weights[i], b)}
                if layers:
                    douts = {i: grads.pop(i) for i in layers}
                    self.detached.sgd(douts, [*layers.values()], options)
        self._carry(grads)

    def _carry(self, grads: Mapping[int, Tensor]) -> None:
        """Standardization's backward: linear in the gradients, hence once for their sum."""
        if not grads:
            return
        parameters = [self.weights[i] for i in grads]
        parameters += [self.gains[i] for i in grads] if self.gains else []

        def backward() -> list[Tensor]:
            dweights, dgains = self.detached.backward(grads)
            return [*dweights.values(), *dgains.values()]

        # Through autograd, so that the hooks of the parameters (DDP's among them) fire.
        with torch.enable_grad():
            _Carried.apply(backward, *parameters).backward()


def _is_fsdp(module: nn.Module) -> bool:
    """Return whether FSDP2's ``fully_shard`` wraps the module, without the slow import of FSDP2."""
    return hasattr(type(module), "unshard")


def _is_available(conv: WSConv2d) -> bool:
    """Return whether a layer's weight exists before its call: not computed, nor set by hooks."""
    if "forward" in vars(conv) or _torch.forward_pre_hooked(conv):
        return False
    parameters: list[Any] = [_torch.own_parameter(conv, "weight")]
    if conv.gain is not None:
        parameters.append(_torch.own_parameter(conv, "gain"))
    return all(type(p) in (Tensor, nn.Parameter) and not p.is_meta for p in parameters)


class _Shared(NamedTuple):
    """A standardized weight, and the tensors it was computed from, in this state."""

    out: Tensor
    sources: Sequence[Tensor]
    state: Hashable


class StandardizedWeights:
    """The standardized weights of a module's WSConv2d layers, made when first asked for."""

    def __init__(
        self, module: nn.Module, group: Callable[[Sequence[WSConv2d]], LayerGroup]
    ) -> None:
        # What FSDP2 wraps further down has whole weights only while it runs itself.
        wrapped = [m for m in module.modules() if m is not module and _is_fsdp(m)]
        others = {conv for m in wrapped for conv in m.modules()}
        groups = defaultdict(list)
        for conv in module.modules():
            if isinstance(conv, WSConv2d) and conv not in others and _is_available(conv):
                groups[LayerGroup.key(conv)].append(conv)
        self.groups: Sequence[LayerGroup] = [group(convs) for convs in groups.values()]
        self.shared: dict[nn.Module, _Shared] | None = None

    def get(self, conv: nn.Module, weight: Tensor, x: Tensor) -> Tensor | None:
        """As ``current.WeightSource.get``."""
        if self.shared is None:
            self.shared = dict(self._standardize(x))
        shared = self.shared.get(conv)
        if shared is None or _torch.forward_pre_hooked(conv):  # may change the weight
            return None
        if weight is not shared.sources[0] or _torch.version_key(shared.sources) != shared.state:
            return self.on_changed(conv, weight)
        trained = any(source.requires_grad for source in shared.sources)
        without = trained and torch.is_grad_enabled() and not shared.out.requires_grad
        return None if without or shared.out.dtype != conv_dtype(x, weight) else shared.out

    def _standardize(self, x: Tensor) -> Iterator[tuple[nn.Module, _Shared]]:
        for group in self.groups:
            weight = group.weights[0]
            outs = group.standardize(conv_dtype(x, weight), conv_channels_last(x, weight))
            for i, (conv, out) in enumerate(zip(group.convs, outs, strict=True)):
                sources = group.weights[i : i + 1] + (group.gains or [])[i : i + 1]
                yield conv, _Shared(out, sources, _torch.version_key(sources))

    def on_changed(self, conv: nn.Module, weight: Tensor) -> Tensor | None:
        """Result of ``get`` for a layer whose weight is not the one standardized."""
        return None


class _StepWeights(StandardizedWeights):
    """The weights of an optimizer step, which must not change before its gradients are there."""

    groups: Sequence[_StepLayerGroup]

    def __init__(self, module: nn.Module, sums: GradAccumulator) -> None:
        super().__init__(module, partial(_StepLayerGroup, sums=sums))
        self.parameters = [p for p in module.parameters() if type(p) is nn.Parameter]
        self.state = _torch.version_key(self.parameters)
        self.asked = self.ddp = False

    def get(self, conv: nn.Module, weight: Tensor, x: Tensor) -> Tensor | None:
        self.ddp |= _torch.active_ddp() is not None  # its hooks need the gradients
        out = super().get(conv, weight, x)
        self.asked |= out is not None and out.requires_grad and torch.is_grad_enabled()
        return out

    def on_changed(self, conv: nn.Module, weight: Tensor) -> Tensor | None:
        if weight is not _torch.own_parameter(conv, "weight"):  # but one that was handed in
            return None
        raise RuntimeError(f"standardized: a weight has changed inside the block: {_FORM}")

    def refuse_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Raise RuntimeError if an optimizer is about to change the weights."""
        ours = set(map(id, self.parameters))
        if any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(f"standardized: an optimizer step inside the block: {_FORM}")

    def finish(self, sums: Mapping[Hashable, Tensor], optimizer: SGD | None) -> None:
        """Carry collected gradients to the weights, or step at once where that is possible.

        It is for the weight of a single layer that has no other gradient and no hooks.
        """
        fused: set[Tensor] = set()
        if optimizer is not None and not self.ddp and not optimizer.has_hooks:
            weights = [w for group in self.groups for w in group.weights]
            layers = Counter(w.data_ptr() for w in weights)
            alone = (w for w in weights if layers[w.data_ptr()] == 1 and w.grad is None)
            fused = {w for w in alone if not _torch.grad_hooked(w)}
        for group in self.groups if self.shared is not None else ():
            group.finish(sums, optimizer, fused)

    def close(self) -> None:
        """Stop collecting: later gradients go to the weights at once."""
        for group in self.groups:
            group.closed = True

    def check(self) -> None:
        """Raise RuntimeError if the block was not a step's forward and backward passes."""
        if _torch.version_key(self.parameters) != self.state:
            raise RuntimeError(f"standardized: a parameter has changed inside the block: {_FORM}")
        if self.asked and not any(group.arrived for group in self.groups):
            raise RuntimeError(
                f"standardized: no backward pass of the convolutions inside the block: {_FORM}"
            )


def per_forward(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Standardize all weights of ``module`` in one launch during the block, a forward pass.

    Does nothing inside ``standardized``, whose weights are there already, and under the compiler
    and transforms, which cannot see into it: there each layer standardizes its own.
    """
    if torch.compiler.is_compiling() or _torch.active_transform():
        return contextlib.nullcontext()
    return using(current() or StandardizedWeights(module, LayerGroup))


def _take_step(optimizer: SGD | None) -> None:
    """Step the parameters that have gradients by now."""
    if optimizer is not None:
        _torch.refuse_scaler(optimizer)
        optimizer.step()
        optimizer.zero_grad()


@contextlib.contextmanager
def standardized(
    module: nn.Module, *, optimizer: SGD | None = None, sums: GradAccumulator | None = None
) -> Iterator[None]:
    """Standardize all weights of ``module`` once for the forward and backward passes inside.

    For the micro-batches of one optimizer step::

        with bitkern.standardized(model):
            for x, y in micro_batches:
                loss(model(x), y).backward()
        optimizer.step()

    The gradients of the standardized weights are summed (in float32) and carried to the weights
    when the block ends, by a single backward of the standardization. It is linear in them, so the
    result is that of a backward per micro-batch. The gradients of the layers' weights and gains
    are complete only after the block; one that arrives later is carried to its weight at once.

    With an ``optimizer`` the block ends with its step and ``zero_grad``; ``optimizer.step()`` is
    not called. A standardized weight that has momentum takes the step in one pass with the backward
    of the standardization, and its gradient is never stored; the others, and all where something
    looks at gradients or steps (hooks, DistributedDataParallel), take PyTorch's. To clip or unscale
    gradients, leave ``optimizer`` out and call its step after the block.

    ``sums`` collects the gradients; a subclass may do more than sum them.

    With DistributedDataParallel all micro-batches but the last run under its ``no_sync``. Does
    nothing to a module that FSDP2 wraps, whose weights are whole only during a forward pass.

    Raises:
        RuntimeError: for an optimizer step or a changed parameter inside the block, for a block
            that ends without a backward pass through the standardized weights that were used with
            gradients enabled, and for ``backward(create_graph=True)`` inside it.
        TypeError: for an ``optimizer`` other than ``bitkern.optim.SGD``.
        ValueError: in the forward pass of a DistributedDataParallel that is told to
            ``find_unused_parameters`` or has a ``static_graph``.
    """
    if optimizer is not None and type(optimizer) is not SGD:  # another's step may do more
        raise TypeError(
            f"optimizer: expected bitkern.optim.SGD, got {type(optimizer).__name__}, whose step is "
            "called after the block"
        )
    if _is_fsdp(module):
        yield
        _take_step(optimizer)
        return
    sums = sums or GradAccumulator()
    weights = _StepWeights(module, sums)
    refusal = register_optimizer_step_pre_hook(weights.refuse_step)
    try:
        with using(weights):
            yield
    finally:
        refusal.remove()
        weights.close()
    weights.check()
    with sums.complete() as totals:
        weights.finish(totals, optimizer)
    _take_step(optimizer)
