"""Every block of code in the documentation runs, and every link leads somewhere."""

import importlib
import inspect
import os
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import bitkern
from tests import ROOT
from tests.process import python
from tests.repo.docs.page import LANGUAGES, blocks

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = {str(page.relative_to(ROOT)): blocks(page) for page in PAGES}
NOT_RUN = [
    pytest.param(block.reason, id=f"{page}, line {block.line}")
    for page, found in BLOCKS.items()
    for block in found
    if block.reason
]
MODULES = [f"bitkern.{name}" for name in ("backends", "models", "nn", "ops", "testing", "transfer")]
# Pages whose commands take more than some seconds, for each starts an interpreter and loads torch.
SWEEP = ["README.md"] + [
    f"docs/{name}.md"
    for name in ("applications", "data", "export", "finetune", "pretraining", "private")
    + ("start", "weights")
]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.sweep] * (page in SWEEP))
        for page, found in BLOCKS.items()
        if any(not block.reason for block in found)
    ],
)
def test_blocks_run(page, tmp_path):
    if page == "docs/private.md":
        pytest.importorskip("opacus", reason="opacus is not installed")
    folder = tmp_path / "page"
    folder.mkdir()
    environment = {
        "PYTHONPATH": f"{ROOT / 'tests/repo/docs/stand_in'}:{ROOT}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "BITKERN_CACHE": str(tmp_path / "cache"),
        "BITKERN_WEIGHTS_URL": "http://127.0.0.1:9",  # where nobody answers
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    python("-m", "tests.repo.docs.page", ROOT / page, cwd=folder, **environment)


@pytest.mark.parametrize("reason", NOT_RUN)
def test_not_run(reason):
    pytest.skip(reason)


def test_few_blocks_are_not_run():
    assert len(NOT_RUN) <= 8


@pytest.mark.parametrize("page", BLOCKS)
def test_blocks_say_what_they_are(page):
    for block in BLOCKS[page]:
        assert block.language in LANGUAGES, f"line {block.line}"
        assert block.title or block.language != "csv", f"line {block.line}: name the file"


@pytest.mark.parametrize("page", BLOCKS)
def test_links_lead_to_files(page):
    """Links name files that exist; building the site also checks headings and pages."""
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if not link.startswith(("https://", "#")):
            assert (folder / link.partition("#")[0]).exists(), link


def documented():
    """Yield the names on the pages of the reference."""
    text = "\n".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    for path in re.findall(r"^::: (\S+)", text, re.M):
        named = pkgutil.resolve_name(path)
        names = named.__all__ if hasattr(named, "__all__") else [path.rpartition(".")[2]]
        yield from names


@pytest.mark.parametrize("module", [bitkern, *map(importlib.import_module, MODULES)])
def test_public_names_are_documented(module):
    for name in module.__all__:
        assert getattr(module, name).__doc__
        assert inspect.ismodule(getattr(module, name)) or name in set(documented()), name


def test_named_tests_are_there():
    page = (ROOT / "docs/autograd.md").read_text()
    named = re.findall(r"`(tests/\S+\.py)(?:::(\w+))?`", page)
    assert len(named) > 15
    for path, name in named:
        assert not name or f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
