"""A folder that timm loads as ``"local-dir:PATH"``, or from the Hugging Face hub."""

from pathlib import Path

import safetensors.torch
from torch import Tensor

from bitkern import files
from bitkern.export.common import scaled_state, write_card
from bitkern.models.pretrained import timm_name
from bitkern.transfer.run import FinishedRun

REQUIRES: tuple[str, ...] = ("timm",)

SNIPPET = """\
import timm

model = timm.create_model("local-dir:PATH", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
logits = model(transform(image)[None])  # a PIL image
names = model.pretrained_cfg["label_names"]"""


def write(run: FinishedRun, out: Path) -> None:
    import timm

    architecture = timm_name(run.architecture)
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no {run.architecture}")
    out.mkdir()
    half = [0.5, 0.5, 0.5]
    config = {
        "architecture": architecture,
        "num_classes": len(run.classes),
        "num_features": run.model.num_features,
        "label_names": list(run.classes),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, run.crop, run.crop],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": half,
            "std": half,
            "num_classes": len(run.classes),
            "pool_size": None,
            "first_conv": "stem.conv",
            "classifier": "head.fc",
        },
    }
    files.write_json(out / "config.json", config)
    write_card(run, out / "README.md", "timm", SNIPPET)
    state = {name: tensor.contiguous() for name, tensor in scaled_state(run).items()}
    safetensors.torch.save_file(state, out / "model.safetensors", {"format": "pt"})


def logits(run: FinishedRun, out: Path, images: Tensor) -> Tensor:
    import timm

    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    result: Tensor = model(images)
    return result
