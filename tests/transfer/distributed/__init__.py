"""Checks in several processes, and how the tests start these."""

import os
import subprocess
import sys

from tests import ROOT


def torchrun(processes, *arguments, nodes=1, endpoint="localhost:0"):
    """A process of torchrun, for one of ``nodes``; arguments begin with a module."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
    command += ["--rdzv-id=bitkern", "--master-port=0", "-m", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
