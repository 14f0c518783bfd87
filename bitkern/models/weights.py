"""Weights by name, from the cache, Google's storage or the Hugging Face hub."""

import importlib.util
import os
from os import PathLike
from pathlib import Path

from bitkern.files import cache_folder
from bitkern.models.download import download, ways_out
from bitkern.models.pretrained import HUB, Release, get_release
from bitkern.text import one_line

BIT_URL = "https://storage.googleapis.com/bit_models"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
CacheDir = str | PathLike[str] | None


def source(release: Release) -> str:
    """The address of released weights, or their repository as ``hf-hub:ORG/NAME``."""
    if release.repository:
        return HUB + release.repository
    mirror = os.environ.get("BITKERN_WEIGHTS_URL") or BIT_URL
    if not mirror.startswith(("http://", "https://")):
        raise ValueError(f"BITKERN_WEIGHTS_URL: expected http://… or https://…, got {mirror}")
    return f"{mirror.rstrip('/')}/{release.name}.npz"


def find_cached(name: str, cache_dir: CacheDir = None) -> Path | None:
    """The file of ``fetch`` if it is in the cache, without a request; None if not."""
    if repository := _repository(name):
        return _in_hub_cache(repository, cache_dir)
    path = _path(get_release(name), cache_dir)
    return path if path.is_file() else None


def fetch(name: str, cache_dir: CacheDir = None) -> Path:
    """The file of weights, downloaded unless it is in the cache.

    ``name`` is that of a release or ``"hf-hub:ORG/NAME"``. ``cache_dir`` is in place of bitkern's
    cache, or of the hub's. Raises ValueError for a name without weights and where huggingface_hub
    is needed and missing, OSError if the file cannot be had.
    """
    if repository := _repository(name):
        return _in_hub_cache(repository, cache_dir) or _from_hub(repository, cache_dir)
    release = get_release(name)
    path = _path(release, cache_dir)
    download(source(release), path)
    return path


def _path(release: Release, cache_dir: CacheDir) -> Path:
    return cache_folder(cache_dir) / f"{release.name}.npz"


def _repository(name: str) -> str | None:
    return name.removeprefix(HUB) if name.startswith(HUB) else get_release(name).repository


def _in_hub_cache(repository: str, cache_dir: CacheDir) -> Path | None:
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    import huggingface_hub

    for file in HUB_FILES:
        try:
            found = huggingface_hub.try_to_load_from_cache(repository, file, _hub_dir(cache_dir))
        except huggingface_hub.errors.HFValidationError as error:
            raise ValueError(f"{HUB}{repository}: {one_line(error)}") from None
        if isinstance(found, str):
            return Path(found)
    return None


def _from_hub(repository: str, cache_dir: CacheDir) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ValueError(
            f"{HUB}{repository}: huggingface_hub is not installed: pip install 'bitkern[train]'"
        )
    import huggingface_hub

    for file in HUB_FILES:
        try:
            found = huggingface_hub.hf_hub_download(repository, file, cache_dir=_hub_dir(cache_dir))
            return Path(found)
        except huggingface_hub.errors.RemoteEntryNotFoundError:
            continue
        except huggingface_hub.errors.RepositoryNotFoundError:
            reason = "no such repository, or none for you"
        except huggingface_hub.errors.LocalEntryNotFoundError:
            reason = "not in the cache, and the hub cannot be reached"
        # It also raises the errors of its HTTP client and some fifty classes of its own.
        except Exception as error:
            reason = one_line(error)
        address = f"{huggingface_hub.constants.ENDPOINT}/{repository}"
        ways = ways_out(f"pass the path of its {file}, fetched by hand", "HF_ENDPOINT")
        raise OSError(f"{address}: {reason}; {ways}")
    raise OSError(f"{HUB}{repository}: expected {' or '.join(HUB_FILES)}, found neither")


def _hub_dir(cache_dir: CacheDir) -> str | None:
    return None if cache_dir is None else str(cache_folder(cache_dir))
