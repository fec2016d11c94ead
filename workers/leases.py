"""The descriptors a worker holds: pulled from the front when first needed, kept until the release."""

from __future__ import annotations

import errno
import os
import time

from llloop.arena import Arena
from llloop.protocol import HANDLES_PER_FRONT
from llloop.syscalls import pidfd_getfd

_REFUSED = frozenset({errno.EPERM, errno.ENOSYS})
_PAUSES = (0.0002,) * 20 + (0.005,) * 20  # seconds between tries
_FULL = frozenset({errno.EMFILE, errno.ENFILE})
_REOPEN = os.O_ACCMODE | os.O_SYNC | os.O_DSYNC | os.O_DIRECT


class Leases:
    """Descriptors by handle. Dropping one costs nothing but pulling it again.

    Args:
        arena: where the front's process id is.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._held: dict[int, int] = {}
        self._front = 0
        self._generation = 0
        self._pidfd = -1

    def __len__(self) -> int:
        return len(self._held)

    def get(self, handle: int, descriptor: int) -> int:
        """Return this process's own descriptor of an open file.

        Args:
            handle: the number of the open file.
            descriptor: the front's descriptor of it, open as long as a request for it is unanswered.

        Raises:
            OSError: it could not be pulled.
        """
        if self._generation != self._arena.generation:
            self._start_over()
        if handle // HANDLES_PER_FRONT != self._generation:
            # A request of a front that is gone: by now its descriptor's number may be another file's.
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        fd = self._held.get(handle)
        if fd is None:
            fd = self._held[handle] = self._pull(descriptor)
        return fd

    def _pull(self, descriptor: int) -> int:
        try:
            return self._duplicate(descriptor)
        except OSError as error:
            if error.errno not in _FULL or not self._held:
                raise
        self._drop_half()
        return self._duplicate(descriptor)

    def _duplicate(self, descriptor: int) -> int:
        """Fetch a descriptor from the front; where tracing is forbidden (seccomp in containers), open its file again.

        For the moments in which the front acts as somebody else, both are refused; they pass.
        """
        for pause in (*_PAUSES, None):
            try:
                return pidfd_getfd(self._pidfd, descriptor)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
            try:
                return self._open_again(descriptor)
            except PermissionError:
                if pause is None:
                    raise
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _open_again(self, descriptor: int) -> int:
        with open(f"/proc/{self._front}/fdinfo/{descriptor}") as info:
            flags = next(int(line.split()[1], 8) for line in info if line.startswith("flags:"))
        return os.open(f"/proc/{self._front}/fd/{descriptor}", flags & _REOPEN | os.O_CLOEXEC)

    def _start_over(self) -> None:
        """Let go of everything that belonged to a front that is gone."""
        for handle in list(self._held):
            self.release(handle)
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)
        self._front = self._arena.front_pid
        if self._front == 0:
            raise OSError(errno.EIO, "there is no front")
        self._pidfd = os.pidfd_open(self._front)
        self._generation = self._arena.generation

    def _drop_half(self) -> None:
        for handle in list(self._held)[: len(self._held) // 2 + 1]:
            self.release(handle)

    def release(self, handle: int) -> None:
        """Close the descriptor of an open file, if it is held."""
        fd = self._held.pop(handle, None)
        if fd is not None:
            os.close(fd)
