import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The folder of what is kept on disk, empty and not the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BITKERN_CACHE", str(folder))
    return folder
