"""How many micro-batches a step must be split into for the memory to suffice."""

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from bitkern.transfer import ranks
from bitkern.transfer.compute import is_out_of_memory
from bitkern.transfer.data.memory import free_memory, resident_memory
from bitkern.transfer.step import Stepper

USED = 0.9  # of the free memory of a CPU, at most
CPU_IMAGES = 16  # a micro-batch of more is no faster on a CPU
PERIOD = 0.002  # seconds between two looks at the memory


class Trial(NamedTuple):
    """What a micro-batch takes: bytes of memory in the process at the peak, and seconds."""

    memory: int
    seconds: float


def smallest_split(suffices: Callable[[int], bool], most: int, least: int = 1) -> int | None:
    """Find the smallest number of micro-batches in ``least`` … ``most`` that suffices, or None.

    What suffices is taken to do so when there are more of them, too.
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

    Linux promises memory that it has not, and kills who uses it: so the memory of a few images and
    of twice as many is measured, and more are taken to be on the line through them. The processes
    of a group all make the call, and get the same number.
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
    return min(ranks.everyones(images))


def attempt(step: Stepper) -> Trial | None:
    """Try a step's largest micro-batch; None if the memory of some process does not suffice.

    The model, the optimizer and all random generators stay as they are. Of several processes the
    trial is that of the one that takes most.
    """
    device = step.compute.device
    gpus = [device] if device.type == "cuda" else []
    buffers = [(buffer, buffer.clone()) for buffer in step.model.buffers()]
    seconds: float | None = None
    with torch.random.fork_rng(gpus), _peak(device) as peak:
        try:
            seconds = step.rehearse()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
    # Here, where the error no longer holds on to what it was raised in.
    step.optimizer.zero_grad()
    for buffer, value in buffers:
        buffer.copy_(value)
    gc.collect()
    if gpus:
        torch.cuda.empty_cache()
    trials = ranks.everyones(None if seconds is None else Trial(peak(), seconds))
    if any(trial is None for trial in trials):
        return None
    return Trial(*map(max, zip(*trials, strict=True)))


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """Give what tells, after the block, the most bytes that the process had during it."""
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
