"""The host side of a launch: short, because a network makes hundreds per step."""

import functools
from typing import NamedTuple

import torch


class Device(NamedTuple):
    multiprocessors: int
    l2_bytes: int


@functools.cache
def device_of(index: int) -> Device:
    """What the launch configurations need to know; index -1 is Triton's interpreter."""
    if index < 0:
        return Device(multiprocessors=4, l2_bytes=1 << 20)
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.multi_processor_count, properties.L2_cache_size)


def options(warps: int) -> dict:
    """Triton's compiler options.

    Without a limit, ptxas spills a register or two to fit one more program on a multiprocessor.
    """
    return {"num_warps": warps, "enable_fp_fusion": True, "maxnreg": 255}


_compiled = {}


def launch(kernel, programs, pointers, numbers, constants, warps):
    """Launch ``kernel`` on the current stream of the current device.

    pointers: tensors or None. numbers: ints and floats, of types that ``constants`` determines.
    constants: the constexpr arguments, in the order of the signature.

    Triton inspects the arguments of every call; here the first call's outcome is looked up by
    what it depends on. The kernels do not specialize on numbers.
    """
    device, key, address = -1, [kernel, constants, warps], 0
    for pointer in pointers:
        if pointer is None:
            key.append(None)
        else:
            key.append(pointer.dtype)
            address |= pointer.data_ptr()
            device = pointer.get_device()
    key = (device, address % 16, *key)
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[programs, 1, 1](*pointers, *numbers, *constants)
        return
    compiled = kernel[programs,](*pointers, *numbers, *constants, **options(warps))
    if address % 16 == 0 and compiled is not None:  # None: the interpreter
        _compiled[key] = compiled
