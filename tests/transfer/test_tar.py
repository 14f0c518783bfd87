"""Headers of tar files, whole and damaged, in every format."""

import gzip
import io
import os
import tarfile

import pytest

from bitkern.transfer import DataError
from bitkern.transfer.data.shards import image_shards
from tests.transfer.shards import jpeg, sample, write_tar

TWO = [*sample("a", 0), *sample("b", 1)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("BITKERN_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("cut", range(0, 6 * 1024, 128))
def test_truncated(tmp_path, cut):
    path = write_tar(tmp_path / "train.tar", TWO)
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + 512 + 1024
    assert 5 * 1024 < end <= 6 * 1024
    os.truncate(path, cut)
    if cut >= end:
        assert len(image_shards(path, "train").images) == 2
        return
    with pytest.raises(DataError, match="train.tar: ends early, at byte"):
        image_shards(path, "train")


@pytest.mark.parametrize("place", [0, 100, 124, 148, 156, 257, 345, 511])
@pytest.mark.parametrize("member", [0, 2])
def test_damaged_headers(tmp_path, place, member):
    path = write_tar(tmp_path / "train.tar", TWO)
    with tarfile.open(path) as archive:
        start = archive.getmembers()[member].offset
    data = bytearray(path.read_bytes())
    data[start + place] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"damaged at byte {start}" if start else "not a tar file"):
        image_shards(path, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data + data, "goes on behind the end of the archive"),
        (gzip.compress, "compressed; expected a plain .tar"),
        (lambda data: jpeg(0) * 3, "not a tar file"),
        (lambda data: b"not a tar", "not a tar file"),
        (lambda data: b"", "ends early, at byte 0"),
        (lambda data: bytes(10240), "no images"),
    ],
)
def test_not_a_plain_tar(tmp_path, change, message):
    path = write_tar(tmp_path / "train.tar", TWO)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=f"train.tar: .*{message}"):
        image_shards(path, "train")


LONG = "folder/" * 30 + "x" * 120
KEYS = ["d/a", "Ünïcödé/北京 1", "a" * 90 + "/" + "b" * 90, LONG, "ü" * 120]


@pytest.mark.parametrize(
    ("format", "keys"),
    [
        (tarfile.USTAR_FORMAT, KEYS[:3]),
        (tarfile.GNU_FORMAT, KEYS),
        (tarfile.PAX_FORMAT, KEYS),
    ],
)
def test_names_in_every_format(tmp_path, format, keys):
    members = [member for i, key in enumerate(keys) for member in sample(key, i % 3)]
    path = write_tar(tmp_path / "x.tar", members, format)
    found = image_shards(path, "train")
    with tarfile.open(path) as archive:
        theirs = [info for info in archive if info.name.endswith("jpg")]
    assert [m.offset for m in found.images] == [info.offset_data for info in theirs]
    for i, (image, key) in enumerate(zip(found.images, keys, strict=True)):
        assert image.read() == jpeg(i % 3)
        assert f"{key}.jpg".startswith(image.name.removesuffix("…"))


def test_pax_fields_and_sizes(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(
        path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "ü"}
    ) as archive:
        for name, data in TWO:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # which takes an extended header
            archive.addfile(info, io.BytesIO(data))
    assert [m.read() for m in image_shards(path, "train").images] == [jpeg(0), jpeg(1)]


def test_size_in_binary(tmp_path):
    path = write_tar(tmp_path / "x.tar", TWO)
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + len(jpeg(0)).to_bytes(11)
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    assert image_shards(path, "train").images[0].read() == jpeg(0)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
def test_links(tmp_path, kind):
    link = tarfile.TarInfo("c.jpg")
    link.type, link.linkname = kind, "a.jpg"
    path = write_tar(tmp_path / "x.tar", [*TWO, (link, None)])
    with pytest.raises(DataError, match="x.tar: c.jpg: expected a file, got a link"):
        image_shards(path, "train")


def test_names_that_are_not_text(tmp_path):
    path = write_tar(tmp_path / "x.tar", [*sample("a\udcff\n", 0), *sample("b", 1)])
    assert image_shards(path, "train").images[0].name == "a\ufffd .jpg"
