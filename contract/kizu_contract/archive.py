"""ZIP files as bundles use them: a few known names, stored uncompressed, bounded before anything is parsed.

Stored and not deflated: weights hardly shrink, the same parts give the same bytes whatever zlib is installed, and a
part can never unpack to more than the file holds. There is one file for given parts and no other (the headers are
written here, APPNOTE.TXT 4.3): whoever changes any byte of a bundle makes it unreadable.
"""

import io
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple
from zlib import crc32

from kizu_contract.errors import BundleError

_ENTRY_OVERHEAD = 1024
"""Bytes allowed for the two headers of a member besides its data."""
_LOCAL = struct.Struct("<4s5H3L2H")
"""Local header: signature, version, flags, method, time, date, CRC, stored size, size, name length, extra length."""
_ENTRY = struct.Struct("<4s6H3L5H2L")
"""Directory entry: signature, two versions, flags, method, time, date, CRC, two sizes, lengths of name, extra and
comment, disk, two attributes, offset."""
_END = struct.Struct("<4s4H2LH")
"""End of central directory: signature, two disk numbers, two entry counts, size, offset, comment length."""
_ZIP64_LOCATOR_BYTES = 20
_VERSION, _MADE_BY_UNIX, _FIRST_OF_1980, _MODE_644 = 20, 3 << 8 | 20, 1 << 5 | 1, 0o644 << 16


class _Frame(NamedTuple):
    """What surrounds the parts: a local header before each, and the directory with its end after all."""

    headers: list[bytes]
    directory: bytes


def pack_archive(parts: Mapping[str, bytes]) -> bytes:
    """Pack `parts` in their order; the same parts give the same bytes."""
    frame = _frame(parts)
    pieces = (piece for pair in zip(frame.headers, parts.values(), strict=True) for piece in pair)
    return b"".join((*pieces, frame.directory))


def most_bytes(limits: Mapping[str, int]) -> int:
    """Bytes of the largest archive whose members keep to `limits`."""
    return sum(limits.values()) + len(limits) * _ENTRY_OVERHEAD + _END.size


def unpack_archive(file: BinaryIO, limits: Mapping[str, int]) -> dict[str, bytes]:
    """Read an archive whose members are among `limits` (name → most bytes). Raises BundleError for anything else."""
    try:
        _bound_directory(file, len(limits))
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _check_members(members, limits)
            parts = {member.orig_filename: _read_member(archive, member) for member in members}
            _check_frame(file, parts)
            return parts
    except (zipfile.BadZipFile, struct.error, OSError, ValueError, EOFError, NotImplementedError) as exc:
        raise BundleError(f"is not a whole ZIP file: {exc}") from exc


def _bound_directory(file: BinaryIO, most_members: int) -> None:
    """Refuse what zipfile would parse without bound: many entries, comments, ZIP64 records, several disks."""
    size = file.seek(0, io.SEEK_END)
    if size < _END.size:
        raise BundleError(f"is not a whole ZIP file: it has {size} bytes")
    tail = min(size, _END.size + _ZIP64_LOCATOR_BYTES)
    file.seek(size - tail)
    end = file.read(tail)
    signature, disk, first_disk, here, members, length, offset, comment = _END.unpack(end[-_END.size :])
    if signature != b"PK\x05\x06" or comment:
        raise BundleError("is not a whole ZIP file: it does not end with a directory")
    if end.startswith(b"PK\x06\x07"):
        raise BundleError("is a ZIP64 file; a bundle never is")
    if not disk == first_disk == 0 or here != members or offset + length + _END.size != size:
        raise BundleError("is not a whole ZIP file: its directory does not fit")
    if members > most_members or length > most_members * _ENTRY_OVERHEAD:
        raise BundleError(f"holds {members} names in {length} bytes; at most {most_members} belong there")


def _check_members(members: list[zipfile.ZipInfo], limits: Mapping[str, int]) -> None:
    # `filename` may have been cut at a NUL or replaced by an extra field: what is on disk counts.
    names = [member.orig_filename for member in members]
    foreign = sorted(set(names) - limits.keys())
    if foreign or len(names) != len(set(names)):
        raise BundleError(f"holds names that do not belong there, or one twice: {(foreign or names)[:5]!r:.200}")
    for member in members:
        name = member.orig_filename
        if member.flag_bits & 1 or member.compress_type != zipfile.ZIP_STORED:
            raise BundleError(f"{name} is compressed or encrypted; a bundle stores its parts as they are")
        if member.file_size > limits[name]:
            raise BundleError(f"{name} has {member.file_size} bytes; at most {limits[name]} are allowed")
        if member.compress_size != member.file_size:
            raise BundleError(
                f"{name} has {member.file_size} bytes by one header and {member.compress_size} by another"
            )


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    with archive.open(member) as stream:
        data = stream.read()
    if len(data) != member.file_size:
        raise BundleError(f"{member.orig_filename} holds {len(data)} bytes, its header says {member.file_size}")
    return data


def _check_frame(file: BinaryIO, parts: Mapping[str, bytes]) -> None:
    """Refuse headers that `pack_archive` would not write: no checksum covers them."""
    frame = _frame(parts)
    offset = 0
    for header, data in zip(frame.headers, parts.values(), strict=True):
        _expect(file, offset, header)
        offset += len(header) + len(data)
    _expect(file, offset, frame.directory)
    if file.seek(0, io.SEEK_END) != offset + len(frame.directory):
        raise BundleError("is not as kizu-export writes it: it has bytes that belong to no part")


def _expect(file: BinaryIO, offset: int, wanted: bytes) -> None:
    file.seek(offset)
    if file.read(len(wanted)) != wanted:
        raise BundleError(f"is not as kizu-export writes it: the headers at byte {offset} differ")


def _frame(parts: Mapping[str, bytes]) -> _Frame:
    headers, entries, offset = [], [], 0
    for name, data in _encoded(parts):
        common = (0, 0, 0, _FIRST_OF_1980, crc32(data), len(data), len(data), len(name))
        headers.append(_LOCAL.pack(b"PK\x03\x04", _VERSION, *common, 0) + name)
        rest = (0, 0, 0, 0, _MODE_644, offset)
        entries.append(_ENTRY.pack(b"PK\x01\x02", _MADE_BY_UNIX, _VERSION, *common, *rest) + name)
        offset += len(headers[-1]) + len(data)
    directory = b"".join(entries)
    end = _END.pack(b"PK\x05\x06", 0, 0, len(parts), len(parts), len(directory), offset, 0)
    return _Frame(headers, directory + end)


def _encoded(parts: Mapping[str, bytes]) -> Iterator[tuple[bytes, bytes]]:
    return ((name.encode("ascii"), data) for name, data in parts.items())
