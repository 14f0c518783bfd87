"""A user's script in which a strict type checker finds no error."""

from pathlib import Path

import torch
from torch import Tensor, nn

import bitkern
from bitkern import transfer
from bitkern.nn import GroupNormAct, WSConv2d


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = WSConv2d(3, 32, 3, padding=1, bias=False, eps=1e-5, gain=True)
        self.norm = GroupNormAct(8, 32, act="silu")

    def forward(self, x: Tensor) -> Tensor:
        return bitkern.ops.group_norm_act(self.norm(self.conv(x)), 8, act="leaky_relu")


def layers(x: Tensor) -> tuple[Tensor, str]:
    net: Net = bitkern.fold(bitkern.convert(Net()))
    total, y = bitkern.ops.add_group_norm_act(x, x, 3)
    y = bitkern.ops.group_norm_add_relu(y, x, 3, eps=1e-6)
    weight = bitkern.reference.weight_standardize(torch.ones(4, 3, 1, 1), scale=2.0)
    y = bitkern.ops.ws_conv2d(y, weight, stride=(1, 2), padding="same")
    choice: bitkern.Choice = bitkern.explain("group_norm_act", x)
    print(bitkern.explain(net)[0].reason)
    with bitkern.use_backend("reference"):
        return net.conv.standardize(x) + total + y, choice.reason


def models(path: Path) -> list[Tensor]:
    model = bitkern.create_model("BiT-M-R50x1", num_classes=10, weights=path)
    model.freeze_backbone()
    bitkern.models.save_npz(model, "out.npz")
    with bitkern.standardized(model):
        logits: Tensor = model.forward_head(model.forward_features(torch.ones(1, 3, 32, 32)))
    bitkern.create_model("BiT-S-R50x1", pretrained=True, cache_dir=path).reset_classifier(3)
    backbone = bitkern.create_model(
        "R50x1", pretrained=False, features_only=True, out_indices=(1, 2)
    )
    maps: list[Tensor] = backbone(logits)
    return [*maps, torch.tensor(backbone.channels)]


def finetune(data: Path) -> float:
    train_set = transfer.image_folder(data, "train")
    test_set = transfer.image_folder(data, "test")
    rule = transfer.hyperrule(len(train_set.images), (480, 480)).with_steps(100)
    model = bitkern.create_model("BiT-M-R50x1", num_classes=len(train_set.classes))
    result = transfer.train(
        model, train_set, rule, eval_set=test_set, out="runs/mine", precision="auto"
    )
    for images, labels in transfer.train_batches(train_set, rule, seed=0):
        x, y, y_perm = transfer.mixup(images.float(), labels, 0.3, torch.randperm(len(labels)))
        transfer.mixup_loss(model(x), y, y_perm, 0.3)
    metrics = transfer.evaluate(model, test_set, rule.crop, device="cuda")
    outputs = transfer.predict(model, test_set, rule.crop)
    about = {"model": "R50x1"}
    transfer.write_report(data / "r.html", outputs, test_set, history=result.history, about=about)
    print(transfer.scores(outputs, test_set)["macro_f1"])
    best = outputs.argmax(1)
    return metrics["top1"] + rule.lr(3) + result.seconds + float(best[0]) + result.skipped
