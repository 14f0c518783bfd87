"""Blocks of any class, whose norms run fused where a trace proves what follows them.

A block's forward is traced in every case: either mode, with and without gradients, with every
choice of optional arguments. What is fused in each is compared with the original on random input
in float64, results and gradients, before any of it is kept. At run time a case is taken if all that
its trace has read is still so; in any other the block runs as its author wrote it.
"""

import contextlib
import copy
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from bitkern import _torch
from bitkern.convert.patterns import WITH_SUM, fuse
from bitkern.convert.proof import Deceived, prove, twin_of
from bitkern.convert.tracing import (
    Case,
    Forward,
    Parameters,
    Untraced,
    function_of,
    original,
    original_forward,
    source_of,
    structure,
    trace,
)
from bitkern.convert.watching import Read, Unproven
from bitkern.nn.activations import idle, may_be_idle
from bitkern.nn.fused import fused_act, watched


class Escapes(Unproven):
    """A block is left since it returns what a norm makes."""


class Way(NamedTuple):
    """What a block does in a case, and what that depends on."""

    function: Forward
    reads: tuple[Read, ...]


class Plan(NamedTuple):
    """The cases in which a block runs fused. It holds no module: copies of the block share it."""

    parameters: Parameters
    through: tuple[str, ...]
    involved: frozenset[str]
    ways: dict[Case, Way]
    fused: dict[str, str]  # what becomes of each norm, by its path
    left: dict[str, str]

    def of(self, block: nn.Module) -> "BoundPlan":
        """The plan for a block as it stands."""

        def scope(of: str | Mapping[str, Any]) -> Mapping[str, Any]:
            return vars(block.get_submodule(of)) if isinstance(of, str) else of

        ways = {
            case: (way.function, [(scope(read.of), read) for read in way.reads])
            for case, way in self.ways.items()
        }
        read = {r.of for way in self.ways.values() for r in way.reads if isinstance(r.of, str)}
        looked_at = [block, *map(block.get_submodule, sorted({*self.through, *read}))]
        looked_at = [part for each in looked_at for part in _with_lists(each)]
        through = [block.get_submodule(path) for path in self.through]
        involved = [block.get_submodule(path) for path in self.involved]
        return BoundPlan(self, through, involved, looked_at, structure(looked_at), ways)


@dataclass(frozen=True, eq=False)
class BoundPlan:
    """A plan and the modules of one block."""

    plan: Plan
    through: list[nn.Module]
    involved: list[nn.Module]
    looked_at: list[nn.Module]
    structure: tuple[Any, ...]
    ways: dict[Case, tuple[Forward, list[tuple[Mapping[str, Any], Read]]]]

    def fits(self) -> bool:
        """Whether the block still has the parts that it had."""
        return structure(self.looked_at) == self.structure

    def way(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Forward, Any] | None:
        """The function for a call, and its tensors; None if the block is to run unfused."""
        bound = self.plan.parameters.bind(args, kwargs)
        if bound is None or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return None
        which, tensors = bound
        way = self.ways.get(Case(block.training, torch.is_grad_enabled(), which))
        if way is None or not self.fits() or any(map(_by_itself, self.through)):
            return None
        if any(map(_seen, self.involved)):
            return None
        function, reads = way
        return (function, tensors) if all(read.holds(scope) for scope, read in reads) else None


def _by_itself(part: nn.Module) -> bool:
    """Whether a module is to be called, since hooks watch it or something has compiled it."""
    return watched(part) or _torch.compiled(part)


def _seen(part: nn.Module) -> bool:
    """Whether it shows, or matters, when a module is called."""
    return watched(part) or (may_be_idle(part) and not idle(part)) or "_conv_forward" in vars(part)


