"""The descriptors of a worker: fetched from the front when first needed, kept until the file is released."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from contextlib import suppress

from llloop.linux.pidfds import open_process
from llloop.linux.syscalls import fstatx, is_readable, pidfd_getfd
from llloop.shared.messages import identity_of
from llloop.shared.slots import Slots

# How long to wait for a new front, in seconds, and between two checks.
FRONT_TIMEOUT = 30.0
_FRONT_PAUSE = 0.002

# A killed process loses its descriptors some time before it ends. Since Linux 6.9, pidfd_getfd(2) then fails with
# ESRCH. Older kernels return EBADF, which can also mean that the descriptor really does not exist. So the worker only
# waits so many seconds for the end of the front.
_DEATH_TIMEOUT = 0.5

_REFUSED_ERRNOS = frozenset({errno.EPERM, errno.ENOSYS})
_PAUSES = (0.0002,) * 20 + (0.005,) * 20  # seconds between tries
# Errors that mean that the front has no such descriptor, or has ended.
_GONE_ERRNOS = frozenset({errno.ESRCH, errno.ENOENT, errno.EBADF})
_FULL_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE})
_REOPEN_FLAGS = os.O_ACCMODE | os.O_SYNC | os.O_DSYNC | os.O_DIRECT


class Descriptors:
    """A cache of descriptors by file handle. A descriptor that was dropped is fetched again.

    Args:
        slots: tell the front's process id.

    Attributes:
        closing: descriptors to close after the current request is answered, because close(2) may take long.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._held: dict[int, int] = {}
        self.closing: list[int] = []
        # By handle: how many threads use its descriptor for a request, and the descriptors to close after that.
        self._in_use: Counter[int] = Counter()
        self._deferred: dict[int, list[int]] = {}
        self._front = 0
        self._generation = 0
        self._pidfd = -1

    def __len__(self) -> int:
        return len(self._held)

    def get(self, handle: int, descriptor: int, file: int = 0) -> int:
        """Return this process's descriptor of an open file.

        Args:
            handle: the file handle.
            descriptor: the front's descriptor of the file. The front keeps it open while a request for it is
                unanswered.
            file: the identity of the file (`llloop.shared.messages.identity_of`), 0 for any.

        Raises:
            OSError: it cannot be fetched; EBADF if the front has another file open as *descriptor*.
        """
        if self._generation != self._slots.generation:
            self._follow_new_front()
        fd = self._held.get(handle)
        if fd is None:
            fd = self._fetch(descriptor)
            if file and identity_of(fstatx(fd)) != file:  # front and descriptor keeper have both died
                os.close(fd)
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._held[handle] = fd
        return fd

    def borrow(self, descriptor: int) -> int:
        """Return a duplicate of the front's *descriptor*, which the caller must close.

        Raises:
            OSError: it cannot be fetched.
        """
        if self._generation != self._slots.generation:
            self._follow_new_front()
        return self._fetch(descriptor)

    def _fetch(self, descriptor: int) -> int:
        while True:
            try:
                return self._duplicate(descriptor)
            except OSError as error:
                dying = FRONT_TIMEOUT if error.errno == errno.ESRCH else _DEATH_TIMEOUT
                if error.errno in _GONE_ERRNOS and is_readable(self._pidfd, dying):
                    self._follow_new_front()  # the next front has the same descriptors, from the descriptor keeper
                elif error.errno in _FULL_ERRNOS and self._held:
                    self._drop_half()
                else:
                    raise

    def _duplicate(self, descriptor: int) -> int:
        """Duplicate a descriptor of the front. If the kernel refuses that (seccomp in containers), reopen its file.

        While the front acts with a caller's credentials, the kernel refuses both; so it tries again for a moment.
        """
        for pause in (*_PAUSES, None):
            try:
                return pidfd_getfd(self._pidfd, descriptor)
            except OSError as error:
                if error.errno not in _REFUSED_ERRNOS:
                    raise
            try:
                return self._reopen(descriptor)
            except PermissionError:
                if pause is None:
                    raise
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _reopen(self, descriptor: int) -> int:
        with open(f"/proc/{self._front}/fdinfo/{descriptor}") as info:
            flags = next(int(line.split()[1], 8) for line in info if line.startswith("flags:"))
        found = os.open(f"/proc/{self._front}/fd/{descriptor}", os.O_PATH | os.O_CLOEXEC)
        try:
            if is_readable(self._pidfd):  # the front has ended; another process may have its id
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
            return os.open(f"/proc/self/fd/{found}", flags & _REOPEN_FLAGS | os.O_CLOEXEC)
        finally:
            os.close(found)

    def _follow_new_front(self) -> None:
        """Release all descriptors, and wait for a front to fetch descriptors from.

        They are released because RELEASE messages of the previous front may have been lost.

        Raises:
            OSError: EIO, if there is no front after `FRONT_TIMEOUT` seconds.
        """
        for handle in list(self._held):
            self.release(handle)
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        deadline = time.monotonic() + FRONT_TIMEOUT
        while True:
            self._generation = self._slots.generation
            self._front = self._slots.front_pid
            if self._front:
                with suppress(ProcessLookupError):
                    self._pidfd = open_process(self._front, self._slots.front_started)
                    return
            if time.monotonic() > deadline:
                raise OSError(errno.EIO, "there is no front")
            time.sleep(_FRONT_PAUSE)

    def _drop_half(self) -> None:
        for handle in list(self._held)[: len(self._held) // 2 + 1]:
            self.release(handle)
        while self.closing:  # the front still has these files open, so close(2) returns quickly
            self.close(self.closing.pop())

    def release(self, handle: int) -> None:
        """Schedule the descriptor of an open file for closing, if there is one."""
        fd = self._held.pop(handle, None)
        if fd is None:
            return
        if handle in self._in_use:
            self._deferred.setdefault(handle, []).append(fd)
        else:
            self.closing.append(fd)

    @staticmethod
    def close(fd: int) -> None:
        """Close a descriptor of `closing`. Ignore errors: fsync(2) and close(2) in FLUSH have reported them."""
        with suppress(OSError):
            os.close(fd)

    def hold(self, handle: int) -> None:
        """Note that another thread uses an open file's descriptor, so that it stays open even if it is released."""
        self._in_use[handle] += 1

    def unhold(self, handle: int) -> None:
        """Note that a thread has finished using it; after the last one, schedule released descriptors for closing."""
        self._in_use[handle] -= 1
        if not self._in_use[handle]:
            del self._in_use[handle]
            self.closing += self._deferred.pop(handle, ())
