"""Triton on GPUs: device code in ``kernels``, launchers beside it, one file per operator."""

import functools
import importlib
import os
import types

import torch

from bitkern.backends.backend import FLOATS, KERNELS, Backend


@functools.cache
def load() -> tuple[types.ModuleType | None, str]:
    """Triton and an empty string, or None and the reason why it is missing."""
    try:
        return importlib.import_module("triton"), ""
    except ImportError as error:
        return None, f"triton did not load ({error})"


class Triton(Backend):
    name = "triton"
    devices = auto = ("cuda",)
    dtypes = dict.fromkeys(KERNELS, FLOATS)

    def runs_on(self, device: str) -> bool:
        return device in self.devices or os.environ.get("TRITON_INTERPRET") == "1"

    def unavailable(self) -> str | None:
        triton, reason = load()
        if triton is None or not torch.cuda.is_available():
            return reason or None
        try:  # it compiles a module that calls the GPU's driver, which takes a C compiler
            triton.runtime.driver.active.get_current_target()
        except Exception as error:
            return f"triton did not start ({error})"
        return None

    def launchers(self, kernel: str) -> types.ModuleType:
        return importlib.import_module(f"{__name__}.{kernel}")
