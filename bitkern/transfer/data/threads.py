"""Threads that load images."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from bitkern.packages import require

Item = TypeVar("Item")
Result = TypeVar("Result")


def _use_one_core() -> None:
    """Limit PyTorch to one core in this thread; other threads keep their setting."""
    from threadpoolctl import threadpool_limits

    torch.get_num_threads()  # its first call in a thread sets the number
    threadpool_limits(1, "openmp")  # OpenMP keeps one limit for each thread


def thread_pool(workers: int) -> ThreadPoolExecutor:
    """Create ``workers`` threads, each on one core."""
    require("threadpoolctl")
    return ThreadPoolExecutor(workers, "bitkern-images", initializer=_use_one_core)


def prefetch(
    start: Callable[[Item], Callable[[], Result]], items: Iterable[Item], count: int
) -> Iterator[Result]:
    """Yield the results for all items in order, with ``count`` more started than requested.

    ``start`` returns a function that waits for the result.
    """
    pending: deque[Callable[[], Result]] = deque()
    for item in items:
        pending.append(start(item))
        if len(pending) > count:
            yield pending.popleft()()
    while pending:
        yield pending.popleft()()
