"""Names of models, and create_model's handling of heads."""

import re

import pytest
import torch

from bitkern.models import FeatureNet, ResNetV2, create_model, save_npz
from tests.models.helpers import small

CLASSES = {
    "BiT-S-R50x1": 1000,
    "BiT-M-R101x3": 21843,
    "BiT-L-R152x4": 18291,
    "BiT-M-R152x2-ILSVRC2012": 1000,
    "BiT-M-R26x0.5": 21843,
    "R26x0.5": 1000,
    "resnetv2_50x3_bit": 1000,
    "resnetv2_101x1_bit.goog_in21k": 21843,
    "resnetv2_50x1_bit.goog_distilled_in1k": 1000,
    "resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k_384": 1000,
}


@pytest.mark.parametrize("name", CLASSES)
def test_names(name):
    model = create_model(name, device="meta")
    assert model.num_classes == CLASSES[name]
    blocks = {"26": 8, "50": 16, "101": 33, "152": 50}
    depth, width = re.search(r"(\d+)x([\d.]+)", name).groups()
    assert sum(len(stage.blocks) for stage in model.stages) == blocks[depth]
    assert model.num_features == 2048 * float(width)


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("bit-m-r50x1", "BiT-M-R50x1"),
        ("resnetv2_50x1_bitm", "resnetv2_50x1_bit"),
        ("BiT-M-R50x2", "BiT-M-R50x1"),
        ("vit", "R26x0.5, R50x1, R50x3, R101x1, R101x3, R152x2, R152x4"),
    ],
)
def test_unknown_name(name, nearest):
    with pytest.raises(ValueError) as error:
        create_model(name)
    message = str(error.value)
    assert message.startswith(f"name: unknown model {name!r}; ")
    assert nearest in message and "\n" not in message


def test_out_indices_without_features_only():
    with pytest.raises(ValueError, match="out_indices: expected with features_only=True, got"):
        create_model("R26x0.5", out_indices=(1, 2))


@pytest.fixture
def npz(tmp_path):
    save_npz(small(7), tmp_path / "bit.npz")
    return tmp_path / "bit.npz"


@pytest.mark.parametrize("num_classes", [None, 7])
def test_head_of_the_checkpoint_is_kept(npz, num_classes):
    model = create_model("BiT-M-R26x0.5", num_classes, weights=npz)
    assert model.num_classes == 7
    assert torch.equal(model.get_classifier().weight, small(7).get_classifier().weight)


def test_head_of_another_size_is_dropped(npz):
    body = small(7).norm.weight
    for zero_head in (True, False):
        model = create_model("BiT-M-R26x0.5", 10, weights=npz, zero_head=zero_head)
        head = model.get_classifier().weight
        assert head.shape == (10, 1024, 1, 1) and torch.equal(model.norm.weight, body)
        assert (head.abs().max() == 0) == zero_head
    assert create_model("BiT-M-R26x0.5", 0, weights=npz)(torch.zeros(1, 3, 32, 32)).shape[1] == 1024


def test_weights_for_a_backbone_on_gray_images(npz):
    net = create_model("R26x0.5", in_chans=1, weights=npz, features_only=True, out_indices=[3])
    assert isinstance(net, FeatureNet)
    expected = small(7).stem.conv.weight.sum(1, keepdim=True)
    assert torch.equal(net.stem.conv.weight, expected)
    assert net(torch.randn(1, 1, 64, 64))[0].shape == (1, 512, 4, 4)


def test_device_and_dtype(npz):
    model = create_model("R26x0.5", weights=npz, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in create_model("R50x1", device="meta").parameters()} == {"meta"}
    assert isinstance(model, ResNetV2)
