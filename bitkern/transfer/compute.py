"""How to run: the device, the precision, the threads that load images."""

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitkern.transfer import ranks

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CUDA_GRAPH = ("auto", "on", "off")
# Instructions that multiply bfloat16: on x86, on Arm. Without them it is slower than float32.
_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")

# What installs the modules that bitkern[train] does not.
_PACKAGES = {
    "datasets": "bitkern[large]",
    "tensorboard": "tensorboard",
    "torchvision": "torchvision",
    "webdataset": "bitkern[large]",
}


def default_precision(device: str | torch.device) -> tuple[str, str]:
    """The precision for a device, and why.

    ``"bf16"`` where it multiplies bfloat16 natively, ``"fp16"`` on other GPUs, else ``"fp32"``.
    """
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):  # it is asked of the current one
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "which the GPU has") if native else ("fp16", "the GPU has no bf16")
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        has = [name for name in _BF16 if capabilities.get(name)]
        return ("bf16", f"the CPU has {has[0]}") if has else ("fp32", "the CPU has no bf16")
    return "fp32", f"not known of {device.type}"


def require(*modules: str) -> None:
    """Raise ValueError, saying how to install them, unless all modules can be imported."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            package = _PACKAGES.get(module, "bitkern[train]")
            raise ValueError(f"{module} is not installed: pip install '{package}'")


# PyTorch's allocator for the CPU and the libraries below it say so in words alone.
_OUT_OF_MEMORY = (
    *("can't allocate memory", "not enough memory", "bad_alloc", "bad allocation"),
    *("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error) for s in _OUT_OF_MEMORY)


def use_graph(cuda_graph: str, device: torch.device) -> bool:
    """Whether one of ``CUDA_GRAPH`` means to use them: "auto" not yet, see ``train``.

    Raises ValueError for "on" where they cannot be used, and for what is none of the three.
    """
    if cuda_graph not in CUDA_GRAPH:
        raise ValueError(f"cuda_graph: expected {', '.join(CUDA_GRAPH)}, got {cuda_graph!r}")
    if cuda_graph == "on" and device.type != "cuda":
        raise ValueError(f"cuda_graph: expected auto or off on {device.type}, got 'on'")
    if cuda_graph == "on" and ranks.world_size() > 1:
        raise ValueError("cuda_graph: expected auto or off in several processes, got 'on'")
    return cuda_graph == "on"


class Compute(NamedTuple):
    """How to run: where, in which of ``PRECISIONS``, with how many threads that load images.

    And whether as CUDA graphs.
    """

    device: torch.device
    precision: str
    workers: int
    cuda_graph: bool = False

    @classmethod
    def of(
        cls,
        device: str | torch.device,
        precision: str,
        workers: int,
        cuda_graph: str = "off",
    ) -> "Compute":
        """Of a user's arguments; precision ``"auto"`` is that of ``default_precision``.

        Raises ValueError for another precision, and as ``use_graph`` does.
        """
        device = torch.device(device)
        if precision == "auto":
            precision, _ = default_precision(device)
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision: expected auto, {', '.join(PRECISIONS)}, got {precision!r}"
            )
        if cuda_graph == "on" and precision == "fp16":
            raise ValueError("cuda_graph: expected auto or off with fp16, got 'on'")
        return cls(device, precision, workers, use_graph(cuda_graph, device))

    def place(self, model: nn.Module) -> None:
        """Move a model to the device, in channels_last, in which convolutions and kernels lead.

        And without gaps in its tensors, in which the fused optimizer would err.
        """
        model.to(self.device)
        for tensor in (*model.parameters(), *model.buffers()):
            format = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
            tensor.data = tensor.data.contiguous(memory_format=format)

    def to_input(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) as fp32 in [-1, 1] on the device, channels_last."""
        images = images.to(self.device, non_blocking=True)
        return images.contiguous(memory_format=torch.channels_last).float() / 127.5 - 1

    def scaler(self) -> torch.amp.GradScaler:
        """What keeps the gradients of fp16 from vanishing, and does nothing in other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def autocast(self) -> torch.autocast:
        """The context in which the model runs."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")
