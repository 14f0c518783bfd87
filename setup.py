"""Builds the extension ``bitkern._C`` with CMake; everything else is in pyproject.toml.

``BITKERN_CUDA=0|1|auto`` (default auto) decides on the CUDA kernels, ``BITKERN_SANITIZE=address,
undefined`` instruments the build. The extension is optional: without a working compiler the
installation goes on, and ``bitkern info`` says what is missing.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        try:
            import pybind11

            self.cmake_build(ext, pybind11.get_cmake_dir())
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            # With optional=True setuptools warns of this and goes on.
            raise CompileError(f"{ext.name} was not built: {error}") from error

    def cmake_build(self, ext, pybind11_dir):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "pybind11_DIR": pybind11_dir,
            "Python_EXECUTABLE": sys.executable,
            "PYBIND11_FINDPYTHON": "ON",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": build / "out",
            "BITKERN_CUDA": cuda,
            "BITKERN_SANITIZE": os.environ.get("BITKERN_SANITIZE", ""),
        }
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        definitions = [f"-D{key}={value}" for key, value in options.items()]
        subprocess.run(["cmake", *generator, *definitions, str(ROOT)], cwd=build, check=True)
        subprocess.run(["cmake", "--build", ".", "--parallel"], cwd=build, check=True)
        (built,) = (build / "out").glob("_C*.so")
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file, then a rename: a process that has the old one mapped keeps it.
        fresh = target.with_suffix(".new")
        shutil.copy2(built, fresh)
        os.replace(fresh, target)


cuda = os.environ.get("BITKERN_CUDA", "auto")
if cuda not in ("0", "1", "auto"):
    raise SystemExit(f"BITKERN_CUDA: expected 0, 1 or auto, got {cuda!r}")
optional = cuda != "1"  # asked for by name, a missing nvcc is an error
setup(
    ext_modules=[Extension("bitkern._C", sources=[], optional=optional)],
    cmdclass={"build_ext": CMakeBuild},
)
