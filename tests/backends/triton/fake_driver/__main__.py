"""Run our launchers on CPU tensors under the fake driver, which never touches their contents.

``python -m tests.backends.triton.fake_driver launches | numbers | capture | time | step`` prints
JSON: every launch of each case; which types of numbers gave a wrong launch; what was refused while
capturing; microseconds of host time per call; launches and host time of the operators of a training
step.
"""

import ctypes
import json
import struct
import sys
import time

import numpy as np
import torch

torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.is_current_stream_capturing = lambda: False
torch._C._cuda_getCurrentRawStream = lambda _: 0

import triton  # noqa: E402

from bitkern.backends.triton import (  # noqa: E402
    group_norm_act,
    group_norm_add_relu,
    launch,
    weight_standardize,
)
from bitkern.variant import Variant  # noqa: E402
from tests.backends.triton import shipped  # noqa: E402

cuda = ctypes.CDLL("libcuda.so.1")
cuda.fake_name.restype = ctypes.c_char_p
cuda.fake_parameter.restype = ctypes.c_uint64
real_launch = launch.launch


class Case:
    """Tensors of a channels_last map; nothing ever writes to them."""

    def __init__(self, samples, channels, size, residual=False, dtype=torch.bfloat16, offset=0):
        count = samples * channels * size * size
        x = torch.empty(count + offset, dtype=dtype)[offset:]
        self.x = x.view(samples, size, size, channels).permute(0, 3, 1, 2)
        self.residual = self.x if residual else None
        self.affine = (torch.empty(channels), torch.empty(channels))
        self.statistics = (torch.empty(samples, 32), torch.empty(samples, 32))

    def forward(self):
        group_norm_act.group_norm_act_forward(self.x, self.residual, 32, *self.affine, 1e-5, "relu")

    def recompute(self):
        args = 32, *self.affine, *self.statistics, "relu"
        group_norm_act.group_norm_act_recompute(self.x, *args)

    def backward(self):
        args = 32, *self.affine, *self.statistics, "relu", True, True
        group_norm_act.group_norm_act_backward(self.x, self.residual, self.x, *args)


class AddCase(Case):
    """Tensors and calls of group_norm_add_relu."""

    def forward(self):
        args = 32, *self.affine, 1e-5
        group_norm_add_relu.group_norm_add_relu_forward(self.x, self.x, *args)

    def backward(self):
        args = 32, *self.affine, *self.statistics, True, True, True
        group_norm_add_relu.group_norm_add_relu_backward(self.x, self.x, self.x, *args)


class Weights:
    def __init__(self, shapes):
        self.weights = [torch.empty(shape) for shape in shapes]
        self.scales, self.variant = [1.0] * len(shapes), Variant(1e-10, False, False)
        self.forward()

    def forward(self):
        self.outs, self.stats = weight_standardize.weight_standardize_forward(
            self.weights, None, self.scales, self.variant, torch.bfloat16, False
        )

    def backward(self):
        weight_standardize.weight_standardize_backward(
            self.outs, self.weights, None, self.scales, self.stats, self.variant
        )


ADD_CASES = {"add, on chip": AddCase(2, 2048, 7), "add, split": AddCase(3, 256, 56)}
CASES = {
    "on chip": Case(2, 2048, 7),
    "whole": Case(2, 512, 28, residual=True),
    "split": Case(3, 256, 56),
    "split, one sample": Case(1, 256, 56, residual=True),
    "unaligned": Case(2, 2048, 7, offset=1),
    "fp32": Case(2, 2048, 7, dtype=torch.float32),
}


def expected(pointers, numbers):
    """Return the lower 4 bytes of each parameter."""
    numbers = [
        struct.unpack("I", struct.pack("f" if isinstance(n, float) else "i", n))[0] for n in numbers
    ]
    return [p.data_ptr() & 0xFFFFFFFF for p in pointers if p is not None] + numbers


def checked_launch(kernel, programs, pointers, numbers, constants, warps):
    """Launch, and check that the driver got the intended parameters."""
    # Of a tuple, the addresses of many layers, the driver keeps too few to compare them.
    meant = expected(pointers, [] if tuple in map(type, numbers) else numbers)
    ctypes.c_long.in_dll(cuda, "fake_parameters").value = len(meant)
    before = cuda.fake_count()
    real_launch(kernel, programs, pointers, numbers, constants, warps)
    assert cuda.fake_count() == before + 1, kernel.__name__
    got = [cuda.fake_parameter(before, k) & 0xFFFFFFFF for k in range(len(meant))]
    assert got == meant, (kernel.__name__, got, meant)
    assert cuda.fake_grid(before) == programs and cuda.fake_threads(before) == 32 * warps
    assert cuda.fake_name(before).decode() == kernel.__name__


