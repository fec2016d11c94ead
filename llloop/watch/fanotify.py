"""Hearing with fanotify, as root: one mark for each file system."""

from __future__ import annotations

import errno
import os

from llloop.linux import fanotify
from llloop.shared.watch_state import Method, WatchState
from llloop.watch.file_systems import CannotHear, FileSystems
from llloop.watch.parsing import SLACK, Batch, parse

_BUFFER = 256 * 1024
_GROUP = fanotify.FAN_CLOEXEC | fanotify.FAN_NONBLOCK | fanotify.FAN_REPORT_DFID_NAME_TARGET


class FanotifyQueue:
    """The events of the file systems; see `llloop.watch.process.Queue`.

    Args:
        state: what front and watcher tell each other.
        source: the absolute path of the source.
        own: st_dev of the mount itself, as (major, minor).

    Raises:
        CannotHear: this is not possible.
    """

    method = Method.FANOTIFY

    def __init__(self, state: WatchState, source: str, own: tuple[int, int]) -> None:
        try:
            self.fd = fanotify.fanotify_init(_GROUP)
        except OSError as error:
            raise CannotHear(_why_not(error)) from None
        try:
            self.file_systems = FileSystems(self.fd, source, own)
            self.file_systems.add_source()
        except CannotHear:
            os.close(self.fd)
            raise
        self._known = state.known
        self._buffer = bytearray(_BUFFER + SLACK)
        self._view = memoryview(self._buffer)[:_BUFFER]
        self._length = 0

    def read(self) -> int:
        """Read events; return how many bytes, 0 if there are none."""
        try:
            self._length = os.readv(self.fd, [self._view])
        except BlockingIOError:
            self._length = 0
        return self._length

    def batch(self) -> Batch:
        """Return the events that were read."""
        return parse(self._buffer, self._length, self.file_systems.heard, self._known)

    def forget(self) -> None:
        """Do nothing: events say which inode they are about."""


def why_not(source: str) -> str | None:
    """Return why fanotify cannot hear the file system of *source*; None if it can."""
    try:
        queue = FanotifyQueue(WatchState(), source, (0, 0))
    except CannotHear as reason:
        return str(reason)
    os.close(queue.fd)
    return None


def _why_not(error: OSError) -> str:
    if error.errno == errno.EPERM:
        return "this needs root (CAP_SYS_ADMIN)"
    if error.errno in (errno.EINVAL, errno.ENOSYS):
        return "this needs Linux 5.17 with fanotify"
    return error.strerror or str(error)
