"""Notes of requests that must not be done twice, for the next front.

When a front dies, the kernel sends every unanswered request to the next front again, marked as such
(FUSE_NOTIFY_RESEND, Linux 6.9). Most can simply be done again. Those that cannot are noted in the journal before they
are begun: a second mkdir(2) would fail with EEXIST, a second rename(2) with ENOENT. Workers, which survive the front,
note appends themselves. Each thread of a front serves one request at a time, so there is one note for each thread.
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
from llloop.shared.leadership import MAX_THREADS

_CLOCK_REALTIME_COARSE = 5  # <linux/time.h>; the clock of file system timestamps

_UNIQUE, _DONE, _STARTED, _NUMBER, _NODEID, _TARGET, _PIN, _VICTIM, _HANDLE, _BACKING = range(10)


# The fields of a note except the request's `unique`, which is stored last, and the backing id.
NOTE = Struct("=8Q")


class Intent(NamedTuple):
    """The note of a dead front about a request.

    Attributes:
        done: whether the request was certainly done. If not, it may be done or not.
        started: when it was begun, in nanoseconds (CLOCK_REALTIME_COARSE).
        number: the inode number of its file in the source, or whether an extended attribute existed.
        nodeid: the nodeid of the file, 0 if the request has no name.
        target: the nodeid of the file that a rename replaces, or 0.
        pin: an O_PATH descriptor of the file that loses a name, or -1.
        victim: the inode number of that file in the source.
        handle: the number of the handle that was created, 0 for none.
        backing: the backing id that was registered, 0 for none.
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
        """Return whether an existing file can be the one that this request created."""
        # Without birth times, the ctime must do, although an older file may have been changed since.
        changed = attributes.ctime * 1_000_000_000 + attributes.ctime_nsec
        return self.done or (birth_of(attributes) or changed) >= self.started

    def has_pin(self) -> bool:
        """Return whether the pin is still a descriptor of its file."""
        try:
            return self.pin >= 0 and fstatx(self.pin).ino == self.victim
        except OSError:
            return False


class Note:
    """The note of a thread about its current request, for the next front.

    Attributes:
        unique: the request's `unique`.

    Args:
        cells, memory: the journal's memory.
        pack: `NOTE.pack_into`.
        place: the index of the note's first cell.
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
        """Note that the request is begun, and at the end of the ``with`` block that it is done.

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
        """Note that the request opens a file. It can be done again if it is known whether it created a handle."""
        cells, place = self._cells, self._place
        cells[place + _HANDLE] = 0
        cells[place + _UNIQUE] = self.unique

    def note_handle(self, number: int) -> None:
        """Note the number of the handle that the request creates."""
        self._cells[self._place + _HANDLE] = number

    def made_backing(self, backing: int) -> None:
        """Note the backing id that the request has registered."""
        self._cells[self._place + _BACKING] = backing

    def finished(self) -> None:
        """Clear the note, because the request is finished."""
        self._cells[self._place + _UNIQUE] = 0


def _nowhere() -> Note:
    memory = bytearray(8 * (_BACKING + 1))
    return Note(memoryview(memory).cast("Q"), memory, NOTE.pack_into, 0)


# The note of requests that the kernel never sends again, which no front reads.
NOWHERE = _nowhere()


class Intents:
    """The notes of the threads of a front, and those of a dead front.

    Args:
        journal: contains the notes.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._cells = journal.cells
        self._pack = NOTE.pack_into
        # Descriptors that a dead front had opened, but not noted.
        self._orphans: list[int] = []
        # A dead front's notes by the request's `unique`, and the thread of each note.
        self._left: dict[int, Intent] = {}
        self._threads: dict[int, int] = {}
        # Which of them the kernel has sent again.
        self._resent: set[int] = set()
        for thread in range(MAX_THREADS):
            cells = self._cells[journal.note_of(thread) :]
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
        return Note(self._cells, journal.memory, self._pack, journal.note_of(thread))

    def note_of(self, unique: int) -> Note:
        """Return the note for a request that is sent again: its own one, or one that is not needed."""
        self._resent.add(unique & ~RESENT)
        noted = self._threads.values()
        free = next((thread for thread in range(MAX_THREADS) if thread not in noted), 0)
        return self.note(self._threads.get(unique & ~RESENT, free))

    @property
    def unasked(self) -> bool:
        """Whether there are notes of requests that the kernel has not sent again."""
        return not self._resent.issuperset(self._left)

    def of(self, unique: int) -> Intent | None:
        """Return a dead front's note about a request that is sent again, or None."""
        return self._left.get(unique & ~RESENT) if unique & RESENT else None

    def find_pins(self, left: set[int]) -> None:
        """Drop pins that are not among the descriptors that a dead front has *left*, or of other files by now."""
        for unique, intent in self._left.items():
            if not (intent.pin in left and intent.has_pin()):
                self._left[unique] = intent._replace(pin=-1)

    def adopt(self, left: set[int]) -> None:
        """Keep descriptors that a dead front had opened without a record, until `finish_takeover`."""
        self._orphans = sorted(left - self.left_pins)

    def take_orphan(self, attributes: Attributes) -> int | None:
        """Return a descriptor of a file that a dead front had opened for I/O but not noted, or None."""
        for fd in self._orphans:
            found = fstatx(fd)
            is_it = (found.ino, found.device) == (attributes.ino, attributes.device)
            if is_it and not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
                self._orphans.remove(fd)
                return fd
        return None

    @property
    def left_pins(self) -> set[int]:
        """The descriptors that a dead front's notes still need."""
        return {intent.pin for intent in self._left.values() if intent.has_pin()}

    def finish_takeover(self) -> list[int]:
        """Drop a dead front's notes, after all requests that the kernel sends again were received.

        Returns:
            The descriptors that the dead front left open and nobody needs any more, for the caller to close.
        """
        orphans, self._orphans = self._orphans, []
        for unique, thread in self._threads.items():
            place = self._journal.note_of(thread) + _UNIQUE
            if self._cells[place] & ~RESENT == unique:
                self._cells[place] = 0
        self._left = {}
        self._threads = {}
        return orphans
