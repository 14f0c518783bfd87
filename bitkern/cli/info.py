"""What ``bitkern info`` prints: versions, devices, what was built, what runs each operator."""

import importlib.metadata
import os
import platform

import torch

import bitkern
from bitkern import backend


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices():
    devices = [
        f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    ]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices.append(
            f"cuda:{i}: {p.name}, {p.multi_processor_count} multiprocessors, "
            f"{p.total_memory / 2**30:.0f} GiB"
        )
    return devices


def _operators():
    """For each device at hand and each operator the choice for typical tensors."""
    rows = []
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for dtype in (torch.float32, torch.bfloat16):
            maps = torch.empty(1, 32, 8, 8, device=device, dtype=dtype)
            weight = torch.empty(32, 32, 3, 3, device=device)
            for name, kernel in backend.OPERATORS.items():
                tensors = (weight,) if kernel == "weight_standardize" else (maps,)
                choice = backend.choose(kernel, *tensors)
                rows.append(
                    {
                        "operator": name,
                        "device": device,
                        "dtype": str(dtype).removeprefix("torch."),
                        **choice._asdict(),
                    }
                )
    return rows


def collect() -> dict:
    """Everything as plain data."""
    module, reason = backend.extension()
    if module is None:
        built = reason
    else:
        cuda = "with" if module.with_cuda else "without"
        built = f"cpu ({module.cpu.isa()}), {cuda} cuda, compiler {module.compiler}"
    triton, triton_reason = backend.triton()
    packages = ("torch", "numpy", "safetensors", "torchvision", "timm", "transformers")
    return {
        "bitkern": bitkern.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "triton": triton.__version__ if triton else triton_reason,
        "cuda": torch.version.cuda,
        "devices": _devices(),
        "extension": built,
        "backend": backend.requested(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith("BITKERN_")},
        "operators": _operators(),
    }


def report() -> str:
    """The same as text for people."""
    data = collect()
    lines = [f"bitkern    {data['bitkern']}", f"python     {data['python']}"]
    lines += [f"{k:<10} {v or 'not installed'}" for k, v in data["packages"].items()]
    lines += [f"triton     {data['triton']}", f"cuda       {data['cuda'] or 'torch without CUDA'}"]
    lines += [f"device     {device}" for device in data["devices"]]
    lines += [f"extension  {data['extension']}", f"backend    {data['backend']}"]
    lines += [f"{k}={v}" for k, v in data["environment"].items()]
    lines += ["", f"{'operator':<20} {'device':<6} {'dtype':<9} {'runs on':<10} because"]
    lines += [
        f"{r['operator']:<20} {r['device']:<6} {r['dtype']:<9} {r['name']:<10} {r['reason']}"
        for r in data["operators"]
    ]
    return "\n".join(lines)
