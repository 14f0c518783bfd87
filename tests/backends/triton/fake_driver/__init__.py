"""Triton's real launcher on a machine without a GPU: see libcuda.c, __main__.py."""

import os
import subprocess
from pathlib import Path

import triton

from tests import ROOT
from tests.backends.triton import tritons
from tests.process import python

HERE = Path(__file__).parent
BUILD = ROOT / "build/fake_driver"
COMPILER = os.environ.get("CC", "gcc")


def build():
    """Build libcuda.so.1 and return its folder."""
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    BUILD.mkdir(parents=True, exist_ok=True)
    compiler = [COMPILER, "-shared", "-fPIC", "-O1", f"-I{include}"]
    subprocess.run([*compiler, HERE / "libcuda.c", "-o", BUILD / "libcuda.so.1"], check=True)
    return BUILD


def run(what, other_triton):
    """Run ``python -m tests.backends.triton.fake_driver`` with a Triton; return what it prints."""
    folder = str(build())
    driver = {"LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder}
    environment = tritons.environment(other_triton)
    return python("-m", "tests.backends.triton.fake_driver", what, env=environment, **driver).stdout