class Traced:
    """Mixin of blocks that run as a plan says."""

    bitkern_original: type
    bitkern_plan: BoundPlan | None = None

    def __init_subclass__(cls, **_: Any) -> None:
        """The author's, a registry perhaps, is for the author's classes."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin: Any = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(_without_plan(self), memo))
        plan = plan_for(self)
        if plan is not None:
            twin.bitkern_plan = plan.of(twin)
        return twin

    # The class has no name to be pickled by, nor has a plan's code: the plan is made anew.
    def __reduce_ex__(self, protocol: Any) -> Any:
        through = self.bitkern_plan.plan.through if self.bitkern_plan else ()
        return _bare, (self.bitkern_original,), (_without_plan(self), through)

    def __setstate__(self, state: Any) -> None:
        attributes, through = state
        self.bitkern_original.__setstate__(self, attributes)  # type: ignore[attr-defined]
        block: Any = self
        with contextlib.suppress(Unproven):
            adopt(block, [block.get_submodule(path) for path in through])


def plan_for(module: Any) -> Plan | None:
    """The plan of a module for the parts that it has now."""
    bound = module.bitkern_plan if isinstance(module, Traced) else None
    return bound.plan if bound is not None and bound.fits() else None


def _without_plan(block: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(block).items() if name != "bitkern_plan"}


def _bare(cls: type) -> Any:
    return object.__new__(traced(cls))


@functools.cache
def traced(cls: Any) -> Any:
    """The subclass of a class whose instances may have a plan."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = self.bitkern_plan
        way = None if bound is None else bound.way(self, args, kwargs)
        if way is None:
            return cls.forward(self, *args, **kwargs)
        function, tensors = way
        return function(self, *tensors)

    # torch.compile counts its attempts by code: those at another class are others.
    forward.__code__ = forward.__code__.replace()
    functools.update_wrapper(forward, cls.forward)  # whose parameters are looked at
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (Traced, cls), names | {"bitkern_original": cls, "forward": forward})


def adopt_all(module: nn.Module) -> None:
    """Give a plan to every block in a module that calls a norm, inner ones first.

    If a block returns what a norm makes, and does no more with it, the block that calls it is
    looked at, and the inner one as a part of that.
    """
    _adopt_inside(module)
    _adopt_across(module)


def _adopt_inside(module: nn.Module) -> None:
    escapes: list[nn.Module] = []
    for block in reversed(list(module.modules())):
        if not is_block(block):
            continue
        held = set(_held(block))
        through = [part for part in escapes if any(part in set(h.modules()) for h in held)]
        if not through and not any(fused_act(part) for part in held):
            continue
        try:
            adopt(block, through)
        except Escapes:
            escapes.append(block)
        except Unproven:
            pass


def _adopt_across(block: nn.Module) -> None:
    """Let blocks that follow each other run as one where a norm takes the sum before it."""
    parts = [part for part in block.modules() if part is not block]
    through = [part for part in parts if any(isinstance(p, Traced) for p in part.modules())]
    if sum(isinstance(part, Traced) for part in through) > 1 and not is_ours(block):
        with contextlib.suppress(Unproven):
            _give(block, plan_of(block, through, wanted=WITH_SUM))
            return
    for child in block.children():
        _adopt_across(child)


_LISTS = nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict


def _with_lists(block: nn.Module) -> Iterator[nn.Module]:
    """A block and the lists in it, whose parts a forward may take one by one."""
    yield block
    for part in block.children():
        if isinstance(part, _LISTS):
            yield from _with_lists(part)


def is_block(module: nn.Module) -> bool:
    """Whether a module is one that has parts, calls them, and has been left to itself."""
    done = plan_for(module) is not None
    return not (is_ours(module) or done) and any(True for _ in module.children())


def is_ours(module: nn.Module) -> bool:
    """Whether a module has a forward of this package, or one put over that of its class."""
    return type(module).__module__.split(".")[0] == "bitkern" or "forward" in vars(module)


