"""Rules of the tree that import-linter and ruff (see pyproject.toml) cannot check."""

import ast
import re
from pathlib import Path

import pytest

import bitkern
from tests import ROOT

PACKAGE = Path(bitkern.__file__).parent
LONGEST = 400
PRIVATE = PACKAGE / "_torch.py"  # the one module with private names of other packages
# Imports by name, except from parts below the importer and other packages.
HIDDEN_IMPORT = re.compile(
    r'__import__|import_module\((?!f?"(?:\{__name__\}\.|(?!bitkern)\w[\w.]*"))'
)
PRIVATE_NAME = re.compile(r"_[a-zA-Z]\w*")


def test_imports_by_name_point_down():
    """The extension is below all parts, the facade above them."""
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if HIDDEN_IMPORT.search(path.read_text())
    }
    assert found == {"__init__.py", "backends/extension.py"}


def hidden_private_names(tree):
    """Find private names of other packages in imports, and in strings of getattr and keys."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and not node.module.startswith("bitkern"):
            names = [node.module, *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Subscript):
            names = [node.slice]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("attr", ".get")):
            names = node.args
        for name in names:
            name = name.value if isinstance(name, ast.Constant) else name
            parts = name.split(".") if isinstance(name, str) else ()
            yield from (part for part in parts if PRIVATE_NAME.fullmatch(part))


def test_private_names_of_pytorch_are_in_one_place():
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {path for path, tree in trees.items() if [*hidden_private_names(tree)]} == {PRIVATE}
    versions = PRIVATE.read_text().partition("\n")[0]
    assert re.search(r"PyTorch 2\.11\.\d and 2\.\d+\.\d", versions)


@pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the sources: run it in a checkout"
)
@pytest.mark.parametrize(
    "folder", ["bitkern", "benchmarks", "tests", "csrc", "python", "examples", "hub", ".github"]
)
def test_no_file_is_long(folder):
    suffixes = {".py", ".cpp", ".cu", ".h", ".sh", ".yml"}
    files = [p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    assert files
    lengths = {str(path): len(path.read_text().splitlines()) for path in files}
    assert {path: n for path, n in lengths.items() if n > LONGEST} == {}
