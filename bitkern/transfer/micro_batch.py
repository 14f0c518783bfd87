"""Find the smallest number of micro-batches in a step for which memory suffices."""

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from bitkern.transfer import ranks
from bitkern.transfer.data.memory import free_memory, is_out_of_memory, resident_memory
from bitkern.transfer.step import TrainStep

USED = 0.9  # of the free memory of a CPU, at most
CPU_IMAGES = 16  # a larger micro-batch is no faster on a CPU
PERIOD = 0.002  # seconds between two measurements of the memory


class Trial(NamedTuple):
    """The peak memory of the process, in bytes, and the seconds of a micro-batch."""

    memory: int
    seconds: float


def smallest_split(suffices: Callable[[int], bool], most: int, least: int = 1) -> int | None:
    """Find the smallest number of micro-batches in ``least`` … ``most`` that suffices, or None.

    Assumes that more micro-batches suffice too.
    """
    too_few, split = least - 1, least
    while not suffices(split):
        if split == most:
            return None
        too_few, split = split, min(2 * split, most)
    while split - too_few > 1:
        middle = (too_few + split) // 2
        too_few, split = (too_few, middle) if suffices(middle) else (middle, split)
    return split


def images_that_fit(try_images: Callable[[int], Trial | None], few: int = 1) -> int:
    """Find how many images of a micro-batch fit into the free memory of a CPU; 0 if not ``few``.

    Linux overcommits memory, and kills a process that uses it: so the memory of a few images and of
    twice as many is measured and extrapolated. All processes of a group make the call, and get the
    same number.
    """
    free = free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    most = resident_memory() + USED * free
    fewer, more = try_images(few), try_images(2 * few)
    images = 0
    if fewer and fewer.memory <= most:
        images = 2 * few - 1
        if more:
            each = max(1, more.memory - fewer.memory) / few
            images = few + int((most - fewer.memory) / each)
    return min(ranks.all_gather_object(images))


def try_step(step: TrainStep) -> Trial | None:
    """Try a step's largest micro-batch; None if memory does not suffice in some process.

    The model, the optimizer and all random generators are left unchanged. With several processes
    the largest memory and time are returned.
    """
    device = step.config.device
    gpus = [device] if device.type == "cuda" else []
    buffers = [(buffer, buffer.clone()) for buffer in step.model.buffers()]
    seconds: float | None = None
    with torch.random.fork_rng(gpus), _peak_memory(device) as peak:
        try:
            seconds = step.rehearse()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
    # Outside of the except block, where the traceback no longer keeps tensors alive.
    step.optimizer.zero_grad()
    for buffer, value in buffers:
        buffer.copy_(value)
    gc.collect()
    if gpus:
        torch.cuda.empty_cache()
    trials = ranks.all_gather_object(None if seconds is None else Trial(peak(), seconds))
    if any(trial is None for trial in trials):
        return None
    return Trial(*map(max, zip(*trials, strict=True)))


@contextlib.contextmanager
def _peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the peak memory of the process during the block, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_reserved(device)
        return
    done, most = threading.Event(), resident_memory()

    def watch() -> None:
        nonlocal most
        while not done.wait(PERIOD):
            most = max(most, resident_memory())

    thread = threading.Thread(target=watch, name="bitkern-memory", daemon=True)
    thread.start()
    try:
        yield lambda: most
    finally:
        done.set()
        thread.join()
