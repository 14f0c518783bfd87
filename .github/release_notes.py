"""The changelog's part on the version of a tag; an error unless the tag is that of the package.

``python release_notes.py v1.2.3``
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def notes(tag: str, changelog: str, version: str) -> str:
    """What stands under ``## 1.2.3 (date)``."""
    if tag != f"v{version}":
        raise SystemExit(f"tag: expected v{version}, the version in pyproject.toml, got {tag}")
    parts = re.split(r"^## (\S+) \((.+)\)\n", changelog, flags=re.M)
    for number, date, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        if number == version and re.fullmatch(r"\d{4}-\d\d-\d\d", date):
            return text.strip()
    raise SystemExit(f"CHANGELOG.md: expected a heading '## {version} (YYYY-MM-DD)', got none")


if __name__ == "__main__":
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    print(notes(sys.argv[1], (ROOT / "CHANGELOG.md").read_text(), version))
