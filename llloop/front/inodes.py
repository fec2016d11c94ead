"""The inode table: what the kernel knows, by number, and under which names it can be found again.

An inode costs no descriptor. It is one small object holding its parent's number, its name, how
often the kernel has looked it up and what tells it from another file that gets the same number
later. It goes when the kernel has forgotten it exactly as often as it was looked up. All this
stands in the journal, too, for the next front.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable

from llloop.linux.syscalls import Attributes, DirectoryEntry
from llloop.shared.journal import INODE, LINK, Journal, Record
from llloop.shared.metrics import own_cell

ROOT = 1  # FUSE_ROOT_ID of <linux/fuse.h>
_MASK = (1 << 64) - 1

# The numbers of an inode's record: nodeid, parent, number, device, birth, lookups, pinned descriptor + 1, mount.
_PARENT, _LOOKUPS, _PIN = 1, 5, 6

_TYPE, _DIRECTORY = 0o170000, 0o040000  # of st_mode
# For so long, in seconds, it is taken for granted that a mount is or is not as the root's.
_MOUNTS_STAY = 1.0


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
        mount: the mount that it belongs to, as in `llloop.linux.syscalls.Attributes`, or 0 if it may be reached through
            several: see `Inodes`.
        place: where its record is in the journal.
        stamp: the size and times at which the kernel's page cache was last known to be right, or None.
        accessed: the access time for which it was last dropped: see `llloop.front.access_times`.
    """

    __slots__ = ("accessed", "birth", "device", "lookups", "mount", "name", "number", "parent", "place", "stamp")

    def __init__(self, parent: int, name: bytes, number: int, device: int, birth: int = 0, mount: int = 0) -> None:
        self.parent = parent
        self.name = name
        self.lookups = 0
        self.device = device
        self.number = number
        self.birth = birth
        self.mount = mount
        self.place = 0
        self.stamp: tuple[int, ...] | None = None
        self.accessed: tuple[int, int] | None = None

    def is_same(self, attributes: Attributes) -> bool:
        """Whether *attributes* are those of this very file, not of one that got its number after it."""
        return (
            attributes.ino == self.number
            and attributes.device == self.device
            # birth_of(attributes), whose call would cost as much as all of this
            and (self.birth == 0 or attributes.btime * 1_000_000_000 + attributes.btime_nsec == self.birth)
            and (self.mount == 0 or attributes.mount == self.mount)
        )


def _nothing(nodeid: int) -> None:
    """Nobody keeps anything."""


def _alike(directory: int, name: bytes) -> bool:
    """Nobody looks: all mounts allow the same."""
    return True


