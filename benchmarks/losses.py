"""The losses of a short training by each recipe: a change that should be neutral keeps them.

``python -m benchmarks.losses`` prints them. ``python -m benchmarks.losses COMMIT`` builds that
commit in a temporary folder, trains there too, and says whether the losses have the same bits.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import bitkern
from bitkern import transfer

ROOT = Path(__file__).parent.parent
STEPS = 8


class Float64(nn.Module):
    """A network in float64: what rounding does to its losses is too small to matter."""

    def __init__(self, network):
        super().__init__()
        self.network = network.double()

    def forward(self, x):
        return self.network(x.double())


def recipes(num_examples):
    short = {"crop": 32, "batch_size": 16, "steps": STEPS, "decay_steps": (6,), "warmup_steps": 2}
    fine = transfer.hyperrule(num_examples, image_size=(8, 8))
    upstream = transfer.pretraining("BiT-S", num_examples, batch_size=16)
    return {
        "hyperrule": dataclasses.replace(fine, **short, resize=40, mixup_alpha=0.1, base_lr=0.01),
        "pretraining": dataclasses.replace(upstream, **short),
    }


def losses(wrap=lambda network: network):
    """Recipe -> the loss of each step, on scikit-learn's digits."""
    data = transfer.digits("train")
    found = {}
    for name, rule in recipes(len(data.images)).items():
        torch.manual_seed(0)
        model = bitkern.create_model("R26x0.5", num_classes=len(data.classes), zero_head=False)
        result = transfer.train(wrap(model), data, rule, progress=False, cache="off", check=False)
        found[name] = [record["loss"] for record in result.history]
    return found


def of_commit(commit):
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder, "checkout")
        git = "git", "-C", str(ROOT), "worktree"
        subprocess.run([*git, "add", "--quiet", "--detach", checkout, commit], check=True)
        try:
            script = checkout / "benchmarks" / "losses.py"  # which older commits have not
            script.write_text(Path(__file__).read_text())
            build = sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"
            subprocess.run(build, cwd=checkout, check=True, stdout=sys.stderr)
            environment = os.environ | {"PYTHONPATH": str(checkout)}
            command = sys.executable, "-m", "benchmarks.losses"
            done = subprocess.run(
                command, cwd=checkout, env=environment, check=True, stdout=subprocess.PIPE
            )
        finally:
            subprocess.run([*git, "remove", "--force", checkout], check=True)
    return json.loads(done.stdout)


def main(commit=None):
    now = losses()
    if commit is None:
        print(json.dumps(now, indent=1))
        return 0
    before = of_commit(commit)
    for name, values in now.items():
        differ = [
            i for i, pair in enumerate(zip(before[name], values, strict=True)) if len({*pair}) > 1
        ]
        if differ:
            i = differ[0]
            print(f"{name}: from step {i + 1} on: {before[name][i]} before, {values[i]} now")
        else:
            print(f"{name}: the same bits in {len(values)} steps")
    return int(before != now)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
