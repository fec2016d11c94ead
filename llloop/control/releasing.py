"""`llloop control MNT release PATH`: let the file system at PATH be unmounted."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from llloop.control import client
from llloop.errors import BusyError, LlloopError, UsageError
from llloop.linux import mounts
from llloop.linux.descriptor_paths import is_at_or_below, path_of, without_mark
from llloop.shared.release import ANSWER, PATH_SIZE, RELEASE

# How long to wait until the server's processes have closed their descriptors, between two checks, and for the close(2)
# of a program to reach the server, in seconds.
_TIMEOUT = 10.0
_PAUSE = 0.01
_CLOSE_TIME = 1.0
_MOST_SHOWN = 10


def release(mountpoint: str, path: str) -> None:
    """Make the server close everything below *path* that no program uses; return when it has.

    Args:
        mountpoint: the mount point.
        path: a path below it, or below the source.

    Raises:
        BusyError: programs have files below *path* open through the mount. Everything else is closed.
        UsageError: *path* is not below one of them.
        LlloopError: the server does not answer, or does not support this.
    """
    status = client.ask_mount(mountpoint, "status")
    mount, source = mounts.resolve_mountpoint(mountpoint), os.path.realpath(status["source"])
    place = _place(path, mount, source)
    processes = [process["pid"] for process in status["processes"] if process["pid"]]
    deadline = time.monotonic() + _TIMEOUT
    while True:
        used, closing = _ask(mount, place)
        if used:
            users = list(_users(os.path.join(mount, place)))
            # The server hears of a close(2) a moment later.
            if users or time.monotonic() > deadline - _TIMEOUT + _CLOSE_TIME:
                raise BusyError(f"{path}: {_describe(used, users)}")
        elif not closing and not any(_has_open(pid, os.path.join(source, place)) for pid in processes):
            return
        if time.monotonic() > deadline:
            raise LlloopError(f"{path}: the server of {mountpoint} still uses it after {_TIMEOUT:g} seconds")
        time.sleep(_PAUSE)


def _place(path: str, mount: str, source: str) -> str:
    """Return *path* relative to the mount point or the source. The file system at *path* itself may hang."""
    whole = mounts.resolve_mountpoint(path)
    for above in (mount, source):
        if os.path.commonpath([whole, above]) == above:
            place = os.path.relpath(whole, above)
            if place == ".":
                raise UsageError(f"{path}: llloop serves this directory; only llloop umount releases it")
            return place
    raise UsageError(f"{path}: this path is neither below {mount} nor below its source {source}")


def _ask(mount: str, place: str) -> tuple[int, int]:
    """Return how many files programs have open below a place, and how many descriptors the front has yet to close.

    Raises:
        LlloopError: the mount cannot be accessed, or it does not support this.
    """
    name = os.fsencode(place)
    if len(name) > PATH_SIZE:
        raise UsageError(f"{place}: this path is too long")
    try:
        fd = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise LlloopError(f"{mount}: {error.strerror}") from None
    try:
        data = bytearray(name.ljust(PATH_SIZE, b"\0"))
        fcntl.ioctl(fd, RELEASE, data)
    except PermissionError:
        raise LlloopError(f"{mount}: only root and the user who runs the server may do this") from None
    except OSError as error:
        raise LlloopError(f"{mount}: {error.strerror}; release needs --loop own and a server of this version") from None
    finally:
        os.close(fd)
    used, closing = ANSWER.unpack_from(data)
    return used, closing


def _describe(used: int, users: list[tuple[int, str]]) -> str:
    """Say how many files are open, and in which processes."""
    if not users:
        return f"{used} files are open; this user cannot see by which programs"
    shown = ", ".join(f"{name} (process {pid})" for pid, name in users[:_MOST_SHOWN])
    more = f" and {len(users) - _MOST_SHOWN} others" if len(users) > _MOST_SHOWN else ""
    return f"in use by {shown}{more}"


def _users(path: str) -> Iterator[tuple[int, str]]:
    """Yield id and name of each process that has *path* or something below it open or mapped."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and int(entry) != os.getpid() and (_has_open(int(entry), path) or _maps(entry, path)):
            with suppress(OSError):
                yield int(entry), Path(f"/proc/{entry}/comm").read_text(errors="replace").rstrip("\n")


def _has_open(pid: int, path: str) -> bool:
    """Return whether a process has a descriptor below *path*; False if this user cannot see that."""
    with suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                if is_at_or_below(path_of(int(fd), pid), os.fsencode(path)):
                    return True
    return False


def _maps(pid: str, path: str) -> bool:
    """Return whether a process has mapped a file below *path*."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_bytes().splitlines():
            *_, name = line.split(None, 5)
            if is_at_or_below(without_mark(name), os.fsencode(path)):
                return True
    return False
