"""A profile of one training step of R50x1: ``python -m benchmarks.step OUT_DIR [--tiny]``.

Leaves the operators and kernels by time, how many launches there are, and how long the step takes
by itself and replayed as a CUDA graph.
"""

import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

import bitkern
from benchmarks.kernels import seconds


def main(folder, tiny):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, batch, size = ("R26x0.5", 2, 32) if tiny else ("R50x1", 128, 224)
    model = bitkern.create_model(name, num_classes=10).to(device)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    y = torch.zeros(batch, dtype=torch.long, device=device)

    def step():
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=activities) as profile:
        step()
    table = profile.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=60)
    (folder / "profile.txt").write_text(table)
    on_gpu = torch.autograd.DeviceType.CUDA
    kernels = Counter(event.name for event in profile.events() if event.device_type == on_gpu)
    lines = [f"{count:5d} {name[:120]}" for name, count in kernels.most_common()]
    (folder / "launches.txt").write_text("\n".join([f"{sum(kernels.values()):5d} all", *lines]))
    print(f"{name}, batch {batch} at {size}: {sum(kernels.values())} launches", flush=True)
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            step()
        end.record()
        end.synchronize()
        print(f"eager {start.elapsed_time(end) / 10:.2f} ms", flush=True)
    print(f"as a graph {1e3 * seconds(step, device):.2f} ms", flush=True)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    main(out, "--tiny" in sys.argv[2:])
