"""The members of a tar file, by its headers alone: ustar, GNU and pax."""

import os
import re
import zlib
from collections.abc import Iterator

from bitkern import files
from bitkern.transfer.data.images import DataError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_PAGE = 4096
_LONGEST = 1 << 20  # bytes; no extended header is longer
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_PLAIN = (b"0", b"\0", b"7", b"5")  # files, and folders
_TELLING = re.compile(rb"path=|size=|GNU.sparse")  # what is of use here
_BEFORE = (b"x", b"L", b"K", b"g")  # what tells more of the next member, or of all


def shown(name: bytes) -> str:
    """A member's name as errors print it."""
    return files.in_a_line(name.decode(errors="replace"))


class Reader:
    """A file that is open, of which the last page is kept: small members lie close together."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self.page = b""
        self.start = 0

    def read(self, position: int, length: int) -> bytes:
        """Bytes from a position on, fewer at the end of the file."""
        begin = position - self.start
        if begin < 0 or begin + length > len(self.page):
            page = os.pread(self.descriptor, max(length, _PAGE), position)
            self.page, self.start, begin = page, position, 0
        return self.page[begin : begin + length]


def members(file: Reader, path: str) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, length) of each plain file in a tar file.

    Raises ``DataError``, naming ``path``, for what is no tar file or damaged, for one that
    does not reach to the end that every tar file has, and for members that are links.
    """
    position, extended = 0, dict[bytes, bytes]()
    while (header := file.read(position, BLOCK)) != _ZEROS:
        kind = header[156:157]
        offset = position + BLOCK
        try:
            length = _checked_length(header)
            if extended and kind not in _BEFORE:
                length = int(extended.get(b"size", length))
            if length < 0 or kind in _BEFORE and length > _LONGEST:
                raise ValueError
            following = (offset + length + BLOCK - 1) // BLOCK * BLOCK
            if kind == b"x" and following <= file.size:
                extended |= _pax(file.read(offset, length))
        except ValueError:
            raise DataError(_wrong(path, header, position)) from None
        if following > file.size:
            raise _early(path, file.size)
        position = following
        if kind == b"L":
            extended[b"path"] = file.read(offset, length).rstrip(b"\0")
        if kind in _BEFORE:
            continue
        name = extended.get(b"path") or _name(header)
        if kind not in _PLAIN or extended and b"GNU.sparse" in b" ".join(extended):
            raise DataError(f"{path}: {shown(name)}: expected a file, got a link or the like")
        if kind != b"5" and not name.endswith(b"/"):  # which is how old programs mark a folder
            yield name, offset, length
        if extended:
            extended = {}
    if file.size - position < 2 * BLOCK:
        raise _early(path, file.size)
    while piece := file.read(position, _LONGEST):
        if piece.strip(b"\0"):
            raise DataError(f"{path}: goes on behind the end of the archive at byte {position}")
        position += len(piece)


def _checked_length(header: bytes) -> int:
    """What a header says of the length, if the sum of its bytes is what it says; ValueError."""
    # Its own 8 bytes count as spaces. The lower half of Adler's sum is 1 plus the sum of the bytes,
    # modulo 65521, and much faster than Python's.
    found = zlib.adler32(header[:148] + b"        " + header[156:]) & 0xFFFF
    if len(header) < BLOCK or found != (1 + _number(header[148:156])) % 65521:
        raise ValueError
    return _number(header[124:136])


def _number(field: bytes) -> int:
    """Octal digits; or binary, as GNU writes what has too many of them."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:])
    return int(field.strip(b" \0") or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _pax(data: bytes) -> dict[bytes, bytes]:
    """The fields of an extended header, of which each is "LENGTH NAME=VALUE" and a line's end."""
    fields: dict[bytes, bytes] = {}
    if not _TELLING.search(data):  # but the time, as of all that webdataset writes
        return fields
    while data:
        length = int(data[: data.index(b" ")])
        if length < 1 or data[length - 1 : length] != b"\n":
            raise ValueError
        name, _, value = data[: length - 1].partition(b" ")[2].partition(b"=")
        fields[name] = value
        data = data[length:]
    return fields


def _early(path: str, size: int) -> DataError:
    return DataError(f"{path}: ends early, at byte {size}: copy it anew")


def _wrong(path: str, header: bytes, position: int) -> str:
    """What to say of a header that is none."""
    if header.startswith(_COMPRESSED) and not position:
        return f"{path}: compressed; expected a plain .tar, whose images can be read one by one"
    if len(header) < BLOCK:
        doubt = "" if position else ", or is not a tar file"
        return f"{path}: ends early, at byte {position + len(header)}{doubt}: copy it anew"
    return f"{path}: {f'damaged at byte {position}' if position else 'not a tar file'}"
