"""Processes of their own: Python, and other programs."""

import os
import subprocess
import sys

from tests import ROOT


def run(*command, code=0, cwd=ROOT, env=None, **variables):
    """Run a command; return the process when it has ended with this exit code.

    ``variables`` are added to the environment, by default that of this process.
    """
    command, environment = [*map(str, command)], (env or os.environ) | variables
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout[-6000:] + done.stderr[-3000:]
    return done


def python(*arguments, **options):
    return run(sys.executable, *arguments, **options)
