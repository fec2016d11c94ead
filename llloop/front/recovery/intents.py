"""Requests that must not be done twice are noted, so that the next front knows of them when they are sent again.

When a front dies, the kernel sends the next one every request that has no answer yet, marked
(FUSE_NOTIFY_RESEND, Linux 6.9). Most can simply be done again. Those that cannot (a second mkdir
would say EEXIST, a second rename ENOENT) are noted in the journal before they are begun; appends are
the workers' to note, who outlive the front. Each thread of a front does one request at a time, so there is one note
for each of them. Mostly that is one, and others only where system calls have held threads up.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Callable
from struct import Struct
from typing import NamedTuple

from llloop.front.inodes import birth_of
from llloop.linux.fuse import FUSE_UNIQUE_RESEND as RESENT
from llloop.linux.syscalls import Attributes, fstatx
from llloop.shared.journal import Journal
from llloop.shared.leadership import MOST_THREADS

_CLOCK_REALTIME_COARSE = 5  # <linux/time.h>; the clock that file systems take their times from

_UNIQUE, _DONE, _STARTED, _NUMBER, _NODEID, _TARGET, _PIN, _VICTIM, _HANDLE, _BACKING = range(10)


# All of it but the number of the request, which comes last, and the registration.
_NOTE = Struct("=8Q")


class Intent(NamedTuple):
    """What a dead front noted of the request in its hands.

    Attributes:
        done: whether it was done; if not, it may have been all the same.
        started: when it was begun, in nanoseconds of the clock that file systems take their times from.
        number: the source's inode number of the file that it is about, or whether an extended attribute was there.
        nodeid: the file's number in the inode table, 0 if it is about no name.
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
        # Where a file system keeps no birth time, this is the best: an old file can have been changed since.
        changed = attributes.ctime * 1_000_000_000 + attributes.ctime_nsec
        return self.done or (birth_of(attributes) or changed) >= self.started

    def has_pin(self) -> bool:
        """Whether the pin is still a descriptor of the file that it was made for."""
        try:
            return self.pin >= 0 and fstatx(self.pin).ino == self.victim
        except OSError:
            return False


class Note:
    """What a thread notes of the request that it has at hand, for the next front.

    Attributes:
        unique: the kernel's number of the request.

    Args:
        cells, memory: the journal's memory.
        pack: `_NOTE.pack_into`.
        place: the first cell of the note.
    """

    __slots__ = ("_cells", "_memory", "_pack", "_place", "unique")

    def __init__(
        self,
        cells: memoryview,
        memory: mmap.mmap | bytearray,
        pack: Callable[..., None],
        place: int,
    ) -> None:
        self.unique = 0
        self._cells = cells
        self._memory = memory
        self._pack = pack
        self._place = place

    def begin(self, number: int = 0, nodeid: int = 0, target: int = 0, pin: int = -1, victim: int = 0) -> Note:
        """Note that the request is begun; at the end of a ``with`` block note that it is done.

        For the arguments see `Intent`.
        """
        cells, place = self._cells, self._place
        cells[place + _UNIQUE] = 0
        started = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
        self._pack(self._memory, 8 * (place + _DONE), 0, started, number, nodeid, target, pin + 1, victim, 0)
        cells[place + _UNIQUE] = self.unique
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._cells[self._place + _DONE] = 1

    def begin_open(self) -> None:
        """Note that a file is being opened, which can be done again if it is known which handle it made."""
        cells, place = self._cells, self._place
        cells[place + _HANDLE] = 0
        cells[place + _UNIQUE] = self.unique

    def made_handle(self, number: int) -> None:
        """Note the handle that it has made."""
        self._cells[self._place + _HANDLE] = number

    def made_backing(self, backing: int) -> None:
        """Note the kernel registration that it has made."""
        self._cells[self._place + _BACKING] = backing

    def finished(self) -> None:
        """Note that nothing of the request needs to be known any more."""
        self._cells[self._place + _UNIQUE] = 0


def _nowhere() -> Note:
    memory = bytearray(8 * (_BACKING + 1))
    return Note(memoryview(memory).cast("Q"), memory, _NOTE.pack_into, 0)


# The note of what no front has to know of, because the kernel sends it to none again.
NOWHERE = _nowhere()


class Intents:
    """What the threads of a front note, and what those of a dead one have left.

    Args:
        journal: where it stands.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._cells = journal.cells
        self._pack = _NOTE.pack_into
        # Descriptors that a dead front had opened and not noted.
        self._orphans: list[int] = []
        # What a dead front's threads noted, by the number of the request, and by which thread.
        self._left: dict[int, Intent] = {}
        self._threads: dict[int, int] = {}
        for thread in range(MOST_THREADS):
            cells = self._cells[journal.attempt_of(thread) :]
            unique = cells[_UNIQUE] & ~RESENT
            if unique:
                self._threads[unique] = thread
                self._left[unique] = Intent(
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

    def note(self, thread: int) -> Note:
        """Return the note of a thread; threads are counted from 0."""
        journal = self._journal
        return Note(self._cells, journal.memory, self._pack, journal.attempt_of(thread))

    def note_of(self, unique: int) -> Note:
        """Return the note for a request that is sent again: where there is one of it, or in no other's place."""
        noted = self._threads.values()
        free = next((thread for thread in range(MOST_THREADS) if thread not in noted), 0)
        return self.note(self._threads.get(unique & ~RESENT, free))

    def of(self, unique: int) -> Intent | None:
        """Return what a dead front noted of a request, if that is sent again and the front had begun it."""
        return self._left.get(unique & ~RESENT) if unique & RESENT else None

    def find_pins(self, left: set[int]) -> None:
        """Make sure that pins are among the descriptors that a dead front has *left*, and still of their files."""
        for unique, intent in self._left.items():
            if not (intent.pin in left and intent.has_pin()):
                self._left[unique] = intent._replace(pin=-1)

    def adopt(self, left: set[int]) -> None:
        """Take in what a dead front had opened and no record names, until all that is sent again has come."""
        self._orphans = sorted(left - self.left_pins)

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
    def left_pins(self) -> set[int]:
        """The descriptors that a dead front's attempts still need."""
        return {intent.pin for intent in self._left.values() if intent.has_pin()}

    def settle(self) -> None:
        """Forget what a dead front noted: all that is sent again has come."""
        for fd in self._orphans:
            os.close(fd)
        self._orphans = []
        for unique, thread in self._threads.items():
            place = self._journal.attempt_of(thread) + _UNIQUE
            if self._cells[place] & ~RESENT == unique:
                self._cells[place] = 0
        self._left = {}
        self._threads = {}
