"""Compiles the launches that BiT's networks lead to, for several GPUs, and says what they use.

A program of its own (``python shipped.py SHARD SHARDS [TARGET ...]``), because kernels that were
imported for Triton's interpreter cannot be compiled; needs no GPU. Prints a line of JSON for each.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitkern.kernels import group_norm_act, launch, weight_standardize

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
FORMATS = {True: torch.channels_last, False: torch.contiguous_format}


def argument(value):
    """Triton's name for the type of a kernel's argument."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, tuple):
        return ("i64",) * len(value)
    return {int: "i32", float: "fp32"}[type(value)]


class Recorder:
    """Stands in for ``launch`` and keeps what would have to be compiled."""

    def __init__(self):
        self.launches = {}

    def __call__(self, kernel, programs, pointers, numbers, options, warps):
        types = [None if p is None else argument(p) for p in pointers]
        types += [argument(number) for number in numbers]
        self.launches[kernel, tuple(types), tuple(options), warps] = None


def maps(width, image):
    """(channels, height) of the maps that GroupNorms of a BiT of this width see."""
    sizes = [-(-image // step) for step in (4, 8, 16, 32)]
    found = {(64 * width, sizes[0])}
    for stage, size in enumerate(sizes):
        middle, out = 64 * width << stage, 256 * width << stage
        found |= {(middle, size), (out, size)}
        if stage > 0:  # before the stride
            found |= {(middle, sizes[stage - 1]), (out // 2, sizes[stage - 1])}
    return sorted(found)


def group_norms(dtype, channels_last, shapes, affine=torch.float32, act="relu", groups=32):
    """Both launchers, at batch 1 and at one that fills the device, with and without residual."""
    for channels, size in shapes:
        weight = torch.empty(channels, device="meta", dtype=affine)
        for batch in (1, 128):
            x = torch.empty(batch, channels, size, size, device="meta", dtype=dtype)
            x = x.contiguous(memory_format=FORMATS[channels_last])
            stats = torch.empty(batch, groups, device="meta")
            for other in (None, x):
                forward = (x, other, groups, weight, weight, 1e-5, act)
                group_norm_act.group_norm_act_forward(*forward)
                backward = (x, other, x, groups, weight, weight, stats, stats, act, True, True)
                group_norm_act.group_norm_act_backward(*backward)


def weights(width):
    """Shapes of a BiT's standardized weights."""
    found = {(64 * width, 3, 7, 7)}
    for stage in range(4):
        middle, out = 64 * width << stage, 256 * width << stage
        before = 64 * width if stage == 0 else out // 2
        found |= {(middle, before, 1, 1), (out, before, 1, 1), (middle, out, 1, 1)}
        found |= {(middle, middle, 3, 3), (out, middle, 1, 1)}
    return sorted(found)


def standardizations(dtype, out_dtype, channels_last, shapes, gain=False, variant=(False, False)):
    def both(shapes):
        parameters = [torch.empty(s, device="meta", dtype=dtype) for s in shapes]
        parameters = [p.contiguous(memory_format=FORMATS[channels_last[0]]) for p in parameters]
        gains = [p[:, :1, :1, :1] for p in parameters] if gain else None
        scales = [1.0] * len(shapes)
        outs, stats = weight_standardize.weight_standardize_forward(
            parameters, gains, scales, 1e-10, *variant, out_dtype, channels_last[1]
        )
        weight_standardize.weight_standardize_backward(
            outs, parameters, gains, scales, stats, 1e-10, *variant
        )

    both(shapes)
    for shape in shapes:
        both([shape])


def shipped():
    """Everything to compile."""
    recorder = Recorder()
    group_norm_act.launch = weight_standardize.launch = recorder
    group_norm_act.device_of = lambda index: launch.Device(132, 50 << 20)
    torch.Tensor.data_ptr = lambda self: 0  # meta tensors have none
    everything = os.environ.get("BITKERN_COMPILE_ALL") == "1"
    widths, images = ((1, 2, 3, 4), (128, 224, 448, 480)) if everything else ((1, 3, 4), (224, 480))
    for width in widths:
        for image in images:
            group_norms(torch.bfloat16, True, maps(width, image))
            if everything or width == 1:
                group_norms(torch.float32, True, maps(width, image))
                group_norms(torch.bfloat16, False, maps(width, image))
                group_norms(torch.float32, False, maps(width, image))
    return list(recorder.launches)


def compiled(kernel, types, options, warps, target):
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, types + options, strict=True)):
        if i >= len(types) or value is None:
            signature[name], constants[i,] = "constexpr", value
        else:
            signature[name] = value
            if value[0] == "*":
                attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=launch.options(warps))


def resources(binary):
    """Registers, bytes of spills (a stack frame is nothing else here), shared memory."""
    found = {"shared": binary.metadata.shared}
    if binary.metadata.target.backend == "cuda":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            command = [CUOBJDUMP, "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
        registers, stack, local = map(int, numbers.groups())
        return found | {"registers": registers, "spills": stack + local}
    text = binary.asm["amdgcn"]
    number = {
        name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    }
    spills = number["vgpr_spill_count"] + number["sgpr_spill_count"]
    return found | {"registers": number["vgpr_count"], "spills": spills}


def main(shard, shards, *targets):
    for launch_ in shipped()[int(shard) :: int(shards)]:
        kernel, types, options, warps = launch_
        for target in targets or TARGETS:
            binary = compiled(*launch_, TARGETS[target])
            what = {"target": target, "kernel": kernel.__name__, "types": str(types)}
            what |= {"options": str(options), "warps": warps} | resources(binary)
            print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
