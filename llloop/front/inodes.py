"""The inodes that the kernel knows: the file of each, and its known names.

An inode costs no descriptor. It is a row of the table in `llloop.shared.table`, which the next front takes over. It is
removed when the kernel has forgotten it as often as it was looked up.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from llloop.linux.syscalls import Attributes, DirectoryEntry
from llloop.shared.metrics import own_cell
from llloop.shared.table import (
    ACCESSED,
    BIRTH,
    CELLS_SHIFT,
    HASH,
    INODE_ROW,
    LOOKUPS,
    NAMES,
    OWN_NAME,
    PARENT,
    PIN,
    ROOT,
    ROW_SHIFT,
    SETTLED,
    STAMP,
    Table,
    hash_of,
)

__all__ = ["GENERATION", "ROOT", "Inode", "Inodes", "birth_of", "mix", "stale"]

# The generation in struct fuse_entry_out of every inode, since no nodeid is used twice.
GENERATION = 0

_MASK = (1 << 64) - 1
_TYPE, _DIRECTORY = 0o170000, 0o040000  # of st_mode
# For this time, in seconds, it is assumed that the flags of a mount below the source do not change.
_MOUNTS_STAY = 1.0

_new = tuple.__new__
_unpack_row, _unpack_name = INODE_ROW.unpack_from, OWN_NAME.unpack_from
# The number of inodes that are cached as objects, because reading a row takes longer than a lookup in a dict.
_READ_MOST = 1 << 14


def mix(number: int) -> int:
    """Return *number* with its bits well mixed (the finalizer of splitmix64), a bijection of 64-bit numbers."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _MASK
    return number ^ number >> 31


def stale() -> OSError:
    """Return the error for an inode that none of its names leads to any more; the kernel then looks it up again."""
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def birth_of(attributes: Attributes) -> int:
    """Return a file's birth time in nanoseconds modulo 2**64, 0 where its file system keeps none."""
    return attributes.btime * 1_000_000_000 + attributes.btime_nsec & _MASK


class Inode(NamedTuple):
    """A copy of an inode's row.

    Attributes:
        nodeid: its number in the kernel.
        number, device: st_ino and st_dev in the source.
        mount: the mount that it belongs to, as in `llloop.linux.syscalls.Attributes`, or 0 if it may be reached through
            several: see `Inodes`.
        birth: its birth time as `birth_of` gives it, 0 where unknown.
        first: the place of its latest name in the table.
        parent: the nodeid of the directory in which it was last found; 0 if it has no name any more.
        name: its name there.
    """

    nodeid: int
    number: int
    device: int
    mount: int
    birth: int
    first: int
    parent: int
    name: bytes

    def is_same(self, attributes: Attributes) -> bool:
        """Return whether *attributes* belong to this file, not to a later file with its number."""
        return (
            attributes.ino == self.number
            and attributes.device == self.device
            # birth_of(attributes), whose call would cost as much as all of this
            and (self.birth == 0 or attributes.btime * 1_000_000_000 + attributes.btime_nsec & _MASK == self.birth)
            and (self.mount == 0 or attributes.mount == self.mount)
        )


def _alike(directory: int, name: bytes) -> bool:
    """Assume that all mounts below the source have the same flags."""
    return True


