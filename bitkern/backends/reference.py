"""Plain PyTorch: any device, any floating dtype."""

import types

from bitkern import reference
from bitkern.backends.backend import Backend


class Reference(Backend):
    """Serves what no kernel does; ``bitkern.backends.choose`` asks it nothing."""

    name = "reference"

    def launchers(self, kernel: str) -> types.ModuleType:
        return reference
