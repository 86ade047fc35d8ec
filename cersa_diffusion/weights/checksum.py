"""A checksum inside the file that it protects: the SHA-256 of all bytes, with its own 64 digits replaced by zeros."""

import hashlib
import mmap

# The placeholder for the digits, before the checksum is written.
NO_CHECKSUM = "0" * 64


def write_checksum(content: bytearray | mmap.mmap, marker: bytes) -> None:
    """Replaces `NO_CHECKSUM` behind the bytes `marker` by the checksum, in place; `content` is the whole file."""
    start = content.find(marker) + len(marker)
    content[start : start + 64] = _digest(content, start)


def is_intact(content: bytes | mmap.mmap, marker: bytes, end: int) -> bool:
    """Whether every byte of a file is as `write_checksum` left it; the marker is searched only before the position `end`."""
    marker_start = content.find(marker, 0, end)
    start = marker_start + len(marker)
    return marker_start >= 0 and content[start : start + 64] == _digest(content, start)


def _digest(content: bytes | bytearray | mmap.mmap, start: int) -> bytes:
    with memoryview(content) as view:
        digest = hashlib.sha256(view[:start])
        digest.update(NO_CHECKSUM.encode())
        digest.update(view[start + 64 :])
    return digest.hexdigest().encode()
