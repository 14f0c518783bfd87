"""The operators' cases: BiT's shapes, ours, the peers, the gate and the floor.

Sources: weight standardization as in timm (``F.batch_norm`` over the reshaped weight) and in
big_transfer (``var_mean``); group normalization as ``F.group_norm`` and ``F.relu``.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import bitkern
from benchmarks.measure import DTYPES, l2_bytes
from bitkern import reference
from bitkern.nn import WSConv2d
from bitkern.testing import affine, assert_accurate, maps

GROUPS = 32
FORMATS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
# The gradient at the kink of ReLU is a coin toss of the last bit: no gradient comes in there.
KINK = 1e-3


class Case(NamedTuple):
    """``shape``: (N, C, H, W), or for weight_standardize a model's name, all of its layers."""

    operator: str
    shape: tuple[int, ...] | str
    dtype: str = "bf16"
    layout: str = "channels_last"
    backward: bool = True
    modes: tuple[str, ...] = ()  # of torch.compile, beside eager

    kind = "op"

    def __str__(self):
        shape = self.shape if isinstance(self.shape, str) else "x".join(map(str, self.shape))
        passes = "fwd+bwd" if self.backward else "fwd"
        return f"{self.operator}/{shape}/{self.dtype}/{self.layout}/{passes}"


class Contender(NamedTuple):
    """``function(*inputs)`` returns a tuple; ``inputs`` need gradients if there is a backward."""

    function: object
    inputs: list[torch.Tensor]


class Piece(NamedTuple):
    """The float64 ``function`` of some inputs, and which results it gives: outputs, gradients."""

    function: object
    inputs: Sequence[int]
    results: Sequence[int]


def _leaves(tensors, case):
    return [t.detach().clone().requires_grad_(case.backward) for t in tensors]


def feature_maps(case, device, seed=0):
    """Hostile maps of two samples at different scales over the batch, in the case's layout."""
    batch = case.shape[0]
    few = maps((min(batch, 2), *case.shape[1:]), seed=seed).to(device)
    x = few.repeat(math.ceil(batch / 2), 1, 1, 1)[:batch]
    x *= torch.linspace(0.5, 2, batch, device=device)[:, None, None, None]
    return x.to(DTYPES[case.dtype], memory_format=FORMATS[case.layout])


def _norm(module):
    return lambda x, weight, bias: (module.group_norm_act(x, GROUPS, weight, bias),)


def _add_norm(module):
    return lambda x, r, weight, bias: module.add_group_norm_act(x, r, GROUPS, weight, bias)


def _norm_add(module):
    return lambda x, r, weight, bias: (module.group_norm_add_relu(x, r, GROUPS, weight, bias),)


def _eager_norm(x, weight, bias):
    return (F.relu(F.group_norm(x, GROUPS, weight, bias)),)


def _eager_add_norm(x, residual, weight, bias):
    summed = x + residual
    return summed, F.relu(F.group_norm(summed, GROUPS, weight, bias))


def _eager_norm_add(x, residual, weight, bias):
    return (F.relu(F.group_norm(x, GROUPS, weight, bias) + residual),)


def _ours_modulated(x, scale, shift, weight, bias):
    """As GroupNormAct does with a scale and a shift."""
    factor = 1 + scale
    affine = weight * factor, bias * factor + shift
    return (bitkern.ops.group_norm_act(x, GROUPS, *affine, act="silu"),)


def _eager_modulated(x, scale, shift, weight, bias):
    y = F.group_norm(x, GROUPS, weight, bias) * (1 + scale[:, :, None, None])
    return (F.silu(y + shift[:, :, None, None]),)


# And the big tensors of forward and backward, each once: x, (residual, sum,) y; then sum or x, dy,
# (dsum,) dx, or x, y, dy, dx, dresidual.
NORMS = {
    "group_norm_act": (_norm(bitkern.ops), _eager_norm, _norm(reference), (2, 3)),
    "modulated_group_norm_act": (_ours_modulated, _eager_modulated, _eager_modulated, (2, 3)),
    "add_group_norm_act": (_add_norm(bitkern.ops), _eager_add_norm, _add_norm(reference), (4, 4)),
    "group_norm_add_relu": (_norm_add(bitkern.ops), _eager_norm_add, _norm_add(reference), (3, 5)),
}


def _amp(function):
    """Under autocast group_norm returns float32, and the convolution behind it casts again."""

    def run(x, *rest):
        with torch.autocast(x.device.type, torch.bfloat16):
            return tuple(y.to(x.dtype) for y in function(x, *rest))

    return run


def _timm_standardize(w):
    flat = w.reshape(1, w.shape[0], -1)
    flat = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-10)
    return flat.reshape_as(w)


def _big_transfer_standardize(w):
    var, mean = torch.var_mean(w, dim=[1, 2, 3], keepdim=True, unbiased=False)
    return (w - mean) / torch.sqrt(var + 1e-10)


