"""Stand-ins for hours of training and for a network, wherever a page's code runs Python.

- R50x1 and R101x1 have a block or two in each stage, and half the width; also in timm, for what
  ``bitkern export`` writes. A model that timm itself makes is whole.
- Trainings take 2 steps of 4 images of 32 pixels, whatever the recipe says; ``bitkern pretrain``
  makes its schedule as for the images of ImageNet. The demo takes single steps and few letters.
- Released weights are random and in the caches already: see ``tests/repo/docs/world.py``.
"""

import dataclasses

import bitkern.demo
import bitkern.export.timm
from bitkern import transfer
from bitkern.cli import pretrain, training
from bitkern.models import registry, resnetv2

SMALL = {"R50x1": ((1, 1, 1, 1), 0.5), "R101x1": ((1, 1, 2, 1), 0.5)}


def train(model, train_set, rule, *, original=transfer.train, **options):
    values = {"steps": 2, "warmup_steps": 1, "decay_steps": (), "batch_size": 4, "crop": 32}
    if rule.resize is not None:
        values["resize"] = 40
    return original(model, train_set, dataclasses.replace(rule, **values), **options)


def pretraining(preset, num_examples, *, original=transfer.pretraining, **values):
    return original(preset, 1_281_167, **values)


def logits(run, out, images, *, original=bitkern.export.timm.logits):
    import timm.models.resnetv2 as peer

    def small(name, *, create=peer._create_resnetv2_bit, **values):
        depths, width = SMALL["R50x1"]
        return create(name, **values | {"layers": depths, "width_factor": width})

    peer._create_resnetv2_bit = small
    return original(run, out, images)


for name, architecture in SMALL.items():
    resnetv2.ARCHITECTURES[name] = resnetv2.Architecture(*architecture)
registry.NAMES.update(registry._names())
transfer.train = training.train = train
pretrain.pretraining = pretraining
bitkern.export.timm.logits = logits
bitkern.demo.LETTERS = bitkern.demo.HELD_OUT_LETTERS = 74
bitkern.demo.UPSTREAM_STEPS = bitkern.demo.FULL_STEPS = bitkern.demo.FEW_SHOT_STEPS = 1
bitkern.demo.SHOTS = (1,)
