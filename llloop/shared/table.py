"""The inode table in shared memory. A new front finds it as the dead front has left it.

A *row* has 128 bytes and describes an inode, or a name that does not fit into its inode's row. The row's number is its
*place*. The kernel knows an inode by its *nodeid*: the place in the low 28 bits, a generation above. Each new inode
gets the next generation, so no nodeid is ever used for two inodes.

* The *index* leads from inode number and device to a place: buckets, each the head of a chain of rows. It grows by
  a few buckets at a time (linear hashing), so no request waits for a rebuild.
* The names of an inode are a chain too, the latest first. A short name is in the inode's row, and is the last of its
  chain. Other names have rows of their own.
* One byte per place, its *state*, says what the row is. Free places are found by their state (memchr(3)).

A process can be killed at each store. An inode exists if its bucket leads to it, and a name exists if its inode's chain
leads to it. So each appears or disappears by one store. Before that store, and until the rest of the change is done,
the state is *unsettled*. `Table.recover` finds the unsettled rows by their state, and finishes or undoes each change.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import re
import time
from array import array
from collections.abc import Iterator
from contextlib import suppress
from struct import Struct

from llloop.shared.metrics import own_cell
from llloop.shared.sparse_memory import sparse_memory

ROOT = 1  # FUSE_ROOT_ID of <linux/fuse.h>; also the root's place

_PLACE_BITS = 28
_PLACE = (1 << _PLACE_BITS) - 1
_GENERATION = (1 << 63 - _PLACE_BITS) - 1  # nodeids with the highest bit are phantoms of `llloop.shared.relay`
HASH = (1 << 64 - _PLACE_BITS) - 1  # the bits of a hash that are kept above a place in a chain's cell
# The maximum number of rows, a power of two, because a mask extracts the place from a nodeid.
DEFAULT_CAPACITY = 1 << 25
# The index starts with this number of buckets, and grows by it; a power of two.
_BUCKETS_AT_ONCE = 32
_LONGEST_NAME = 1024  # bytes, FUSE_NAME_MAX
# Other processes read chains that the front may be changing. A longer chain than this one is a wrong one.
_LONGEST_CHAIN = 1000
_RETRY = 0.001  # seconds
# Only so many names of an inode are kept, the latest. The kernel looks up other names again before it uses them.
MOST_NAMES = 32

# The last 1/64 of the places is only for names, so that inodes can be renamed when there is no room for new ones.
_NAMES_RESERVE = 6
# Memory is given back after so many removals, or when half of the inodes are removed, if these are more.
_TRIM_AFTER = 1 << 13

# A row has 1 << ROW_SHIFT bytes, which are 1 << CELLS_SHIFT cells.
ROW_SHIFT, CELLS_SHIFT = 7, 4
# An inode's row: nodeid, number, device, mount, birth, place of the first name, parent and name in this row, ...
INODE_ROW = Struct("=QQQQQQQ40p")
# ..., lookups, hash and next place of the bucket's chain, stamp, accessed.
WHOLE_ROW = Struct("=QQQQQQQ40pQQQQ")
_NUMBER, _DEVICE, _MOUNT, BIRTH, NAMES, PARENT = range(1, 7)
# The row of an inode without names has the descriptor that it is pinned with, plus 1, in the place of its name.
PIN = PARENT
LOOKUPS, _CHAIN, STAMP, ACCESSED = 12, 13, 14, 15
OWN_NAME = Struct("=Q40p")  # at the cell PARENT
_LONGEST_OWN_NAME = 39
# A name's row: 0, the inode's place, the next name's place, the continuation's place, parent, length, the name's start.
# A continuation's row: 0, the inode's place, 0, the next continuation's place, a part of the name.
NAME_ROW = Struct("=QQQQQQ80s")
MORE_ROW = Struct("=QQQQ96s")
_OWNER, _NEXT, _MORE, _NAME_PARENT, _LENGTH = 1, 2, 3, 4, 5
_NAME_PART, _MORE_PART = 80, 96
_NAME_START, _MORE_START = 6 * 8, 4 * 8

# The first row is for the table itself: the number of buckets, the number of places ever used, the generation of the
# latest inode, the place of a row that is being moved to another bucket.
_BUCKETS, _USED, _LAST_GENERATION, _MOVING = range(4)

_FREE, UNSETTLED, SETTLED, _NAME, _UNSETTLED_NAME = range(5)
_PAGE_ROWS = mmap.PAGESIZE >> ROW_SHIFT
_FREE_RUN = re.compile(rb"\0{%d,}" % (4 * _PAGE_ROWS))  # the states of at least three pages of free rows


_write_row, _write_name_row, _write_own_name = WHOLE_ROW.pack_into, NAME_ROW.pack_into, OWN_NAME.pack_into


def hash_of(number: int, device: int) -> int:
    """Return the hash that leads to an inode in the index."""
    return hash((number, device)) & HASH


class Table:
    """The inode table.

    Attributes:
        memory: the shared memory.
        cells: the same as cells of 64 bits.
        heads: the places of the first row of each bucket.
        states: the state of each place.
        mask: extracts the place from a nodeid.

    Args:
        capacity: the maximum number of rows, a power of two.
    """

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self._capacity = capacity
        self._inodes_end = capacity - (capacity >> _NAMES_RESERVE)
        self._count = own_cell()
        self.mask = capacity - 1
        heads = capacity << ROW_SHIFT
        self._states_start = heads + 8 * capacity
        self._end = self._states_start + capacity
        self.memory = sparse_memory("llloop-inodes", self._end)
        self.cells = memoryview(self.memory).cast("Q")
        self.heads = memoryview(self.memory)[heads : self._states_start].cast("Q")
        self.states = memoryview(self.memory)[self._states_start :]
        # A random start, so that a nodeid of an earlier mount, which an NFS client may still have, is not valid.
        self.cells[_LAST_GENERATION] = random.getrandbits(32)
        self.cells[_USED] = ROOT
        self.cells[_BUCKETS] = _BUCKETS_AT_ONCE
        self._attach()

    def close(self) -> None:
        """Unmap the memory. The process must not have other views of it."""
        for view in (self.cells, self.heads, self.states):
            view.release()
        self.memory.close()

    def _attach(self) -> None:
        """Read what this object caches from the memory."""
        self._buckets = self.cells[_BUCKETS]
        self._bucket_mask = (1 << (self._buckets - 1).bit_length()) - 1
        self._generation = self.cells[_LAST_GENERATION]
        self._used = self.cells[_USED]
        states = bytes(self.states[: self._used])
        self._length = self._count[0] = states.count(UNSETTLED) + states.count(SETTLED)
        self._removed, self._trim_at = 0, _TRIM_AFTER  # inodes removed since the last `_trim`, and until the next one
        # Places that this process has freed. Places from _scan on that are free are found by a search.
        self._free = array("I")
        self._scan = ROOT

    def __len__(self) -> int:
        """Return the number of inodes."""
        return self._length

    def __iter__(self) -> Iterator[int]:
        """Yield the nodeid of each inode."""
        for place, state in enumerate(bytes(self.states[: self.cells[_USED]])):
            if state in (UNSETTLED, SETTLED):
                yield self.cells[place << CELLS_SHIFT]

    def recover(self, count: memoryview) -> None:
        """Finish or undo the change that a dead front was making. Inodes that are still unsettled are complete.

        Args:
            count: a cell for the number of inodes.
        """
        self._count = count
        self._attach()
        self._recover_index()
        for place in self._in_state(UNSETTLED):
            if not self._is_in(self._bucket(self.cells[(place << CELLS_SHIFT) + _CHAIN] >> _PLACE_BITS), place):
                self._give_back_names(place)
                self.cells[place << CELLS_SHIFT] = 0
                self.states[place] = _FREE
        for place in self._in_state(_UNSETTLED_NAME):
            owner = self.cells[(place << CELLS_SHIFT) + _OWNER]
            is_used = self.states[owner] in (UNSETTLED, SETTLED) and place in self._name_rows(owner)
            self.states[place] = _NAME if is_used else _FREE
        self._attach()

    def _in_state(self, state: int) -> Iterator[int]:
        start, end = self._states_start, self._states_start + self._used
        wanted = bytes((state,))
        found = self.memory.find(wanted, start, end)
        while found >= 0:
            yield found - start
            found = self.memory.find(wanted, found + 1, end)

    def unsettled(self) -> list[int]:
        """Return the nodeids of inodes that the kernel may not have been told of."""
        return [self.cells[place << CELLS_SHIFT] for place in self._in_state(UNSETTLED)]

    def settle(self, place: int) -> None:
        """Note that the kernel has been told of an inode."""
        self.states[place] = SETTLED

    # Places

    def _take(self, end: int) -> int:
        """Return a free place before *end*. Its state stays free until the caller changes it.

        Raises:
            OSError: ENOMEM, if there is none.
        """
        if self._free:
            return self._free.pop()
        place = self._scan
        if place < self._used:
            place = self.memory.find(b"\0", self._states_start + place, self._end) - self._states_start
        if not 0 < place < end:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        self._scan = place + 1
        if place >= self._used:
            self.cells[_USED] = self._used = place + 1
        return place

    def _give_back(self, place: int) -> None:
        """Free a place. Those from _scan on are left to the search, otherwise `_take` would return them twice."""
        self.states[place] = _FREE
        if place < self._scan:
            self._free.append(place)

    # The index

    def _bucket(self, hashed: int) -> int:
        bucket = hashed & self._bucket_mask
        return bucket if bucket < self._buckets else bucket & self._bucket_mask >> 1

    def find(self, hashed: int, number: int, device: int, mount: int) -> int:
        """Return the place of an inode, 0 if there is none; *hashed* is `hash_of` its number and device."""
        bucket = hashed & self._bucket_mask
        if bucket >= self._buckets:
            bucket &= self._bucket_mask >> 1
        place = self.heads[bucket]
        cells = self.cells
        while place:
            row = place << CELLS_SHIFT
            chain = cells[row + _CHAIN]
            if (
                chain >> _PLACE_BITS == hashed
                and cells[row + _MOUNT] == mount
                and cells[row + _NUMBER] == number
                and cells[row + _DEVICE] == device
            ):
                return place
            place = chain & _PLACE
        return 0

    def knows(self, number: int, device: int) -> bool:
        """Return whether there is an inode with this number and device, on any mount below the source."""
        place = self.heads[self._bucket(hash_of(number, device))]
        while place:
            row = place << CELLS_SHIFT
            if self.cells[row + _NUMBER] == number and self.cells[row + _DEVICE] == device:
                return True
            place = self.cells[row + _CHAIN] & _PLACE
        return False

    def _is_in(self, bucket: int, place: int) -> bool:
        other = self.heads[bucket]
        while other and other != place:
            other = self.cells[(other << CELLS_SHIFT) + _CHAIN] & _PLACE
        return other == place

    def _take_out(self, bucket: int, place: int) -> None:
        """Remove a row from a bucket's chain by one store, if it is there."""
        cells = self.cells
        following = cells[(place << CELLS_SHIFT) + _CHAIN] & _PLACE
        other = self.heads[bucket]
        if other == place:
            self.heads[bucket] = following
            return
        while other:
            cell = (other << CELLS_SHIFT) + _CHAIN
            chain = cells[cell]
            other = chain & _PLACE
            if other == place:
                cells[cell] = chain - place + following
                return

    def _put_in(self, bucket: int, place: int) -> None:
        cell = (place << CELLS_SHIFT) + _CHAIN
        self.cells[cell] = self.cells[cell] >> _PLACE_BITS << _PLACE_BITS | self.heads[bucket]
        self.heads[bucket] = place

    def _grow(self) -> None:
        """Add buckets. Each gets its rows from one bucket that had them before (linear hashing)."""
        cells, heads = self.cells, self.heads
        buckets = self._buckets
        if buckets == self._capacity:
            return
        added = 1 << buckets.bit_length() - 1  # the bit in which a new bucket differs from the one before
        first = buckets - added
        for old, head in enumerate(heads[first : first + _BUCKETS_AT_ONCE].tolist(), first):
            place, before = head, 0
            while place:
                cell = (place << CELLS_SHIFT) + _CHAIN
                chain = cells[cell]
                following = chain & _PLACE
                if chain >> _PLACE_BITS & added:
                    cells[_MOVING] = place
                    if before:
                        cells[before] = cells[before] - place + following
                    else:
                        heads[old] = following
                    cells[cell] = chain - following + heads[old + added]
                    heads[old + added] = place
                else:
                    before = cell
                place = following
        cells[_BUCKETS] = self._buckets = buckets + _BUCKETS_AT_ONCE
        cells[_MOVING] = 0
        self._bucket_mask = 2 * added - 1

    def _recover_index(self) -> None:
        """Finish `_grow` if a dead front was in it."""
        moving = self.cells[_MOVING]
        if moving:
            mask = (1 << self._buckets.bit_length()) - 1
            hashed = self.cells[(moving << CELLS_SHIFT) + _CHAIN] >> _PLACE_BITS
            if not self._is_in(self._bucket(hashed), moving) and not self._is_in(hashed & mask, moving):
                self._put_in(hashed & mask, moving)
            self._grow()

    # For any process, at any time: the front may change what is read here. Its change of the index shows in the cells
    # _MOVING and _BUCKETS, or in a row that belongs to another bucket.

    def nodeids_of(self, number: int, device: int) -> list[int]:
        """Return the nodeids of all inodes with this number and device."""
        while (found := self._try_nodeids_of(number, device)) is None:
            time.sleep(_RETRY)
        return found

    def _try_nodeids_of(self, number: int, device: int) -> list[int] | None:
        """Return the same, or None if the index changed meanwhile."""
        cells = self.cells
        buckets = cells[_BUCKETS]
        mask = (1 << (buckets - 1).bit_length()) - 1

        def bucket_of(hashed: int) -> int:
            return hashed & mask if hashed & mask < buckets else hashed & mask >> 1

        bucket = bucket_of(hash_of(number, device))
        place = self.heads[bucket]
        found: dict[int, None] = {}
        for _ in range(_LONGEST_CHAIN):
            if not 0 < place < self._capacity:
                break
            row = place << CELLS_SHIFT
            nodeid = cells[row]
            if cells[row + _NUMBER] == number and cells[row + _DEVICE] == device:
                found[nodeid] = None
            chain = cells[row + _CHAIN]
            if bucket_of(chain >> _PLACE_BITS) != bucket:
                return None
            place = chain & _PLACE
        if place or cells[_MOVING] or cells[_BUCKETS] != buckets:
            return None
        return [nodeid for nodeid in found if nodeid]

    def __contains__(self, nodeid: int) -> bool:
        """Return whether there is an inode *nodeid*."""
        return self.cells[(nodeid & self.mask) << CELLS_SHIFT] == nodeid

    def identity(self, nodeid: int) -> tuple[int, int]:
        """Return device and number of an inode, (0, 0) if there is none."""
        row = (nodeid & self.mask) << CELLS_SHIFT
        found = self.cells[row + _DEVICE], self.cells[row + _NUMBER]
        return found if nodeid in self else (0, 0)  # a row is only written while it belongs to no inode

    def all_names(self) -> list[tuple[int, bytes]]:
        """Return at least the names of all inodes, as (parent, name). Those that are changing may be missing."""
        found = []
        for place, state in enumerate(bytes(self.states[: self.cells[_USED]])):
            if state in (UNSETTLED, SETTLED):
                parent, name = self._name_at(place, place)
                if parent:
                    found.append((parent, name))
            elif state == _NAME:  # or the continuation of one, whose text is hardly a length
                _, _, _, more, parent, length, name = NAME_ROW.unpack_from(self.memory, place << ROW_SHIFT)
                while len(name) < length <= _LONGEST_NAME and 0 < more < self._capacity:
                    start = (more << ROW_SHIFT) + _MORE_START
                    name += self.memory[start : start + _MORE_PART]
                    more = self.cells[(more << CELLS_SHIFT) + _MORE]
                if 0 < length <= len(name):
                    found.append((parent, name[:length]))
        return found

    # Inodes

    def add(self, hashed: int, number: int, device: int, mount: int, birth: int, parent: int, name: bytes) -> int:
        """Add an inode, unsettled and without lookups, and return its nodeid.

        Args:
            hashed: `hash_of` number and device.
            number, device, mount, birth: its identity; see `llloop.front.inodes.Inode`.
            parent: the nodeid of its directory, 0 if it has no name.
            name: its name there.

        Raises:
            OSError: ENOMEM if the table is full.
        """
        place = self._free.pop() if self._free else self._take(self._inodes_end)
        cells, heads = self.cells, self.heads
        cells[_LAST_GENERATION] = self._generation = generation = self._generation + 1 & _GENERATION
        nodeid = generation << _PLACE_BITS | place
        bucket = hashed & self._bucket_mask
        if bucket >= self._buckets:
            bucket &= self._bucket_mask >> 1
        first = place
        if not parent or len(name) > _LONGEST_OWN_NAME:
            first = self._write_first_name(place, parent, name)
        following = heads[bucket]
        _write_row(
            self.memory,
            place << ROW_SHIFT,
            nodeid,
            number,
            device,
            mount,
            birth,
            first,
            parent,
            name,
            0,
            hashed << _PLACE_BITS | following,
            0,
            0,
        )
        self.states[place] = UNSETTLED
        heads[bucket] = place
        if first != place:
            self._set_states(first, _NAME)
        self._length = self._count[0] = count = self._length + 1
        if count > self._buckets:
            self._grow()
        return nodeid

    def _write_first_name(self, place: int, parent: int, name: bytes) -> int:
        """Return the place of a new inode's name that is not in its own row; 0 if it has no name."""
        if not parent:
            return 0
        try:
            return self._write_name(place, 0, parent, name)
        except OSError:
            self._free.append(place)
            raise

    def add_root(self, number: int, device: int, mount: int) -> None:
        """Add the root, which is never removed, unless it exists."""
        if self.states[ROOT] == _FREE:
            self._scan = self._take(self._capacity)
            hashed = hash_of(number, device)
            bucket = self._bucket(hashed)
            chain = hashed << _PLACE_BITS | self.heads[bucket]
            start = ROOT << ROW_SHIFT
            _write_row(self.memory, start, ROOT, number, device, mount, 0, 0, 0, b"", 1, chain, 0, 0)
            self.states[ROOT] = UNSETTLED
            self.heads[bucket] = ROOT
            self._length = self._count[0] = self._length + 1
        self.states[ROOT] = SETTLED

    def leave_index(self, place: int) -> None:
        """Remove an inode from the index, because its number and device belong to another file now."""
        self._take_out(self._bucket(self.cells[(place << CELLS_SHIFT) + _CHAIN] >> _PLACE_BITS), place)

    def remove(self, place: int) -> None:
        """Remove an inode and its names."""
        row = place << CELLS_SHIFT
        cells, states, heads = self.cells, self.states, self.heads
        states[place] = UNSETTLED
        chain = cells[row + _CHAIN]
        bucket = chain >> _PLACE_BITS & self._bucket_mask
        if bucket >= self._buckets:
            bucket &= self._bucket_mask >> 1
        if heads[bucket] == place:
            heads[bucket] = chain & _PLACE
        else:
            self._take_out(bucket, place)
        first = cells[row + NAMES]
        if first and first != place:
            self._give_back_names(place)
        cells[row] = 0
        states[place] = _FREE
        if place < self._scan:  # as in _give_back
            self._free.append(place)
        self._length = self._count[0] = self._length - 1
        self._removed += 1
        if self._removed == self._trim_at:
            self._trim()

    def _trim(self) -> None:
        """Give the memory of free rows back to the kernel."""
        self._removed, self._trim_at = 0, max(_TRIM_AFTER, self._length // 2)
        for run in _FREE_RUN.finditer(bytes(self.states[: self._used]), ROOT + 1):
            first, end = -(-run.start() // _PAGE_ROWS), run.end() // _PAGE_ROWS
            with suppress(OSError):
                self.memory.madvise(mmap.MADV_REMOVE, first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE)

    def _give_back_all(self, entry: int) -> None:
        """Free the rows of a name that no chain leads to."""
        for row in self._rows_of(entry):
            self._give_back(row)

    def _give_back_names(self, place: int) -> None:
        for row in self._name_rows(place):
            self._give_back(row)

    # Names

    def names(self, place: int) -> list[tuple[int, bytes]]:
        """Return the names of an inode as (parent, name), the latest first."""
        return [self._name_at(place, entry) for _, entry in self._entries(place)]

    def first_name(self, place: int) -> tuple[int, bytes]:
        """Return the latest name of an inode as (parent, name); the parent is 0 if it has none."""
        first = self.cells[(place << CELLS_SHIFT) + NAMES]
        return self._name_at(place, first) if first else (0, b"")

    def has_name(self, place: int, parent: int, name: bytes) -> bool:
        """Return whether an inode has this name in *parent*."""
        if self.cells[(place << CELLS_SHIFT) + NAMES] == place:  # as most: it is the only one, in the inode's own row
            return self._name_at(place, place) == (parent, name)
        return any(self._name_at(place, entry) == (parent, name) for _, entry in self._entries(place))

    def _entries(self, place: int) -> Iterator[tuple[int, int]]:
        """Yield each name of an inode: the cell that leads to it, and its place."""
        cell = (place << CELLS_SHIFT) + NAMES
        entry = self.cells[cell]
        while entry:
            yield cell, entry
            if entry == place:
                return
            cell = (entry << CELLS_SHIFT) + _NEXT
            entry = self.cells[cell]

    def _name_at(self, place: int, entry: int) -> tuple[int, bytes]:
        if entry == place:
            own: tuple[int, bytes] = OWN_NAME.unpack_from(self.memory, (place << ROW_SHIFT) + 8 * PARENT)
            return own
        _, _, _, more, parent, length, name = NAME_ROW.unpack_from(self.memory, entry << ROW_SHIFT)
        while more:
            start = (more << ROW_SHIFT) + _MORE_START
            name += self.memory[start : start + _MORE_PART]
            more = self.cells[(more << CELLS_SHIFT) + _MORE]
        return parent, name[:length]

    def _rows_of(self, entry: int) -> list[int]:
        """Return the rows of one name."""
        rows = []
        while entry:
            rows.append(entry)
            entry = self.cells[(entry << CELLS_SHIFT) + _MORE]
        return rows

    def _name_rows(self, place: int) -> list[int]:
        """Return the rows of all names of an inode."""
        return [row for _, entry in self._entries(place) if entry != place for row in self._rows_of(entry)]

    def _set_states(self, entry: int, state: int) -> None:
        for row in self._rows_of(entry):
            self.states[row] = state

    def _write_name(self, owner: int, following: int, parent: int, name: bytes) -> int:
        """Write a name into new rows that no chain leads to yet, and return the first row's place."""
        more = self._write_more(owner, name) if len(name) > _NAME_PART else 0
        try:
            row = self._take(self._capacity)
        except OSError:
            self._give_back_all(more)
            raise
        _write_name_row(self.memory, row << ROW_SHIFT, 0, owner, following, more, parent, len(name), name)
        self.states[row] = _UNSETTLED_NAME
        return row

    def _write_more(self, owner: int, name: bytes) -> int:
        more = 0
        for start in reversed(range(_NAME_PART, len(name), _MORE_PART)):
            try:
                row = self._take(self._capacity)
            except OSError:
                self._give_back_all(more)
                raise
            MORE_ROW.pack_into(self.memory, row << ROW_SHIFT, 0, owner, 0, more, name[start:])
            self.states[row] = _UNSETTLED_NAME
            more = row
        return more

    def set_name(self, place: int, parent: int, name: bytes) -> None:
        """Replace all names of an inode by this one."""
        cell = (place << CELLS_SHIFT) + NAMES
        old = self._name_rows(place) if self.cells[cell] != place else ()
        row = self._write_name(place, 0, parent, name)
        for one in old:
            self.states[one] = _UNSETTLED_NAME
        self.cells[cell] = row
        for one in old:
            self._give_back(one)
        if len(name) <= _LONGEST_OWN_NAME:
            # The row's state stays unsettled, because it is freed at once.
            _write_own_name(self.memory, (place << ROW_SHIFT) + 8 * PARENT, parent, name)
            self.cells[cell] = place
            self._give_back(row)
        else:
            self._set_states(row, _NAME)

    def add_name(self, place: int, parent: int, name: bytes) -> None:
        """Add a name to an inode, as its latest."""
        cell = (place << CELLS_SHIFT) + NAMES
        row = self._write_name(place, self.cells[cell], parent, name)
        self.cells[cell] = row
        self._set_states(row, _NAME)
        _, *others = self._entries(place)
        kept = 1 + len(others)
        for before, entry in reversed(others):
            if kept > MOST_NAMES or self._name_at(place, entry) == (parent, name):
                self._unlink(place, before, entry)
                kept -= 1
        self._bring_home(place)

    def drop_name(self, place: int, parent: int, name: bytes) -> bool:
        """Remove a name from an inode, if it has it; return whether it has another."""
        cell = (place << CELLS_SHIFT) + NAMES
        if self.cells[cell] == place:
            if self._name_at(place, place) != (parent, name):
                return True
            self.cells[cell] = 0
            return False
        for before, entry in reversed(list(self._entries(place))):
            if self._name_at(place, entry) == (parent, name):
                self._unlink(place, before, entry)
        self._bring_home(place)
        return bool(self.cells[cell])

    def drop_names(self, place: int) -> None:
        """Remove all names of an inode."""
        rows = self._name_rows(place)
        for row in rows:
            self.states[row] = _UNSETTLED_NAME
        self.cells[(place << CELLS_SHIFT) + NAMES] = 0
        for row in rows:
            self._give_back(row)

    def pins(self) -> list[tuple[int, int]]:
        """Return the place and the pin of each inode that has no name and may have a pin."""
        cells = self.cells
        first_names = cells[NAMES : self._used << CELLS_SHIFT : 1 << CELLS_SHIFT].tolist()
        found = []
        place = ROOT
        with suppress(ValueError):  # index() raises it at the end
            while True:
                place = first_names.index(0, place + 1)
                pin = cells[(place << CELLS_SHIFT) + PIN]
                if pin and self.states[place] in (UNSETTLED, SETTLED):
                    found.append((place, pin - 1))
        return found

    def _unlink(self, place: int, before: int, entry: int) -> None:
        """Remove a name from the chain; the cell *before* leads to it."""
        if entry == place:
            self.cells[before] = 0
            return
        rows = self._rows_of(entry)
        for row in rows:
            self.states[row] = _UNSETTLED_NAME
        self.cells[before] = self.cells[(entry << CELLS_SHIFT) + _NEXT]
        for row in rows:
            self._give_back(row)

    def _bring_home(self, place: int) -> None:
        """Move the only name of an inode into the inode's row, if it is short."""
        cell = (place << CELLS_SHIFT) + NAMES
        first = self.cells[cell]
        if first and first != place:
            row = first << CELLS_SHIFT
            if not self.cells[row + _NEXT] and self.cells[row + _LENGTH] <= _LONGEST_OWN_NAME:
                self.states[first] = _UNSETTLED_NAME
                _write_own_name(self.memory, (place << ROW_SHIFT) + 8 * PARENT, *self._name_at(place, first))
                self.cells[cell] = place
                self._give_back(first)
