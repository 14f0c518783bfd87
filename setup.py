"""Builds the extension ``bitkern._C`` with CMake; everything else is in pyproject.toml.

``BITKERN_CUDA=0|1|auto`` (default auto) decides on the CUDA kernels, ``BITKERN_SANITIZE=address,
undefined`` instruments the build. The extension is optional: without a working compiler the
installation goes on with the reason in ``bitkern/_C.missing``, from where ``bitkern info`` and the
first call on the CPU have it. With ``BITKERN_REQUIRE_EXTENSION=1`` it is an error.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
MISSING = "_C.missing"
REPOSITORY = "https://github.com/bitkern/bitkern"


def run(command, cwd):
    """Run a command in sight of the user; its output is the argument of CalledProcessError."""
    command = [str(word) for word in command]
    with subprocess.Popen(
        command,
        cwd=cwd,
        # Whatever the terminal can show: in other locales compilers quote as they like.
        env=os.environ | {"LC_ALL": "C"},
        encoding="ascii",
        errors="backslashreplace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, "".join(lines))


def why(error):
    """One line on what kept the extension from being built."""
    output = getattr(error, "output", None) or ""
    error_of_cmake = r"CMake Error(?: at [^\n]*)?:\s*(.+?)(?=It fails|Call Stack|\n-- |\Z)"
    said = re.search(error_of_cmake, output, re.S)
    said = said or re.search(r"^.*?((?:fatal )?error: .+)", output, re.M)
    return " ".join((said[1] if said else str(error)).split())[:300]


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        missing = target.with_name(MISSING)
        for old in (target, missing):
            old.unlink(missing_ok=True)
        try:
            import pybind11

            self.cmake_build(target, pybind11.get_cmake_dir())
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            missing.write_text(why(error), encoding="utf-8")
            # With optional=True setuptools warns of this and goes on.
            raise CompileError(f"{ext.name} was not built: {why(error)}") from error

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        (ext,) = self.extensions
        target = Path(self.get_ext_fullpath(ext.name))
        built, source = Path(self.build_lib, "bitkern", MISSING), target.with_name(MISSING)
        if built.exists():
            target.unlink(missing_ok=True)  # of an earlier build, for other sources
            shutil.copy2(built, source)
        else:
            source.unlink(missing_ok=True)

    def cmake_build(self, target, pybind11_dir):
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
        run(["cmake", "--fresh", *generator, *definitions, ROOT], cwd=build)
        run(["cmake", "--build", ".", "--parallel"], cwd=build)
        (built,) = (build / "out").glob("_C*.so")
        # A new file, then a rename: a process that has the old one mapped keeps it.
        fresh = target.with_suffix(".new")
        shutil.copy2(built, fresh)
        os.replace(fresh, target)


def chosen(name, default, *others):
    value = os.environ.get(name, default)
    if value not in (default, *others):
        raise SystemExit(f"{name}: expected {', '.join((default, *others))}, got {value!r}")
    return value


def long_description():
    """The README, whose links lead to the repository from wherever it is shown."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"(!\[[^]]*\]\()(?=docs/)", rf"\1{REPOSITORY}/raw/main/", text)
    return re.sub(r"\]\((?!https?:)", f"]({REPOSITORY}/blob/main/", text)


cuda = chosen("BITKERN_CUDA", "auto", "0", "1")
required = chosen("BITKERN_REQUIRE_EXTENSION", "0", "1")
optional = "1" not in (cuda, required)  # asked for by name, a missing nvcc is an error
setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    ext_modules=[Extension("bitkern._C", sources=[], optional=optional)],
    cmdclass={"build_ext": CMakeBuild},
)
