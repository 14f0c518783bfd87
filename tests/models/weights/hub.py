"""Asks the hub at HF_ENDPOINT, which is read at its import: a process of its own. Prints JSON.

Arguments: names of weights. Prints the path of each, or what the error says.
"""

import json
import sys

from bitkern.models.weights import fetch


def outcome(name):
    try:
        return str(fetch(name))
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


print(json.dumps([outcome(name) for name in sys.argv[1:]]))
