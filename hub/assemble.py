"""Write bitkern in the kernel format of Hugging Face: ``python -m hub.assemble OUT``.

OUT gets the sources that ``kernel-builder`` takes and, in ``build``, what it makes of them: the two
files of ``hub/torch-ext/bitkern`` and what they need of the package, found by its imports. What
needs the compiled extension is left out. Imports become relative, and operators are registered in a
namespace that has the hash of the sources in its name, so that several versions can live in one
process. The same sources give the same bytes.
"""

import argparse
import ast
import base64
import hashlib
import importlib.util
import json
import os
import tomllib
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAME = "bitkern"
EXTENSION = f"{NAME}.backends.extension"

OPS = '''"""The namespace in which this build registers its operators."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(name):
    return f"{id}::{{name}}"
'''
COMPATIBLE = '''"""The kernel, for versions of ``kernels`` that look for it in this folder."""

import importlib.util
import sys
from pathlib import Path

if "{id}" not in sys.modules:
    path = Path(__file__).parents[1] / "__init__.py"
    spec = importlib.util.spec_from_file_location("{id}", path)
    sys.modules["{id}"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["{id}"])
kernel = sys.modules["{id}"]
__all__ = kernel.__all__
globals().update({{name: getattr(kernel, name) for name in __all__}})
'''


class Module:
    """A module, by its absolute name."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.text = path.read_text()
        self.nodes = list(ast.walk(ast.parse(self.text)))
        self.froms = [node for node in self.nodes if isinstance(node, ast.ImportFrom)]
        is_package = path.name == "__init__.py"
        self.package = name if is_package else name.rpartition(".")[0]
        self.file = "/".join(name.split(".")[1:] + ["__init__"] * is_package) + ".py"

    def source(self, node: ast.ImportFrom) -> str:
        """The absolute name of what a ``from`` statement imports from."""
        above = self.package.split(".")[: 1 - node.level or None] if node.level else []
        return ".".join(filter(None, [*above, node.module]))

    def imports(self, known: Iterable[str]) -> Iterator[str]:
        """The known modules that it imports; all of its package where it computes a name."""
        for node in self.froms:
            source = self.source(node)
            yield from {source, *(f"{source}.{alias.name}" for alias in node.names)} & {*known}
        computed = [ast.unparse(node) for node in self.nodes if isinstance(node, ast.JoinedStr)]
        if any(text.startswith("f'{__name__}.") for text in computed):
            yield from (name for name in known if name.rpartition(".")[0] == self.name)

    def relative(self, name: str) -> str:
        """An absolute name as its ``from`` statements have it."""
        here, there = self.package.split("."), name.split(".")
        same = len(os.path.commonprefix([here, there]))
        return "." * (len(here) - same + 1) + ".".join(there[same:])

    def edits(self, left_out: set[str]) -> Iterator[tuple[ast.stmt | ast.expr, str]]:
        """Nodes, and what stands in their place in the kernel.

        That is relative imports, and operators of the build. What modules left out define goes from
        the imports, and from tuples of instances.
        """
        ours = [node for node in self.froms if self.source(node).split(".")[0] == NAME]
        gone = {alias.name for node in ours if node.module in left_out for alias in node.names}
        for node in ours:
            text = str(ast.get_source_segment(self.text, node))
            if node.module in left_out:
                yield node, ""
            elif not node.level:
                yield node, text.replace(str(node.module), self.relative(str(node.module)), 1)
        for node in self.nodes:
            if isinstance(node, ast.Tuple):
                kept = [e for e in node.elts if ast.unparse(e).removesuffix("()") not in gone]
                if len(kept) < len(node.elts):
                    yield node, ast.unparse(ast.Tuple(kept))
            elif isinstance(node, ast.Attribute) and ast.unparse(node) == f"torch.ops.{NAME}":
                yield node, "ops"
            elif isinstance(node, ast.Constant) and str(node.value).startswith(f"{NAME}::"):
                yield node, f'add_op_namespace_prefix("{node.value.partition("::")[2]}")'

    def relocated(self, left_out: set[str]) -> bytes:
        """Its text in the kernel."""
        text = self.text.encode()
        lines = [0, *accumulate(map(len, text.splitlines(keepends=True)))]
        spans = []
        for node, by in self.edits(left_out):
            end = lines[node.end_lineno - 1] + node.end_col_offset
            spans.append((lines[node.lineno - 1] + node.col_offset, end + (by == ""), by))
        for first, last, by in sorted(spans, reverse=True):
            text = text[:first] + by.encode() + text[last:]
        if b"add_op_namespace_prefix(" in text:
            line = f"from {self.relative(NAME + '._ops')} import add_op_namespace_prefix, ops\n"
            at = min(first for first, _, _ in spans)
            text = text[:at] + line.encode() + text[at:]
        return text


def modules(root: Path) -> dict[str, Module]:
    """The modules under a package's folder, by name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        *parts, last = NAME, *path.relative_to(root).with_suffix("").parts
        name = ".".join(parts if last == "__init__" else [*parts, last])
        found[name] = Module(name, path)
    return found


def sources(package: Path) -> dict[str, bytes]:
    """The files of the kernel, by their paths."""
    own = modules(HERE / "torch-ext" / NAME)
    known = modules(package) | own
    compiled = {name for name, module in known.items() if EXTENSION in module.imports(known)}
    left_out = compiled | {EXTENSION}
    found: set[str] = set()
    waiting = list(own)
    while waiting:
        name = waiting.pop()
        if name and name not in found | left_out:
            found.add(name)
            waiting += [name.rpartition(".")[0], *known[name].imports(known)]
    return {known[name].file: known[name].relocated(left_out) for name in sorted(found)}


def variant(files: dict[str, bytes], general: dict[str, Any], backend: str) -> dict[str, bytes]:
    """The files of a build for a backend, those that ``kernel-builder`` adds among them."""
    content = hashlib.sha256(b"".join(path.encode() + text for path, text in files.items()))
    id = f"_{NAME}_{backend}_{content.hexdigest()[:8]}"
    files = files | {
        "_ops.py": OPS.format(id=id).encode(),
        f"{NAME}/__init__.py": COMPATIBLE.format(id=id).encode(),
    }
    hashes = {
        path: base64.b64encode(hashlib.sha256(text).digest()).decode()
        for path, text in sorted(files.items())
    }
    metadata = {
        "id": id,
        **{key: general[key] for key in ("name", "version", "license")},
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    return files | {"metadata.json": json.dumps(metadata, indent=2).encode() + b"\n"}


def assemble(out: Path, package: Path | None = None) -> Path:
    """Write the kernel to ``out``, a new folder, and return it.

    Raises FileExistsError if there is one.
    """
    general = tomllib.loads((HERE / "build.toml").read_text())["general"]
    found = importlib.util.find_spec(NAME)  # in the clone, or installed
    files = sources(package or Path(found.origin).parent)
    written = {path.name: path.read_bytes() for path in (HERE / "build.toml", HERE / "flake.nix")}
    for name in ("README.md", "CARD.md"):  # for the Hub; for kernel-builder
        written[name] = (HERE / "README.md").read_bytes()
    written["LICENSE"] = (HERE.parent / "LICENSE").read_bytes()
    written |= {f"torch-ext/{NAME}/{path}": text for path, text in files.items()}
    for backend in general["backends"]:
        built = variant(files, general, backend)
        written |= {f"build/torch-{backend}/{path}": text for path, text in built.items()}
    out.mkdir(parents=True)
    for path, text in written.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(text)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    print(assemble(parser.parse_args().out))