class Inodes:
    """The table.

    One directory of the source can be reached through several mounts below it (bind mounts, a device mounted twice).
    The kernel moves a directory that it knows to wherever it is found, so a directory is an inode for each mount.
    Anything else is one inode for all mounts that allow the same, so that what is written by one path is read by the
    other; through a mount that allows less (read-only, noexec) it is another inode, since the kernel does not say by
    which path it opens one.

    Args:
        root: the attributes of the source directory.
        journal: where the next front finds the table.
        births: whether a file's birth time tells it from another with its number. On stacked file systems it changes
            when a file is copied up, while the file stays the same.
        count: a cell for how many there are.
    """

    def __init__(
        self, root: Attributes, journal: Journal, *, births: bool = True, count: memoryview | None = None
    ) -> None:
        self._journal = journal
        self._root_device = root.device
        self._root_number = root.ino
        self._reserved = frozenset({0, ROOT, root.ino})
        self.births = births
        self._root_mount = root.mount
        inode = Inode(0, b"", root.ino, root.device, mount=root.mount)
        inode.lookups = 1  # the kernel never forgets the root
        self._table: dict[int, Inode] = {ROOT: inode}
        self._count = own_cell() if count is None else count
        self._count[0] = 1
        # The numbers of inodes whose own could not be used; they stay as long as the kernel knows the inode.
        self._renumbered: dict[tuple[int, int, int], int] = {}
        # Called with a number that was given to another file, so that nothing kept for the old one is used for it.
        self.on_reuse: Callable[[int], None] = _nothing
        # Says whether the mount that holds a name in a directory allows what the root's does.
        self.is_alike: Callable[[int, bytes], bool] = _alike
        # What it said of a mount, and until when that counts (monotonic clock, seconds).
        self._mounts: dict[int, tuple[bool, float]] = {}
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
        """Return a directory's entries with the numbers that the mount shows for them where llfuse runs the loop."""
        if device != self._root_device:
            return [(self.shown(device, number), kind, name) for number, kind, name in entries]
        root = self._root_number
        return [(ROOT, entry[1], entry[2]) if entry[0] == root else entry for entry in entries]

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

    def nodeid(self, device: int, number: int, mount: int = 0) -> int:
        """Return the number under which the kernel knows, or is to know, an inode of the source.

        It is the inode's own number if that is free, which makes it quickly found.

        Args:
            device: st_dev in the source.
            number: st_ino in the source.
            mount: see `Inode`.
        """
        if number == self._root_number and device == self._root_device and mount == self._root_mount:
            return ROOT
        nodeid = self._renumbered.get((device, number, mount))
        if nodeid is not None:
            return nodeid
        nodeid = self.shown(device, number)
        while True:
            if nodeid > ROOT:
                taken = self._table.get(nodeid)
                if taken is None or (taken.number == number and taken.device == device and taken.mount == mount):
                    return nodeid
            nodeid = mix(nodeid + 0x9E3779B97F4A7C15 & _MASK)

    def known(self, parent: int, name: bytes, attributes: Attributes) -> int | None:
        """Return the number under which the kernel knows this very file, found under a name, or None."""
        nodeid = self.nodeid(attributes.device, attributes.ino, self._mount_of(parent, name, attributes))
        inode = self._table.get(nodeid)
        return nodeid if inode is not None and inode.is_same(attributes) else None

    def remember(self, parent: int, name: bytes, attributes: Attributes, directory: int = 0) -> int:
        """Note an inode that the kernel is about to be told of, and return the number to tell it.

        Only `count` says that the kernel has been told.

        Args:
            parent: the number of the directory it was found in, 0 if it has no name.
            name: its name there.
            attributes: what statx(2) says of it.
            directory: the number of the directory in which it was made without a name.
        """
        table = self._table
        nodeid = number = attributes.ino
        device = attributes.device
        inode = table.get(nodeid)
        # Mostly the file is where it was, or its own number is free; what takes a number is looked at more closely.
        if inode is not None and inode.name == name and inode.parent == parent and inode.is_same(attributes):
            return nodeid
        mount = self._mount_of(parent or directory, name, attributes)
        if inode is not None or device != self._root_device or self._renumbered or nodeid in self._reserved:
            nodeid = self.nodeid(device, number, mount)
            inode = table.get(nodeid)
        if inode is None:
            birth = birth_of(attributes) if self.births else 0
            inode = Inode(parent, name, number, self._shared(device), birth, self._shared_mount(mount))
            # The record comes first: what the kernel is told of, the next front must find.
            inode.place = self._journal.add(INODE, (nodeid, parent, number, device, birth & _MASK, 0, 0, mount), name)
            table[nodeid] = inode
            self._count[0] = len(table)
            if nodeid != number:
                self._renumbered[device, number, mount] = nodeid
        elif inode.name != name or inode.parent != parent or not inode.is_same(attributes):
            self._found_elsewhere(nodeid, inode, parent, name, attributes)
        return nodeid

    def _shared(self, device: int) -> int:
        """Return *device*, mostly as the one object that all inodes share: a number for each would cost 32 bytes."""
        return self._root_device if device == self._root_device else device

    def _shared_mount(self, mount: int) -> int:
        """Return *mount* in the same way."""
        return self._root_mount if mount == self._root_mount else mount

    def count(self, nodeid: int) -> None:
        """Note that the kernel has been told of an inode once more."""
        inode = self._table[nodeid]
        lookups = inode.lookups = inode.lookups + 1
        self._journal.set(inode.place, _LOOKUPS, lookups)

    def _found_elsewhere(self, nodeid: int, inode: Inode, parent: int, name: bytes, attributes: Attributes) -> None:
        if not inode.is_same(attributes):  # the number was given to another file
            self._drop_links(nodeid)
            inode.birth = birth_of(attributes)
            inode.stamp = None
            self.on_reuse(nodeid)
        elif attributes.nlink == 1 and self._are_on_one_mount(inode.parent, parent):
            self._drop_links(nodeid)
        elif inode.parent and attributes.mode & _TYPE != _DIRECTORY:
            self._add_link(nodeid, (inode.parent, inode.name))
            self._drop_link(nodeid, (parent, name))
        if nodeid != ROOT:
            inode.parent, inode.name = parent, name
            self._record_again(nodeid, inode)

    def _are_on_one_mount(self, *directories: int) -> bool:
        """Whether some directories are; then a file with one link has only one name in all of them."""
        return len({self._table[nodeid].mount for nodeid in directories if nodeid in self._table}) < 2

    def lookups(self, nodeid: int) -> int:
        """Return how often the kernel has looked up an inode and not forgotten it."""
        inode = self._table.get(nodeid)
        return 0 if inode is None else inode.lookups

    def restore_lookups(self, nodeid: int, lookups: int) -> None:
        """Set how often the kernel has looked up an inode, if it is still in the table."""
        inode = self._table.get(nodeid)
        if inode is not None:
            inode.lookups = lookups
            self._journal.set(inode.place, _LOOKUPS, lookups)

    def forget(self, nodeid: int, lookups: int) -> bool:
        """Take back *lookups* of an inode; return whether it is gone from the table."""
        inode = self._table.get(nodeid)
        if inode is None or nodeid == ROOT:
            return False
        left = inode.lookups = inode.lookups - lookups
        journal = self._journal
        if left > 0:
            journal.set(inode.place, _LOOKUPS, left)
            return False
        journal.remove(inode.place)
        del self._table[nodeid]
        self._count[0] = len(self._table)
        if inode.number != nodeid:
            del self._renumbered[inode.device, inode.number, inode.mount]
        self._drop_links(nodeid)
        return True

    def other_names(self, nodeid: int) -> list[tuple[int, bytes]]:
        """Return the further names of a hard-linked inode that the kernel has seen, as (parent, name)."""
        return list(self._links.get(nodeid, ()))

    def has_name(self, nodeid: int, parent: int, name: bytes) -> bool:
        """Whether the kernel has been told that *name* in *parent* leads to an inode."""
        inode = self.get(nodeid)
        return (inode.name == name and inode.parent == parent) or (parent, name) in self._links.get(nodeid, ())

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
        self._journal.set(inode.place, _PARENT, 0)
        return False

    # The journal

    def _record(self, nodeid: int, inode: Inode, pin: int) -> int:
        return self._journal.add(
            INODE,
            (nodeid, inode.parent, inode.number, inode.device, inode.birth & _MASK, inode.lookups, pin, inode.mount),
            inode.name,
        )

    def _record_again(self, nodeid: int, inode: Inode) -> None:
        """Bring an inode's record up to date."""
        old = inode.place
        journal = self._journal
        inode.place = self._record(nodeid, inode, journal.get(old, _PIN) if old else 0)
        journal.remove(old)

    def note_pin(self, nodeid: int, fd: int) -> None:
        """Note the descriptor that keeps an inode without names, or -1."""
        inode = self._table.get(nodeid)
        if inode is not None:
            self._journal.set(inode.place, _PIN, fd + 1)

    def _add_link(self, nodeid: int, link: tuple[int, bytes]) -> None:
        links = self._links.setdefault(nodeid, {})
        if link not in links:
            links[link] = self._journal.add(LINK, (nodeid, link[0], 0, 0, 0, 0, 0, 0), link[1])

    def _drop_link(self, nodeid: int, link: tuple[int, bytes]) -> None:
        links = self._links.get(nodeid)
        if links is not None and link in links:
            self._journal.remove(links.pop(link))

    def _drop_links(self, nodeid: int) -> None:
        for place in self._links.pop(nodeid, {}).values():
            self._journal.remove(place)

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
                nodeid, parent, number, device, birth, lookups, pin, mount = record.fields
                # A birth before 1970 is negative.
                name = record.name if parent else b""
                shared = self._shared(device), birth - (birth >> 63 << 64), self._shared_mount(mount)
                inode = Inode(parent, name, number, *shared)
                inode.lookups = lookups
                inode.place = record.place
                superseded = self._table.get(nodeid)
                if superseded is not None:
                    self._journal.remove(superseded.place)
                    pins.pop(nodeid, None)
                self._table[nodeid] = inode
                if nodeid != number:
                    self._renumbered[device, number, mount] = nodeid
                if pin:
                    pins[nodeid] = pin - 1
        for record in records:
            if record.kind == LINK:
                nodeid, parent = record.fields[:2]
                links = self._links.setdefault(nodeid, {})
                inode_of = self._table.get(nodeid)
                link = (parent, record.name)
                if inode_of is None or link in links or link == (inode_of.parent, inode_of.name):
                    self._journal.remove(record.place)
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
