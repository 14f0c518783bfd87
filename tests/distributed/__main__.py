"""Run the checks in this process of a torchrun; write what came of each to FOLDER/RANK.json.

``torchrun --nproc-per-node=4 -m tests.distributed FOLDER``, as tests/test_distributed.py does.
"""

import datetime
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed import gradients, training


def run(folder):
    outcomes = {}
    for check in (*gradients.CHECKS, *training.CHECKS):
        torch.manual_seed(0)
        try:
            check(folder / check.__name__)
            outcomes[check.__name__] = "passed"
        except Exception:  # noqa: BLE001 - reported, and the test fails
            outcomes[check.__name__] = traceback.format_exc()
        dist.barrier()
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    # A check that leaves its peers waiting fails in a minute, not in half an hour.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    run(Path(sys.argv[1]))
    dist.destroy_process_group()
