"""Watch a run in TensorBoard: ``train(..., on_record=f)`` calls f with each line of metrics.jsonl.

W&B, MLflow and others listen the same way. A small ResNetV2 learns scikit-learn's handwritten
digits on a CPU: ``python examples/log_to_tensorboard.py``, to be looked at by ``tensorboard
--logdir runs/tensorboard``. Needs ``pip install tensorboard``.
"""

import dataclasses
import sys

from torch.utils.tensorboard import SummaryWriter

import bitkern
from bitkern import transfer


def main(folder="runs/tensorboard"):
    train_set, test_set = transfer.digits("train"), transfer.digits("test")
    rule = transfer.hyperrule(len(train_set.images), (8, 8)).with_steps(60)
    rule = dataclasses.replace(rule, resize=36, crop=32, batch_size=64, base_lr=0.03)
    model = bitkern.create_model("R26x0.5", num_classes=len(train_set.classes))

    with SummaryWriter(folder) as writer:

        def on_record(record):
            for name, value in record.items():
                if name != "step":
                    writer.add_scalar(name, value, record["step"])

        transfer.train(
            model,
            train_set,
            rule,
            eval_set=test_set,
            flip=False,
            eval_every=20,
            on_record=on_record,
            progress=False,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
