"""The tree: which part may import which, where private names of PyTorch are, how long a file is."""

import ast
import re
from pathlib import Path

import pytest

import bitkern

ROOT = Path(bitkern.__file__).parent
LONGEST = 400
PRIVATE = "_torch"  # the one module with private names of other packages

# From the bottom to the top: a part imports those before it, and itself.
PARTS = (
    ("_C", "_torch", "packages", "text", "variant"),
    ("files", "layout"),
    ("reference",),
    ("backends",),
    ("ops",),
    ("optim",),
    ("nn",),
    ("compile",),
    ("convert", "models"),
    ("private", "transfer"),
    ("export",),
    ("demo", "selftest"),
    ("cli",),
)
LEVEL = {part: level for level, parts in enumerate(PARTS) for part in parts}
# Inside a package, from the bottom to the top. Its own __init__ is above them all.
INSIDE = {
    "backends": (("backend",), ("extension", "reference"), ("cpu", "cuda", "triton")),
    "backends.triton": (
        ("kernels",),
        ("config", "launch"),
        ("group_norm_act", "weight_standardize"),
        ("group_norm_add_relu",),
    ),
    "backends.triton.kernels": (
        ("tiles",),
        ("group_norm_act_forward", "group_norm_act_backward", "weight_standardize"),
    ),
    "ops": (
        ("group_norm_act", "weight_standardize"),
        ("detached", "group_norm_add_relu", "ws_conv2d"),
        ("convolution",),
        ("group_norm_act_conv",),
    ),
    "nn": (
        ("activations", "current"),
        ("layers",),
        ("norms",),
        ("fused", "standardized"),
        ("preact",),
    ),
    "compile": (
        ("graph", "report", "run"),
        ("weights",),
        ("patterns",),
    ),
    "convert": (
        ("batchnorm", "libraries"),
        ("classes",),
        ("convert",),
        ("explain", "fold"),
    ),
    "convert.libraries": (("common",), ("timm", "transformers", "transformers_activations")),
    "models": (
        ("download", "pretrained", "resnetv2"),
        ("checkpoints", "weights"),
        ("registry",),
    ),
    "transfer": (
        ("balance", "curves", "ranks", "rng"),
        ("cuda_graphs", "device_config"),
        ("recipes",),
        ("schedule",),
        ("data",),
        ("gradient_reducer", "inference", "run"),
        ("progress", "report", "selection", "step"),
        ("micro_batch",),
        ("train_setup",),
        ("loop",),
        ("trainer",),
        ("training",),
    ),
    "transfer.recipes": (("checks", "mixup"), ("hyperrule", "pretraining")),
    "transfer.report": (("evaluation", "style"), ("metrics", "plots"), ("page",)),
    "transfer.data": (
        ("images", "memory", "threads"),
        ("decoders", "lazy_images", "subsets", "tar"),
        ("digits", "folder", "huggingface", "resized", "shards", "table"),
        ("disk_cache",),
        ("open_images",),
        ("loader",),
    ),
    "export": (("common",), ("aoti", "npz", "onnx", "timm", "transformers")),
    "demo": (("letters", "plots"),),
    "cli": (
        ("options",),
        ("training",),
        ("cache", "demo", "evaluate", "export", "finetune", "info", "predict", "pretrain"),
        ("weights",),
    ),
}


def modules(root):
    """{dotted name: file} of a package's modules."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree, module, known):
    """The modules of the package that a module imports, in whatever way; f-strings by their start.

    What only type checkers see is left out: it is no arrow of the program.
    """
    package = module if known[module].name == "__init__.py" else module.rpartition(".")[0]
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped |= {inner for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: expected absolute imports"
            assert node.module != "importlib", f"{module}: expected import importlib"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in known else node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            (text,) = node.args  # a package to be relative to is not taken
            start = re.fullmatch(r"f?'([\w.]+|{__name__}[\w.]*)({.*})?'", ast.unparse(text))
            assert start, f"{module}: imports what cannot be told, {ast.unparse(node)}"
            yield start[1].replace("{__name__}", package).rstrip(".")
        elif isinstance(node, ast.Name) and node.id == "__import__":
            raise AssertionError(f"{module}: expected importlib.import_module, got __import__")


def arrows(root):
    """(importing module, imported module) inside a package."""
    known = modules(root)
    for module, path in known.items():
        for name in imported(ast.parse(path.read_text()), module, known):
            if name.split(".")[0] == root.name and name != module:
                yield module, name


def place(module, package):
    """The level of a module inside a package; above all others for the package itself."""
    piece = module.removeprefix(f"bitkern.{package}").lstrip(".").split(".")[0]
    levels = {name: level for level, names in enumerate(INSIDE[package]) for name in names}
    assert not piece or piece in levels, f"{module}: not among {sorted(levels)} of {package}"
    return piece, levels.get(piece, len(INSIDE[package]))


def is_upward(module, name):
    """Whether an import goes to the importer's own level or above it."""
    part, to = (dotted.split(".")[1] if "." in dotted else None for dotted in (module, name))
    if part in (None, "__main__"):  # the facade: nobody imports it, save for its version
        return False
    if to is None:
        return part != "cli"
    if part != to:
        return LEVEL[part] <= LEVEL[to]
    package = part
    while package in INSIDE:
        (piece, level), (to_piece, to_level) = place(module, package), place(name, package)
        if piece != to_piece:
            return level <= to_level
        package = f"{package}.{piece}"
    return False


def upward(root):
    """The arrows that point up, each in words."""
    found = sorted(set(arrows(root)))
    return [f"{module} imports {name}" for module, name in found if is_upward(module, name)]


