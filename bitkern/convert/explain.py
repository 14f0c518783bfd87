"""Explanation: the conversion of each module, and the backend that serves an operator."""

from collections.abc import Mapping
from typing import Any, overload

from torch import Tensor, nn

from bitkern import _torch, backends
from bitkern.backends import Choice
from bitkern.compile.report import Row, Table, rows_of
from bitkern.convert.convert import is_bitkern
from bitkern.convert.libraries import __name__ as LIBRARIES
from bitkern.convert.libraries import replacements
from bitkern.nn import WSConv2d
from bitkern.nn.norms import INSTANCE_NORMS, InstanceNorm


@overload
def explain(op_name: str, /, *tensors: Tensor | None) -> Choice: ...
@overload
def explain(module: nn.Module, /) -> Table: ...
def explain(subject: str | nn.Module, /, *tensors: Tensor | None) -> Choice | Table:
    """Explain which implementation an operator uses on these tensors: a ``Choice``.

    ``tensors`` are the operator's tensor arguments in their order, the big one first, e.g.
    ``explain("group_norm_act", x, weight, bias)``. Of ``ws_conv2d`` it tells how the weight is
    standardized; the convolution itself is PyTorch's (cuDNN, oneDNN).

    ``explain(module)`` of an ``nn.Module`` returns a ``Table``, to be printed, of what in it
    runs on the kernels, what does not, and why: see ``bitkern.convert``. Of a module compiled with
    ``backend="bitkern"`` it tells what became of each norm and each standardized weight in the
    graphs so far, where Dynamo broke them and why, and whether it will compile no more of them.

    Raises ValueError for an unknown operator, or without tensors.
    """
    if not isinstance(subject, nn.Module):
        return backends.explain(subject, *tensors)
    if _torch.compiled(subject):
        rows = rows_of(subject)
        unseen = Row("", type(subject).__name__, False, "no graph has been compiled: call it first")
        return Table([unseen] if rows is None else rows)
    layers, blocks = replacements("LAYERS"), replacements("BLOCKS")
    known = *layers, *blocks, *_PLAIN
    rows = []
    for name, part in subject.named_modules():
        if isinstance(part, known) or type(part) in (nn.Conv2d, nn.BatchNorm2d):
            reason = _why_left(part, layers | blocks)
            # Of the class, or of the one it replaces.
            library = type(part).__module__.removeprefix(f"{LIBRARIES}.").split(".")[0]
            layer = f"{library} {type(part).__name__}"
            rows.append(Row(name, layer, reason is None, reason or _how(part)))
    return Table(rows)


_PLAIN = nn.GroupNorm, *INSTANCE_NORMS, WSConv2d


def _how(module: nn.Module) -> str:
    if isinstance(module, WSConv2d):
        return "weights standardized by a kernel"
    if isinstance(module, nn.GroupNorm | InstanceNorm):
        act, after = module.fusion()  # type: ignore[operator, misc]
        then = ", then ".join(type(m).__name__ for m in after if type(m) is not nn.Identity)
        if then:
            return f"norm by a kernel, then {then}, which it cannot apply"
        if act == "none":
            return (
                'norm by a kernel alone: torch.compile(model, backend="bitkern") fuses what follows'
            )
        return "norm and activation in one kernel"
    return "norms, activations and convolutions inside as one"


def _why_left(module: nn.Module, classes: Mapping[type, Any]) -> str | None:
    """The reason why a module does not run on the kernels; None if it does."""
    cls = type(module)
    if is_bitkern(module):
        return None
    if "forward" in vars(module):
        return "a forward of its own has been put over that of its class"
    if cls in INSTANCE_NORMS and module.track_running_stats:
        return "running statistics, which a GroupNorm has not"
    if cls in classes or cls is nn.GroupNorm or cls in INSTANCE_NORMS:
        fits = getattr(classes.get(cls), "fits", None)
        if fits is None or fits(module):
            return "bitkern.convert has not seen it"
        return "nothing converted inside that could be fused"
    if cls is nn.Conv2d:
        return "no weight standardization"
    if cls is nn.BatchNorm2d:
        return "no GroupNorm"
    base = next(base for base in cls.__mro__[1:] if base in classes or base in _PLAIN)
    return f"a subclass of {base.__name__}, which may compute something else"
