"""Tar files for the tests."""

import io
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from bitkern.transfer.data.decoders import pillow
from bitkern.transfer.data.loader import eval_batches
from bitkern.transfer.data.resized import ResizedImages
from bitkern.transfer.device_config import DeviceConfig
from tests.transfer.images import picture


def jpeg(label, number=0):
    file = io.BytesIO()
    Image.fromarray(picture(label, number)).save(file, "JPEG")
    return file.getvalue()


def sample(key, label, suffix="jpg"):
    """The members of an image with a number for its label."""
    return [(f"{key}.{suffix}", jpeg(label)), (f"{key}.cls", b"%d" % label)]


TWO = [*sample("a", 0), *sample("b", 1)]


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    """``members`` are (name, bytes), or a ``TarInfo`` and None; returns ``path``."""
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            if data is None:
                archive.addfile(name)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder, split="train", shards=3, per_shard=4):
    """``SPLIT-00000N.tar`` with labels 0, 1, 2, 0, …; returns the pattern that names them."""
    for shard in range(shards):
        numbers = shard * per_shard + np.arange(per_shard)
        members = [member for i in numbers for member in sample(f"{split}{i}", int(i) % 3)]
        write_tar(folder / f"{split}-{shard:06d}.tar", members)
    return folder / f"{split}-{{000000..{shards - 1:06d}}}.tar"


def assert_reads_alike(found, expected):
    """Threads, loaders and copies get the same images."""
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda m: m.read(), list(found.images) * 5)) == expected * 5
    resized, rows = ResizedImages(found.images, 8, pillow), range(len(found.images))
    computes = (DeviceConfig.create("cpu", "fp32", n) for n in (0, 2))
    batches = [list(eval_batches(resized, rows, compute)) for compute in computes]
    for (here, _), (threaded, unreadable) in zip(*batches, strict=True):
        assert not unreadable and (here == threaded).all()
    assert [m.read() for m in pickle.loads(pickle.dumps(found)).images] == expected
