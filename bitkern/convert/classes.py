"""Conversion of the user's own convolutions and norms, after a numerical comparison."""

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitkern import _torch
from bitkern.nn import GroupNormAct, WSConv2d
from bitkern.variant import Variant

TOLERANCE = 1e-5  # relative, in float64: their code may work in float32 inside
IN_FLOAT64: dict[str, Any] = {"device": "cpu", "dtype": torch.float64}

Options = dict[str, Any]


def convert_classes(module: nn.Module, classes: Mapping[type, Any]) -> None:
    """Convert modules of the classes that are keys to the classes that are values.

    Raises ValueError or TypeError naming ``classes``; then nothing has been changed.
    """
    chosen: list[tuple[Any, type, Options]] = []
    for cls, value in classes.items():
        target, options = _target(cls, value)
        found = {name: part for name, part in module.named_modules() if type(part) is cls}
        if not found:
            raise ValueError(f"classes: no {cls.__name__} in {type(module).__name__}")
        alike: set[str] = set()
        for name, part in found.items():
            settings = {k: v for k, v in vars(part).items() if not k.startswith("_")}
            key = repr((part, settings))
            if key not in alike:
                with _one_thread(), torch.enable_grad():
                    _check(name, part, target, options)
                alike.add(key)
            chosen.append((part, target, options))
    for part, target, options in chosen:
        _assign(part, target, options)


def _target(cls: type, value: Any) -> tuple[type, Options]:
    target, options = value, {}
    if isinstance(value, functools.partial) and not value.args:
        target, options = value.func, value.keywords
    known = {
        WSConv2d: (nn.Conv2d, {*Variant._fields, "scale"}),
        GroupNormAct: (nn.GroupNorm, {"act"}),
    }
    if target not in known or not options.keys() <= known[target][1]:
        raise TypeError(
            "classes: expected WSConv2d or GroupNormAct, or a functools.partial of one with "
            f"keywords of its formula, for {cls!r}, got {value!r}"
        )
    base = known[target][0]
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise TypeError(f"classes: expected a subclass of nn.{base.__name__}, got {cls!r}")
    return target, options


def _assign(part: Any, target: type, options: Options) -> None:
    part.__class__ = target
    if target is WSConv2d:
        defaults = {**Variant()._asdict(), "scale": 1.0, "gain": None}
        vars(part).update(defaults | options)
    else:
        vars(part).update({"act": "relu"} | options)


def _check(name: str, part: Any, target: type, options: Options) -> None:
    """Raise ValueError if a module does not compute what another class would."""
    theirs = _twin(part)
    x = torch.randn(_shape(part), generator=torch.Generator().manual_seed(0), **IN_FLOAT64)
    expected = _run(theirs, x)
    ours = copy.copy(theirs)
    _assign(ours, target, options)
    far = _distance(_run(ours, x), expected)
    if far <= TOLERANCE:
        return
    raise ValueError(
        f"classes: {target.__name__} does not compute what {name or 'the module'} "
        f"({type(part).__name__}) does: {far:.0e} away on random input; give the variant of its "
        f"formula by functools.partial({target.__name__}, ...), or "
        'torch.compile(model, backend="bitkern"), which recognizes it by itself'
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run the block on one thread: threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _twin(part: nn.Module) -> nn.Module:
    """A copy on the CPU, in float64, without hooks, whose parameters show eps and scale."""
    twin = copy.deepcopy(part)
    if any(t.is_meta for t in (*twin.parameters(), *twin.buffers())):
        twin.to_empty(device="cpu")
    twin.to(**IN_FLOAT64)
    for module in twin.modules():
        _torch.drop_hooks(module)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.uniform_(-1, 1, generator=generator)
            if parameter.ndim > 1:
                parameter.add_(0.3).mul_(_scales(parameter))
    return twin


def _scales(weight: Tensor) -> Tensor:
    """Factors that give filters standard deviations from 0.1 down to 1e-5."""
    powers = torch.arange(weight.shape[0], **IN_FLOAT64) % 5 + 1
    return (10**-powers).reshape(-1, *[1] * (weight.ndim - 1))


def _shape(part: Any) -> tuple[int, ...]:
    if isinstance(part, nn.Conv2d):
        return (
            2,
            part.in_channels,
            *(d * (k - 1) + 3 for d, k in zip(part.dilation, part.kernel_size, strict=True)),
        )
    return 2, part.num_channels, 5, 4


def _run(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Results in both modes, and the gradients of input and parameters."""
    found = []
    for training in (True, False):
        module.train(training)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        weights = torch.linspace(-1, 1, y.numel(), **IN_FLOAT64).view_as(y)
        parameters = [p for p in module.parameters() if p.requires_grad]
        grads = torch.autograd.grad((y * weights).sum(), [leaf, *parameters])
        # A filter's gradient is as large as the filter is small.
        scaled = [g * _scales(g) if g.ndim > 1 else g for g in grads[1:]]
        found += [y.detach(), grads[0], *scaled]
    return found


def _distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest relative distance."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
