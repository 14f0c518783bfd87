"""Compare the bytes that kernels read and write on the machine with the cost model's.

``test_kernels.py`` runs this, in a process where kernels are executed.
"""

import itertools

import pytest
import torch

from benchmarks import cost
from tests.backends.triton.ptx import driver
from tests.backends.triton.test_group_norm_act import problem


@pytest.mark.parametrize("shape", [(2, 512, 7, 7), (2, 256, 28, 28), (1, 256, 56, 56)], ids=str)
def test_bytes_are_those_of_the_cost_model(shape):
    samples, channels, height, _ = shape
    case = problem("cpu", shape, 32, torch.bfloat16, "channels_last")
    driver.log.clear()
    case.ours()
    launches = list(driver.log)
    for backward in (False, True):
        passes = itertools.chain(
            *cost.group_norm_act(
                samples, channels, height**2, cost.DEVICES["H100"], backward=backward
            )
        )
        passes, way = list(passes), "_backward_" if backward else "_forward_"
        maps = [t for name, tensors in launches if way in name for t in tensors]
        maps = [(read, written) for size, read, written in maps if size == case.x.nbytes]
        read, written = (sum(numbers) for numbers in zip(*maps, strict=True))
        # Forward reads the first row of each tile of a split once more, which is in L1 then.
        assert 1 <= read / sum(p.read for p in passes) <= 1.15
        assert written == sum(p.written for p in passes)
