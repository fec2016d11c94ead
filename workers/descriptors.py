"""The descriptors a worker holds: pulled from the front when first needed, kept until the release."""

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

# How long to wait for another front, in seconds, and between two looks.
_LONGEST_ABSENCE = 30.0
_ABSENCE_PAUSE = 0.002

# A killed process has lost its descriptors some time before it has ended. Where the kernel does not say so by ESRCH
# (pidfd_getfd(2) since Linux 6.9), it is waited for no longer than this, in seconds: it can be missing for good.
_DYING = 0.5

_REFUSED = frozenset({errno.EPERM, errno.ENOSYS})
_PAUSES = (0.0002,) * 20 + (0.005,) * 20  # seconds between tries
# What says that a process has no such descriptor, or none at all any more.
_GONE = frozenset({errno.ESRCH, errno.ENOENT, errno.EBADF})
_FULL = frozenset({errno.EMFILE, errno.ENFILE})
_REOPEN = os.O_ACCMODE | os.O_SYNC | os.O_DSYNC | os.O_DIRECT


class Descriptors:
    """Descriptors by handle. Dropping one costs nothing but pulling it again.

    Args:
        arena: where the front's process id is.

    Attributes:
        closing: descriptors that are to be closed when the request at hand is answered, since that may take long.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._held: dict[int, int] = {}
        self.closing: list[int] = []
        # By handle: how many threads use its descriptor in a request that is under way, and what these are to close.
        self._in_use: Counter[int] = Counter()
        self._kept: dict[int, list[int]] = {}
        self._front = 0
        self._generation = 0
        self._pidfd = -1

    def __len__(self) -> int:
        return len(self._held)

    def get(self, handle: int, descriptor: int, file: int = 0) -> int:
        """Return this process's own descriptor of an open file.

        Args:
            handle: the number of the open file.
            descriptor: the front's descriptor of it, open as long as a request for it is unanswered.
            file: the identity of the file.

        Raises:
            OSError: it could not be pulled; EBADF if the front has another file open as *descriptor*.
        """
        if self._generation != self._slots.generation:
            self._start_over()
        fd = self._held.get(handle)
        if fd is None:
            fd = self._pull(descriptor)
            if file and identity_of(fstatx(fd)) != file:  # the file is lost: front and keeper have died together
                os.close(fd)
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._held[handle] = fd
        return fd

    def borrow(self, descriptor: int) -> int:
        """Return a descriptor of whatever the front has open as *descriptor*, for the caller to close.

        Raises:
            OSError: it could not be pulled.
        """
        if self._generation != self._slots.generation:
            self._start_over()
        return self._pull(descriptor)

    def _pull(self, descriptor: int) -> int:
        while True:
            try:
                return self._duplicate(descriptor)
            except OSError as error:
                dying = _LONGEST_ABSENCE if error.errno == errno.ESRCH else _DYING
                if error.errno in _GONE and is_readable(self._pidfd, dying):
                    self._start_over()  # the next front has the same descriptors
                elif error.errno in _FULL and self._held:
                    self._drop_half()
                else:
                    raise

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
        found = os.open(f"/proc/{self._front}/fd/{descriptor}", os.O_PATH | os.O_CLOEXEC)
        try:
            if is_readable(self._pidfd):  # the front has ended, and its process id may have been another's
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
            return os.open(f"/proc/self/fd/{found}", flags & _REOPEN | os.O_CLOEXEC)
        finally:
            os.close(found)

    def _start_over(self) -> None:
        """Turn to the front that lives now, or to the next if none does, and let go of all that is held.

        Of what the last one held, some may have been closed without a word of it.
        """
        for handle in list(self._held):
            self.release(handle)
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        deadline = time.monotonic() + _LONGEST_ABSENCE
        while True:
            self._generation = self._slots.generation
            self._front = self._slots.front_pid
            if self._front:
                with suppress(ProcessLookupError):
                    self._pidfd = open_process(self._front, self._slots.front_started)
                    return
            if time.monotonic() > deadline:
                raise OSError(errno.EIO, "there is no front")
            time.sleep(_ABSENCE_PAUSE)

    def _drop_half(self) -> None:
        for handle in list(self._held)[: len(self._held) // 2 + 1]:
            self.release(handle)
        while self.closing:  # the front has the files open still, so this does not take long
            self.close(self.closing.pop())

    def release(self, handle: int) -> None:
        """Have the descriptor of an open file closed, if it is held."""
        fd = self._held.pop(handle, None)
        if fd is None:
            return
        if handle in self._in_use:
            self._kept.setdefault(handle, []).append(fd)
        else:
            self.closing.append(fd)

    @staticmethod
    def close(fd: int) -> None:
        """Close one of those that are `closing`."""
        with suppress(OSError):  # of a server that is gone; who asked by fsync(2) or close(2) has been told
            os.close(fd)

    def hold(self, handle: int) -> None:
        """Keep the descriptor of an open file open for one thread more, also if it is released."""
        self._in_use[handle] += 1

    def let_go(self, handle: int) -> None:
        """Keep it open for one thread less."""
        self._in_use[handle] -= 1
        if not self._in_use[handle]:
            del self._in_use[handle]
            self.closing += self._kept.pop(handle, ())
