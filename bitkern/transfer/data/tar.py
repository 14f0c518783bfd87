"""The members of a tar file, by its headers alone: ustar, GNU and pax."""

import os
import zlib
from collections.abc import Iterator

from bitkern import files
from bitkern.transfer.data.images import DataError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_PIECE = 1 << 20  # bytes read at once; no extended header is longer
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_PLAIN = (b"0", b"\0", b"7", b"5")  # files, and folders
_BEFORE = (b"x", b"L", b"K", b"g")  # what tells more of the next member, or of all


def shown(name: bytes) -> str:
    """A member's name as errors print it."""
    return files.in_a_line(name.decode(errors="replace"))


def members(file: int, path: str) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, length) of each plain file in the tar file that a descriptor has open.

    Raises :class:`DataError`, naming ``path``, for what is no tar file or damaged, for one that
    does not reach to the end that every tar file has, and for members that are links.
    """
    size = os.fstat(file).st_size
    position, extended = 0, dict[bytes, bytes]()
    while (header := os.pread(file, BLOCK, position)) != _ZEROS:
        kind = header[156:157]
        offset = position + BLOCK
        try:
            length = _checked_length(header)
            if kind not in _BEFORE:
                length = int(extended.get(b"size", length))
            if length < 0 or kind in _BEFORE and length > _PIECE:
                raise ValueError
            following = offset + -(-length // BLOCK) * BLOCK
            if following <= size and kind == b"x":
                extended |= _pax(os.pread(file, length, offset))
        except ValueError:
            raise DataError(_wrong(path, header, position)) from None
        if following > size:
            raise _early(path, size)
        position = following
        if kind == b"L":
            extended[b"path"] = os.pread(file, length, offset).rstrip(b"\0")
        if kind in _BEFORE:
            continue
        name = extended.get(b"path") or _name(header)
        if kind not in _PLAIN or extended and b"GNU.sparse" in b" ".join(extended):
            raise DataError(f"{path}: {shown(name)}: expected a file, got a link or the like")
        if kind != b"5" and not name.endswith(b"/"):  # which is how old programs mark a folder
            yield name, offset, length
        if extended:
            extended = {}
    if size - position < 2 * BLOCK:
        raise _early(path, size)
    while piece := os.pread(file, _PIECE, position):
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
    fields = {}
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
