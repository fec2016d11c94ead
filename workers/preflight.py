"""PROBE requests: a worker checks whether the source hangs before the front makes a system call."""

from __future__ import annotations

import logging
import os
from contextlib import suppress

from llloop.linux.syscalls import file_system_type, fstatx, fstatx_raw
from llloop.shared.leadership import Leadership
from llloop.shared.messages import ASK_SERVER, PROBED, Request
from llloop.workers.descriptors import Descriptors

_log = logging.getLogger(__name__)

_PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_AT_STATX_FORCE_SYNC = 0x2000  # <linux/fcntl.h>


class Probes:
    """Makes system calls that hang if the source hangs, and notifies the front when they return.

    Args:
        root: an O_PATH descriptor of the source.
        descriptors: the descriptors fetched from the front.
        results_pipe: the write end of the pipe to the front.
        leadership: decides which thread serves.
    """

    def __init__(
        self, root: int, descriptors: Descriptors, results_pipe: int, leadership: Leadership | None = None
    ) -> None:
        self._root = root
        self._descriptors = descriptors
        self._results_pipe = results_pipe
        self._leadership = leadership or Leadership()

    def probe(self, request: Request) -> None:
        """Access each place of a PROBE. Ignore errors, because the front repeats the system calls."""
        for descriptor, path in request.extra:
            try:
                base = os.dup(self._root) if descriptor < 0 else self._descriptors.borrow(descriptor)
                self._leadership.call(_access, base, path, request.flags)
            except OSError:
                continue
            except Exception:
                _log.exception("the look-up of %s failed", path)
        os.write(self._results_pipe, PROBED.pack(request.unique))


def _access(base: int, path: bytes, flags: int) -> None:
    """Access *path*, component by component, starting in the directory *base*; close *base*."""
    try:
        names = path.split(b"/") if path else []
        for position, name in enumerate(names):
            try:
                step = os.open(name, _PATH_FLAGS, dir_fd=base)
            except FileNotFoundError:
                if flags & ASK_SERVER and position == len(names) - 1:
                    _ask_server(base)  # the request is about to create the name in this directory
                raise
            os.close(base)
            base = step
        fstatx(base)
        if flags & ASK_SERVER:
            _ask_server(base)
    finally:
        os.close(base)


def _ask_server(fd: int) -> None:
    """Make calls that the server of a network file system must answer: no client caches statfs(2)."""
    with suppress(OSError):
        fstatx_raw(fd, 0xFFF, _AT_STATX_FORCE_SYNC)
    file_system_type(fd)
