import pytest
import torch


@pytest.fixture(autouse=True)
def reset():
    torch._dynamo.reset()
