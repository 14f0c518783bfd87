"""The processes that train together, as torchrun starts them; a single one is a group of one.

Each computes its part of a step by itself, then they meet: a process that fails never leaves the
others waiting.
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

BUCKET_BYTES = 32 << 20  # that an all-reduce takes at a time: few calls, little memory
P = ParamSpec("P")
T = TypeVar("T")


class RankError(RuntimeError):
    """Another process failed, or cannot be reached any more; the message says how."""


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_first_of_host() -> bool:
    """Whether this is the process that does what each host needs once."""
    return world_size() == 1 or int(os.environ.get("LOCAL_RANK", rank())) == 0


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """Join the other processes for the block, if torchrun started them and it is not done yet."""
    if not dist.is_available() or dist.is_initialized() or not dist.is_torchelastic_launched():
        yield
        return
    # Loaded later, as the compiler does, its default arguments hold the group for good; then the
    # threads of gloo outlive it, and one that frees a tensor while Python ends aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    # The first one may check a large folder of images for hours.
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of any backend, when a process is gone
        reason = str(error).partition("\n")[0]
        raise RankError(f"the processes cannot meet: {reason}") from None


def sums_of(*values: float) -> list[float]:
    """The sums of ``values`` over all processes."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    with _meeting():
        dist.all_reduce(sums)
    return [float(value) for value in sums]


def adding_up(tensor: Tensor) -> Callable[[], None]:
    """Begin to replace a tensor by its sum over all processes; what is returned waits for it.

    With NCCL the stream does, and not the host, by PyTorch's documentation.
    """
    with _meeting():
        work = dist.all_reduce(tensor, async_op=True)

    def wait() -> None:
        with _meeting():
            work.wait()

    return wait


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in few large all-reduces."""
    if world_size() == 1:
        return
    for bucket in buckets(tensors):
        sizes = [tensor.numel() for tensor in bucket]
        with together():  # which memory may not suffice for
            flat = bucket[0].new_empty(sum(sizes))
        # One copy each way, whatever the memory format; reshape and cat would make two.
        parts = [p.view(t.shape) for p, t in zip(torch.split(flat, sizes), bucket, strict=True)]
        for tensor, part in zip(bucket, parts, strict=True):
            part.copy_(tensor)
        with _meeting():
            dist.all_reduce(flat)
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part)


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in lists of one dtype and device, of about BUCKET_BYTES each."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        bucket = kinds[tensor.dtype, tensor.device]
        bucket.append(tensor)
        if sum(t.nbytes for t in bucket) >= BUCKET_BYTES:
            yield kinds.pop((tensor.dtype, tensor.device))
    yield from kinds.values()


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by that of the first process."""
    if world_size() > 1:
        with _meeting():
            for tensor in tensors:
                dist.broadcast(tensor, 0)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Run the block, in which processes do not meet; one that fails in it stops them all.

    They may meet in what all take part in, whoever fails (``bitkern.transfer.reduction``). One
    that fails raises its own error, the others ``RankError`` with the message of the first.
    """
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(RankError):  # the error at hand matters more
            _tell_failures(f"process {rank()}: {str(error) or type(error).__name__}")
        raise
    _tell_failures(None)


def _tell_failures(mine: str | None) -> None:
    if world_size() == 1:
        return
    first = torch.tensor(world_size() if mine is None else rank())
    with _meeting():
        dist.all_reduce(first, dist.ReduceOp.MIN)
        if first == world_size():
            return
        message: list[str | None] = [mine]
        dist.broadcast_object_list(message, int(first))
    if mine is None:
        raise RankError(message[0])


def from_first(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """What ``function`` returns on the first process, the only one to call it."""
    with together():
        result: list[T | None]
        result = [function(*arguments, **options) if rank() == 0 else None]
    if world_size() > 1:
        with _meeting():
            dist.broadcast_object_list(result)
    return result[0]  # type: ignore[return-value]


def everyones(value: T) -> list[T]:
    """The value of each process, in their order."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    with _meeting():
        dist.all_gather_object(values, value)
    return values


def _host() -> str:
    """What the processes have in common that see each other's files in /proc."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def from_first_of_host(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """What ``function`` returns on the first process of this host, which alone calls it there."""
    if world_size() == 1:
        return function(*arguments, **options)
    hosts = everyones(_host())
    first = hosts.index(hosts[rank()])
    result = None
    with together():
        if rank() == first:
            result = function(*arguments, **options)
            packed = pickle.dumps(result)  # which other hosts may not be able to unpack
        else:
            packed = b""
    packed = everyones(packed)[first]
    with together():
        unpacked: T = result if rank() == first else pickle.loads(packed)  # type: ignore[assignment]
    return unpacked
