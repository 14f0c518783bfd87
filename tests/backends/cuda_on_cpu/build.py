"""CUDA C++ compiled for the CPU, with the sanitizers that BITKERN_SANITIZE names if any.

In build/cuda_on_cpu, and again only when something has changed that it depends on.
"""

import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import types
from functools import partial
from pathlib import Path

import pybind11
from filelock import FileLock

from bitkern.backends import extension
from tests import ROOT

HERE = Path(__file__).resolve().parent
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
SANITIZERS = os.environ.get("BITKERN_SANITIZE", "")
BUILD = ROOT / "build/cuda_on_cpu" / (SANITIZERS or "plain")
COMPILER = shlex.split(os.environ.get("CXX", "g++"))

OURS = [HERE, ROOT / "csrc/include"]
FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += [f"-I{path}" for path in OURS]
FLAGS += [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
SANITIZE = []
if SANITIZERS:
    SANITIZE = [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"]
    FLAGS += [*SANITIZE, "-fno-omit-frame-pointer", "-fsanitize-sections=cuda_shared"]


def missing():
    """Why nothing can be compiled here, or None."""
    return None if shutil.which(COMPILER[0]) else f"no C++ compiler {COMPILER[0]}"


def compiler(*arguments):
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([*COMPILER, *arguments], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(map(str, done.args))}\n{done.stderr}")
    return done.stdout


@functools.cache
def surroundings():
    """What every object depends on besides its source."""
    headers = sorted(header for path in OURS for header in path.rglob("*.h"))
    texts = [header.read_text() for header in headers]
    return repr((compiler("--version"), sys.version, pybind11.__version__, texts))


def compiled(source, folder, *options):
    """The object of a source."""
    flags = [*FLAGS, *options]
    if source.suffix == ".cu":
        flags += ["-include", "cuda_on_cpu.h", "-x", "c++"]
    depends = repr((flags, source.read_text(), surroundings()))
    key = hashlib.sha256(depends.encode()).hexdigest()
    made = folder / f"{source.stem}.o"
    made_of = made.with_suffix(".key")
    if not (made.exists() and made_of.exists() and made_of.read_text() == key):
        folder.mkdir(parents=True, exist_ok=True)
        made_of.unlink(missing_ok=True)
        compiler(*flags, "-c", source, "-o", made)
        made_of.write_text(key)
    return made


def library(objects, made):
    """The shared library of objects: a new file, never one that a process has loaded."""
    fresh = made.with_suffix(".new")
    compiler("-shared", *SANITIZE, *objects, "-o", fresh)
    os.replace(fresh, made)
    return made


def module(kernels=KERNELS, folder=BUILD):
    """``bitkern._C`` with the CUDA kernels, which here take addresses of CPU tensors."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / ".lock"):  # of the processes that share the tests
        objects = [
            compiled(ROOT / "python/bindings.cpp", BUILD, "-DBITKERN_WITH_CUDA"),
            compiled(HERE / "no_cpu.cpp", BUILD),
            *(compiled(kernel, folder) for kernel in kernels),
        ]
        path = library(objects, folder / "_C.so")
    # pybind11 adds to a submodule of the same name, if there is one.
    spec = importlib.util.spec_from_file_location(f"{folder.name}._C", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def launchers(kernels=KERNELS, folder=BUILD):
    """As ``bitkern.backends.cuda`` has them, but of these kernels, on CPU tensors."""
    cuda, stream = module(kernels, folder).cuda, 0
    return types.SimpleNamespace(
        weight_standardize_forward=partial(extension.standardize_forward, cuda, stream),
        weight_standardize_backward=partial(extension.standardize_backward, cuda, stream),
    )
