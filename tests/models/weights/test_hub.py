"""The Hugging Face hub, played by a local server."""

import json

import pytest

from tests.models.weights.server import serving
from tests.process import python

TIMM = "resnetv2_50x1_bit.goog_distilled_in1k"
FILES = {
    f"/timm/{TIMM}/resolve/main/model.safetensors": b"safe",
    "/org/old/resolve/main/pytorch_model.bin": b"pickled",
    "/org/empty/resolve/main/README.md": b"",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


def ask(home, url, *names, **environment):
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home)}
    return json.loads(python("-m", "tests.models.weights.hub", *names, **environment).stdout)


def test_hub(home):
    with serving(FILES) as server:
        names = ["resnetv2_50x1_bit", "hf-hub:org/old", "hf-hub:org/empty", "hf-hub:org/unknown"]
        names += [f"hf-hub:timm/{TIMM}", "hf-hub:org/old"]  # both are there by now
        safe, old, empty, unknown, again, old_again = ask(home, server.url, *names)
        with open(safe) as file, open(old) as old_file:
            assert (file.read(), old_file.read()) == ("safe", "pickled")
        assert (again, old_again) == (safe, old)
        missing = "expected model.safetensors or pytorch_model.bin, found neither"
        assert empty == f"OSError: hf-hub:org/empty: {missing}"
        by_hand = (
            "or pass the path of its model.safetensors, fetched by hand, name a mirror in "
            "HF_ENDPOINT, or start from random weights (--weights none), which takes far more "
            "images and steps for the same accuracy"
        )
        reason = "no such repository, or none for you"
        assert unknown == f"OSError: {server.url}/org/unknown: {reason}; {by_hand}"
        got = [path for path, _ in server.requests]
        assert got.count(f"/timm/{TIMM}/resolve/main/model.safetensors") == 1
        assert got.count("/org/old/resolve/main/pytorch_model.bin") == 1
    # The server is gone.
    there, new = ask(home, server.url, "resnetv2_50x1_bit", "hf-hub:org/new", HF_HUB_OFFLINE="1")
    assert there == safe
    reason = "not in the cache, and the hub cannot be reached"
    assert new == f"OSError: {server.url}/org/new: {reason}; {by_hand}"
