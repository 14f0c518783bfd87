"""Device, precision, loader threads and CUDA graphs of a training or evaluation."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitkern.transfer import ranks
from bitkern.transfer.checks import CUDA_GRAPH, PRECISIONS, check, check_choice

# CPU features (x86, then Arm) that multiply bfloat16; without one it is slower than float32.
_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def default_precision(device: str | torch.device) -> tuple[str, str]:
    """Return the precision for a device, and the reason.

    ``"bf16"`` where it multiplies bfloat16 natively, ``"fp16"`` on other GPUs, else ``"fp32"``.
    """
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):  # the query concerns the current device
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "which the GPU has") if native else ("fp16", "the GPU has no bf16")
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        has = [name for name in _BF16 if capabilities.get(name)]
        return ("bf16", f"the CPU has {has[0]}") if has else ("fp32", "the CPU has no bf16")
    return "fp32", f"not known of {device.type}"


def use_graph(cuda_graph: str, device: torch.device) -> bool:
    """Return True if ``cuda_graph`` is "on"; "auto" is off until it has been measured.

    Raises ValueError for "on" where graphs are not supported, and for an unknown value.
    """
    check_choice("cuda_graph", cuda_graph, CUDA_GRAPH)
    on = cuda_graph == "on"
    gpu, alone = device.type == "cuda", ranks.world_size() == 1
    check(not on or gpu, "cuda_graph", f"auto or off on {device.type}", cuda_graph)
    check(not on or alone, "cuda_graph", "auto or off in several processes", cuda_graph)
    return on


class DeviceConfig(NamedTuple):
    """The device, one of ``PRECISIONS``, the number of loader threads, and CUDA graphs or not."""

    device: torch.device
    precision: str
    workers: int
    cuda_graph: bool = False

    @classmethod
    def create(
        cls, device: str | torch.device, precision: str, workers: int, cuda_graph: str = "off"
    ) -> "DeviceConfig":
        """Validate a user's arguments; precision ``"auto"`` is that of ``default_precision``.

        Raises ValueError for an unknown precision, and as ``use_graph`` does.
        """
        device = torch.device(device)
        if precision == "auto":
            precision, _ = default_precision(device)
        check_choice("precision", precision, ("auto", *PRECISIONS))
        graph_of_fp16 = cuda_graph == "on" and precision == "fp16"
        check(not graph_of_fp16, "cuda_graph", "auto or off with fp16", cuda_graph)
        return cls(device, precision, workers, use_graph(cuda_graph, device))

    def place(self, model: nn.Module) -> None:
        """Move a model to the device, in channels_last, which convolutions and kernels prefer.

        Tensors become dense, because the fused optimizer is wrong for others.
        """
        model.to(self.device)
        for tensor in (*model.parameters(), *model.buffers()):
            format = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
            tensor.data = tensor.data.contiguous(memory_format=format)

    def to_input(self, images: Tensor) -> Tensor:
        """Convert uint8 (N, 3, H, W) to fp32 in [-1, 1] on the device, channels_last."""
        images = images.to(self.device, non_blocking=True)
        return images.contiguous(memory_format=torch.channels_last).float() / 127.5 - 1

    def scaler(self) -> torch.amp.GradScaler:
        """Create the GradScaler of fp16, disabled in other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def autocast(self) -> torch.autocast:
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")