def _held(block: nn.Module) -> Iterator[nn.Module]:
    """The modules of a block, those in lists and dicts included."""
    for part in block.children():
        if isinstance(part, nn.ModuleList | nn.ModuleDict):
            yield from _held(part)
        yield part


def adopt(block: nn.Module, through: Sequence[nn.Module] = ()) -> None:
    """Give a block a plan and the class that runs it. Raises Unproven if there is none."""
    _give(block, _best_plan(block, through))


def _give(block: nn.Module, plan: Plan) -> None:
    if not isinstance(block, Traced):
        cls: Any = type(block)
        block.__class__ = traced(cls)
    vars(block)["bitkern_plan"] = plan.of(block)


def _best_plan(block: nn.Module, through: Sequence[nn.Module]) -> Plan:
    """Seen through modules, if norms inside these gain by it."""
    if through:
        with contextlib.suppress(Unproven):
            plan = plan_of(block, through)
            if any(path.startswith(f"{inner}.") for path in plan.fused for inner in plan.through):
                return plan
    return plan_of(block)


# Which code has been compared with which class, its parts being such, in which mode: not again in a
# next block, nor for a case in which the same happens.
_proved: set[tuple[type, str, str, bool]] = set()


# How modules are copied and pickled.
_COPIED = "__copy__", "__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__"


def plan_of(block: nn.Module, through: Sequence[nn.Module] = (), wanted: str | None = None) -> Plan:
    """What of a block can run fused. Raises Unproven, with the reason, if nothing can.

    ``wanted`` is what a norm must become for the plan to be worth it.
    """
    parameters = Parameters(original_forward(block))
    if any(getattr(original(block), n, None) != getattr(nn.Module, n, None) for n in _COPIED):
        raise Unproven("its class is copied in a way of its own")
    found_at = {module: path for path, module in block.named_modules()}
    paths = tuple(found_at[module] for module in through)
    reason, twin = Unproven("its forward fails in all cases"), None
    ways: dict[Case, Way] = {}
    fused: dict[str, str] = {}
    left: dict[str, str] = {}
    involved: set[str] = set()
    for training, grad in itertools.product((True, False), repeat=2):
        for which in parameters.cases():
            case = Case(training, grad, which)
            try:
                copied, twin = twin or twin_of(block), None  # a trace that fails may spoil it
                graph, reads = trace(copied, paths, parameters, case)
                twin = copied
                found = fuse(graph, twin)
                left |= found.left
                if not found.fused:
                    kind = Escapes if found.escape else Unproven
                    raise kind("; ".join(sorted(set(found.left.values()))) or "it calls no norm")
                if wanted is not None and wanted not in found.fused.values():
                    raise Unproven(f"no {wanted}")
                source = source_of(graph)
                function = function_of(source)
                key = original(block), source.src, repr(block), training
                if key not in _proved:
                    prove(twin, graph, parameters, case, function)
                    _proved.add(key)
            except Deceived:
                raise
            except Unproven as error:
                reason = error
                continue
            ways[case] = Way(function, reads)
            fused |= found.fused
            involved |= found.involved
        if not ways and isinstance(reason, Untraced):
            break  # each case costs a copy, and other modes rarely have another answer
    if not ways:
        raise reason
    return Plan(parameters, paths, frozenset(involved), ways, fused, left)


def why_left(norm: nn.Module, model: nn.Module) -> str:
    """Why a norm in a model runs without what follows it."""
    blocks = [block for block in model.modules() if norm in set(_held(block))]
    reasons = []
    for block in blocks:
        if isinstance(block, nn.ModuleList | nn.ModuleDict):
            continue
        path = next(path for path, part in block.named_modules() if part is norm)
        try:
            plan = plan_for(block) or plan_of(block)
            reasons.append(plan.left.get(path, "bitkern.convert has not seen its block"))
        except Unproven as error:
            reasons.append(f"{type(block).__name__}: {error}")
    return "; ".join(reasons) or "no block is known that calls it"
