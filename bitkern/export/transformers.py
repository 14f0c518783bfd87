"""A folder that transformers loads with ``from_pretrained``, or from the Hugging Face hub."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from bitkern import files
from bitkern.export.common import scaled_state, write_card
from bitkern.models import ARCHITECTURES
from bitkern.transfer.run import FinishedRun

REQUIRES: tuple[str, ...] = ("transformers",)

SNIPPET = """\
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("PATH")
model = AutoModelForImageClassification.from_pretrained("PATH").eval()
logits = model(**processor(image, return_tensors="pt")).logits
names = model.config.id2label"""

RENAMES = (
    (r"^stem\.conv\.", "bit.embedder.convolution."),
    (r"^stages\.(\d+)\.blocks\.", r"bit.encoder.stages.\1.layers."),
    (r"^norm\.", "bit.norm."),
    (r"^head\.fc\.", "classifier.1."),
)


def config(architecture: str, **options: Any) -> Any:
    from transformers import BitConfig

    depths, width = ARCHITECTURES[architecture]
    return BitConfig(
        # Widths instead of width_factor, which does not apply to the stem.
        embedding_size=round(64 * width),
        hidden_sizes=[round(size * width) for size in (256, 512, 1024, 2048)],
        depths=list(depths),
        **options,
    )


def transformers_name(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def write(run: FinishedRun, out: Path) -> None:
    from transformers import BitForImageClassification

    names = dict(enumerate(run.classes))
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    problem = f"{'multi' if run.multi_label else 'single'}_label_classification"
    model = BitForImageClassification(config(run.architecture, problem_type=problem, **labels))
    state = {transformers_name(name): tensor for name, tensor in scaled_state(run).items()}
    state["classifier.1.weight"] = state["classifier.1.weight"].flatten(1)  # nn.Linear
    model.load_state_dict(state)
    model.save_pretrained(out)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": run.crop, "width": run.crop},
        "resample": 2,  # bilinear
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    files.write_json(out / "preprocessor_config.json", processor)
    write_card(run, out / "README.md", "transformers", SNIPPET)


def logits(run: FinishedRun, out: Path, images: Tensor) -> Tensor:
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(out).eval()
    result: Tensor = model(images).logits
    return result
