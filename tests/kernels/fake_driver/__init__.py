"""Triton's real launcher on a machine without a GPU: see libcuda.c, __main__.py."""

import os
import subprocess
import sys
from pathlib import Path

import triton

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
OTHER_TRITON = ROOT / "build/triton-3.6.0"  # made by the Makefile
BUILD = ROOT / "build/fake_driver"


def build():
    """The folder of libcuda.so.1."""
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    BUILD.mkdir(parents=True, exist_ok=True)
    compiler = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-O1", f"-I{include}"]
    subprocess.run([*compiler, HERE / "libcuda.c", "-o", BUILD / "libcuda.so.1"], check=True)
    return BUILD


def run(*arguments, other_triton=False):
    """What ``python -m tests.kernels.fake_driver`` prints, with the Triton of PyTorch 2.11 or the
    installed one."""
    folder = str(build())
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder}
    if other_triton:
        environment["PYTHONPATH"] = str(OTHER_TRITON)
    command = [sys.executable, "-m", "tests.kernels.fake_driver", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
