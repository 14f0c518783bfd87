"""Image sets, folders and logits for the tests: each class has its own colour, sizes are odd."""

import numpy as np
import torch
from PIL import Image

from bitkern.transfer import ImageSet

CLASSES = ("ant", "bee", "cat")
COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])


def picture(label, number, height=13, width=17):
    random = np.random.default_rng((label, number))
    noise = random.integers(-40, 40, size=(height, width, 3))
    return (COLOURS[label] + noise).astype(np.uint8)


def image_set(per_class=5):
    """In memory, ``per_class`` pictures of each class."""
    labels = np.repeat(np.arange(3), per_class)
    return ImageSet([picture(label, i) for i, label in enumerate(labels)], labels, CLASSES)


def write_folder(root, train=4, test=2):
    """``root/{train,test}/CLASS/*`` in several file formats; returns ``root``."""
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                suffix = ("jpg", "png", "webp", "JPEG")[i % 4]
                image = Image.fromarray(picture(label, 100 * (split == "test") + i))
                image.save(folder / f"{i}.{suffix}")
    return root


def logits(labels, classes, seed=0):
    """Random logits that tend to the label."""
    outputs = torch.randn(len(labels), classes, generator=torch.Generator().manual_seed(seed))
    outputs[torch.arange(len(labels)), torch.from_numpy(labels)] += 1.5
    return outputs


def arrays(labels, classes):
    return ImageSet([picture(0, 0)] * len(labels), labels, tuple(classes))