def _norm_problem(case, device):
    x = feature_maps(case, device)
    dtype, channels = DTYPES[case.dtype], case.shape[1]
    parameters = affine(channels)
    if case.operator == "modulated_group_norm_act":
        parameters = *affine(channels, seed=2, samples=x.shape[:1]), *parameters
    parameters = [p.to(device) for p in parameters]
    branch = [x, feature_maps(case, device, seed=2)] if "add" in case.operator else [x]
    ours, eager, exact, tensors = NORMS[case.operator]
    same = _leaves([*branch, *(p.to(dtype) for p in parameters)], case)
    contenders = {"ours": Contender(ours, same), "eager": Contender(eager, same)}
    if case.dtype == "bf16":
        leaves = same[: len(branch)] + _leaves(parameters, case)
        contenders["amp"] = Contender(_amp(eager), leaves)

    first, *others = (t.detach().double() for t in branch)
    norm = [t.detach().double() for t in same[-2:]]
    if case.operator == "add_group_norm_act":
        first += others.pop()
    z = sum(others, reference.group_norm_act(first, GROUPS, *norm, act="none"))
    kinks = z.abs() < KINK
    dys = [torch.randn_like(x).masked_fill_(kinks, 0.0)]  # in place: in the layout of x
    if case.operator == "add_group_norm_act":
        dys.insert(0, torch.randn_like(x))
    pieces = [Piece(exact, range(len(same)), range(len(dys) + len(same)))]
    return contenders, dys, pieces, sum(tensors[: 1 + case.backward]) * x.nbytes


def layer_weights(model, device):
    """Random weights in the shapes of a model's weight-standardized convolutions, means not 0."""
    net = bitkern.create_model(model, device="meta")
    generator = torch.Generator(device).manual_seed(0)
    weights = []
    for layer in net.modules():
        if isinstance(layer, WSConv2d):
            w = torch.randn(layer.weight.shape, device=device, generator=generator)
            weights.append(w * 0.02 + 0.01)
    return weights


def _weight_problem(case, device):
    dtype, memory_format = DTYPES[case.dtype], FORMATS[case.layout]
    layouts = (w.to(memory_format=memory_format) for w in layer_weights(case.shape, device))
    weights = _leaves(layouts, case)

    def ours(*weights):
        last = case.layout == "channels_last"
        return tuple(bitkern.ops.weight_standardize_all(weights, dtype=dtype, channels_last=last))

    def each(standardize):
        def run(*weights):
            made = (standardize(w) for w in weights)
            return tuple(w.to(dtype, memory_format=memory_format) for w in made)

        return Contender(run, weights)

    contenders = {
        "ours": Contender(ours, weights),
        "eager": each(_timm_standardize),
        "big_transfer": each(_big_transfer_standardize),
    }

    def exact(weight):
        return (reference.weight_standardize(weight),)

    # One layer at a time: all of R152x4 in float64 would not fit beside the rest.
    layers = range(len(weights))
    pieces = [Piece(exact, [i], [i, len(weights) + i]) for i in layers]
    dys = [torch.randn_like(w, dtype=dtype) for w in weights]
    elements = sum(w.numel() for w in weights)
    passes = elements * (4 + dtype.itemsize) + case.backward * elements * (dtype.itemsize + 8)
    return contenders, dys, pieces, passes


class Problem:
    """One case on a device: ``contenders`` to race, ``gate()`` before, ``floor_bytes`` to move."""

    def __init__(self, case, device):
        build = _weight_problem if case.operator == "weight_standardize" else _norm_problem
        self.case, self.device = case, device
        self._contenders, self.dys, self.pieces, self.floor_bytes = build(case, device)
        self.dys = self.dys if case.backward else []
        # Enough copies of the inputs that none is left in the L2 cache when its turn comes again.
        size = sum(t.nbytes for t in (*self._contenders["ours"].inputs, *self.dys))
        l2 = l2_bytes(device)
        self.calls = min(max(math.ceil(3 * l2 / size), 2), 256) if l2 else 1

    def _results(self, function, inputs, dys):
        """Outputs, then gradients of the inputs."""
        outs = function(*inputs)
        return [*outs, *(torch.autograd.grad(outs, inputs, dys) if dys else ())]

    def gate(self):
        """Ours is as near to the float64 result as PyTorch's at the same dtype, by a factor 2."""
        ours, eager = (
            self._results(*self._contenders[name], self.dys) for name in ("ours", "eager")
        )
        for function, which, results in self.pieces:
            inputs = [self._contenders["ours"].inputs[i].detach().double() for i in which]
            inputs = [t.requires_grad_(self.case.backward) for t in inputs]
            results = [i for i in results if i < len(ours)]
            dys = [self.dys[i].double() for i in results if i < len(self.dys)]
            for i, exact in zip(results, self._results(function, inputs, dys), strict=True):
                assert_accurate(ours[i], eager[i], exact, f"{self.case}: result {i}")

    @property
    def contenders(self):
        """Name -> function that prepares a run of ``calls`` calls."""
        all = dict(self._contenders)
        for mode in self.case.modes:
            name = "compile" if mode == "default" else mode
            eager = "big_transfer" if self.case.operator == "weight_standardize" else "eager"
            function, inputs = all[eager]
            compiled = torch.compile(function, mode=mode, dynamic=False, fullgraph=True)
            all[name] = Contender(compiled, inputs)
        return {name: partial(self._burst, one) for name, one in all.items()}

    def _burst(self, contender):
        # Clones in the same order for every contender; AMP's parameters are its own.
        sets = [(contender.inputs, self.dys)]
        for _ in range(self.calls - 1):
            sets.append((_leaves(contender.inputs, self.case), [dy.clone() for dy in self.dys]))

        def run():
            with torch.set_grad_enabled(self.case.backward):
                for inputs, dys in sets:
                    self._results(contender.function, inputs, dys)

        return run

    def copy(self):
        """Prepares a copy that reads and writes ``floor_bytes`` altogether."""
        source = torch.randn(self.floor_bytes // 8)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)
