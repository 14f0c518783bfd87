"""Installing without a working compiler: everything works, and info says what is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = "bitkern csrc python setup.py CMakeLists.txt pyproject.toml README.md LICENSE".split()


@pytest.fixture
def checkout(tmp_path):
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        source, target = ROOT / name, tmp_path / "checkout" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignore)
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    return tmp_path / "checkout"


def install(checkout, target, **env):
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--target", str(target), str(checkout)]
    env = os.environ | {"CXX": "/bin/false", "BITKERN_CUDA": "auto"} | env
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=checkout)


def test_without_a_compiler(checkout, tmp_path):
    result = install(checkout, tmp_path / "site")
    assert result.returncode == 0, result.stderr
    assert not list((tmp_path / "site").rglob("_C*"))
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
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    out = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert out.returncode == 0, out.stderr
    where, choice = out.stdout.splitlines()
    assert where.startswith(str(tmp_path / "site"))
    assert "'reference'" in choice and "bitkern._C did not load" in choice


def test_cuda_demanded_without_a_compiler_is_an_error(checkout, tmp_path):
    assert install(checkout, tmp_path / "site", BITKERN_CUDA="1").returncode != 0
