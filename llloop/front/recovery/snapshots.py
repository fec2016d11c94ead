"""Snapshots: memfds with the entries that were read of a directory, for the next front.

A snapshot begins with the directory's cookie of its last entry, where reading continues, and the length of the entries,
which follow. One write sets both after the entries are written.
"""

from __future__ import annotations

import os
from struct import Struct

_NAME = "llloop-listing"
_HEAD = Struct("=QQ")


def make() -> int:
    """Create an empty snapshot and return its descriptor (memfd_create(2))."""
    fd = os.memfd_create(_NAME, os.MFD_CLOEXEC)
    os.pwrite(fd, _HEAD.pack(0, 0), 0)
    return fd


def append(fd: int, data: bytes, position: int) -> None:
    """Add entries to a snapshot.

    Args:
        fd: its descriptor.
        data: the entries.
        position: the directory's cookie of the last of them.
    """
    _, length = _HEAD.unpack(os.pread(fd, _HEAD.size, 0))
    start = _HEAD.size + length
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, start)
        start += written
        rest = rest[written:]
    os.pwrite(fd, _HEAD.pack(position, length + len(data)), 0)


def is_snapshot(fd: int) -> bool:
    """Return whether a descriptor is a snapshot (proc(5), /proc/self/fd)."""
    return os.readlink(f"/proc/self/fd/{fd}").startswith(f"/memfd:{_NAME} ")


def load(fd: int) -> tuple[bytes, int]:
    """Return the entries of a snapshot, and the directory's cookie of the last of them."""
    position, length = _HEAD.unpack(os.pread(fd, _HEAD.size, 0))
    return os.pread(fd, length, _HEAD.size), position
