"""A checksum that is in the file it is of: the SHA-256 of all bytes, its own 64 digits counted as zeros."""

import hashlib
import mmap

# What a writer puts where the digits will be.
NO_CHECKSUM = "0" * 64


def write_checksum(content: bytearray | mmap.mmap, marker: bytes) -> None:
    """Puts the checksum in the place of `NO_CHECKSUM`.

    Args:
        content: the whole file, in memory or mapped; changed in place.
        marker: the bytes in front of the digits.
    """
    place = content.find(marker) + len(marker)
    content[place : place + 64] = _digest(content, place)


def is_intact(content: bytes | mmap.mmap, marker: bytes, end: int) -> bool:
    """Whether a file is, in every byte, as `write_checksum` left it.

    Args:
        content: the whole file, in memory or mapped.
        marker: the bytes in front of the digits.
        end: where to stop looking for the marker.
    """
    found = content.find(marker, 0, end)
    place = found + len(marker)
    return found >= 0 and content[place : place + 64] == _digest(content, place)


def _digest(content: bytes | bytearray | mmap.mmap, place: int) -> bytes:
    with memoryview(content) as view:
        digest = hashlib.sha256(view[:place])
        digest.update(NO_CHECKSUM.encode())
        digest.update(view[place + 64 :])
    return digest.hexdigest().encode()
