"""``python -m bitkern.selftest``: the operators on this machine, held against the reference.

Each operator runs forward and backward on hostile shapes, on the GPU if there is one: within twice
the distance from float64 that plain PyTorch has at the same dtype, the same bits again, and on a
GPU the same bits out of a CUDA graph. The last line says whether all is right, or what to report;
the exit status is 0 or 1.
"""

import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitkern import backends, ops, reference, testing
from bitkern.reference import Activation

REPORT = "https://github.com/bitkern/bitkern/issues/new?template=bug.yml"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
FIRST, LAST = torch.contiguous_format, torch.channels_last


class Norm(NamedTuple):
    shape: tuple[int, ...]
    groups: int
    dtype: torch.dtype
    layout: torch.memory_format
    act: Activation


NORMS = [
    Norm((2, 32, 9, 7), 32, FP32, FIRST, "silu"),
    Norm((1, 64, 14, 14), 32, BF16, LAST, "relu"),
    Norm((3, 12, 5, 3), 4, FP16, FIRST, "relu"),  # 3 channels in a group
    Norm((2, 10, 1, 1), 2, FP32, LAST, "none"),
    Norm((1, 6, 33, 2), 1, FP32, FIRST, "gelu"),
    Norm((1, 256, 4, 5), 2, BF16, LAST, "mish"),  # 128 channels in a group
    Norm((4, 8), 4, FP32, FIRST, "leaky_relu"),
    Norm((2, 8, 3, 5, 2), 4, FP16, torch.channels_last_3d, "hardswish"),
    Norm((2, 256, 56, 56), 32, BF16, LAST, "silu"),  # several passes
    Norm((1, 1024, 60, 60), 32, BF16, LAST, "silu"),
    Norm((2, 64, 57, 57), 32, FP32, FIRST, "silu"),
    Norm((0, 24, 7, 9), 4, BF16, LAST, "relu"),
]
WEIGHTS = [(64, 3, 7, 7), (33, 17, 1, 1), (6, 9, 3, 3), (8, 1024, 3, 3)]


class Case(NamedTuple):
    operator: str
    what: str
    ours: Callable[..., Any]
    plain: Callable[..., Any]  # the same by the reference
    inputs: list[Tensor]  # on the CPU, of which all gradients are wanted


def _norms(norm: Norm) -> Iterator[Case]:
    x, residual = (
        testing.maps(norm.shape, norm.dtype, seed, constant=False).to(memory_format=norm.layout)
        for seed in (0, 1)
    )
    weight, bias = torch.randn(2, norm.shape[1])
    what = f"{tuple(norm.shape)} in {norm.groups} groups, {norm.dtype}, {norm.act}, {norm.layout}"

    def on(module: Any, operator: str) -> Callable[..., Any]:
        options = {"act": norm.act} if operator.endswith("_act") else {}
        function = partial(getattr(module, operator), **options)
        return lambda *inputs: function(*inputs[:-2], norm.groups, *inputs[-2:])

    for operator in ("group_norm_act", "add_group_norm_act", "group_norm_add_relu"):
        inputs = [x, residual, weight, bias] if "add" in operator else [x, weight, bias]
        yield Case(operator, what, on(ops, operator), on(reference, operator), inputs)


def _weights() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) * 0.02 + 0.3 for shape in WEIGHTS]
    for weight in weights:
        yield Case(
            "weight_standardize", str(tuple(weight.shape)), ops.weight_standardize,
            reference.weight_standardize, [weight],
        )  # fmt: skip
    yield Case(
        "weight_standardize_all", f"{len(weights)} layers",
        lambda *weights: ops.weight_standardize_all(weights),
        lambda *weights: [reference.weight_standardize(weight) for weight in weights], weights,
    )  # fmt: skip
    x = torch.randn(2, 17, 9, 8, generator=generator).contiguous(memory_format=LAST)
    convolved = [x, weights[1], torch.randn(33, generator=generator)]
    yield Case("ws_conv2d", "(2, 17, 9, 8)", ops.ws_conv2d, reference.ws_conv2d, convolved)
    conv = ops.Conv((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    x = torch.randn(2, 8, 9, 8, generator=generator)
    kernel = torch.randn(5, 8, 3, 3, generator=generator)

    def fused(x: Tensor, w: Tensor, b: Tensor, kernel: Tensor) -> Tensor:
        return ops.group_norm_act_conv(
            x, None, 4, w, b, 1e-5, "silu", [kernel], [None], [conv]
        )[1][0]  # fmt: skip

    def apart(x: Tensor, w: Tensor, b: Tensor, kernel: Tensor) -> Tensor:
        return torch.convolution(
            reference.group_norm_act(x, 4, w, b, 1e-5, "silu"), kernel, None, *conv
        )

    affine = torch.randn(2, 8, generator=generator)
    yield Case("group_norm_act_conv", "(2, 8, 9, 8)", fused, apart, [x, *affine, kernel])


def _results(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    outs = [out] if isinstance(out, Tensor) else list(out)
    slopes = [torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape).to(o) for o in outs]
    return [o.detach() for o in outs] + list(torch.autograd.grad(outs, leaves, slopes))


def _captured(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results out of a CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _results(function, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = _results(function, inputs)
    for result in results:
        result.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return results


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check(case: Case, device: str) -> str | None:
    """Describe what is wrong with an operator in a case; None if nothing is."""
    inputs = [t.to(device) for t in case.inputs]
    ours = _results(case.ours, inputs)
    near = _results(case.plain, inputs)
    exact = _results(case.plain, [t.double() for t in inputs])
    for number, (a, b, true) in enumerate(zip(ours, near, exact, strict=True)):
        # Roundings of the result, and of sums in another order.
        if fault := testing.inaccuracy(a, b, true, roundings=4):
            return f"result {number}: {fault}"
    if not _equal(_results(case.ours, inputs), ours):
        return "other bits the second time"
    if device == "cuda" and not _equal(_captured(case.ours, inputs), ours):
        return "other bits out of a CUDA graph"
    return None


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    for norm in NORMS:
        yield from _norms(norm)
    yield from _weights()


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    torch.backends.cudnn.allow_tf32 = False
    done: dict[str, list[str | None]] = {}
    for case in cases():
        try:
            fault = check(case, device)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        done.setdefault(case.operator, []).append(fault)
        if fault:
            print(f"{case.operator} of {case.what}: {fault}", flush=True)
    for operator, faults in done.items():
        known = backends.OPERATORS.get(operator)
        kernel = known.kernel if known else "group_norm_act"
        choice = backends.choose(kernel, torch.empty(1, 8, 1, 1, device=device))
        right = faults.count(None)
        print(f"{operator:<23}{right:>3} of {len(faults):<3} by {choice.name}: {choice.reason}")
    wrong = sum(fault is not None for faults in done.values() for fault in faults)
    checks = sum(map(len, done.values()))
    print(
        f"wrong: {wrong} of {checks} cases on {name}; please report all of this at {REPORT}"
        if wrong
        else f"right: {checks} cases on {name}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
