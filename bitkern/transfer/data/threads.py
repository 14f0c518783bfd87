"""Threads that load images."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from bitkern.transfer.compute import require

Item = TypeVar("Item")
Result = TypeVar("Result")


def _alone() -> None:
    """Have PyTorch compute on this thread alone; what others do stays as it is."""
    from threadpoolctl import threadpool_limits

    torch.get_num_threads()  # sets the thread's number, the first time
    threadpool_limits(1, "openmp")  # which OpenMP keeps for each thread


def thread_pool(workers: int) -> ThreadPoolExecutor:
    """``workers`` threads, each on one core."""
    require("threadpoolctl")
    return ThreadPoolExecutor(workers, "bitkern-images", initializer=_alone)


def begun_ahead(
    begin: Callable[[Item], Callable[[], Result]], items: Iterable[Item], count: int
) -> Iterator[Result]:
    """The results for all items, in order, ``count`` more of them begun than were asked for.

    ``begin`` returns what waits for the result.
    """
    pending: deque[Callable[[], Result]] = deque()
    for item in items:
        pending.append(begin(item))
        if len(pending) > count:
            yield pending.popleft()()
    while pending:
        yield pending.popleft()()
