"""inotify(7): constants of <linux/inotify.h> and the system calls."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path
from struct import Struct

from llloop.linux.syscalls import last_error

IN_MODIFY = 0x2
IN_ATTRIB = 0x4
IN_CLOSE_WRITE = 0x8
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800
IN_Q_OVERFLOW = 0x4000
IN_IGNORED = 0x8000
IN_ONLYDIR = 0x1000000
IN_ISDIR = 0x40000000

EVENT = Struct("=iIII")  # struct inotify_event: wd, mask, cookie, len; then the name

_LIMITS = (Path("/proc/sys/fs/inotify/max_user_watches"), Path("/proc/sys/user/max_inotify_watches"))

_libc = ctypes.CDLL(None, use_errno=True)
_inotify_add_watch = _libc.inotify_add_watch
_inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)


def inotify_init() -> int:
    """Return the descriptor of a new instance, which does not block (inotify_init1(2)).

    Raises:
        OSError: EMFILE if the user has too many (fs.inotify.max_user_instances), ENOSYS if the kernel has no inotify.
    """
    fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise last_error()
    return fd


def add_watch(instance: int, fd: int, mask: int) -> int:
    """Watch the file of *fd* (O_PATH suffices); return the number of the watch (inotify_add_watch(2)).

    If it is watched already, this is the number of the watch that exists.

    Raises:
        OSError: ENOSPC beyond fs.inotify.max_user_watches, EACCES without the right to read the file.
    """
    watch: int = _inotify_add_watch(instance, b"/proc/self/fd/%d" % fd, mask)
    if watch < 0:
        raise last_error()
    return watch


def remove_watch(instance: int, watch: int) -> None:
    """End a watch (inotify_rm_watch(2)). If it has ended already, nothing happens."""
    _libc.inotify_rm_watch(instance, watch)


def max_user_watches() -> int:
    """Return how many watches a user may have, 0 if there is no inotify.

    That is fs.inotify.max_user_watches and, in a user namespace, user.max_inotify_watches (namespaces(7)).
    """
    limits = []
    for file in _LIMITS:
        with suppress(OSError):
            limits.append(int(file.read_text()))
    return min(limits, default=0)
