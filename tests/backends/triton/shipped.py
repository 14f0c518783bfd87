"""Compiles the launches that BiT's networks lead to, for several GPUs, and says what they use.

A program of its own (``python -m tests.backends.triton.shipped EXTENT SHARD SHARDS``), because
kernels imported for Triton's interpreter cannot be compiled. Prints a line of JSON for each.
"""

import json
import re
import sys
from collections import Counter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitkern.backends.triton import group_norm_act, group_norm_add_relu, launch, weight_standardize
from bitkern.backends.triton.kernels.tiles import STAGES
from bitkern.variant import SgdOptions, Variant
from tests.backends.triton import machine_code

PROVEN = ("sm_80", "sm_90", "sm_100")  # by what their machine code does; others must not spill
TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (75, 80, 86, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}
GROUP_NORM_ACT = {
    "group_norm_act_forward_on_chip", "group_norm_act_forward_whole",
    "group_norm_act_forward_reduce", "group_norm_act_forward_apply", "group_norm_act_recompute",
    "group_norm_act_backward_on_chip", "group_norm_act_backward_whole",
    "group_norm_act_backward_reduce", "group_norm_act_backward_apply",
}  # fmt: skip
KERNELS = GROUP_NORM_ACT | {
    "group_norm_act_sum_samples",
    "weight_standardize_forward_one", "weight_standardize_backward_one",
    "weight_standardize_forward_all", "weight_standardize_backward_all",
    "weight_standardize_sgd_all", "weight_standardize_store_pointers",
}  # fmt: skip
FORMATS = {True: torch.channels_last, False: torch.contiguous_format}


def argument(value):
    """Return Triton's name for the type of a kernel's argument."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, tuple):
        return ("i64",) * len(value)
    return {int: "i32", float: "fp32"}[type(value)]


class Recorder:
    """Stands in for ``launch`` and keeps what would have to be compiled."""

    def __init__(self):
        self.launches = {}

    def __call__(self, kernel, programs, pointers, numbers, constants, warps):
        types = [None if p is None else argument(p) for p in pointers]
        types += [argument(number) for number in numbers]
        self.launches[kernel, tuple(types), tuple(constants), warps] = None


def maps(width, image):
    """Return (channels, height) of the GroupNorm inputs of a BiT of this width."""
    sizes = [-(-image // step) for step in (4, 8, 16, 32)]
    found = {(64 * width, sizes[0])}
    for stage, size in enumerate(sizes):
        middle, out = 64 * width << stage, 256 * width << stage
        found |= {(middle, size), (out, size)}
        if stage > 0:  # before the stride
            found |= {(middle, sizes[stage - 1]), (out // 2, sizes[stage - 1])}
    return sorted(found)


def group_norms(
    dtype, channels_last, shapes, affine=torch.float32, act="relu", groups=32, per_sample=False
):
    """Call all launchers, at batch 1 and one that fills the device, with and without residual."""
    for channels, size in shapes:
        for batch in (1, 128):
            sizes = (batch, channels) if per_sample else (channels,)
            weight = torch.empty(sizes, device="meta", dtype=affine)
            x = torch.empty(batch, channels, size, size, device="meta", dtype=dtype)
            x = x.contiguous(memory_format=FORMATS[channels_last])
            stats = torch.empty(batch, groups, device="meta")
            for other in (None, x):
                forward = (x, other, groups, weight, weight, 1e-5, act)
                group_norm_act.group_norm_act_forward(*forward)
                group_norm_act.group_norm_act_recompute(
                    x, groups, weight, weight, stats, stats, act
                )
                backward = (x, other, x, groups, weight, weight, stats, stats, act, True, True)
                group_norm_act.group_norm_act_backward(*backward)


def group_norm_adds(dtype, channels_last, shapes, groups=32):
    """Call the launchers of group_norm_add_relu: the same kernels, with an addend."""
    for channels, size in shapes:
        weight = torch.empty(channels, device="meta")
        x = torch.empty(128, channels, size, size, device="meta", dtype=dtype)
        x = x.contiguous(memory_format=FORMATS[channels_last])
        stats = torch.empty(128, groups, device="meta")
        args = groups, weight, weight
        group_norm_add_relu.group_norm_add_relu_forward(x, x, *args, 1e-5)
        backward = (x, x, x, *args, stats, stats, True, True, True)
        group_norm_add_relu.group_norm_add_relu_backward(*backward)


def weights(width):
    """Return the shapes of a BiT's standardized weights."""
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
            parameters, gains, scales, Variant(1e-10, *variant), out_dtype, channels_last[1]
        )
        weight_standardize.weight_standardize_backward(
            outs, parameters, gains, scales, stats, Variant(1e-10, *variant)
        )

    both(shapes)
    for shape in shapes:
        both([shape])
    if not gain and dtype == torch.float32:
        sgd_steps(channels_last, shapes, variant)


def sgd_steps(channels_last, shapes, variant):
    weights, douts = (
        [torch.empty(s, device="meta").contiguous(memory_format=FORMATS[layout]) for s in shapes]
        for layout in channels_last
    )
    stats = torch.empty(2, sum(s[0] for s in shapes), device="meta")
    scales = [1.0] * len(shapes)
    for nesterov in (False, True):
        options = SgdOptions(0.1, 0.9, 0.0, 1e-4, nesterov)
        args = douts, weights, weights, scales, stats, Variant(1e-10, *variant), options
        weight_standardize.weight_standardize_sgd(*args)


