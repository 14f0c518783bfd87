"""Installing from a checkout and from the source archive, with a compiler and without."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = "bitkern csrc python setup.py CMakeLists.txt pyproject.toml MANIFEST.in README.md LICENSE"


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
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--target", str(target), str(source)]
    env = os.environ | {"CXX": "/bin/false", "BITKERN_CUDA": "auto"} | env
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=target.parent)


def what_runs(site):
    """What an installation says of itself, where no other can be found."""
    code = (
        "import sys\n"
        # An editable install of the checkout would supply the extension that is missing here.
        "finders = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
        "sys.meta_path[:] = finders\n"
        "import torch, bitkern\n"
        "print(bitkern.__file__)\n"
        "x = torch.randn(2, 8, 4, 4, requires_grad=True)\n"
        "bitkern.ops.group_norm_act(x, 4).sum().backward()\n"
        "print(bitkern.explain('group_norm_act', x))"
    )
    env = os.environ | {"PYTHONPATH": str(site)}
    out = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=env, cwd=site
    )
    assert out.returncode == 0, out.stderr
    where, choice = out.stdout.splitlines()
    assert where.startswith(str(site))
    return choice


def test_without_a_compiler(checkout, tmp_path):
    result = install(checkout, tmp_path / "site")
    assert result.returncode == 0, result.stderr
    assert not list((tmp_path / "site").rglob("_C*"))
    choice = what_runs(tmp_path / "site")
    assert "'reference'" in choice and "bitkern._C did not load" in choice


@pytest.fixture
def archive(checkout, tmp_path):
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    return archive


def test_source_archive_is_complete(archive):
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    sources = [path for name in SOURCES.split() for path in (ROOT / name).rglob("*")]
    sources = {str(path.relative_to(ROOT)) for path in sources if path.is_file()}
    sources = {name for name in sources if not name.endswith((".so", ".pyc"))}
    assert {"bitkern/py.typed", "csrc/cuda/weight_standardize.cu"} < sources <= packed


@pytest.mark.sweep
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler on this machine")
def test_source_archive_has_the_kernels(archive, tmp_path):
    quick = {"CMAKE_BUILD_TYPE": "Debug"}  # optimized, the compiler takes five times as long
    result = install(archive, tmp_path / "site", CXX="c++", BITKERN_CUDA="0", **quick)
    assert result.returncode == 0, result.stderr
    assert "name='cpu'" in what_runs(tmp_path / "site")
    assert (tmp_path / "site" / "bitkern" / "py.typed").exists()
    assert not list((tmp_path / "site").glob("csrc*"))


def test_cuda_demanded_without_a_compiler_is_an_error(checkout, tmp_path):
    assert install(checkout, tmp_path / "site", BITKERN_CUDA="1").returncode != 0


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