def launches():
    """Run each call twice, first by Triton's launch, then by ours; return names and modules."""
    for module in (group_norm_act, weight_standardize):
        module.launch = checked_launch
    done = []
    works = [(name, case, ("forward", "recompute", "backward")) for name, case in CASES.items()]
    works += [(name, case, ("forward", "backward")) for name, case in ADD_CASES.items()]
    works += [("one weight", Weights([(64, 64, 3, 3)]), ("forward", "backward"))]
    works += [("weights", Weights(shipped.weights(1)), ("forward", "backward"))]
    for repeat in range(2):
        for name, case, calls in works:
            for call in calls:
                cuda.fake_clear()
                getattr(case, call)()
                seen = range(cuda.fake_count())
                names = [cuda.fake_name(i).decode() for i in seen]
                modules = [cuda.fake_module(i) for i in seen]
                done.append(
                    {"repeat": repeat, "case": name, "call": call, "launches": names}
                    | {"modules": modules}
                )
    return done


def numbers():
    """Launch with numbers of each type first, then of the others; return what went wrong."""
    for module in (group_norm_act, weight_standardize):
        module.launch = checked_launch
    given = {"int": (0, 1), "float": (1e-5, 0.5), "numpy": (np.float32(1e-4), np.float64(2.0))}
    x, w, wrong = CASES["on chip"].x, [torch.empty(64, 64, 3, 3)], []
    for first in given:
        launch._compiled.clear()
        for jit in (
            *vars(group_norm_act.forward).values(),
            *vars(weight_standardize.kernels).values(),
        ):
            getattr(jit, "device_caches", {}).clear()
        for kind in (first, *given):
            eps, scale = given[kind]
            try:
                group_norm_act.group_norm_act_forward(x, None, 32, None, None, eps, "relu")
                weight_standardize.weight_standardize_forward(
                    w, None, [scale], Variant(eps, False, False), torch.bfloat16, False
                )
            except (AssertionError, TypeError) as error:
                wrong.append([first, kind, str(error)])
    return wrong


def capture():
    """Return the refused calls: none that is warmed up, at any address, and all others."""
    refused = []
    for warm in (True, False):
        for offset in (0, 1, 2):
            case = Case(2, 2048, 7, offset=offset)
            launch._compiled.clear()
            for capturing in (False, True) if warm else (True,):
                torch.cuda.is_current_stream_capturing = lambda on=capturing: on
                try:
                    case.forward()
                except RuntimeError:
                    refused.append([warm, offset])
    return refused


def per_call(function, seconds=0.5):
    """Return the microseconds of a call, the least of five."""
    for _ in range(20):
        function()
    best = float("inf")
    for _ in range(5):
        calls, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds / 5:
            function()
            calls += 1
        best = min(best, (time.perf_counter() - began) / calls)
    return round(best * 1e6, 1)


def times():
    captured = []
    group_norm_act.launch = lambda *arguments: captured.append(arguments)
    CASES["whole"].forward()
    group_norm_act.launch = real_launch
    CASES["whole"].forward()
    found = {"launch": per_call(lambda: real_launch(*captured[0]))}
    for name in ("on chip", "whole", "split"):
        for call in ("forward", "recompute", "backward"):
            found[f"{call}, {name}"] = per_call(getattr(CASES[name], call))
    weights = Weights(shipped.weights(1))
    return found | {"weights forward": per_call(weights.forward)}


def norms(image):
    """Return (channels, size, residual) for every GroupNorm of R50x1, in order."""
    found, size = [], image // 4
    for stage, blocks in enumerate((3, 4, 6, 3)):
        middle = 64 << stage
        for block in range(blocks):
            before = size
            size = -(-size // 2) if stage and not block else size
            width = 4 * middle if block else (64 if not stage else 2 * middle)
            found += [(width, before, bool(stage or block)), (middle, before, False)]
            found += [(middle, size, False)]
    return [*found, (2048, size, True)]


def step():
    """Call a training step's operators: forward, recomputation in backward, and backward."""
    done = []
    for image, batch in ((224, 32), (224, 128), (448, 32)):
        cases = [Case(batch, *norm) for norm in norms(image)]
        weights = Weights(shipped.weights(1))

        def run(cases=cases, weights=weights):
            weights.forward()
            for case in cases:
                case.forward()
            for case in reversed(cases):
                case.recompute()
                case.backward()
            weights.backward()

        run()
        cuda.fake_clear()
        run()
        done.append({"image": image, "batch": batch, "launches": cuda.fake_count()})
        done[-1]["host_ms"] = round(per_call(run, seconds=2) / 1000, 2)
    return done


if __name__ == "__main__":
    what = {"launches": launches, "numbers": numbers, "capture": capture}
    result = (what | {"time": times, "step": step})[sys.argv[1]]()
    print(json.dumps({"triton": triton.__version__, "result": result}))
