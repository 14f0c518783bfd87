"""How many micro-batches a step must be split into for the memory to suffice."""

import gc
from collections.abc import Callable

import torch

from bitkern.transfer import ranks
from bitkern.transfer.step import Stepper


def smallest_split(suffices: Callable[[int], bool], most: int) -> int | None:
    """The smallest number of micro-batches in 1 … ``most`` that suffices; None if none does.

    What suffices is taken to do so when there are more of them, too.
    """
    too_few, split = 0, 1
    while not suffices(split):
        if split == most:
            return None
        too_few, split = split, min(2 * split, most)
    while split - too_few > 1:
        middle = (too_few + split) // 2
        too_few, split = (too_few, middle) if suffices(middle) else (middle, split)
    return split


# Libraries say in their own words that there was no memory for their buffers.
_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def _is_out_of_memory(error: RuntimeError) -> bool:
    message = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(s in message for s in _OUT_OF_MEMORY)


def fits(step: Stepper) -> bool:
    """Whether the memory of every process suffices for a step, which is tried.

    The model, the optimizer and all random generators stay as they are.
    """
    device = step.compute.device
    gpus = [device] if device.type == "cuda" else []
    buffers = [(buffer, buffer.clone()) for buffer in step.model.buffers()]
    failed = False
    with torch.random.fork_rng(gpus):
        try:
            step.rehearse()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            failed = True
    # Here, where the error no longer holds on to what it was raised in.
    step.optimizer.zero_grad()
    for buffer, value in buffers:
        buffer.copy_(value)
    gc.collect()
    if gpus:
        torch.cuda.empty_cache()
    return ranks.sums_of(failed) == [0]
