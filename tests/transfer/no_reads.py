"""Reads that make the host wait for a device are errors in :func:`no_reads`, on the CPU too."""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Read(AssertionError):
    pass


# Operators that read values, or whose result has a shape that depends on them.
READING = "_local_scalar_dense item is_nonzero equal nonzero argwhere masked_select bincount "
READING += "unique_dim unique_consecutive unique_dim_consecutive _unique _unique2 allclose"
READING = {f"aten::{name}" for name in READING.split()}
INDEXING = {f"aten::{name}" for name in ("index", "index_put", "index_put_", "_index_put_impl_")}


class _Operators(TorchDispatchMode):
    """Sees what every call comes down to, in forward and in backward."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        if name in READING:
            raise Read(name)
        if name in INDEXING:
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                raise Read(f"{name} by a mask")
        if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            raise Read(f"{name} without output_size")
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    """Sees what on the CPU comes down to nothing."""

    NAMES = ("cpu", "numpy", "tolist", "__array__", "__dlpack__")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in {getattr(torch.Tensor, name) for name in self.NAMES}:
            raise Read(func.__name__)
        if func is torch.Tensor.to and "cpu" in map(str, (*args[1:], *kwargs.values())):
            raise Read("to the host")
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_reads():
    """Raise :class:`Read` where tensors are read. The device of the computation is a cpu:0."""
    with _Methods(), _Operators():
        yield
