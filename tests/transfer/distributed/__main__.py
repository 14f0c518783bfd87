"""Run the checks of modules in this process of a torchrun; write what came to FOLDER/RANK.json.

``torchrun --nproc-per-node=4 -m tests.transfer.distributed FOLDER training``, as the tests do.
"""

import datetime
import importlib
import json
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


def run(folder, *modules):
    outcomes = {}
    found = [importlib.import_module(f"tests.transfer.distributed.{module}") for module in modules]
    for check in (check for module in found for check in module.CHECKS):
        torch.manual_seed(0)
        try:
            check(folder / check.__name__)
            outcomes[check.__name__] = "passed"
        except (Exception, pytest.fail.Exception):  # reported, and the test fails
            outcomes[check.__name__] = traceback.format_exc()
        dist.barrier()
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    # As in bitkern.transfer.ranks: loaded later, it keeps the group's threads until they abort.
    importlib.import_module("torch.distributed.nn.functional")
    # A check that leaves its peers waiting fails in a minute, not in half an hour.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    run(Path(sys.argv[1]), *sys.argv[2:])
    dist.destroy_process_group()
