"""``python -m bitkern``: the command line."""

import sys

from bitkern.cli import main

sys.exit(main())
