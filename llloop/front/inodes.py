"""The inode table: what the kernel knows, by number, and under which names it can be found again.

An inode costs no descriptor. It is one small object holding its parent's number, its name, how
often the kernel has looked it up and what tells it from another file that gets the same number
later. It goes when the kernel has forgotten it exactly as often as it was looked up.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from ..metrics import own_cell
from ..syscalls import Attributes, DirectoryEntry

ROOT = 1  # FUSE_ROOT_ID of <linux/fuse.h>
_MASK = (1 << 64) - 1


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
        stamp: the size and times at which the kernel's page cache was last known to be right, or None.
    """

    __slots__ = ("birth", "device", "lookups", "name", "number", "parent", "stamp")

    def __init__(self, parent: int, name: bytes, attributes: Attributes, birth: int = 0) -> None:
        self.parent = parent
        self.name = name
        self.lookups = 0
        self.device = attributes.device
        self.number = attributes.ino
        self.birth = birth
        self.stamp: tuple[int, ...] | None = None

    def is_same(self, attributes: Attributes) -> bool:
        """Whether *attributes* are those of this very file, not of one that got its number after it."""
        return (
            attributes.ino == self.number
            and attributes.device == self.device
            and (self.birth == 0 or birth_of(attributes) == self.birth)
        )


def _nothing(nodeid: int) -> None:
    """Nobody keeps anything."""


class Inodes:
    """The table.

    Args:
        root: the attributes of the source directory.
        births: whether a file's birth time tells it from another with its number. On stacked file systems it changes
            when a file is copied up, while the file stays the same.
        count: a cell for how many there are.
    """

    def __init__(self, root: Attributes, *, births: bool = True, count: memoryview | None = None) -> None:
        self._root_device = root.device
        self._root_number = root.ino
        self._births = births
        inode = Inode(0, b"", root, 0)
        inode.lookups = 1  # the kernel never forgets the root
        self._table: dict[int, Inode] = {ROOT: inode}
        self._count = own_cell() if count is None else count
        self._count[0] = 1
        # The numbers of inodes whose own could not be used; they stay as long as the kernel knows the inode.
        self._renumbered: dict[tuple[int, int], int] = {}
        # Called with a number that was given to another file, so that nothing kept for the old one is used for it.
        self.on_reuse: Callable[[int], None] = _nothing
        # Further names of hard-linked inodes that the kernel has seen.
        self._links: dict[int, set[tuple[int, bytes]]] = {}

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
        """Note that the kernel is being told of an inode, and return the number to tell it.

        Args:
            parent: the number of the directory it was found in, 0 if it has no name.
            name: its name there.
            attributes: what statx(2) says of it.
        """
        nodeid = attributes.ino
        inode = self._table.get(nodeid)
        # Mostly the number is the source's own, and known as such; all else takes the long way.
        if inode is None or inode.number != nodeid or attributes.device != inode.device or nodeid <= ROOT:
            nodeid = self.nodeid(attributes.device, nodeid)
            inode = self._table.get(nodeid)
            if inode is None:
                birth = birth_of(attributes) if self._births else 0
                inode = self._table[nodeid] = Inode(parent, name, attributes, birth)
                self._count[0] = len(self._table)
                if nodeid != inode.number:
                    self._renumbered[inode.device, inode.number] = nodeid
        if inode.name != name or inode.parent != parent or not inode.is_same(attributes):
            self._found_elsewhere(nodeid, inode, parent, name, attributes)
        inode.lookups += 1
        return nodeid

    def _found_elsewhere(self, nodeid: int, inode: Inode, parent: int, name: bytes, attributes: Attributes) -> None:
        if not inode.is_same(attributes):  # the number was given to another file
            self._links.pop(nodeid, None)
            inode.birth = birth_of(attributes)
            inode.stamp = None
            self.on_reuse(nodeid)
        elif attributes.nlink == 1:
            self._links.pop(nodeid, None)
        elif inode.parent and attributes.mode & 0o170000 != 0o040000:
            links = self._links.setdefault(nodeid, set())
            links.add((inode.parent, inode.name))
            links.discard((parent, name))
        if nodeid != ROOT:
            inode.parent, inode.name = parent, name

    def forget(self, nodeid: int, lookups: int) -> bool:
        """Take back *lookups* of an inode; return whether it is gone from the table."""
        inode = self._table.get(nodeid)
        if inode is None or nodeid == ROOT:
            return False
        inode.lookups -= lookups
        if inode.lookups > 0:
            return False
        del self._table[nodeid]
        self._count[0] = len(self._table)
        if inode.number != nodeid:
            del self._renumbered[inode.device, inode.number]
        self._links.pop(nodeid, None)
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
            self._links.get(nodeid, set()).discard(new)
            return
        links = self._links.setdefault(nodeid, set())
        links.discard(old)
        links.add(new)

    def unlinked(self, nodeid: int, parent: int, name: bytes) -> bool:
        """Note that a name of an inode is gone; return whether another is known."""
        inode = self._table.get(nodeid)
        if inode is None:
            return False
        links = self._links.get(nodeid)
        if (inode.parent, inode.name) != (parent, name):
            if links:
                links.discard((parent, name))
            return bool(inode.parent)
        if links:
            inode.parent, inode.name = links.pop()
            return True
        inode.parent, inode.name = 0, b""
        return False
