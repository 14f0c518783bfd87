"""The notes of a release."""

import runpy

import pytest

from tests import ROOT

SCRIPT = ROOT / ".github" / "release_notes.py"
if not SCRIPT.exists():
    pytest.skip("needs the sources: run it in a checkout", allow_module_level=True)
notes = runpy.run_path(str(SCRIPT))["notes"]
CHANGELOG = """# Changelog

## 0.2.0 (unreleased)
- Something.

## 0.1.0 (2026-12-01)

The first.

**Kernels**
- All.

## 0.0.9 (2026-11-01)
- Nothing.
"""


def test_notes_of_a_version():
    assert notes("v0.1.0", CHANGELOG, "0.1.0") == "The first.\n\n**Kernels**\n- All."
    assert notes("v0.0.9", CHANGELOG, "0.0.9") == "- Nothing."


@pytest.mark.parametrize(
    "tag, version, error",
    [
        ("v0.1.1", "0.1.0", "tag: expected v0.1.0, the version in pyproject.toml, got v0.1.1"),
        ("v0.2.0", "0.2.0", "expected a heading '## 0.2.0 \\(YYYY-MM-DD\\)'"),
        ("v0.3.0", "0.3.0", "expected a heading '## 0.3.0 "),
    ],
)
def test_a_tag_that_is_not_ready(tag, version, error):
    with pytest.raises(SystemExit, match=error):
        notes(tag, CHANGELOG, version)
