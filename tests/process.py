"""Python in a process of its own."""

import os
import subprocess
import sys

from tests import ROOT


def python(*arguments, code=0, cwd=ROOT, env=None, **variables):
    """Run Python with these arguments; return the process when it has ended with this exit code.

    ``variables`` are added to the environment, by default that of this process.
    """
    command = [sys.executable, *map(str, arguments)]
    environment = (env or os.environ) | variables
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout[-6000:] + done.stderr[-3000:]
    return done