def shipped(everything):
    """Return the launches to compile: all of BiT, or a selection with each kernel in each way."""
    recorder = Recorder()
    group_norm_act.launch = weight_standardize.launch = recorder
    torch.Tensor.data_ptr = lambda self: 0  # meta tensors have none
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    widths, images = ((1, 2, 3, 4), (128, 224, 448, 480)) if everything else ((1, 4), (224,))
    for width in widths:
        shapes = sorted({shape for image in images for shape in maps(width, image)})
        group_norms(bf16, True, shapes)
        if everything:
            for dtype in (bf16, fp16, fp32):
                for channels_last in (True, False):
                    group_norms(dtype, channels_last, shapes, affine=dtype)
        for layouts in ((True, True), (False, False), (False, True)):
            if everything or layouts[0] == layouts[1]:
                standardizations(fp32, bf16, layouts, weights(width))
    few = [(64, 56), (256, 56), (1024, 14), (2048, 7), (256, 120)]
    group_norms(fp32, True, few)
    group_norms(fp16, True, few[:3])
    for dtype in (bf16, fp32):
        group_norms(dtype, False, few)
    for act in ("silu", "none"):
        group_norms(bf16, True, few[:2], act=act)
    group_norms(bf16, True, [(64, 1 << 13)])  # 2^32 elements in a sample
    group_norms(bf16, False, [(64, 1 << 13)])
    group_norms(bf16, True, [(63, 30), (1000, 14)], groups=1)
    group_norm_adds(bf16, True, [shape for width in widths for shape in maps(width, 224)])
    for dtype, channels_last in ((bf16, False), (fp32, True), (fp32, False), (fp16, True)):
        group_norm_adds(dtype, channels_last, few)
    some = [(64, 3, 7, 7), (256, 256, 3, 3), (2048, 2048, 3, 3)]
    standardizations(fp32, fp16, (False, True), some, gain=True, variant=(True, True))
    standardizations(bf16, bf16, (True, True), some[1:], gain=True)
    for act in ("leaky_relu", "gelu", "mish", "hardswish"):
        group_norms(bf16, True, few[:2], act=act)
    group_norms(bf16, True, few[:3], act="silu", per_sample=True)
    return list(recorder.launches)


def compiled(kernel, types, constants, warps, target):
    signature, values, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, types + constants, strict=True)):
        if i >= len(types) or value is None:
            signature[name], values[i,] = "constexpr", value
        else:
            signature[name] = value
            if value[0] == "*":
                attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = launch.options(warps, target.backend == "hip")
    return triton.compile(source, target=target, options=options)


def resources(binary, warps):
    """Return registers, bytes of spills, shared memory; for PROVEN also what a multiprocessor
    does."""
    found = {"shared": binary.metadata.shared}
    if binary.metadata.target.backend == "cuda":
        cubin, capability = binary.asm["cubin"], binary.metadata.target.arch
        registers, spills = machine_code.registers_and_spills(cubin)
        found |= {"registers": registers, "spills": spills}
        if f"sm_{capability}" not in PROVEN:  # disassembling takes longest
            return found
        programs = machine_code.programs_per_multiprocessor(
            capability, registers, warps, binary.metadata.shared
        )
        code = machine_code.instructions(cubin)
        loops = machine_code.loops(code)
        least = min(max(loop.outstanding, loop.copies * (STAGES.value - 1)) for loop in loops)
        found |= {"warps_there": programs * warps, "wide": machine_code.wide_accesses(code)}
        found |= {"bytes_under_way": least * 16 * 32 * warps * programs}
        return found | {"loops": [loop._asdict() for loop in loops]}
    text = binary.asm["amdgcn"]
    number = {
        name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    # Scalar registers spill into lanes of vector registers, which is not memory.
    spills = 4 * number["vgpr_spill_count"] + number["private_segment_fixed_size"]
    return found | {"registers": number["vgpr_count"], "spills": spills}


# Of each kernel's launches every nth is compiled for a target: PROVEN's first to last, the others.
EVERY = {"few": (0, 16, 0, 0), "many": (6, 6, 6, 24), "all": (1, 1, 1, 1)}


def selected(extent):
    """Yield (launch, target): "few" or "many" from a selection of sizes, or "all", which is every
    width and image size of BiT for every target."""
    seen = Counter()
    for entry in shipped(extent == "all"):
        number = seen[entry[0]]
        seen[entry[0]] += 1
        for target in TARGETS:
            every = EVERY[extent][PROVEN.index(target) if target in PROVEN else -1]
            if every and number % every == 0:
                yield entry, target
                kernel, types, constants, warps = entry
                if kernel.__name__.endswith("_all"):  # the tile of unaligned layers alone
                    unaligned = (*constants[:-1], constants[-1][-1:])
                    yield (kernel, types, unaligned, warps), target


def main(extent, shard, shards):
    for entry, target in list(selected(extent))[int(shard) :: int(shards)]:
        kernel, types, constants, warps = entry
        what = {"triton": triton.__version__, "target": target, "kernel": kernel.__name__}
        what |= {"types": types, "constants": constants, "warps": warps}
        binary = compiled(*entry, TARGETS[target])
        what |= resources(binary, warps)
        # Addresses out of a table of which the compiler is told that they are aligned.
        what["claims"] = len(re.findall(r"int_to_ptr .*divisibility", binary.asm["ttir"]))
        print(json.dumps(what, default=str), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