def test_arrows_point_down():
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert parts - {"__init__", "__main__"} == set(LEVEL) - {"_C"}
    assert len(list(arrows(ROOT))) > 150, "they are found"
    assert upward(ROOT) == []


@pytest.mark.parametrize(
    ("place", "line", "found"),
    [
        ("ops/ws_conv2d.py", "from bitkern.nn import WSConv2d", "bitkern.ops.ws_conv2d imports"),
        ("nn/layers.py", "import bitkern.models.registry", "imports bitkern.models.registry"),
        ("nn/layers.py", "from bitkern.nn.standardized import Pool", "imports bitkern.nn.stand"),
        ("nn/current.py", "def f():\n    from bitkern.nn import preact", "imports bitkern.nn.pre"),
        ("backends/cpu.py", "from bitkern import transfer", "imports bitkern.transfer"),
        ("models/registry.py", "from bitkern import convert", "imports bitkern.convert"),
        ("transfer/run.py", "import bitkern", "bitkern.transfer.run imports bitkern"),
        ("nn/current.py", "from bitkern.nn import WSConv2d", "imports bitkern.nn"),
        ("transfer/rng.py", "from bitkern.transfer import train", "imports bitkern.transfer"),
        (
            "backends/triton/kernels/group_norm_act_forward.py",
            "from bitkern.backends.triton import group_norm_act",
            "imports bitkern.backends.triton.group_norm_act",
        ),
        (
            "reference.py",
            "import importlib\nimportlib.import_module('bitkern.ops.ws_conv2d')",
            "bitkern.reference imports bitkern.ops.ws_conv2d",
        ),
        (
            "backends/triton/launch.py",
            "import importlib\nimportlib.import_module(f'bitkern.nn.{1}')",
            "bitkern.backends.triton.launch imports bitkern.nn",
        ),
    ],
)
def test_an_upward_import_is_found(tmp_path, place, line, found):
    root = tmp_path / "bitkern"
    for path in modules(ROOT).values():
        copy = root / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    (root / place).write_text((root / place).read_text() + f"\n\n{line}\n")
    (wrong,) = upward(root)
    assert found in wrong


@pytest.mark.parametrize(
    "line",
    [
        "import importlib\nimportlib.import_module({}.get(1, 'bitkern.nn'))",
        "import importlib\nimportlib.import_module(NAME)",
        "import importlib\nimportlib.import_module('.nn', 'bitkern')",
        "from importlib import import_module",
        "__import__('bitkern.nn')",
        "from . import nn",
    ],
)
def test_an_import_that_cannot_be_told_is_an_error(tmp_path, line):
    (tmp_path / "bitkern").mkdir()
    (tmp_path / "bitkern" / "layout.py").write_text(line)
    with pytest.raises((AssertionError, ValueError)):
        upward(tmp_path / "bitkern")


PRIVATE_NAME = re.compile(r"_[a-zA-Z]\w*")
OF_NAMEDTUPLE = {"_replace", "_asdict", "_fields"}


def strings(nodes):
    """The parts of dotted names in strings."""
    texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [part for text in texts for part in text.split(".")]


def privates(root):
    """(private name of another package, module that uses it), also by getattr and keys.

    A name is another's unless it is looked up on self, cls or super(), or on a module of ours; what
    a class of ours defines is its own on self alone.
    """
    for module, path in modules(root).items():
        tree = ast.parse(path.read_text())
        own = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef)}
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value)
                mine = owner in ("self", "cls") or owner in own and node.attr in own
                names = [] if mine else [node.attr]
            elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] != root.name:
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            elif isinstance(node, ast.Subscript):
                names = strings([node.slice])
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("attr", ".get")):
                names = strings(node.args)
            for name in names:
                if PRIVATE_NAME.fullmatch(name) and name not in OF_NAMEDTUPLE:
                    yield name, module


def test_private_names_of_pytorch_are_in_one_place():
    found = set(privates(ROOT))
    others = {name for name, module in found if module != f"{ROOT.name}.{PRIVATE}"}
    assert others == set(), sorted(found)
    assert len(found) > 10
    versions = (ROOT / f"{PRIVATE}.py").read_text().partition("\n")[0]
    assert re.search(r"PyTorch 2\.11\.\d and 2\.\d+\.\d", versions)


@pytest.mark.parametrize(
    "line",
    [
        "x._version",
        "torch._C.Graph",
        "nn.Conv2d._conv_forward",
        "from torch._C import Tag",
        "import torch._dynamo",
        "getattr(x, '_forward_hooks')",
        "vars(x)['_parameters']",
        "sys.modules.get('torch._dynamo')",
    ],
)
def test_a_private_name_is_found(tmp_path, line):
    (tmp_path / "bitkern").mkdir()
    text = f"class Conv:\n    def _conv_forward(self):\n        self._version = 1\n\n\n{line}\n"
    (tmp_path / "bitkern" / "layout.py").write_text(text)
    assert list(privates(tmp_path / "bitkern"))


@pytest.mark.skipif(
    not (Path(__file__).parents[1] / "setup.py").exists(),
    reason="needs the sources: run it in a checkout",
)
@pytest.mark.parametrize(
    "folder", ["bitkern", "benchmarks", "tests", "csrc", "python", "examples", "hub", ".github"]
)
def test_no_file_is_long(folder):
    suffixes = {".py", ".cpp", ".cu", ".h", ".sh", ".yml"}
    files = [p for p in (Path(__file__).parents[1] / folder).rglob("*") if p.suffix in suffixes]
    assert files
    lengths = {str(path): len(path.read_text().splitlines()) for path in files}
    assert {path: n for path, n in lengths.items() if n > LONGEST} == {}
