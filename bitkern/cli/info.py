"""``bitkern info``: versions, devices, the compiled extension, the backend of each operator."""

import argparse
import importlib.metadata
import json
import os
import platform
import warnings
from typing import Any

import torch

import bitkern
from bitkern import backends
from bitkern.backends import extension, triton
from bitkern.cli import options
from bitkern.transfer import default_precision

DISTRIBUTED = False


def add(commands: "argparse._SubParsersAction[options.Parser]") -> None:
    parser = commands.add_parser("info", help="versions, devices, and the backend of each operator")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    print(json.dumps(collect(), indent=2) if args.json else report())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
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


def _operators() -> list[dict[str, str]]:
    """List the backend of each operator on each device, for typical tensors."""
    rows = []
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for dtype in (torch.float32, torch.bfloat16):
            maps = torch.empty(1, 32, 8, 8, device=device, dtype=dtype)
            weight = torch.empty(32, 32, 3, 3, device=device)
            for name, operator in backends.OPERATORS.items():
                takes_weight = operator.kernel == "weight_standardize"
                choice = backends.choose(operator.kernel, weight if takes_weight else maps)
                kind = {"device": device, "dtype": str(dtype).removeprefix("torch.")}
                rows.append({"operator": name, **kind, **choice._asdict()})
    return rows


def collect() -> dict[str, Any]:
    module, built = extension.load()
    if module is not None:
        cuda = "with" if module.with_cuda else "without"
        built = f"cpu ({module.cpu.isa()}), {cuda} cuda, compiler {module.compiler}"
    triton_module, reason = triton.load()
    with warnings.catch_warnings(action="ignore"):  # the table shows the same
        operators = _operators()
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    packages = ("torch", "numpy", "safetensors", "torchvision", "timm", "transformers")
    return {
        "bitkern": bitkern.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "triton": triton_module.__version__ if triton_module else reason,
        "cuda": torch.version.cuda,
        "devices": _devices(),
        "extension": built,
        "backend": backends.requested(),
        "precision": ["{1} on {0}: {2}".format(d, *default_precision(d)) for d in devices],
        "environment": {k: v for k, v in os.environ.items() if k.startswith("BITKERN_")},
        "operators": operators,
    }


def report() -> str:
    data = collect()
    lines = [f"bitkern    {data['bitkern']}", f"python     {data['python']}"]
    lines += [f"{k:<10} {v or 'not installed'}" for k, v in data["packages"].items()]
    lines += [f"triton     {data['triton']}", f"cuda       {data['cuda'] or 'torch without CUDA'}"]
    lines += [f"device     {device}" for device in data["devices"]]
    lines += [f"extension  {data['extension']}", f"backend    {data['backend']}"]
    lines += [f"precision  {precision}" for precision in data["precision"]]
    lines += [f"{k}={v}" for k, v in data["environment"].items()]
    lines += ["", f"{'operator':<20} {'device':<6} {'dtype':<9} {'runs on':<10} because"]
    lines += [
        f"{r['operator']:<20} {r['device']:<6} {r['dtype']:<9} {r['name']:<10} {r['reason']}"
        for r in data["operators"]
    ]
    return "\n".join(lines)
