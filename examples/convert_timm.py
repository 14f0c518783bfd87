"""One line converts a timm model; the training loop around it does not notice.

Any model of timm will do; this one has 0.2 million parameters and learns scikit-learn's handwritten
digits in seconds, on a CPU: ``python examples/convert_timm.py``
"""

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import bitkern


def digits():
    """1797 images (N, 1, 32, 32) in [-1, 1] and their labels (N,), in random order."""
    data = load_digits()
    images = torch.tensor(data.images / 8 - 1, dtype=torch.float32)[:, None]
    images = F.interpolate(images, scale_factor=4)
    order = torch.randperm(len(images))
    return images[order], torch.tensor(data.target)[order]


def main():
    torch.manual_seed(0)
    images, labels = digits()
    model = timm.create_model("test_nfnet", num_classes=10, in_chans=1)
    with torch.no_grad():
        before = model.eval()(images[:8])

    bitkern.convert(model)

    print(bitkern.explain(model))
    with torch.no_grad():
        print(f"logits differ by {(model(images[:8]) - before).abs().max():.1e}")

    train, test = slice(0, 1200), slice(1200, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(3):
        model.train()
        for x, y in zip(images[train].split(50), labels[train].split(50), strict=True):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
        print(f"epoch {epoch + 1}: accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
