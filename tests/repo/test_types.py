"""Types that a type checker, and so an editor, knows from the package."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests import ROOT

TYPING = Path(__file__).parent / "typing"
ERROR = re.compile(r"(?P<file>[^:]+):(?P<line>\d+): error: .*\[(?P<code>[\w-]+)\]$")


def test_users_scripts_under_mypy_strict(tmp_path):
    """mypy is silent on right code, and reports the error that each wrong line names."""
    scripts = [TYPING / "right.py", TYPING / "wrong.py"]
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-pretty"]
    # As of an installed package, of whose own errors a user hears nothing.
    command += ["--follow-imports=silent", f"--cache-dir={ROOT / '.mypy_cache/users'}"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    options = {"capture_output": True, "text": True, "env": environment, "cwd": tmp_path}
    done = subprocess.run([*command, *map(str, scripts)], **options)
    found = {
        (Path(m["file"]).name, int(m["line"]), m["code"])
        for m in map(ERROR.match, done.stdout.splitlines())
        if m
    }
    expected = {
        (script.name, number, line.partition("# error: ")[2])
        for script in scripts
        for number, line in enumerate(script.read_text().splitlines(), 1)
        if "# error: " in line
    }
    assert found == expected, done.stdout + done.stderr
    assert {name for name, _, _ in expected} == {"wrong.py"}
