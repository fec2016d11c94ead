"""The journal: records of open files in shared memory, which outlive the front.

A front keeps its open files in objects of its own, which die with it. For each open file there is a *record* here, from
which the next front makes its object. A process can be killed at any moment, but each change of a record is either done
or not done:

* A record appears or disappears by one store to its first cell.
* A field changes by one store to its cell.

The journal also contains a *note* for each thread of the front: its current request, if that must not be done twice
(see `llloop.front.recovery.intents`). The first thread's note is before the records, the others are after them.

The memory is sparse: unused records take no space.
"""

from __future__ import annotations

import struct
from array import array
from typing import NamedTuple

from llloop.shared.leadership import MAX_THREADS
from llloop.shared.sparse_memory import sparse_memory

RECORD_SIZE = 128  # bytes
# Open files beyond this number have no record, and are lost when the front dies.
DEFAULT_CAPACITY = 1 << 24

_CELL = 8
_CELLS = RECORD_SIZE // _CELL
_FIELDS = 8
# The cells of a record after the first one, which says whether the record is used.
RECORD_BODY = struct.Struct(f"={_FIELDS}Q")

_NOTES = MAX_THREADS

# The first place takes changes of files without a record, and is never read. The cells of the second:
_HIGH_WATER = _CELLS  # how many places have ever been used
_NOTE = _CELLS + 1  # the first cell of the first thread's note
_RESENT, _RESENT_TIMES = _CELLS + 11, _CELLS + 12  # the resent request served last, and by how many fronts
FORGETTING = _CELLS + 13  # how far a FORGET request has come
_FIRST = 2  # the first place for a record


class Record(NamedTuple):
    """A record that a front has left.

    Attributes:
        place: its index in the journal.
        fields: eight numbers; see `llloop.front.open_files`.
    """

    place: int
    fields: tuple[int, ...]


class Journal:
    """The records.

    Args:
        capacity: the maximum number of records.
    """

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self._capacity = capacity
        self.memory = sparse_memory("llloop-journal", (capacity + _NOTES - 1) * RECORD_SIZE)
        self.cells = memoryview(self.memory).cast("Q")
        self._free = array("Q")
        if not self.cells[_HIGH_WATER]:
            self.cells[_HIGH_WATER] = _FIRST

    def close(self) -> None:
        """Unmap the memory. The process must not have other views of it."""
        self.cells.release()
        self.memory.close()

    def add(self, *fields: int) -> int:
        """Add a record and return its place; 0 if the journal is full.

        Args:
            fields: eight numbers of 64 bits.
        """
        place = self._free.pop() if self._free else self._take_new_place()
        if place:
            RECORD_BODY.pack_into(self.memory, place * RECORD_SIZE + _CELL, *fields)
            self.cells[place * _CELLS] = 1
        return place

    def _take_new_place(self) -> int:
        place = self.cells[_HIGH_WATER]
        if place >= self._capacity:
            return 0
        self.cells[_HIGH_WATER] = place + 1
        return place

    def note_of(self, thread: int) -> int:
        """Return the first cell of a thread's note; threads are counted from 0."""
        return (self._capacity + thread - 1) * _CELLS if thread else _NOTE

    def serving_again(self, unique: int) -> int:
        """Note that a resent request is being served; return how many fronts in a row have begun to serve it."""
        cells = self.cells
        times = cells[_RESENT_TIMES] + 1 if cells[_RESENT] == unique else 1
        cells[_RESENT] = unique
        cells[_RESENT_TIMES] = times
        return times

    def served_again(self) -> None:
        """Note that the resent request was served or given to a worker, so that it is not blamed for a later death."""
        self.cells[_RESENT] = 0

    def set(self, place: int, field: int, value: int) -> None:
        """Change a field of a record."""
        self.cells[place * _CELLS + 1 + field] = value

    def get(self, place: int, field: int) -> int:
        """Return a field of a record."""
        return self.cells[place * _CELLS + 1 + field]

    def remove(self, place: int) -> None:
        """Remove a record."""
        if place:
            self.cells[place * _CELLS] = 0
            self._free.append(place)

    def recover(self) -> list[Record]:
        """Return all records that an earlier front has left."""
        used = self.cells[_HIGH_WATER]
        is_used = self.cells[: used * _CELLS : _CELLS].tolist()
        self._free = array("Q", (place for place in range(used - 1, _FIRST - 1, -1) if not is_used[place]))
        return [
            Record(place, RECORD_BODY.unpack_from(self.memory, place * RECORD_SIZE + _CELL))
            for place in range(_FIRST, used)
            if is_used[place]
        ]
