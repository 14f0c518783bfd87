"""Processes that train together, as torchrun starts them; a single one is a group of one.

Each computes its part of a step by itself, then they communicate: a process that fails never leaves
the others waiting.
"""

import contextlib
import datetime
import importlib
import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 32 << 20  # of an all-reduce: few calls, little memory
P = ParamSpec("P")
T = TypeVar("T")


class RankError(RuntimeError):
    """Another process failed, or cannot be reached any more; the message says how."""


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_local_rank0() -> bool:
    """Return True in the first process of each machine."""
    return world_size() == 1 or int(os.environ.get("LOCAL_RANK", rank())) == 0


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Initialize the process group for the block, under torchrun and unless it is there already."""
    if not dist.is_available() or dist.is_initialized() or not dist.is_torchelastic_launched():
        yield
        return
    # The compiler imports it later, and then its default arguments keep the group alive: gloo's
    # threads outlive it, and one that frees a tensor while Python exits aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    # Rank 0 may check a large folder of images for hours.
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _as_rank_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # raised by every backend when a process is gone
        reason = str(error).partition("\n")[0]
        raise RankError(f"the processes cannot communicate: {reason}") from None


def all_reduce_sum(*values: float) -> list[float]:
    """Return the sums of ``values`` over all processes."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    with _as_rank_error():
        dist.all_reduce(sums)
    return [float(value) for value in sums]


def all_reduce_async(tensor: Tensor) -> Callable[[], None]:
    """Start to replace a tensor by its sum over all processes; returns a function that waits.

    With NCCL the stream waits, not the host.
    """
    with _as_rank_error():
        work = dist.all_reduce(tensor, async_op=True)

    def wait() -> None:
        with _as_rank_error():
            work.wait()

    return wait


def all_reduce_tensors(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in few large all-reduces."""
    if world_size() == 1:
        return
    for bucket in buckets(tensors):
        sizes = [tensor.numel() for tensor in bucket]
        with propagate_errors():  # there may be too little memory
            flat = bucket[0].new_empty(sum(sizes))
        # One copy each way, in any memory format; reshape and cat would make two.
        parts = [p.view(t.shape) for p, t in zip(torch.split(flat, sizes), bucket, strict=True)]
        for tensor, part in zip(bucket, parts, strict=True):
            part.copy_(tensor)
        with _as_rank_error():
            dist.all_reduce(flat)
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part)


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors into lists of one dtype and device, of about BUCKET_BYTES each."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        bucket = kinds[tensor.dtype, tensor.device]
        bucket.append(tensor)
        if sum(t.nbytes for t in bucket) >= BUCKET_BYTES:
            yield kinds.pop((tensor.dtype, tensor.device))
    yield from kinds.values()


def broadcast_from_rank0(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by that of rank 0."""
    if world_size() > 1:
        with _as_rank_error():
            for tensor in tensors:
                dist.broadcast(tensor, 0)


@contextlib.contextmanager
def propagate_errors() -> Iterator[None]:
    """Run a block without communication; if it fails in one process, stop them all.

    Collectives in which all take part, also those that failed, are allowed in the block
    (``bitkern.transfer.gradient_reducer``). A process that fails raises its own error, the others
    ``RankError`` with the message of the first.
    """
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(RankError):  # the original error matters more
            _share_failure(f"process {rank()}: {str(error) or type(error).__name__}")
        raise
    _share_failure(None)


def _share_failure(own: str | None) -> None:
    if world_size() == 1:
        return
    first = torch.tensor(world_size() if own is None else rank())
    with _as_rank_error():
        dist.all_reduce(first, dist.ReduceOp.MIN)
        if first == world_size():
            return
        message: list[str | None] = [own]
        dist.broadcast_object_list(message, int(first))
    if own is None:
        raise RankError(message[0])


def run_on_rank0(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Call ``function`` on rank 0 alone; all processes get its result."""
    with propagate_errors():
        result: list[T | None]
        result = [function(*arguments, **options) if rank() == 0 else None]
    if world_size() > 1:
        with _as_rank_error():
            dist.broadcast_object_list(result)
    return result[0]  # type: ignore[return-value]


def all_gather_object(value: T) -> list[T]:
    """Return the values of all processes, by rank."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    with _as_rank_error():
        dist.all_gather_object(values, value)
    return values


def _host_id() -> str:
    """Identify processes that see each other's files in /proc."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def run_on_local_rank0(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Call ``function`` in one process of each machine; the others there get its result."""
    if world_size() == 1:
        return function(*arguments, **options)
    hosts = all_gather_object(_host_id())
    first = hosts.index(hosts[rank()])
    result, pickled = None, b""
    with propagate_errors():
        if rank() == first:
            result = function(*arguments, **options)
            pickled = pickle.dumps(result)  # bytes, because other machines may fail to unpickle it
    pickled = all_gather_object(pickled)[first]
    with propagate_errors():
        unpickled: T = result if rank() == first else pickle.loads(pickled)  # type: ignore[assignment]
    return unpickled
