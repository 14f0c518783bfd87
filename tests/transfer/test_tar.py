"""Headers of tar files, whole and damaged, in every format."""

import gzip
import io
import os
import tarfile

import pytest

from bitkern.transfer import DataError
from bitkern.transfer.data.shards import image_shards
from tests.transfer.shards import TWO, jpeg, sample, write_tar


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
    with pytest.raises(DataError, match="train.tar: truncated at byte"):
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
        (lambda data: data + data, "has data after the end of the archive"),
        (gzip.compress, "compressed; expected a plain .tar"),
        (lambda data: jpeg(0) * 3, "not a tar file"),
        (lambda data: b"not a tar", "not a tar file"),
        (lambda data: b"", "truncated at byte 0"),
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


def entry(name, data, kind=tarfile.REGTYPE, size=None):
    """A header and what follows it; ``size`` is 12 bytes in place of what the header says."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    if size:
        header[124:136], header[148:156] = size, b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % 512)


def write_entries(path, *first):
    """A tar file of these entries and a sample of class 1."""
    entries = [*first, *(entry(name, data) for name, data in sample("b", 1))]
    path.write_bytes(b"".join(entries) + bytes(1024))
    return path


JPEG = jpeg(0)
BINARY = b"\x80" + len(JPEG).to_bytes(11)


@pytest.mark.parametrize(
    ("before", "size"),
    [([], BINARY), ([], b" %9o  " % len(JPEG)), ([b"12 size=%d\n" % len(JPEG)], b"0" * 12)],
)
def test_sizes(tmp_path, before, size):
    before = [entry("x", data, tarfile.XHDTYPE) for data in before]
    image = entry("a.jpg", JPEG, size=size)
    path = write_entries(tmp_path / "x.tar", *before, image, entry("a.cls", b"0"))
    found = image_shards(path, "train")
    assert [m.read() for m in found.images] == [JPEG, jpeg(1)]


BAD = [b"8 path=a\n", b"11 path=a\n", b"0 path=a\n", b"-9 path=a\n", b"path=a\n", b"9 size=x\n"]


@pytest.mark.parametrize("record", [*BAD, b"11 size=-5\n", b"12 size=1e9\n"])
def test_bad_extended_headers(tmp_path, record):
    path = write_entries(tmp_path / "x.tar", entry("x", record, tarfile.XHDTYPE))
    with pytest.raises(DataError, match="x.tar: (damaged at byte|not a tar file)"):
        image_shards(path, "train")


def test_sparse_files(tmp_path):
    record = b"22 GNU.sparse.major=1\n"
    path = write_entries(tmp_path / "x.tar", entry("x", record, tarfile.XHDTYPE))
    with pytest.raises(DataError, match="x.tar: b.jpg: expected a file"):
        image_shards(path, "train")


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
