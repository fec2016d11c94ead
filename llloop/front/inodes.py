"""The inode table: what the kernel knows, by number, and under which names it can be found again.

An inode costs no descriptor. It is one small object holding its parent's number, its name, how
often the kernel has looked it up and what tells it from another file that gets the same number
later. It goes when the kernel has forgotten it exactly as often as it was looked up. All this
stands in the ledger, too, for the next front.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from ..ledger import INODE, LINK, Ledger, Record
from ..metrics import own_cell
from ..syscalls import Attributes, DirectoryEntry

ROOT = 1  # FUSE_ROOT_ID of <linux/fuse.h>
_MASK = (1 << 64) - 1

# The numbers of an inode's record: nodeid, parent, number, device, birth, lookups, pinned descriptor + 1.
_PARENT, _LOOKUPS, _PIN = 1, 5, 6


def mix(number: int) -> int:
    """Return *number* with its bits well mixed (the finalizer of splitmix64), a bijection of 64-bit numbers."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _MASK
    return number ^ number >> 31


def stale() -> OSError:
    """Return the error for an inode that is no longer where its names say; the kernel then looks it up afresh."""
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def birth_of(attributes: Attributes) -> int:
    """Return a file's birth time in nanoseconds, 0 where its file system keeps none."""
    return attributes.btime * 1_000_000_000 + attributes.btime_nsec


class Inode:
    """What is known of one inode.

    Attributes:
        parent: the number of the directory it was last found in; 0 if it has no name any more.
        name: its name there.
        lookups: how often the kernel has looked it up and not yet forgotten it.
        device, number: st_dev and st_ino in the source.
        birth: its birth time in nanoseconds, 0 where unknown; the generation told to the kernel.
        place: where its record is in the ledger.
        stamp: the size and times at which the kernel's page cache was last known to be right, or None.
    """

    __slots__ = ("birth", "device", "lookups", "name", "number", "parent", "place", "stamp")

    def __init__(self, parent: int, name: bytes, number: int, device: int, birth: int = 0) -> None:
        self.parent = parent
        self.name = name
        self.lookups = 0
        self.device = device
        self.number = number
        self.birth = birth
        self.place = 0
        self.stamp: tuple[int, ...] | None = None

    def is_same(self, attributes: Attributes) -> bool:
        """Whether *attributes* are those of this very file, not of one that got its number after it."""
        return (
            attributes.ino == self.number
            and attributes.device == self.device
            # birth_of(attributes), whose call would cost as much as all of this
            and (self.birth == 0 or attributes.btime * 1_000_000_000 + attributes.btime_nsec == self.birth)
        )


def _nothing(nodeid: int) -> None:
    """Nobody keeps anything."""


