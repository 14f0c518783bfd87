"""Weights, preprocessing and model card shared by several targets."""

from pathlib import Path

from torch import Tensor

from bitkern import files
from bitkern.models.pretrained import HUB, find_release
from bitkern.text import one_line
from bitkern.transfer.run import FinishedRun

# timm and transformers standardize with an eps of 1e-8, BiT with 1e-10. Weights times ten have
# variances times a hundred, so their standardized weights are the same.
WEIGHT_FACTOR = 10.0


def with_suffix(out: Path, suffix: str) -> None:
    """Raise ValueError unless the name of ``out`` ends in the suffix."""
    if out.suffix != suffix:
        raise ValueError(f"{out.name}: expected a name ending in {suffix}")


def scaled_state(run: FinishedRun) -> dict[str, Tensor]:
    """Return the model's state dict for libraries that standardize with an eps of 1e-8."""
    return {
        name: tensor * WEIGHT_FACTOR if ".conv" in name else tensor
        for name, tensor in run.model.state_dict().items()
    }


def preprocessing(run: FinishedRun) -> str:
    return (
        f"turn it upright as its EXIF data says, convert to RGB, resize to {run.crop} x {run.crop} "
        "pixels (bilinear, antialiased, not keeping the aspect ratio), scale to [-1, 1] by "
        "v / 127.5 - 1"
    )


def write_card(run: FinishedRun, path: Path, library: str, snippet: str) -> None:
    """Write the model card, README.md with metadata for the Hugging Face hub."""
    summary = run.summary
    kind = "Several labels per image are possible" if run.multi_label else "One label per image"
    known = {
        "Model": f"{summary.get('model', run.architecture)}, pre-activation ResNet with weight "
        "standardization and GroupNorm",
        "Started from": _named(summary.get("weights")),
        "Data": _named(summary.get("data")),
        "Training images": summary.get("training_images"),
        "Evaluated on": summary.get("evaluated_on"),
        "Evaluation images": summary.get("evaluation_images"),
        "Top-1": _fraction(summary.get("top1")),
        "Balanced accuracy": _fraction(summary.get("balanced_accuracy")),
        "Top-5": _fraction(summary.get("top5")),
        "Mean average precision": _fraction(summary.get("mean_average_precision")),
        "Loss": _fraction(summary.get("eval_loss")),
        "Steps": summary.get("steps"),
    }
    rows = [f"| {name} | {_cell(value)} |" for name, value in known.items() if value is not None]
    names = ", ".join(f"`{name}`" for name in run.classes[:50])
    more = f" and {len(run.classes) - 50} more, see config.json" * (len(run.classes) > 50)
    text = f"""---
library_name: {library}
pipeline_tag: image-classification
tags:
- image-classification
- big-transfer
---
# {run.architecture}, {len(run.classes)} classes

A Big Transfer model (Kolesnikov et al., arXiv 1912.11370), trained with bitkern.

| | |
|---|---|
{chr(10).join(rows)}

{kind}; the classes: {names}{more}.

## Use
```python
{snippet}
```
Preprocessing: {preprocessing(run)}.

The weights of the convolutions are those of training times {WEIGHT_FACTOR:g}: {library}
standardizes weights with an eps of 1e-8 where the model was trained with 1e-10, and so computes the
same. To train on, mind that a step moves weights ten times as large a hundredth as far.

## Licence
The released weights of Big Transfer are under Apache-2.0. The licence of this model depends on
its initial weights and training data, and is up to its publisher.
"""
    with files.atomic_write(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def _named(source: str | None) -> str | None:
    """Return the name of data or weights, without the folders of a path."""
    if source is None or source.startswith(HUB) or find_release(source):
        return source
    return Path(source).name


def _fraction(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _cell(value: object) -> str:
    return one_line(value).replace("|", "\\|")
