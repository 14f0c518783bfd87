"""Triton's interpreter: where there is no GPU, the kernels run under it on CPU tensors.

Triton decides at import whether its functions are interpreted: ``switch_on`` is called before the
process first imports Triton. TRITON_INTERPRET is set in the tests of Triton alone: others see the
package as it is without a GPU. Interpreted kernels cannot be compiled.
"""

import importlib
import os
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

EXECUTED = "BITKERN_PTX" in os.environ  # in a process of tests/backends/triton/ptx
INTERPRETED = not (torch.cuda.is_available() or EXECUTED) and find_spec("triton") is not None
_MODULES = (
    "triton",
    "bitkern.backends.triton.group_norm_act",
    "bitkern.backends.triton.weight_standardize",
)


def switch_on():
    """Import the kernels interpreted, if there is no GPU for them, and compute as a GPU does."""
    if not INTERPRETED or getattr(switch_on, "done", False):
        return
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "Triton was imported before its interpreter could be switched on: "
            "run tests/backends/triton and tests/ops first or alone, or set TRITON_INTERPRET=1"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for module in _MODULES:
            importlib.import_module(module)
    _compute_like_a_gpu()
    switch_on.done = True


def _compute_like_a_gpu():
    """Round to nearest and sum in a tree; the interpreter truncates float32 to bfloat16 and sums in
    a row."""
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, source, dtype):
        if (source.dtype.scalar, dtype.scalar) != (float32, bfloat16):
            return cast(self, source, dtype)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        bits = rounded.view(torch.int16).numpy().view(np.uint16).reshape(source.data.shape)
        return interpreter.TensorHandle(bits, bfloat16)

    def tree_sum(self, input):
        parts = np.moveaxis(input.handle.data, self.axis, 0)
        while len(parts) > 1:
            parts = parts[: len(parts) // 2] + parts[len(parts) // 2 :]
        total = parts.swapaxes(0, self.axis) if self.keep_dims else parts[0]
        return self.to_tensor(total, input.dtype)

    interpreter.InterpreterBuilder.cast_impl = cast_impl
    interpreter.ReduceOps.sum = tree_sum
