"""Skips these tests where there is no compiler."""

import pytest

from tests.backends.cuda_on_cpu import build


def pytest_collection_modifyitems(items):
    reason = build.missing()
    for item in items if reason else []:
        if build.HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
