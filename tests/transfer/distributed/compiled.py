"""Compiled networks in several processes: their gradients against those of one."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from tests.transfer.distributed.gradients import (
    accumulate,
    assert_gradients,
    build,
    ddp_of,
    mesh_of,
    unsynced,
)


def compiled_gradients_equal_those_of_one_process(folder):
    """``torch.compile(backend="bitkern")``, around and inside the wrapper."""
    ddp = torch.compile(ddp_of(build(), 2), backend="bitkern")
    for _ in range(2):
        ddp.zero_grad()
        accumulate(ddp, dist.get_rank() % 2, 2, unsynced(ddp))
        assert_gradients(ddp._orig_mod)
    inside = build()
    inside.compile(backend="bitkern")
    ddp = ddp_of(inside, 2)
    accumulate(ddp, dist.get_rank() % 2, 2, unsynced(ddp))
    assert_gradients(ddp)
    sharded = build()
    for stage in sharded.stages:
        fully_shard(stage, mesh=mesh_of(2))
        stage.compile(backend="bitkern")
    fully_shard(sharded, mesh=mesh_of(2))
    sharded.dtype = torch.float32
    accumulate(sharded, dist.get_rank() % 2, 2)
    assert_gradients(sharded)


CHECKS = (compiled_gradients_equal_those_of_one_process,)
