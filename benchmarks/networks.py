"""Whole models: ours, timm's BiT in every precision and compiled, and its BatchNorm twin."""

import time
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, StdConv2d, create_conv2d
from timm.models.resnetv2 import ResNetV2
from torch.utils.flop_counter import FlopCounterMode

import bitkern
from benchmarks.measure import DTYPES, free
from bitkern.models import ARCHITECTURES, load_state_dict
from bitkern.testing import assert_accurate

CLASSES = 1000


class Case(NamedTuple):
    """``kind`` is "train_step" or "infer"; ``modes``, beside eager, are those of ``compiled``."""

    kind: str
    model: str
    pixels: int
    batch: int
    dtype: str = "bf16"
    modes: tuple[str, ...] = ()

    def __str__(self):
        return f"{self.model}/{self.pixels}/bs{self.batch}/{self.dtype}"


class Contender(NamedTuple):
    """The way to build and run a model. bf16 is by autocast, or "pure": parameters and all."""

    build: object
    bf16: str | None
    channels_last: bool = True
    mode: str | None = None


def _timm(model, device, **layers):
    depths, width = ARCHITECTURES[model]
    with torch.device(device):
        return ResNetV2(depths, num_classes=CLASSES, width_factor=width, **layers)


def timm_bit(model, device):
    """timm's BiT with the eps of BiT (1e-10), under which ours and timm's are the same function."""
    return _timm(model, device, stem_type="fixed", conv_layer=partial(StdConv2d, eps=1e-10))


def timm_twin(model, device):
    """The same with BatchNorm and plain convolutions; for R50x1 it is timm's ``resnetv2_50``."""
    return _timm(model, device, conv_layer=create_conv2d, norm_layer=BatchNormAct2d)


def ours(model, device):
    return bitkern.create_model(model, num_classes=CLASSES, zero_head=False, device=device)


def folded(model, device):
    return bitkern.fold(ours(model, device))


def contenders_of(case):
    """Name -> :class:`Contender` of a case."""
    if case.dtype == "fp32":
        all = {
            "ours": Contender(ours, None),
            "eager": Contender(timm_bit, None, channels_last=False),
            "channels_last": Contender(timm_bit, None),
            "batchnorm": Contender(timm_twin, None),
        }
        compiled = {"": all["channels_last"]}
    else:
        all = {
            # Training keeps float32 parameters; for inference they are converted once.
            "ours": Contender(ours, "autocast" if case.kind == "train_step" else "pure"),
            "amp": Contender(timm_bit, "autocast"),
            "bf16": Contender(timm_bit, "pure"),
            "batchnorm": Contender(timm_twin, "autocast"),
            "eager": Contender(timm_bit, None, channels_last=False),
        }
        compiled = {" amp": all["amp"], " bf16": all["bf16"]}
    if case.kind == "infer":
        all["folded"] = all["ours"]._replace(build=folded)
    if "freezing" in case.modes:
        all["folded freezing"] = all["folded"]._replace(mode="freezing")
    if "default" in case.modes:
        all["compile batchnorm"] = all["batchnorm"]._replace(mode="default")
    for mode in case.modes:
        for suffix, eager in compiled.items():
            name = ("compile" if mode == "default" else mode) + suffix
            all[name] = eager._replace(mode=mode)
    return all


def compiled(model, mode):
    """``torch.compile`` in one of its modes, or "freezing": with constant weights, which Inductor
    lays out once as convolutions want them."""
    if mode != "freezing":
        return torch.compile(model, mode=mode)
    options = {"freezing": True}
    run = torch.compile(model, options=options)

    def frozen(images):
        with torch._inductor.config.patch(options):  # Dynamo asks for it too
            return run(images)

    return frozen


