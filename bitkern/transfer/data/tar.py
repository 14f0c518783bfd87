"""The members of a tar file, by its headers alone: ustar, GNU and pax."""

import os
import re
import zlib
from collections.abc import Iterator

from bitkern.text import one_line
from bitkern.transfer.data.images import DataError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_PAGE = 4096
_LONGEST = 1 << 20  # bytes of an extended header, at most
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_PLAIN = (b"0", b"\0", b"7", b"5")  # files, and folders
_USED_FIELDS = re.compile(rb"path=|size=|GNU.sparse")
_EXTENDED = (b"x", b"L", b"K", b"g")  # headers that extend that of the next member, or of all


def printable(name: bytes) -> str:
    """Decode a member's name for an error."""
    return one_line(name.decode(errors="replace"))


class Reader:
    """An open file that keeps the last page read, because small members lie close together."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self.page = b""
        self.start = 0

    def read(self, position: int, length: int) -> bytes:
        """Read bytes at a position, fewer at the end of the file."""
        begin = position - self.start
        if begin < 0 or begin + length > len(self.page):
            page = os.pread(self.descriptor, max(length, _PAGE), position)
            self.page, self.start, begin = page, position, 0
        return self.page[begin : begin + length]


def members(file: Reader, path: str) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, offset, length) of each plain file in a tar file.

    Raises ``DataError``, naming ``path``, for a file that is damaged, truncated or no tar file, and
    for members that are links.
    """
    position, extended = 0, dict[bytes, bytes]()
    while (header := file.read(position, BLOCK)) != _ZEROS:
        kind = header[156:157]
        offset = position + BLOCK
        try:
            length = _checked_length(header)
            if extended and kind not in _EXTENDED:
                length = int(extended.get(b"size", length))
            if length < 0 or kind in _EXTENDED and length > _LONGEST:
                raise ValueError
            following = (offset + length + BLOCK - 1) // BLOCK * BLOCK
            if kind == b"x" and following <= file.size:
                extended |= _pax(file.read(offset, length))
        except ValueError:
            raise DataError(_explain(path, header, position)) from None
        if following > file.size:
            raise _truncated(path, file.size)
        position = following
        if kind == b"L":
            extended[b"path"] = file.read(offset, length).rstrip(b"\0")
        if kind in _EXTENDED:
            continue
        name = extended.get(b"path") or _name(header)
        if kind not in _PLAIN or extended and b"GNU.sparse" in b" ".join(extended):
            raise DataError(f"{path}: {printable(name)}: expected a file, got a link or the like")
        if kind != b"5" and not name.endswith(b"/"):  # the mark of a folder in old archives
            yield name, offset, length
        if extended:
            extended = {}
    if file.size - position < 2 * BLOCK:
        raise _truncated(path, file.size)
    while piece := file.read(position, _LONGEST):
        if piece.strip(b"\0"):
            raise DataError(f"{path}: has data after the end of the archive at byte {position}")
        position += len(piece)


def _checked_length(header: bytes) -> int:
    """Return the length in a header. Raises ValueError unless its checksum is right."""
    # The checksum's own 8 bytes count as spaces. The lower half of Adler-32 is 1 plus the sum of
    # the bytes, modulo 65521, and much faster than a sum in Python.
    found = zlib.adler32(header[:148] + b"        " + header[156:]) & 0xFFFF
    if len(header) < BLOCK or found != (1 + _number(header[148:156])) % 65521:
        raise ValueError
    return _number(header[124:136])


def _number(field: bytes) -> int:
    """Parse octal digits, or GNU's binary form of large numbers."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:])
    return int(field.strip(b" \0") or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Parse the fields of an extended header, each "LENGTH NAME=VALUE" and a newline."""
    fields: dict[bytes, bytes] = {}
    if not _USED_FIELDS.search(data):  # nothing but times, as in the files of webdataset
        return fields
    while data:
        length = int(data[: data.index(b" ")])
        if length < 1 or data[length - 1 : length] != b"\n":
            raise ValueError
        name, _, value = data[: length - 1].partition(b" ")[2].partition(b"=")
        fields[name] = value
        data = data[length:]
    return fields


def _truncated(path: str, size: int) -> DataError:
    return DataError(f"{path}: truncated at byte {size}: copy it again")


def _explain(path: str, header: bytes, position: int) -> str:
    if header.startswith(_COMPRESSED) and not position:
        return f"{path}: compressed; expected a plain .tar, whose images can be read one by one"
    if len(header) < BLOCK:
        doubt = "" if position else ", or is not a tar file"
        return f"{path}: truncated at byte {position + len(header)}{doubt}: copy it again"
    return f"{path}: {f'damaged at byte {position}' if position else 'not a tar file'}"
