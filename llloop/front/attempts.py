"""Requests that must not be done twice: how one that a dead front had in hand is recognised when it comes again.

When a front dies, the kernel sends the next one every request that has no answer yet, marked
(FUSE_NOTIFY_RESEND, Linux 6.9). Most can simply be done again. Those that cannot (a second mkdir
would say EEXIST, a second rename ENOENT) are noted in the ledger before they are begun; appends are
the workers' to note, who outlive the front. A front does one request at a time, so there is one
note, and at most one request of which it must be found out how far it had come.
"""

from __future__ import annotations

import fcntl
import os
import time
from struct import Struct
from typing import NamedTuple

from ..ledger import ATTEMPT, Ledger
from ..syscalls import Attributes, fstatx
from ..wire import FUSE_UNIQUE_RESEND as RESENT

_CLOCK_REALTIME_COARSE = 5  # <linux/time.h>; the clock that file systems take their times from

_UNIQUE, _DONE, _STARTED, _NUMBER, _NODEID, _TARGET, _PIN, _VICTIM, _HANDLE, _BACKING = range(ATTEMPT, ATTEMPT + 10)


# All of it but the number of the request, which comes last, and the registration.
_NOTE = Struct("=8Q")
_NOTE_START = 8 * _DONE


class Attempt(NamedTuple):
    """What a dead front noted of the request in its hands.

    Attributes:
        done: whether it was done; if not, it may have been all the same.
        started: when it was begun, in nanoseconds of the clock that file systems take their times from.
        number: the source's inode number of the file that it is about, or whether an extended attribute was there.
        nodeid: the file's number in the inode table, 0 if it is not in there.
        target: the same of the file that a rename replaces.
        pin: an O_PATH descriptor of the file that loses a name, or -1.
        victim: the source's inode number of that file.
        handle: the number of the handle that was made, 0 for none.
        backing: the kernel registration that was made for it, 0 for none.
    """

    done: bool
    started: int
    number: int
    nodeid: int
    target: int
    pin: int
    victim: int
    handle: int
    backing: int

    def made(self, attributes: Attributes) -> bool:
        """Whether a file that is in the way can be the one that the attempt itself has made."""
        return self.done or attributes.ctime * 1_000_000_000 + attributes.ctime_nsec >= self.started

    def has_pin(self) -> bool:
        """Whether the pin is still a descriptor of the file that it was made for."""
        try:
            return self.pin >= 0 and fstatx(self.pin).ino == self.victim
        except OSError:
            return False


class Attempts:
    """The note.

    Attributes:
        unique: the kernel's number of the request that is being served; set by whoever decodes one that is noted.

    Args:
        ledger: where it stands.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._cells = ledger.cells
        self._memory = ledger.memory
        self._pack = _NOTE.pack_into
        self.unique = 0
        # Descriptors that a dead front had opened and not noted.
        self._orphans: list[int] = []
        self._left: Attempt | None = None
        self._left_unique = self._cells[_UNIQUE] & ~RESENT
        if self._left_unique:
            cells = self._cells
            self._left = Attempt(
                bool(cells[_DONE]),
                cells[_STARTED],
                cells[_NUMBER],
                cells[_NODEID],
                cells[_TARGET],
                cells[_PIN] - 1,
                cells[_VICTIM],
                cells[_HANDLE],
                cells[_BACKING],
            )

    def find_pin(self, left: set[int]) -> None:
        """Make sure that the pin is one of the descriptors that a dead front has *left*, and still of its file."""
        if self._left is not None and not (self._left.pin in left and self._left.has_pin()):
            self._left = self._left._replace(pin=-1)

    def adopt(self, left: set[int]) -> None:
        """Take in what a dead front had opened and no record names, until all that is sent again has come."""
        self._orphans = sorted(left - {self.left_pin})

    def take_orphan(self, attributes: Attributes) -> int | None:
        """Return a descriptor of that file which a dead front had opened for I/O and not noted, or None."""
        for fd in self._orphans:
            found = fstatx(fd)
            is_it = (found.ino, found.device) == (attributes.ino, attributes.device)
            if is_it and not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
                self._orphans.remove(fd)
                return fd
        return None

    @property
    def left_pin(self) -> int:
        """The descriptor that a dead front's attempt still needs, or -1."""
        return self._left.pin if self._left is not None and self._left.has_pin() else -1

    def interrupted(self) -> Attempt | None:
        """Return what a dead front noted of the very request that is being served, if it did."""
        if self._left is None or not self.unique & RESENT or self.unique & ~RESENT != self._left_unique:
            return None
        return self._left

    def begin(self, number: int = 0, nodeid: int = 0, target: int = 0, pin: int = -1, victim: int = 0) -> None:
        """Note that the request that is being served is begun; for the arguments see `Attempt`."""
        cells = self._cells
        cells[_UNIQUE] = 0
        started = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
        self._pack(self._memory, _NOTE_START, 0, started, number, nodeid, target, pin + 1, victim, 0)
        cells[_UNIQUE] = self.unique

    def begin_open(self, unique: int) -> None:
        """Note that a file is being opened, which can be done again if it is known which handle it made."""
        cells = self._cells
        cells[_HANDLE] = 0
        cells[_UNIQUE] = self.unique = unique

    def done(self) -> None:
        """Note that it is done, so that only its answer is missing."""
        self._cells[_DONE] = 1

    def made_handle(self, number: int) -> None:
        """Note the handle that it has made."""
        self._cells[_HANDLE] = number

    def made_backing(self, backing: int) -> None:
        """Note the kernel registration that it has made."""
        self._cells[_BACKING] = backing

    def settle(self) -> None:
        """Forget what a dead front noted: all that is sent again has come."""
        for fd in self._orphans:
            os.close(fd)
        self._orphans = []
        if self._left is not None:
            if self._cells[_UNIQUE] & ~RESENT == self._left_unique:
                self._cells[_UNIQUE] = 0
            self._left = None
