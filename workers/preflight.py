"""Looking at the source for the front, which must not wait if it hangs."""

from __future__ import annotations

import logging
import os
from contextlib import suppress

from llloop.linux.syscalls import file_system_type, fstatx, fstatx_raw
from llloop.shared.leadership import Leadership
from llloop.shared.messages import PROBED, SERVER, Request
from llloop.workers.descriptors import Descriptors

_log = logging.getLogger(__name__)

_STEP = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_AT_STATX_FORCE_SYNC = 0x2000  # <linux/fcntl.h>


class Probes:
    """Makes the system calls in which the front would hang, to no other end, and tells the front that they are over.

    Args:
        root: an O_PATH descriptor of the source.
        leases: the front's descriptors.
        told: the write end of the pipe to the front.
        leadership: which thread serves.
    """

    def __init__(self, root: int, descriptors: Descriptors, told: int, leadership: Leadership | None = None) -> None:
        self._root = root
        self._descriptors = descriptors
        self._told = told
        self._leadership = leadership or Leadership()

    def look(self, request: Request) -> None:
        """Look at each place of a PROBE; what comes of it does not matter, the front will see for itself."""
        for descriptor, path in request.extra:
            try:
                base = os.dup(self._root) if descriptor < 0 else self._descriptors.borrow(descriptor)
                self._leadership.call(_look_at, base, path, request.flags)
            except OSError:
                continue
            except Exception:
                _log.exception("the look-up of %s failed", path)
        os.write(self._told, PROBED.pack(request.unique))


def _look_at(base: int, path: bytes, flags: int) -> None:
    """Look at what *path* leads to from the directory *base*, which is closed."""
    try:
        names = path.split(b"/") if path else []
        for position, name in enumerate(names):
            try:
                step = os.open(name, _STEP, dir_fd=base)
            except FileNotFoundError:
                if flags & SERVER and position == len(names) - 1:
                    _ask_server(base)  # the name is yet to be made, in this directory
                raise
            os.close(base)
            base = step
        fstatx(base)
        if flags & SERVER:
            _ask_server(base)
    finally:
        os.close(base)


def _ask_server(fd: int) -> None:
    """Make calls that no cache of attributes answers: the state of the file system (statfs(2)) is in none."""
    with suppress(OSError):
        fstatx_raw(fd, 0xFFF, _AT_STATX_FORCE_SYNC)
    file_system_type(fd)
