"""Triton's real launcher, whose launches are executed: ``install`` puts the machine behind the fake
driver of ``tests/backends/triton/fake_driver``.

The compiler stops at PTX, which the driver "loads" in the place of machine code. What a launch may
touch are the tensors that it was given, and those whose addresses it was given in a table.
"""

import ctypes
import functools

import triton
from triton.backends.nvidia.driver import CudaDriver

from bitkern.backends import triton as backend
from bitkern.backends.triton import launch
from tests.backends.triton.ptx.machine import Launch, Program
from tests.backends.triton.ptx.parser import parse

Executor = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
executed: dict[str, list] = {}  # by kernel: launches, instructions, bytes read, bytes written
# Of every launch: kernel; of each tensor its size, what was read and what was written, in bytes.
log: list[tuple[str, list[tuple[int, int, int]]]] = []
_tensors: list[tuple[int, int]] = []  # of the launch under way
_in_tables: list = []  # of the next launch for many layers


def _stop_at_ptx(*arguments):
    """Hook for Triton's stages of a compilation; without arguments, return its name."""
    if not arguments:
        return "ptx", "ptx"
    _, stages, *_ = arguments
    stages["cubin"] = lambda ptx, _: ptx.encode()


@functools.cache
def _program(image):
    return Program.of(parse(image.decode()))


def _extent(tensor):
    """Return the address and the number of bytes from the first element to the last."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def _execute(image, programs, threads, shared, parameters):
    program = _program(image)
    assert threads == program.kernel.threads
    sizes = [size for _, size in program.kernel.parameters]
    arguments = [ctypes.string_at(parameters[i], size) for i, size in enumerate(sizes)]
    done = Launch(program, programs, shared, arguments, _tensors)
    memory = done.memory
    tensors = memory.ends - memory.starts, memory.bytes_read, memory.bytes_written
    log.append((program.kernel.name, list(zip(*tensors, strict=True))))
    counts = [1, done.instructions, int(memory.bytes_read.sum()), int(memory.bytes_written.sum())]
    before = executed.get(program.kernel.name, [0, 0, 0, 0])
    executed[program.kernel.name] = [a + b for a, b in zip(before, counts, strict=True)]


def _told_launch(real):
    def run(kernel, programs, pointers, *rest):
        of_tables = _in_tables if kernel.__name__.endswith("_all") else []
        _tensors[:] = [_extent(t) for t in (*pointers, *of_tables) if t is not None]
        real(kernel, programs, pointers, *rest)
        of_tables.clear()

    return run


def _told_pointers(real):
    def run(tensors):
        _in_tables[:] = [t for layer in tensors for t in layer]
        return real(tensors)

    return run


def install(capability):
    """Install for the rest of the process, for CPU tensors; call before importing launchers."""
    triton.knobs.runtime.add_stages_inspection_hook = _stop_at_ptx
    driver = CudaDriver()
    driver.get_current_device = driver.get_current_stream = lambda *_: 0
    driver.get_device_capability = lambda *_: divmod(capability, 10)
    triton.runtime.driver.set_active(driver)
    cuda = ctypes.CDLL("libcuda.so.1")

    @Executor
    def executor(*launched):
        try:
            _execute(*launched)
        except BaseException as error:  # which may not leave a function that C calls
            cuda.fake_error(f"{type(error).__name__}: {error}".encode())
            return 1
        return 0

    install.executor = executor  # kept, as ctypes asks
    cuda.fake_executor(executor)
    launch.launch = _told_launch(launch.launch)
    backend.Triton.devices = ("cuda", "cpu")
    from bitkern.backends.triton import weight_standardize

    weight_standardize._pointers = _told_pointers(weight_standardize._pointers)
