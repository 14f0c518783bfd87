"""The layers and blocks of other libraries, with the kernels of this one.

One module per library, imported only where the library already is. Each class is a subclass of the
one it takes the place of, with its name, so that ``isinstance``, pickling, and whatever goes by
class names work on. ``bitkern.convert`` assigns it to ``module.__class__``.

``LAYERS`` and ``BLOCKS`` of each module map the library's classes to these; a value may also be a
function of the module. A block has a ``fits(module)``: whether its parts are converted.
"""

import importlib
import sys
from typing import Any

# A module of this package -> the module of the library without which it is of no use.
LIBRARIES = {
    "timm": "timm.layers",
    "transformers": "transformers.models.bit.modeling_bit",
}


def replacements(kind: str) -> dict[type, Any]:
    """``LAYERS`` or ``BLOCKS`` of the libraries in use: their classes -> the ones taken instead."""
    classes: dict[type, Any] = {}
    for name, marker in LIBRARIES.items():
        if marker in sys.modules:
            classes |= getattr(importlib.import_module(f"{__name__}.{name}"), kind, {})
    return classes
