"""Shared memory of which only the used pages take space."""

from __future__ import annotations

import mmap
import os


def sparse_memory(name: str, size: int) -> mmap.mmap:
    """Return *size* zero bytes that a process shares with the processes that it forks (memfd_create(2)).

    With vm.overcommit_memory=2, the kernel counts all of an anonymous mapping, but only the used pages of a memfd.

    Args:
        name: what /proc/PID/maps shows.
        size: in bytes.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)
