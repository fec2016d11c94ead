"""The paths of open files, as the kernel shows them in /proc (proc_pid_fd(5)), and what lies below a path."""

from __future__ import annotations

import os


def without_mark(path: bytes) -> bytes:
    """Return a path without what the kernel adds to it if the file was removed."""
    return path.removesuffix(b" (deleted)")


def path_of(fd: int, pid: int | str = "self") -> bytes:
    """Return the path of a descriptor, as this process sees it.

    Args:
        fd: the descriptor.
        pid: its process.

    Raises:
        OSError: there is none, or this user cannot see it.
    """
    return without_mark(os.readlink(f"/proc/{pid}/fd/{fd}".encode()))


def is_at_or_below(found: bytes, path: bytes) -> bool:
    """Return whether *found* is *path* or lies below it."""
    path = path.rstrip(b"/")
    return found == path or found.startswith(path + b"/")
