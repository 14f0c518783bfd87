"""Gradients of each sample by Opacus: with the samplers of bitkern.private, and by functorch.

``python -m benchmarks.per_sample MODEL BATCH SIZE`` prints the seconds of a forward and backward
pass, the median of ``CALLS`` after a first, and the most memory of a process that does nothing
else. Before it is timed a gradient is compared with a backward pass for each sample.
"""

import resource
import statistics
import subprocess
import sys
import time

import torch

CALLS = 5


def run(mode, name, batch, size):
    from opacus.grad_sample.utils import wrap_model

    import bitkern.private  # of no effect where everything goes by functorch

    torch.manual_seed(0)
    model = bitkern.create_model(name, num_classes=10, zero_head=False)
    model = model.to(memory_format=torch.channels_last)
    images, labels = torch.randn(batch, 3, size, size), torch.arange(batch) % 10
    criterion = torch.nn.functional.cross_entropy
    loss = criterion(model(images[-1:]), labels[-1:])
    expected = torch.autograd.grad(loss, list(model.parameters()))
    model = wrap_model(model, grad_sample_mode=mode)
    seconds = []
    for _ in range(CALLS + 1):
        model.zero_grad()
        begin = time.perf_counter()
        criterion(model(images), labels).backward()
        seconds.append(time.perf_counter() - begin)
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert (p.grad_sample[-1] - grad).norm() <= 1e-3 * grad.norm()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{mode}: {statistics.median(seconds[1:]):.3f} s, {peak:.2f} GB")


def main(name, batch, size):
    for mode in ("hooks", "functorch"):
        command = [sys.executable, "-m", "benchmarks.per_sample", name, batch, size, mode]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    if len(sys.argv) == 5:
        run(sys.argv[4], sys.argv[1], *map(int, sys.argv[2:4]))
    else:
        main(*sys.argv[1:])
