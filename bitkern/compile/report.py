"""Records of rewritten graphs, for ``bitkern.explain``."""

import re
import weakref
from collections.abc import Iterable, Mapping
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from bitkern import _torch


class Row(NamedTuple):
    """One module or part of a graph: its name, what it is, whether it runs on the kernels, how."""

    name: str
    layer: str
    converted: bool
    reason: str


class Table(tuple[Row, ...]):
    """A tuple of ``Row``; rows with the same text are printed as one."""

    def __str__(self) -> str:
        tell = attrgetter("layer", "converted", "reason")
        lines = []
        for (layer, converted, reason), rows in groupby(sorted(self, key=tell), key=tell):
            names = [row.name or "(the module)" for row in rows]
            more = ", …" if len(names) > 1 else ""
            state = "converted" if converted else "left"
            lines.append(f"{len(names):4} {layer:42} {state:9}  {reason} [{names[0]}{more}]")
        return "\n".join(lines)


class _Graph(NamedTuple):
    key: tuple[str, tuple[int, ...]]  # number and parameters
    parameters: tuple[weakref.ref[Tensor], ...]
    rows: tuple[Row, ...]


_graphs: list[_Graph] = []


def record(gm: fx.GraphModule, parameters: Iterable[Tensor], rows: Iterable[Row]) -> None:
    """Keep the rows of a graph for as long as its parameters live."""
    compiled, reason = _torch.compilation(gm)
    parameters = tuple(parameters)
    key = compiled, tuple(map(id, parameters))
    # After torch.compiler.reset() numbers are given again.
    _graphs[:] = [g for g in _graphs if g.key != key and any(p() is not None for p in g.parameters)]
    ends = []
    if reason is not None:
        ends.append(Row(compiled, "graph break", False, reason))
    elif _torch.at_recompile_limit(compiled):
        ends.append(
            Row(compiled, "recompile limit", False, "other inputs run as the network was written")
        )
    made = Row(compiled, "graph", True, "compiled")
    _graphs.append(_Graph(key, tuple(map(weakref.ref, parameters)), (made, *rows, *ends)))


def rows_of(module: nn.Module) -> list[Row] | None:
    """The rows of the graphs that have a module's parameters; None if there are none."""
    own = {id(p) for p in module.parameters()}
    found = [g for g in _graphs if any(id(p()) in own for p in g.parameters)]
    return [row for graph in found for row in graph.rows] if found else None


def name_of(node: fx.Node, names: Mapping[str, str]) -> str:
    """The path of the module that a node comes from, or of the parameter that it is."""
    if node.name in names:
        return names[node.name]
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    path = str([*stack.values()][-1][0]) if stack else node.name
    path = re.sub(r"(?:__dict__\['_modules'\])?\['(\w+)'\]", r"\1", path.removeprefix("L['self']"))
    return path.removeprefix(".") or node.name
