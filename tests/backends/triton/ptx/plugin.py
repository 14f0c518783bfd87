"""A plugin of pytest: the tests of Triton kernels run on the machine, for the GPU that BITKERN_PTX
names, ``sm_80`` or ``sm_90``. ``test_kernels.py`` sets it up.
"""

import json
import os

from tests.backends.triton.ptx import arithmetic, driver

EXECUTED = "executed: "
capability = int(os.environ["BITKERN_PTX"].removeprefix("sm_"))
driver.install(capability)


def pytest_report_header():
    return f"executed as for sm_{capability}, BITKERN_PTX_SEED={arithmetic.SEED}"


def pytest_terminal_summary(terminalreporter):
    """Print launches, instructions, bytes read and written for each kernel."""
    terminalreporter.write_line(f"{EXECUTED}{json.dumps(driver.executed)}")
