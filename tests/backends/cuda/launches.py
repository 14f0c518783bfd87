"""CUDA C++ without a GPU: g++ compiles what runs on the host, and NVRTC each kernel that it
launches, to PTX, which the machine of ``tests/backends/triton/ptx`` executes.
"""

import ctypes
import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sysconfig
import types
from functools import partial
from pathlib import Path

import pybind11
from cuda import pathfinder
from cuda.bindings import nvrtc

from bitkern.backends import extension
from tests import ROOT
from tests.backends.triton.ptx.machine import Launch, Program
from tests.backends.triton.ptx.parser import parse

KERNELS = ROOT / "csrc/cuda/weight_standardize.cu"
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
INCLUDE = [f"-I{ROOT / 'csrc/include'}", f"-I{pathfinder.find_nvidia_header_directory('cudart')}"]
# NVRTC has no standard library; this is what kernels take of it.
STANDARD = {"cstdint": "using int64_t = long;", "algorithm": "", "stdexcept": "", "string": ""}
ITEM_BYTES = [dtype.itemsize for dtype in extension.DTYPES]
Launcher = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p)
)


def _call(function, *arguments):
    error, *results = function(*arguments)
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"{function.__name__}: {error.name}")
    return results[0] if results else None


def _text(length, get, program):
    text = b" " * _call(length, program)
    _call(get, program, text)
    return text.decode().rstrip("\0")


def ptx(source, kernel):
    """Compile an instance of a kernel, such as ``scale<float>``, by NVRTC."""
    headers = [[text.encode() for text in part] for part in (STANDARD.values(), STANDARD)]
    program = _call(nvrtc.nvrtcCreateProgram, source.encode(), b"", len(STANDARD), *headers)
    _call(nvrtc.nvrtcAddNameExpression, program, kernel.encode())
    options = ["--gpu-architecture=compute_80", "-std=c++17", "-default-device", "-lineinfo"]
    options = [option.encode() for option in options + INCLUDE]
    if nvrtc.nvrtcCompileProgram(program, len(options), options)[0]:
        raise RuntimeError(_text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program))
    return _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)


def _tensors(problem, layers):
    """Yield the address and the bytes of each tensor."""
    weight, out = (ITEM_BYTES[problem[name]] for name in ("weight_dtype", "out_dtype"))
    for layer in layers:
        filters = layer["filters"]
        elements = filters * layer["inner"] * layer["taps"]
        nbytes = {"mean": 4 * filters, "std": 4 * filters}
        nbytes |= dict.fromkeys(("gain", "dgain"), weight * filters)
        nbytes |= dict.fromkeys(("weight", "dweight"), weight * elements)
        nbytes |= dict.fromkeys(("out", "dout"), out * elements)
        yield from ((layer[name], size) for name, size in nbytes.items() if layer[name])


class Host:
    """The extension ``bitkern._C`` with CUDA, whose launches come to Python."""

    def __init__(self, folder: Path):
        made = folder / "_C.so"
        command = [*COMPILER, "-shared", "-fPIC", "-std=c++17", "-DBITKERN_WITH_CUDA", *INCLUDE]
        command += ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS"]
        command += [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
        command += ["-include", Path(__file__).with_name("host.h"), "-x", "c++"]
        command += [ROOT / "python/bindings.cpp", KERNELS, "-o", made]
        subprocess.run(command, check=True)
        # pybind11 adds to a submodule of the same name, if there is one.
        spec = importlib.util.spec_from_file_location("host._C", made)
        self.extension = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.extension)
        self.library = ctypes.CDLL(str(made))
        done = subprocess.run(["nm", "-C", made], check=True, capture_output=True, text=True)
        symbols = done.stdout.replace("(anonymous namespace)::", "")
        found = re.findall(r"^(\w+) [tT] (?:void )?([^(\n]+)", symbols, re.M)
        places = {name: int(at, 16) for at, name in found}
        known = ctypes.cast(self.library.PyInit__C, ctypes.c_void_p).value
        self.names = {known - places["PyInit__C"] + at: name for name, at in places.items()}

    def launchers(self, kernels):
        """As ``bitkern.backends.cuda`` has them, with kernels of this source, on CPU tensors."""
        tensors = []

        @functools.cache
        def programs(name):
            return Program.of(parse(ptx(kernels, name))._replace(name=name))

        @Launcher
        def launcher(address, blocks, threads, pointers):
            try:
                program = programs(self.names[address])
                assert blocks and threads == program.kernel.threads
                sizes = [size for _, size in program.kernel.parameters]
                arguments = [ctypes.string_at(pointers[i], size) for i, size in enumerate(sizes)]
                Launch(program, blocks, 0, arguments, tensors)
            except BaseException as error:  # which may not leave a function that C calls
                text = f"{type(error).__name__}: {error}".encode()[-4095:]
                (ctypes.c_char * 4096).in_dll(self.library, "fault").value = text
                return 1
            return 0

        def call(name, problem, layers, stream):
            tensors[:] = _tensors(problem, layers)
            to = ctypes.cast(launcher, ctypes.c_void_p)
            ctypes.c_void_p.in_dll(self.library, "launcher").value = to.value
            getattr(self.extension.cuda, name)(problem, layers, stream)

        names = "weight_standardize_forward", "weight_standardize_backward"
        cuda = types.SimpleNamespace(**{name: partial(call, name) for name in names})
        return types.SimpleNamespace(
            weight_standardize_forward=partial(extension.standardize_forward, cuda, 0),
            weight_standardize_backward=partial(extension.standardize_backward, cuda, 0),
        )
