"""All standardized weights of a model at once: for one forward pass, or for an optimizer step.

The weights are standardized when the first layer asks for its own, because only then dtype and
layout are known, and in one launch for all layers of a kind.
"""

import contextlib
from collections import defaultdict

import torch
from torch.nn.parallel import DistributedDataParallel

from bitkern import ops
from bitkern.backend import choose, launchers
from bitkern.layout import dense, memory_format
from bitkern.nn import WSConv2d, pool


class _Group:
    """Layers of one kind: same variant of the formula, dtype, device and need of a gradient."""

    def __init__(self, convs):
        self.convs = convs
        first = convs[0]
        self.eps, self.variant = first.eps, (first.eps_outside, first.unbiased)
        self.scales = [conv.scale for conv in convs]
        self.weights = [conv.weight for conv in convs]
        self.gains = None if first.gain is None else [conv.gain for conv in convs]

    @staticmethod
    def key(conv):
        gain = conv.gain
        needs_grad = conv.weight.requires_grad or gain is not None and gain.requires_grad
        kind = conv.eps, conv.eps_outside, conv.unbiased, gain is None
        return *kind, type(conv.weight), conv.weight.dtype, conv.weight.device, needs_grad

    def standardize(self, dtype, channels_last):
        """Differentiable: the gradient reaches the weights with the backward pass."""
        return ops.weight_standardize_all(
            self.weights,
            self.eps,
            gains=self.gains,
            scales=self.scales,
            eps_outside=self.variant[0],
            unbiased=self.variant[1],
            dtype=dtype,
            channels_last=channels_last,
        )


class _Step(_Group):
    """A group whose gradients are collected until :meth:`finish` carries them to the weights."""

    def standardize(self, dtype, channels_last):
        ddp = DistributedDataParallel._get_active_ddp_module()
        if ddp is not None and (ddp.find_unused_parameters or ddp.static_graph):
            raise ValueError(
                "standardized: expected DistributedDataParallel without find_unused_parameters and "
                "static_graph, which take weights for unused whose gradients come after the block"
            )
        self.name = choose("weight_standardize", self.weights[0]).name
        self.inputs = (
            [dense(w.detach()) for w in self.weights],
            self.gains and [g.detach().contiguous() for g in self.gains],
            self.scales,
        )
        implementation = launchers(self.name, "weight_standardize")
        outs, self.stats = implementation.weight_standardize_forward(
            *self.inputs, self.eps, *self.variant, dtype, channels_last
        )
        self.grads = [None] * len(outs)
        for i, out in enumerate(outs):
            if self.weights[i].requires_grad or self.gains and self.gains[i].requires_grad:
                out.requires_grad_().register_post_accumulate_grad_hook(self._collector(i))
        return outs

    def _collector(self, i):
        def collect(out):
            # In float32 where the compute dtype has 16 bits: rounded sums would not be exact.
            grad = out.grad.to(self.stats.dtype)
            self.grads[i] = grad if self.grads[i] is None else self.grads[i].add_(grad)
            out.grad = None

        return collect

    def finish(self):
        """Standardization's backward: linear in the gradients, hence once for their sum."""
        got = [i for i, grad in enumerate(self.grads) if grad is not None]
        if not got:
            return
        weights, gains, scales = (v and [v[i] for i in got] for v in self.inputs)
        stats = self.stats.split([w.shape[0] for w in self.weights], 1)
        douts = [dense(self.grads[i]) for i in got]
        dweights, dgains = launchers(self.name, "weight_standardize").weight_standardize_backward(
            douts,
            weights,
            gains,
            scales,
            torch.cat([stats[i] for i in got], 1),
            self.eps,
            *self.variant,
        )
        parameters = [self.weights[i] for i in got] + [self.gains[i] for i in got if dgains]
        pairs = zip(parameters, dweights + (dgains or []), strict=True)
        wanted = [(p, grad) for p, grad in pairs if p.requires_grad]
        # Through autograd, so that the hooks of the parameters (DDP's among them) fire.
        torch.autograd.backward(*zip(*wanted, strict=True))


def _is_fsdp(module):
    """Whether FSDP2's ``fully_shard`` wraps the module; told without the slow import of FSDP2."""
    return hasattr(type(module), "unshard")


class Pool:
    """The standardized weights of a module's WSConv2d layers, made when first asked for."""

    def __init__(self, module, group):
        # What FSDP2 wraps further down has whole weights only while it runs itself.
        wrapped = [m for m in module.modules() if m is not module and _is_fsdp(m)]
        others = {conv for m in wrapped for conv in m.modules()}
        kinds = defaultdict(list)
        for conv in module.modules():
            if isinstance(conv, WSConv2d) and conv not in others:
                kinds[_Group.key(conv)].append(conv)
        self.groups = [group(convs) for convs in kinds.values()]
        self.outs = None

    def get(self, conv, x):
        """The standardized weight of ``conv`` for a convolution of ``x``; None if not its own."""
        if self.outs is None:
            self.outs = {}
            for group in self.groups:
                weight = group.weights[0]
                dtype = ops.compute_dtype(x, weight)
                channels_last = torch.channels_last in (memory_format(x), memory_format(weight))
                outs = group.standardize(dtype, channels_last)
                self.outs.update(zip(group.convs, outs, strict=True))
        return self.outs.get(conv)


@contextlib.contextmanager
def using(weights):
    """Take the weights of WSConv2d layers from this pool, or from none, inside the block."""
    token = pool.set(weights)
    try:
        yield weights
    finally:
        pool.reset(token)


def per_forward(module):
    """Standardize all weights of ``module`` in one launch during the block, a forward pass.

    Does nothing inside :func:`standardized`, whose weights are there already, and under the
    compiler, which cannot trace it: there each layer standardizes its own.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return using(pool.get() or Pool(module, _Group))


@contextlib.contextmanager
def standardized(module):
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

    With DistributedDataParallel all micro-batches but the last run under its ``no_sync``. Does
    nothing to a module that FSDP2 wraps, whose weights are whole only during a forward pass.

    Raises ValueError in the forward pass of a DistributedDataParallel that is told to
    ``find_unused_parameters`` or has a ``static_graph``.
    """
    if _is_fsdp(module):
        yield
        return
    with using(Pool(module, _Step)) as weights:
        yield
    if weights.outs is not None:
        for group in weights.groups:
            group.finish()
