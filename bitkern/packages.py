"""Optional packages and the extras that install them."""

import importlib.util

_EXTRAS = {
    "datasets": "bitkern[large]",
    "tensorboard": "tensorboard",
    "torchvision": "torchvision",
    "webdataset": "bitkern[large]",
}


def require(*modules: str) -> None:
    """Raise ValueError, saying how to install them, unless all modules can be imported."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            package = _EXTRAS.get(module, "bitkern[train]")
            raise ValueError(f"{module} is not installed: pip install '{package}'")
