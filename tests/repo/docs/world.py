"""Files that a page's code finds in its folder, and released weights in the caches."""

import os
import shutil
import zipfile
from pathlib import Path

import torch
from PIL import Image

from bitkern.cli import main
from bitkern.models import ARCHITECTURES, ResNetV2, create_model, save_npz, save_safetensors
from tests.transfer.images import CLASSES, picture, write_folder
from tests.transfer.shards import sample, write_tar


def data(path):
    write_folder(path)


def shards(path):
    path.mkdir()
    for split, count in (("train", 1024), ("test", 7)):
        for i in range(count):
            write_tar(path / f"{split}-{i:06}.tar", sample(f"{split}{i}", i % 3))


def dataset(path):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    splits = {}
    for split, first in (("train", 0), ("test", 100)):
        images = [Image.fromarray(picture(label, first)) for label in range(3)]
        columns = {"image": images, "label": [0, 1, 2]}
        splits[split] = datasets.Dataset.from_dict(columns, features)
    datasets.DatasetDict(splits).save_to_disk(str(path))


def table(path):
    lines = ["image,label,split"]
    for i, split in enumerate(["train"] * 6 + ["test"] * 3):
        photograph(Path(f"{i}.jpg"), i % 3, i)
        lines.append(f"{i}.jpg,{CLASSES[i % 3]},{split}")
    path.write_text("\n".join(lines) + "\n")


def photograph(path, label=0, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(label, number)).save(path)


def photographs(path):
    photograph(path / "one.jpg")
    (path / "two.jpg").write_bytes(b"no image")


def pests(path):
    write_folder(Path("pests-train"), train=5, test=0)
    shutil.make_archive(str(path.with_suffix("")), "zip", "pests-train/train")


def drivers(path):
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(["cab07/0001", "cab07/0002", "cab07/0003", "cab12/0001"]):
            photograph(Path("frame.jpg"), i % 3, i)
            archive.write("frame.jpg", f"{name}.jpg")
            archive.write("frame.jpg", f"night/{name}.jpg")
        archive.writestr("night.csv", "image,labels\nnight/cab12/0001.jpg,phoning\n")


def run(path):
    write_folder(Path("data"))
    arguments = ["finetune", "--data", "data", "--model", "R50x1", "--out", str(path)]
    assert main(arguments) == 0


def released(name):
    model = create_model(name.removeprefix("BiT-M-"), 5, zero_head=False)
    path = Path(os.environ["BITKERN_CACHE"], f"{name}.npz")
    path.parent.mkdir(exist_ok=True)
    save_npz(model, path)


def on_hub(repository, model):
    folder = Path(os.environ["HF_HOME"], "hub", f"models--{repository.replace('/', '--')}")
    for part, text in (("refs/main", "0" * 40), (f"snapshots/{'0' * 40}/config.json", "{}")):
        (folder / part).parent.mkdir(parents=True)
        (folder / part).write_text(text)
    save_safetensors(model, folder / "snapshots" / ("0" * 40) / "model.safetensors")


def timm_bit():
    import timm

    on_hub("timm/resnetv2_50x1_bit.goog_distilled_in1k", timm.create_model("resnetv2_50x1_bit"))


INPUTS = {
    "DATA": data,
    "SHARDS": shards,
    "DATASET": dataset,
    "images.csv": table,
    "photo.jpg": photograph,
    "new-photographs": photographs,
    "pests.zip": pests,
    "drivers.zip": drivers,
}


def prepare(text):
    """Make the files that the text of a page names, in the current folder."""
    torch.manual_seed(0)
    for name, make in INPUTS.items():
        if name in text:
            make(Path(name))
    for name in ("BiT-M-R50x1", "BiT-M-R101x1"):
        if name in text:
            released(name)
    if "hf-hub:ORG/NAME" in text:
        on_hub("ORG/NAME", ResNetV2(*ARCHITECTURES["R50x1"], 5))
    if '"resnetv2_50x1_bit", pretrained=True' in text:
        timm_bit()
    if "runs/mine" in text and "--out runs/mine" not in text:
        run(Path("runs/mine"))
