"""A model of transformers, converted by one line, under the Hugging Face Trainer.

The Trainer saves, loads and evaluates as ever: parameters and their names stay what they are. A
small BiT learns scikit-learn's handwritten digits on a CPU: ``python examples/hf_trainer.py``
Needs ``pip install accelerate``.
"""

import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from transformers import BitConfig, BitForImageClassification, Trainer, TrainingArguments

import bitkern


def digits():
    """1797 examples: pixel_values (1, 32, 32) in [-1, 1] and labels."""
    data = load_digits()
    images = torch.tensor(data.images / 8 - 1, dtype=torch.float32)[:, None]
    images = F.interpolate(images, scale_factor=4)
    return [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, data.target, strict=True)]


def accuracy(prediction):
    return {"accuracy": np.mean(prediction.predictions.argmax(1) == prediction.label_ids)}


def main():
    torch.manual_seed(0)
    config = BitConfig(
        num_channels=1,
        embedding_size=32,
        hidden_sizes=[128, 128, 256, 256],
        depths=[1, 1, 1, 1],
        num_labels=10,
    )
    model = bitkern.convert(BitForImageClassification(config))
    print(bitkern.explain(model))
    examples = digits()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            num_train_epochs=3,
            per_device_train_batch_size=50,
            learning_rate=2e-3,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=examples[:1200],
            eval_dataset=examples[1200:],
            compute_metrics=accuracy,
        )
        trainer.train()
        print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}")


if __name__ == "__main__":
    main()