class Inodes:
    """The table.

    Args:
        root: the attributes of the source directory.
        ledger: where the next front finds the table.
        births: whether a file's birth time tells it from another with its number. On stacked file systems it changes
            when a file is copied up, while the file stays the same.
        count: a cell for how many there are.
    """

    def __init__(
        self, root: Attributes, ledger: Ledger, *, births: bool = True, count: memoryview | None = None
    ) -> None:
        self._ledger = ledger
        self._root_device = root.device
        self._root_number = root.ino
        self._reserved = frozenset({0, ROOT, root.ino})
        self._births = births
        inode = Inode(0, b"", root.ino, root.device)
        inode.lookups = 1  # the kernel never forgets the root
        self._table: dict[int, Inode] = {ROOT: inode}
        self._count = own_cell() if count is None else count
        self._count[0] = 1
        # The numbers of inodes whose own could not be used; they stay as long as the kernel knows the inode.
        self._renumbered: dict[tuple[int, int], int] = {}
        # Called with a number that was given to another file, so that nothing kept for the old one is used for it.
        self.on_reuse: Callable[[int], None] = _nothing
        # Further names of hard-linked inodes that the kernel has seen, each with the place of its record.
        self._links: dict[int, dict[tuple[int, bytes], int]] = {}

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, nodeid: int) -> bool:
        return nodeid in self._table

    def get(self, nodeid: int) -> Inode:
        """Return the inode numbered *nodeid*.

        Raises:
            OSError: ESTALE, if the kernel should not know it.
        """
        inode = self._table.get(nodeid)
        if inode is None:
            raise stale()
        return inode

    def with_shown_numbers(self, device: int, entries: list[DirectoryEntry]) -> list[DirectoryEntry]:
        """Return a directory's entries with the numbers that the mount shows for them."""
        if device != self._root_device:
            return [(self.nodeid(device, number), kind, name) for number, kind, name in entries]
        root = self._root_number
        return [(ROOT, entry[1], entry[2]) if entry[0] == root else entry for entry in entries]

    def nodeid(self, device: int, number: int) -> int:
        """Return the number under which the kernel knows, or is to know, an inode of the source.

        It is the inode's own number, so that tools see in the mount what they see in the source. Only an
        inode on another file system below the source, one whose number is the root's, and one
        whose number is taken get another.

        Args:
            device: st_dev in the source.
            number: st_ino in the source.
        """
        if number == self._root_number and device == self._root_device:
            return ROOT
        nodeid = self._renumbered.get((device, number))
        if nodeid is not None:
            return nodeid
        nodeid = number if device == self._root_device else mix(number ^ mix(device))
        while True:
            if nodeid > ROOT:
                taken = self._table.get(nodeid)
                if taken is None or (taken.number == number and taken.device == device):
                    return nodeid
            nodeid = mix(nodeid + 0x9E3779B97F4A7C15 & _MASK)

    def known(self, attributes: Attributes) -> int | None:
        """Return the number under which the kernel knows this very file, or None if it does not."""
        nodeid = self.nodeid(attributes.device, attributes.ino)
        inode = self._table.get(nodeid)
        return nodeid if inode is not None and inode.is_same(attributes) else None

    def remember(self, parent: int, name: bytes, attributes: Attributes) -> int:
        """Note an inode that the kernel is about to be told of, and return the number to tell it.

        Only `count` says that the kernel has been told.

        Args:
            parent: the number of the directory it was found in, 0 if it has no name.
            name: its name there.
            attributes: what statx(2) says of it.
        """
        table = self._table
        nodeid = number = attributes.ino
        device = attributes.device
        inode = table.get(nodeid)
        # Mostly the file is where it was, or its own number is free; what takes a number is looked at more closely.
        if inode is not None and inode.name == name and inode.parent == parent and inode.is_same(attributes):
            return nodeid
        if inode is not None or device != self._root_device or self._renumbered or nodeid in self._reserved:
            nodeid = self.nodeid(device, number)
            inode = table.get(nodeid)
        if inode is None:
            birth = birth_of(attributes) if self._births else 0
            inode = Inode(parent, name, number, self._shared(device), birth)
            # The record comes first: what the kernel is told of, the next front must find.
            inode.place = self._ledger.add(INODE, (nodeid, parent, number, device, birth & _MASK, 0, 0), name)
            table[nodeid] = inode
            self._count[0] = len(table)
            if nodeid != number:
                self._renumbered[device, number] = nodeid
        elif inode.name != name or inode.parent != parent or not inode.is_same(attributes):
            self._found_elsewhere(nodeid, inode, parent, name, attributes)
        return nodeid

    def _shared(self, device: int) -> int:
        """Return *device*, mostly as the one object that all inodes share: a number for each would cost 32 bytes."""
        return self._root_device if device == self._root_device else device

    def count(self, nodeid: int) -> None:
        """Note that the kernel has been told of an inode once more."""
        inode = self._table[nodeid]
        lookups = inode.lookups = inode.lookups + 1
        self._ledger.set(inode.place, _LOOKUPS, lookups)

    def _found_elsewhere(self, nodeid: int, inode: Inode, parent: int, name: bytes, attributes: Attributes) -> None:
        if not inode.is_same(attributes):  # the number was given to another file
            self._drop_links(nodeid)
            inode.birth = birth_of(attributes)
            inode.stamp = None
            self.on_reuse(nodeid)
        elif attributes.nlink == 1:
            self._drop_links(nodeid)
        elif inode.parent and attributes.mode & 0o170000 != 0o040000:
            self._add_link(nodeid, (inode.parent, inode.name))
            self._drop_link(nodeid, (parent, name))
        if nodeid != ROOT:
            inode.parent, inode.name = parent, name
            self._record_again(nodeid, inode)

    def lookups(self, nodeid: int) -> int:
        """Return how often the kernel has looked up an inode and not forgotten it."""
        inode = self._table.get(nodeid)
        return 0 if inode is None else inode.lookups

    def restore_lookups(self, nodeid: int, lookups: int) -> None:
        """Set how often the kernel has looked up an inode, if it is still in the table."""
        inode = self._table.get(nodeid)
        if inode is not None:
            inode.lookups = lookups
            self._ledger.set(inode.place, _LOOKUPS, lookups)

    def forget(self, nodeid: int, lookups: int) -> bool:
        """Take back *lookups* of an inode; return whether it is gone from the table."""
        inode = self._table.get(nodeid)
        if inode is None or nodeid == ROOT:
            return False
        left = inode.lookups = inode.lookups - lookups
        ledger = self._ledger
        if left > 0:
            ledger.set(inode.place, _LOOKUPS, left)
            return False
        ledger.remove(inode.place)
        del self._table[nodeid]
        self._count[0] = len(self._table)
        if inode.number != nodeid:
            del self._renumbered[inode.device, inode.number]
        self._drop_links(nodeid)
        return True

    def other_names(self, nodeid: int) -> list[tuple[int, bytes]]:
        """Return the further names of a hard-linked inode that the kernel has seen, as (parent, name)."""
        return list(self._links.get(nodeid, ()))

    def renamed(self, nodeid: int, old: tuple[int, bytes], new: tuple[int, bytes]) -> None:
        """Note that the inode known as *old*, a (parent, name), is now known as *new*."""
        inode = self._table.get(nodeid)
        if inode is None:
            return
        if (inode.parent, inode.name) == old or not inode.parent:
            inode.parent, inode.name = new
            self._record_again(nodeid, inode)
            self._drop_link(nodeid, new)
        else:
            self._drop_link(nodeid, old)
            if (inode.parent, inode.name) != new:
                self._add_link(nodeid, new)

    def unlinked(self, nodeid: int, parent: int, name: bytes) -> bool:
        """Note that a name of an inode is gone; return whether another is known."""
        inode = self._table.get(nodeid)
        if inode is None:
            return False
        if (inode.parent, inode.name) != (parent, name):
            self._drop_link(nodeid, (parent, name))
            return bool(inode.parent)
        links = self._links.get(nodeid)
        if links:
            inode.parent, inode.name = link = next(iter(links))
            self._record_again(nodeid, inode)
            self._drop_link(nodeid, link)
            return True
        inode.parent, inode.name = 0, b""
        self._ledger.set(inode.place, _PARENT, 0)
        return False

    # The ledger

    def _record(self, nodeid: int, inode: Inode, pin: int) -> int:
        return self._ledger.add(
            INODE,
            (nodeid, inode.parent, inode.number, inode.device, inode.birth & _MASK, inode.lookups, pin),
            inode.name,
        )

    def _record_again(self, nodeid: int, inode: Inode) -> None:
        """Bring an inode's record up to date."""
        old = inode.place
        ledger = self._ledger
        inode.place = self._record(nodeid, inode, ledger.get(old, _PIN) if old else 0)
        ledger.remove(old)

    def note_pin(self, nodeid: int, fd: int) -> None:
        """Note the descriptor that keeps an inode without names, or -1."""
        inode = self._table.get(nodeid)
        if inode is not None:
            self._ledger.set(inode.place, _PIN, fd + 1)

    def _add_link(self, nodeid: int, link: tuple[int, bytes]) -> None:
        links = self._links.setdefault(nodeid, {})
        if link not in links:
            links[link] = self._ledger.add(LINK, (nodeid, link[0], 0, 0, 0, 0, 0), link[1])

    def _drop_link(self, nodeid: int, link: tuple[int, bytes]) -> None:
        links = self._links.get(nodeid)
        if links is not None and link in links:
            self._ledger.remove(links.pop(link))

    def _drop_links(self, nodeid: int) -> None:
        for place in self._links.pop(nodeid, {}).values():
            self._ledger.remove(place)

    def recover(self, records: list[Record]) -> dict[int, int]:
        """Take over the table of a front that is gone.

        Args:
            records: all that it has left, the older first.

        Returns:
            The descriptors of inodes without names, by number.
        """
        pins: dict[int, int] = {}
        for record in records:
            if record.kind == INODE:
                nodeid, parent, number, device, birth, lookups, pin = record.fields
                # A birth before 1970 is negative.
                name = record.name if parent else b""
                inode = Inode(parent, name, number, self._shared(device), birth - (birth >> 63 << 64))
                inode.lookups = lookups
                inode.place = record.place
                superseded = self._table.get(nodeid)
                if superseded is not None:
                    self._ledger.remove(superseded.place)
                    pins.pop(nodeid, None)
                self._table[nodeid] = inode
                if nodeid != number:
                    self._renumbered[device, number] = nodeid
                if pin:
                    pins[nodeid] = pin - 1
        for record in records:
            if record.kind == LINK:
                nodeid, parent = record.fields[:2]
                links = self._links.setdefault(nodeid, {})
                inode_of = self._table.get(nodeid)
                link = (parent, record.name)
                if inode_of is None or link in links or link == (inode_of.parent, inode_of.name):
                    self._ledger.remove(record.place)
                else:
                    links[link] = record.place
        self._count[0] = len(self._table)
        return pins

    def settle(self, delivered: bool) -> list[int]:
        """Decide about the inodes of which a dead front had not noted whether the kernel was told.

        Args:
            delivered: whether it was: then none of what the front had in hand was sent again.

        Returns:
            Those of which it was not, which are forgotten.
        """
        doubtful = [nodeid for nodeid, inode in self._table.items() if not inode.lookups]
        for nodeid in doubtful:
            if delivered:
                self.count(nodeid)
            else:
                self.forget(nodeid, 0)
        return [] if delivered else doubtful
