"""The host side of a launch: short, because a network makes hundreds per step."""

import torch
from triton import knobs
from triton.runtime import driver

AMD = torch.version.hip is not None


def options(warps: int, amd: bool = AMD) -> dict:
    """Triton's compiler options, of which each backend refuses those that it does not know.

    With 128 registers a multiprocessor of NVIDIA's holds 16 warps, which is what keeps enough loads
    under way.
    """
    common = {"num_warps": warps, "enable_fp_fusion": True}
    return common if amd else common | {"maxnreg": 128}


_compiled = {}


def refuse_capture(what):
    """Raise where a CUDA graph is being captured, in which a first call cannot be."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what}: the first call cannot be captured in a CUDA graph: run the step once before"
        )


def launch(kernel, programs, pointers, numbers, constants, warps):
    """Launch ``kernel`` on the current stream of the device of ``pointers``.

    pointers: tensors or None. numbers: ints and floats, which of them each is must be determined by
    ``constants``: a kernel compiled for an int does not take a float.
    constants: the constexpr arguments, in the order of the signature.

    Triton inspects the arguments of every call; here the first call's outcome is looked up by
    what it depends on. The kernels do not specialize on numbers.
    """
    device, key, addresses, bits = -1, [kernel, constants, warps], [], 0
    for pointer in pointers:
        if pointer is None:
            key.append(None)
            addresses.append(None)
        else:
            address = pointer.data_ptr()
            bits |= address
            key.append(pointer.dtype)
            addresses.append(address)
            device = pointer.get_device()
            if AMD:  # Triton has shorter addresses there for what lies within 2 GB
                key.append(pointer.untyped_storage().nbytes() < 2**31)
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, programs, pointers, numbers, constants, warps)
        return
    if bits % 16:  # Triton has other code for each set of aligned addresses
        key += [address is not None and address % 16 == 0 for address in addresses]
    key = (device, *key)
    compiled = _compiled.get(key)
    if compiled is None:
        refuse_capture(kernel.__name__)
        compiled = kernel[programs,](*pointers, *numbers, *constants, **options(warps))
        if compiled is not None:  # None: the interpreter
            _compiled[key] = compiled
    elif knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
        compiled[programs, 1, 1](*addresses, *numbers, *constants)  # a profiler wants to see it
    else:
        compiled.run(
            programs, 1, 1, driver.active.get_current_stream(device), compiled.function,
            compiled.packed_metadata, None, None, None, *addresses, *numbers, *constants,
        )  # fmt: skip