class Inodes:
    """All inodes by nodeid.

    One directory of the source can be reached through several mounts below it (bind mounts, a device mounted twice).
    The kernel moves a directory that it knows to wherever it is found, so a directory is an inode for each mount.
    Anything else is one inode for all mounts that allow the same, so that what is written by one path is read by the
    other; through a mount that allows less (read-only, noexec) it is another inode, since the kernel does not say by
    which path it opens one.

    A new file that gets the inode number of a removed one is another inode.

    Args:
        root: the attributes of the source directory.
        table: the table, as the previous front has left it.
        births: whether birth times tell files with the same number apart. On stacked file systems, a file's birth time
            changes when it is copied up.
        count: a cell for the number of inodes.
    """

    def __init__(self, root: Attributes, table: Table, *, births: bool = True, count: memoryview | None = None) -> None:
        self._table = table
        self._cells = table.cells
        self._memory = table.memory
        self._mask = table.mask
        self._find = table.find
        self._add = table.add
        self._root_device = root.device
        self._root_mount = root.mount
        self.births = births
        # Returns whether the mount of a name in a directory has the flags of the source's mount.
        self.is_alike: Callable[[int, bytes], bool] = _alike
        # Its last result for each mount, and how long that is valid (monotonic clock, seconds).
        self._mounts: dict[int, tuple[bool, float]] = {}
        # Inodes that were read from the table, by nodeid and by st_ino (None: looked up, but not read). Every change of
        # a row removes its inode from both.
        self._read: dict[int, Inode] = {}
        self._read_by_number: dict[int, Inode | None] = {}
        table.recover(own_cell() if count is None else count)
        table.add_root(root.ino, root.device, root.mount)

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[int]:
        return iter(self._table)

    def __contains__(self, nodeid: int) -> bool:
        return nodeid in self._table

    def get(self, nodeid: int) -> Inode:
        """Return the inode that the kernel knows by *nodeid*.

        Raises:
            OSError: ESTALE if there is none.
        """
        inode = self._read.get(nodeid)
        if inode is not None:
            return inode
        place = nodeid & self._mask
        inode = _new(Inode, _unpack_row(self._memory, place << ROW_SHIFT))
        if inode[0] != nodeid:
            raise stale()
        if inode[5] != place:
            parent, name = self._table.first_name(place)
            inode = inode._replace(parent=parent, name=name)
        if len(self._read_by_number) >= _READ_MOST:
            self._read.clear()
            self._read_by_number.clear()
        self._read[nodeid] = self._read_by_number[inode.number] = inode
        return inode

    def _note_lookup(self, nodeid: int, number: int) -> None:
        """Note the first lookup of a known inode that is not cached. The second one caches it."""
        if number in self._read_by_number:
            self.get(nodeid)
            return
        if len(self._read_by_number) >= _READ_MOST:
            self._read.clear()
            self._read_by_number.clear()
        self._read_by_number[number] = None

    def _changes(self, nodeid: int) -> None:
        """Drop an inode from the cache, because its row changes."""
        inode = self._read.pop(nodeid, None)
        if inode is not None:
            self._read_by_number.pop(inode.number, None)

    def knows(self, number: int, device: int) -> bool:
        """Return whether the kernel knows an inode with these st_ino and st_dev, on any mount below the source."""
        return self._table.knows(number, device)

    def with_shown_numbers(self, device: int, entries: list[DirectoryEntry]) -> list[DirectoryEntry]:
        """Return a directory's entries with the numbers that the mount shows for them."""
        if device == self._root_device:
            return entries
        return [(self.shown(device, number), kind, name) for number, kind, name in entries]

    def shown(self, device: int, number: int) -> int:
        """Return the inode number that the mount shows: the source's own, so that tools see the same in both.

        The mount shows one device number for all, so those of other file systems below the source are mixed with their
        device's: two files must not be taken for one.

        Args:
            device: st_dev in the source.
            number: st_ino in the source.
        """
        return number if device == self._root_device else mix(number ^ mix(device))

    def _mount_of(self, directory: int, name: bytes, attributes: Attributes) -> int:
        """Return what an inode's `mount` is if it is found under a name."""
        mount = attributes.mount
        if attributes.mode & _TYPE == _DIRECTORY:
            return mount
        if mount == self._root_mount:
            return 0
        is_alike, end = self._mounts.get(mount, (False, 0.0))
        now = time.monotonic()
        if now >= end:
            is_alike = self.is_alike(directory, name)
            self._mounts[mount] = (is_alike, now + _MOUNTS_STAY)
        return 0 if is_alike else mount

    def known(self, parent: int, name: bytes, attributes: Attributes) -> int | None:
        """Return the nodeid of a file that the kernel has been told of under this very name, or None.

        Args:
            parent, name: where the file was found now.
            attributes: what statx(2) says of it.
        """
        number = attributes.ino
        inode = self._read_by_number.get(number)
        if inode is not None and inode.name == name and inode.parent == parent and inode.is_same(attributes):
            return inode.nodeid
        device = attributes.device
        place = self._find(hash_of(number, device), number, device, self._mount_of(parent, name, attributes))
        row = place << CELLS_SHIFT
        if not place or self._cells[row + BIRTH] not in (0, birth_of(attributes)):
            return None
        return self._cells[row] if self._table.has_name(place, parent, name) else None

    def remember(self, parent: int, name: bytes, attributes: Attributes, directory: int = 0) -> int:
        """Note an inode that the kernel is about to be told of, and return the nodeid to tell it.

        Only `count` says that the kernel has been told.

        Args:
            parent: the nodeid of the directory it was found in, 0 if it has no name.
            name: its name there.
            attributes: what statx(2) says of it.
            directory: the nodeid of the directory in which it was made without a name.

        Raises:
            OSError: ENOMEM, if there is no room for one more.
        """
        number = attributes.ino
        inode = self._read_by_number.get(number)
        # Mostly the file is where it was.
        if inode is not None and inode.name == name and inode.parent == parent and inode.is_same(attributes):
            return inode.nodeid
        device, mount = attributes.device, attributes.mount
        if attributes.mode & _TYPE != _DIRECTORY:
            mount = 0 if mount == self._root_mount else self._mount_of(parent or directory, name, attributes)
        hashed = hash((number, device)) & HASH  # hash_of(number, device)
        birth = attributes.btime * 1_000_000_000 + attributes.btime_nsec & _MASK if self.births else 0
        place = self._find(hashed, number, device, mount)
        if place:
            cells = self._cells
            row = place << CELLS_SHIFT
            known = cells[row + BIRTH]
            if known == birth or not known:
                nodeid = cells[row]
                if cells[row + NAMES] != place or _unpack_name(self._memory, 8 * (row + PARENT)) != (parent, name):
                    self._found_elsewhere(nodeid, parent, name, attributes)
                else:
                    self._note_lookup(nodeid, number)
                return nodeid
            self._table.leave_index(place)
        return self._add(hashed, number, device, mount, birth, parent, name)

    def count(self, nodeid: int) -> None:
        """Note that the kernel has been told of an inode (one lookup more)."""
        place = nodeid & self._mask
        row = place << CELLS_SHIFT
        cells = self._cells
        if cells[row] != nodeid:  # forgotten meanwhile: the row may be another inode's
            return
        lookups = cells[row + LOOKUPS]
        cells[row + LOOKUPS] = lookups + 1
        if not lookups:
            self._table.states[place] = SETTLED

    def _found_elsewhere(self, nodeid: int, parent: int, name: bytes, attributes: Attributes) -> None:
        inode = self.get(nodeid)
        if nodeid == ROOT or (inode.name == name and inode.parent == parent):
            return
        self._changes(nodeid)
        place = nodeid & self._mask
        is_directory = attributes.mode & _TYPE == _DIRECTORY
        names = self.names(inode)
        if is_directory or (attributes.nlink == 1 and self._are_on_one_mount(parent, *(one for one, _ in names))):
            self._table.set_name(place, parent, name)
            return
        self._table.add_name(place, parent, name)
        for old_parent, old_name in names:
            if old_parent not in self:  # the kernel has forgotten the directory
                self._table.drop_name(place, old_parent, old_name)

    def _are_on_one_mount(self, *directories: int) -> bool:
        """Return whether all *directories* are on one mount. Then a file with one link has one name in all of them."""
        return len({self.get(nodeid).mount for nodeid in directories if nodeid in self}) < 2

    def lookups(self, nodeid: int) -> int:
        """Return how often the kernel has looked up an inode and not forgotten it."""
        row = (nodeid & self._mask) << CELLS_SHIFT
        return self._cells[row + LOOKUPS] if self._cells[row] == nodeid else 0

    def restore_lookups(self, nodeid: int, lookups: int) -> None:
        """Set how often the kernel has looked up an inode, if it is still in the table."""
        if nodeid in self:
            self._cells[((nodeid & self._mask) << CELLS_SHIFT) + LOOKUPS] = lookups

    def forget(self, nodeid: int, lookups: int) -> bool:
        """Subtract *lookups* from an inode's lookup count; return whether it was removed."""
        place = nodeid & self._mask
        row = place << CELLS_SHIFT
        cells = self._cells
        if cells[row] != nodeid or nodeid == ROOT:
            return False
        left = cells[row + LOOKUPS] - lookups
        if left > 0:
            cells[row + LOOKUPS] = left
            return False
        inode = self._read.pop(nodeid, None)  # self._changes(nodeid)
        if inode is not None:
            self._read_by_number.pop(inode.number, None)
        self._table.remove(place)
        return True

    def names(self, inode: Inode) -> list[tuple[int, bytes]]:
        """Return the names of an inode that the kernel has seen, as (parent, name), the latest first."""
        place = inode.nodeid & self._mask
        return [(inode.parent, inode.name)] if inode.first == place else self._table.names(place)

    def has_name(self, nodeid: int, parent: int, name: bytes) -> bool:
        """Return whether the kernel has been told that *name* in *parent* leads to an inode."""
        inode = self.get(nodeid)
        return (inode.name == name and inode.parent == parent) or (parent, name) in self.names(inode)

    def renamed(self, nodeid: int, old: tuple[int, bytes], new: tuple[int, bytes]) -> None:
        """Note that an inode was renamed from *old* to *new*, each a (parent, name)."""
        if nodeid not in self or old == new:
            return
        place = nodeid & self._mask
        inode = self.get(nodeid)
        self._changes(nodeid)
        if inode.first == place and (inode.parent, inode.name) == old:
            self._table.set_name(place, *new)
        else:
            self._table.add_name(place, *new)
            self._table.drop_name(place, *old)

    def unlinked(self, nodeid: int, parent: int, name: bytes) -> bool:
        """Note that a name of an inode was removed; return whether another one is known."""
        inode = self._read.pop(nodeid, None)
        place = nodeid & self._mask
        if inode is not None:
            self._read_by_number.pop(inode.number, None)
            if inode.first == place and inode.name == name and inode.parent == parent:  # as most: it is the only one
                self._cells[(place << CELLS_SHIFT) + NAMES] = 0
                return False
        return nodeid in self and self._table.drop_name(place, parent, name)

    def drop_names(self, nodeid: int) -> None:
        """Note that no known name leads to an inode any more."""
        self._changes(nodeid)
        self._table.drop_names(nodeid & self._mask)

    # Cells for other modules

    def set_pin(self, nodeid: int, pin: int) -> None:
        """Note the descriptor that keeps an inode without names, -1 for none."""
        row = (nodeid & self._mask) << CELLS_SHIFT
        cells = self._cells
        if cells[row] == nodeid and not cells[row + NAMES]:
            cells[row + PIN] = pin + 1

    def pins(self) -> list[tuple[int, int]]:
        """Return what `set_pin` was given, as (nodeid, pin). It may also contain what was never a pin."""
        return [(self._cells[place << CELLS_SHIFT], pin) for place, pin in self._table.pins()]

    def stamp(self, nodeid: int) -> int:
        """Return what `set_stamp` was given last for an inode, 0 for nothing."""
        return self._cells[((nodeid & self._mask) << CELLS_SHIFT) + STAMP]

    def set_stamp(self, nodeid: int, stamp: int) -> None:
        """Keep 64 bits that stand for the size and times at which the kernel's cache was valid."""
        self._cells[((nodeid & self._mask) << CELLS_SHIFT) + STAMP] = stamp

    def accessed(self, nodeid: int) -> int:
        """Return what `set_accessed` was given last for an inode, 0 for nothing."""
        return self._cells[((nodeid & self._mask) << CELLS_SHIFT) + ACCESSED]

    def set_accessed(self, nodeid: int, accessed: int) -> None:
        """Keep 64 bits that stand for the access time for which a file's pages were last dropped."""
        self._cells[((nodeid & self._mask) << CELLS_SHIFT) + ACCESSED] = accessed

    # Directories have no such pages, and use the cell for the time until which the kernel's listing is valid.
    valid_until, set_valid_until = accessed, set_accessed

    def finish_takeover(self, delivered: bool) -> list[int]:
        """Keep or remove the inodes of which a dead front had not noted that the kernel was told.

        Args:
            delivered: whether the kernel was told: then it has not sent the dead front's request again.

        Returns:
            The inodes that were removed, because the kernel does not know them.
        """
        forgotten = []
        for nodeid in self._table.unsettled():
            if self.lookups(nodeid):
                self._table.settle(nodeid & self._mask)
            elif delivered:
                self.count(nodeid)
            else:
                self.forget(nodeid, 0)
                forgotten.append(nodeid)
        return forgotten
