"""What must outlive a front: a table of records in shared memory, written through by the front that lives.

The front keeps its inodes and open files in objects of its own, which die with it. Each has a
*record* here as well, from which the next front makes them again. A record changes in one of
three ways, and a process killed at any moment leaves each of them done or not done:

* it appears, or goes, by one store to its first cell;
* one of its cells changes by one store;
* it moves: the new record appears first, then the old one goes. Of two for the same thing the later counts.

Besides, there is an *attempt* for each thread of the front: the request in its hands that must not simply be done
again when the kernel sends it to the next front (see `llloop.front.recovery.intents`). The first
thread's lies in front of the records, the others' behind them.

The memory is sparse: what no record has touched takes none.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from typing import NamedTuple

from llloop.shared.leadership import MAX_THREADS

RECORD_SIZE = 128  # bytes
# Beyond so many, what comes is not recorded: the kernel has to look it up again when a front has died.
DEFAULT_CAPACITY = 1 << 24

_CELL = 8
_CELLS = RECORD_SIZE // _CELL
_FIELDS = 9
# The part of a name that lies in the record itself, and in each record that holds more of it.
_NAME = RECORD_SIZE - (1 + _FIELDS) * _CELL
_MORE = RECORD_SIZE - 2 * _CELL
# A record's cells behind the first: the fields, then the name.
RECORD_BODY = struct.Struct(f"={_FIELDS}Q{_NAME}s")
TAIL_BODY = struct.Struct(f"=Q{_MORE}s")

# The first cell: what it is, the length of its name, and a number that rises with each record.
_KIND_MASK = 0xFF
_LENGTH_SHIFT, _LENGTH_MASK = 8, 0xFFFF
_AGE_SHIFT = 24

_ATTEMPTS = MAX_THREADS

# The first place takes what is said of things that found no room, and is never read. The cells of the second:
_HIGH_WATER = _CELLS  # how many places have ever been used
ATTEMPT = _CELLS + 1  # the first cell of the attempt
_RESENT, _RESENT_TIMES = _CELLS + 11, _CELLS + 12  # the resent request served last, and by how many fronts in a row
FORGETTING = _CELLS + 13  # how far a FORGET request has come
_FIRST = 2  # the first place for a record


# What a record stands for: more of a name, ...
TAIL, INODE, LINK, HANDLE = range(1, 5)


class Record(NamedTuple):
    """A record as the next front finds it.

    Attributes:
        place: where it lies.
        kind: what it stands for.
        fields: its numbers.
        name: its name, if any.
    """

    place: int
    kind: int
    fields: tuple[int, ...]
    name: bytes


class Journal:
    """The records.

    Args:
        capacity: how many there can be at most.
    """

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self._capacity = capacity
        fd = os.memfd_create("llloop-journal", os.MFD_CLOEXEC)
        try:
            size = (capacity + _ATTEMPTS - 1) * RECORD_SIZE
            os.ftruncate(fd, size)
            self.memory = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self.cells = memoryview(self.memory).cast("Q")
        # Not a list: its numbers would be objects between those of inodes, and keep the memory of all of them.
        self._free = array("Q")
        self._age = 0
        if not self.cells[_HIGH_WATER]:
            self.cells[_HIGH_WATER] = _FIRST

    def close(self) -> None:
        """Let go of the memory and its descriptor, in a process that has no other views of it."""
        self.cells.release()
        self.memory.close()

    def add(self, kind: int, fields: tuple[int, ...], name: bytes = b"") -> int:
        """Make a record and return its place; 0, which stands for none, if there is no room.

        Args:
            kind: what it stands for.
            fields: eight numbers of 64 bits.
            name: at most 65535 bytes.
        """
        length = len(name)
        tail = 0
        if length > _NAME:
            needed = 1 + -((_NAME - length) // _MORE)  # all or none: half a name is another file's
            if len(self._free) + self._capacity - self.cells[_HIGH_WATER] < needed:
                return 0
            tail = self._add_tail(name[_NAME:])
        place = self._free.pop() if self._free else self._take_new_place()
        if place:
            RECORD_BODY.pack_into(self.memory, place * RECORD_SIZE + _CELL, *fields, tail, name)
            self._age = age = self._age + 1
            self.cells[place * _CELLS] = kind | length << _LENGTH_SHIFT | age << _AGE_SHIFT
        return place

    def _add_tail(self, rest: bytes) -> int:
        following = self._add_tail(rest[_MORE:]) if len(rest) > _MORE else 0
        place = self._free.pop() if self._free else self._take_new_place()
        if place:
            TAIL_BODY.pack_into(self.memory, place * RECORD_SIZE + _CELL, following, rest)
            self.cells[place * _CELLS] = TAIL
        return place

    def _take_new_place(self) -> int:
        place = self.cells[_HIGH_WATER]
        if place >= self._capacity:
            return 0
        self.cells[_HIGH_WATER] = place + 1
        return place

    def attempt_of(self, thread: int) -> int:
        """Return the first cell of a thread's attempt; threads are counted from 0."""
        return (self._capacity + thread - 1) * _CELLS if thread else ATTEMPT

    def serving_again(self, unique: int) -> int:
        """Note that a request that was sent again is being served; return how many fronts in a row have begun it."""
        cells = self.cells
        times = cells[_RESENT_TIMES] + 1 if cells[_RESENT] == unique else 1
        cells[_RESENT] = unique
        cells[_RESENT_TIMES] = times
        return times

    def served_again(self) -> None:
        """Note that it has been served, or given to a worker: what kills a front now is not this request."""
        self.cells[_RESENT] = 0

    def set(self, place: int, field: int, value: int) -> None:
        """Change one of a record's numbers."""
        self.cells[place * _CELLS + 1 + field] = value

    def get(self, place: int, field: int) -> int:
        """Return one of a record's numbers."""
        return self.cells[place * _CELLS + 1 + field]

    def remove(self, place: int) -> None:
        """Take a record out."""
        if place:
            first = place * _CELLS
            cells = self.cells
            tail = cells[first + _FIELDS]
            cells[first] = 0
            self._free.append(place)
            while tail:
                following = cells[tail * _CELLS + 1]
                cells[tail * _CELLS] = 0
                self._free.append(tail)
                tail = following

    def nodeids(self) -> list[int]:
        """Return the nodeids of all inodes; for any process, at any time."""
        used = self.cells[_HIGH_WATER] * _CELLS
        heads = self.cells[:used:_CELLS].tolist()
        nodeids = self.cells[1:used:_CELLS].tolist()
        return [nodeid for head, nodeid in zip(heads, nodeids, strict=True) if head & _KIND_MASK == INODE]

    def names(self) -> list[tuple[int, bytes]]:
        """Return the latest name of each inode as (parent's nodeid, name), if it is short; for any process."""
        heads = self.cells[: self.cells[_HIGH_WATER] * _CELLS : _CELLS].tolist()
        found = []
        for place, head in enumerate(heads):
            length = head >> _LENGTH_SHIFT & _LENGTH_MASK
            if head & _KIND_MASK in (INODE, LINK) and 0 < length <= _NAME:
                _, parent, *_, name = RECORD_BODY.unpack_from(self.memory, place * RECORD_SIZE + _CELL)
                found.append((parent, name[:length]))
        return found

    def recover(self) -> list[Record]:
        """Return all records that a process before this one has left, the older first.

        Of two for the same thing the later counts, and whoever finds them removes the other.
        """
        used = self.cells[_HIGH_WATER]
        heads = self.cells[: used * _CELLS : _CELLS].tolist()
        places = [place for place in range(_FIRST, used) if heads[place] & _KIND_MASK > TAIL]
        places.sort(key=lambda place: heads[place] >> _AGE_SHIFT)
        in_use = set(places)
        if places:
            self._age = heads[places[-1]] >> _AGE_SHIFT
        records = []
        for place in places:
            *fields, tail, name = RECORD_BODY.unpack_from(self.memory, place * RECORD_SIZE + _CELL)
            length = heads[place] >> _LENGTH_SHIFT & _LENGTH_MASK
            while tail:
                in_use.add(tail)
                tail, more = TAIL_BODY.unpack_from(self.memory, tail * RECORD_SIZE + _CELL)
                name += more
            records.append(Record(place, heads[place] & _KIND_MASK, tuple(fields), name[:length]))
        self._free = array("Q", (place for place in range(used - 1, _FIRST - 1, -1) if place not in in_use))
        return records
