"""Converted networks under adapters, offloading and trainers, as the unconverted ones."""

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig, get_peft_model
from timm import layers as timm_layers
from torch import nn
from transformers import BitConfig
from transformers.models.bit import modeling_bit as bit

import bitkern
from bitkern.nn import GroupNormAct, WSConv2d
from tests.peers import gradients, relative, small_bit, small_timm

X = torch.randn(2, 3, 40, 33, generator=torch.Generator().manual_seed(0))

CONFIG = BitConfig(num_groups=4)
LAYERS = {
    "GroupNorm": (lambda: nn.GroupNorm(4, 8), (2, 4)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(8), (4, 1e-5, 0.1, True, True)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(8), (4, 1e-5, 0.1, True, True)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(8), (4,)),
    "StdConv2d": (lambda: timm_layers.StdConv2d(3, 8, 3), (4, 4, 3)),
    "StdConv2dSame": (lambda: timm_layers.StdConv2dSame(3, 8, 3), (4, 4, 3, 2)),
    "ScaledStdConv2d": (lambda: timm_layers.ScaledStdConv2d(3, 8, 3), (4, 4, 3)),
    "ScaledStdConv2dSame": (lambda: timm_layers.ScaledStdConv2dSame(3, 8, 3), (4, 4, 3, 2)),
    "timm GroupNorm": (lambda: timm_layers.GroupNorm(8, 4), (4, 2)),
    "timm GroupNorm1": (lambda: timm_layers.GroupNorm1(8), (4,)),
    "timm GroupNormAct": (lambda: timm_layers.GroupNormAct(8, 4), (4, 2)),
    "timm GroupNorm1Act": (lambda: timm_layers.GroupNorm1Act(8), (4,)),
    "WeightStandardizedConv2d": (
        lambda: bit.WeightStandardizedConv2d(3, 8, 3, padding=1),
        (4, 4, 3, 2),
    ),
    "BitGroupNormActivation": (lambda: bit.BitGroupNormActivation(CONFIG, 8), (CONFIG, 4)),
}


@pytest.mark.parametrize("make, arguments", LAYERS.values(), ids=LAYERS)
def test_a_converted_class_is_built_as_the_librarys(make, arguments):
    """Adapters build layers by ``type(layer)(...)``."""
    theirs = make()
    library = type(theirs)
    ours = bitkern.convert(nn.Sequential(theirs))[0]
    assert ours is theirs and type(ours) is not library and isinstance(ours, library)
    assert (type(ours).__name__, type(ours).__qualname__) == (library.__name__,) * 2
    torch.manual_seed(0)
    expected = library(*arguments)
    torch.manual_seed(0)
    built = type(ours)(*arguments)
    assert repr(built) == repr(expected)
    settings = [
        {k: v for k, v in vars(m).items() if not k.startswith("_")} for m in (built, expected)
    ]
    assert settings[0] == settings[1]
    dimensions = next((int(d) for d in "123" if f"{d}d" in library.__name__), 2)
    x = torch.randn(2, 4, *[5, 6, 7][:dimensions])
    for training in (True, True, False):  # running statistics move
        results = [m.train(training)(x) for m in (built, expected)]
        torch.testing.assert_close(*results)
    torch.testing.assert_close(built.state_dict(), expected.state_dict())


def test_lora():
    """PEFT's adapters of standardized convolutions are standardized convolutions."""
    results = []
    for convert in (bitkern.convert, lambda model: model):
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["conv1", "conv2"], r=4, init_lora_weights=False)
        model = get_peft_model(convert(small_timm()), config).double()
        results.append(gradients(model, X.double()))
    (y, grads), (expected, expected_grads) = results
    assert relative(y, expected) < 1e-10 and grads.keys() == expected_grads.keys()
    assert len(grads) > 10 and all("lora" in name for name in grads)
    for name, grad in grads.items():
        assert relative(grad, expected_grads[name]) < 1e-9, name


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloading(offload, tmp_path):
    """accelerate keeps weights on meta until their layer is called."""
    model = small_timm().eval()
    with torch.no_grad():
        expected = model(X)
        model = bitkern.convert(model)
        if offload == "cpu":
            cpu_offload(model, torch.device("cpu"))
        else:
            disk_offload(model, str(tmp_path), torch.device("cpu"))
        assert model.stem.conv.weight.is_meta
        for _ in range(2):
            assert relative(model(X), expected) < 1e-5


def test_layerwise_casting():
    """diffusers keeps weights in float8 and casts them when their layer is called."""
    results = []
    for convert in (bitkern.convert, lambda model: model):
        model, skipped = convert(small_timm().eval()), ("norm", "head")
        apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, skipped)
        assert model.stem.conv.weight.dtype == torch.float8_e4m3fn
        with torch.no_grad():
            results.append(model(X))
    assert relative(*results) < 1e-5


def net():
    torch.manual_seed(0)
    layers = WSConv2d(3, 8, 3), GroupNormAct(4, 8), WSConv2d(8, 4, 1), nn.AdaptiveAvgPool2d(3)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 2))


BATCHES = [(X[:1], torch.tensor([0])), (X, torch.tensor([1, 0])), (X[1:], torch.tensor([1]))]


def stepped():
    """Return the network's state after an optimizer step of plain PyTorch."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x, y in BATCHES:
        nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return model.state_dict()


def test_accelerate():
    accelerator = Accelerator(cpu=True)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    with bitkern.standardized(model):
        for x, y in BATCHES:
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
    optimizer.step()
    torch.testing.assert_close(model.state_dict(), stepped())
    with pytest.raises(RuntimeError, match="standardized: an optimizer step inside the block"):
        with bitkern.standardized(model):
            accelerator.backward(nn.functional.cross_entropy(model(X), BATCHES[1][1]))
            optimizer.step()


def test_lightning(tmp_path):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, misused):
            super().__init__()
            self.net, self.misused = net(), misused
            self.automatic_optimization = misused

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def training_step(self, batch, _):
            if self.misused:
                with bitkern.standardized(self):
                    return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            with bitkern.standardized(self):
                for x, y in BATCHES:
                    self.manual_backward(nn.functional.cross_entropy(self.net(x), y))
            self.optimizers().step()
            return None

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    loader = torch.utils.data.DataLoader([BATCHES[1]], batch_size=None)
    for misused in (True, False):
        module = Module(misused)
        trainer = lightning.Trainer(
            max_steps=1, accelerator="cpu", default_root_dir=tmp_path, **quiet
        )
        if misused:
            with pytest.raises(RuntimeError, match="standardized: no backward pass"):
                trainer.fit(module, loader)
        else:
            trainer.fit(module, loader)
            torch.testing.assert_close(module.net.state_dict(), stepped())


def test_hugging_face_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    images = [{"pixel_values": x, "labels": torch.tensor(i)} for i, x in enumerate(X)] * 2

    class Right(Trainer):
        def training_step(self, model, *args, **kwargs):
            with bitkern.standardized(model):
                return super().training_step(model, *args, **kwargs)

    class Wrong(Trainer):
        def compute_loss(self, model, *args, **kwargs):
            with bitkern.standardized(model):
                return super().compute_loss(model, *args, **kwargs)

    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        optim="sgd",
        gradient_accumulation_steps=2,
        disable_tqdm=True,
    )
    found = []
    for trainer in (Right, Trainer):
        model = bitkern.convert(small_bit())
        trainer(model, arguments, train_dataset=images).train()
        found.append(model.state_dict())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="standardized: no backward pass"):
        Wrong(bitkern.convert(small_bit()), arguments, train_dataset=images).train()
