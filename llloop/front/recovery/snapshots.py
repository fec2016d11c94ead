"""What was read of a directory, in memory that has a descriptor, by which the next front finds it.

The memory begins with the directory's own cookie of the last entry in it, from where reading goes on, and the length
of the entries, which follow. Both are stored at once, when the entries are in place.
"""

from __future__ import annotations

import os
from struct import Struct

_NAME = "llloop-listing"
_HEAD = Struct("=QQ")


def make() -> int:
    """Return a descriptor of memory for a snapshot (memfd_create(2)), empty as yet."""
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
    """Whether a descriptor is one that `make` has returned (proc(5), /proc/self/fd)."""
    return os.readlink(f"/proc/self/fd/{fd}").startswith(f"/memfd:{_NAME} ")


def load(fd: int) -> tuple[bytes, int]:
    """Return the entries of a snapshot, and the directory's cookie of the last of them."""
    position, length = _HEAD.unpack(os.pread(fd, _HEAD.size, 0))
    return os.pread(fd, length, _HEAD.size), position