def task(case, contender, device):
    """A training step (SGD, momentum 0.9) or a forward pass of ``contender`` on random images."""
    torch.manual_seed(0)
    model = contender.build(case.model, device).train(case.kind == "train_step")
    images = torch.randn(case.batch, 3, case.pixels, case.pixels, device=device)
    labels = torch.randint(CLASSES, (case.batch,), device=device)
    if contender.bf16 == "pure":
        model, images = model.bfloat16(), images.bfloat16()
    if contender.channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    run = compiled(model, contender.mode) if contender.mode else model
    autocast = partial(torch.autocast, device, torch.bfloat16, contender.bf16 == "autocast")

    def infer():
        with torch.inference_mode(), autocast():
            return run(images)

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def train_step():
        with autocast():
            loss = F.cross_entropy(run(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return infer if case.kind == "infer" else train_step


def prepared(case, device):
    """Name -> function that prepares the task of a contender."""
    return {
        name: partial(task, case, contender, device)
        for name, contender in contenders_of(case).items()
    }


def seconds_of_ours(case, device):
    """Seconds of the second run of our task."""
    run = task(case, contenders_of(case)["ours"], device)
    run()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@cache
def flops(model, pixels, train):
    """Floating-point operations of the convolutions for one image."""
    net = timm_bit(model, "meta")
    with FlopCounterMode(display=False) as counter:
        out = net(torch.empty(1, 3, pixels, pixels, device="meta"))
        if train:
            out.sum().backward()
    return counter.get_total_flops()


def _hostile_(model):
    """Weights with means off zero, affine parameters off one and zero, in place."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator).to(p)
        if p.ndim == 4:
            p.data = (noise + 0.3) * p[0].numel() ** -0.5
        else:
            p.data = 0.3 * noise + ("norm" in name and name.endswith("weight"))
    model.norm.bias.data += 3  # far from the kink of the last ReLU, see _results


def _results(model, images, dy, contender, train):
    """Logits, then the gradients of the last convolution, norm and head."""
    if contender.channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    images = images.to(model.stem.conv.weight.dtype)
    run = compiled(model, contender.mode) if contender.mode else model
    with torch.autocast(images.device.type, torch.bfloat16, contender.bf16 == "autocast"):
        if not train:
            with torch.inference_mode():
                return [run(images)]
        logits = run(images)
    # Further down ReLUs that the last bit switches decide on gradients: noise, not error.
    ends = model.stages[-1].blocks[-1].conv3.weight, model.norm.weight, model.head.fc.weight
    return [logits.detach(), *torch.autograd.grad(logits, ends, dy.to(logits.dtype))]


@cache
def gate(model, kind, dtype, device, freezing=False):
    """Ours and timm's at the same precision, on two small images, against timm's in float64."""
    torch.manual_seed(0)
    train = kind == "train_step"
    images = torch.randn(2, 3, 97, 97, device=device)
    dy = torch.randn(2, CLASSES, device=device)
    modes = ("freezing",) * freezing
    contenders = contenders_of(Case(kind, model, 97, 2, dtype, modes))
    contender = contenders["ours"]
    peer = timm_bit(model, device)
    _hostile_(peer)
    mine = ours(model, device)
    load_state_dict(mine, peer.state_dict())
    exact = _results(peer.double(), images, dy, Contender(timm_bit, None), train)
    peer, mine = (
        m.to(DTYPES[dtype] if contender.bf16 == "pure" else torch.float32) for m in (peer, mine)
    )
    theirs = _results(peer, images, dy, contender, train)
    names = "logits", *(f"gradient of the last {layer}" for layer in ("conv3", "norm", "head"))
    for one in ("ours", "folded", "folded freezing"):
        if one not in contenders:
            continue
        if one == "folded":
            bitkern.fold(mine)
        results = _results(mine, images, dy, contenders[one], train)
        for name, *trio in zip(names, results, theirs, exact, strict=False):
            assert_accurate(*trio, f"{model} {kind} {dtype}: {one}: {name}")
    del peer, exact, theirs
    free(device)
