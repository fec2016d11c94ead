"""Open files and directories: one descriptor per open(2), under a number that is never used again."""

from __future__ import annotations

import errno
import os
from collections.abc import Container, Iterator

from llloop.front.descriptor_shares import Shares
from llloop.front.page_cache import PageCache
from llloop.front.recovery.snapshots import is_snapshot
from llloop.linux.credentials import is_mandatory_lock_mode
from llloop.linux.syscalls import Attributes, DirectoryEntry
from llloop.shared.journal import HANDLE, Journal
from llloop.shared.messages import HANDLES_PER_FRONT
from llloop.shared.metrics import own_cell

# The numbers of a handle's record: its own, nodeid, descriptor, open(2) flags, registration with the kernel,
# the snapshot's descriptor + 1, the opener's uid and gid.
_BACKING, _SNAPSHOT = 4, 5


class Handle:
    """One open file or directory.

    Attributes:
        descriptor: the front's descriptor of it.
        nodeid: its inode.
        shard: the worker that does its I/O.
        file: the identity of the file, by which a worker knows the descriptor (`protocol.identity_of`); 0 if files have
            none that lasts.
        mount: the mount it was opened through, as in `llloop.linux.syscalls.Attributes`; its device
            where there is none.
        flags: the caller's open(2) flags.
        direct: whether O_DIRECT is among them.
        pages: what the kernel's page cache may hold of it, or None if its inode was not opened for writing since the
            inode's first handle.
        backing: the registration by which the kernel does its I/O itself, or 0.
        lent: whether that worker may hold the descriptor too and must be told of the release.
        shared: whether any worker may, because the file was copied from.
        read_flags, write_flags: the RWF_ flags (preadv2(2)) with which the front may try a small read or write itself
            because it cannot block, or None if it may not.
        unsized: whether the file's size says nothing about what can be read from it (see `llloop.front.unsized_files`).
        entries: a directory's entries as they were when it was opened or rewound, or None.
        snapshot: a descriptor of memory that holds these entries for the next front, or -1.
        place: where its record is in the journal.
        opener: the uid and gid that opened it: what the kernel writes from its page cache counts as theirs.
        locking_group: the group whose members do not clear the set-group-ID bit by writing, -1 where anybody's write
            clears it.
        uncached: whether the kernel passes its page cache over, and so does not ask to clear set-ID bits before it
            writes; also if that is not known.
        late_errors: how many writes had failed in its worker when it was opened for writing.
        append: whether it was opened with O_APPEND; only used where llfuse runs the loop, whose write handler does not
            say.
    """

    __slots__ = (
        "append",
        "backing",
        "descriptor",
        "direct",
        "entries",
        "file",
        "flags",
        "lent",
        "locking_group",
        "mount",
        "nodeid",
        "opener",
        "pages",
        "place",
        "read_flags",
        "shard",
        "shared",
        "snapshot",
        "uncached",
        "unsized",
        "write_flags",
        "writeback_errors",
    )

    def __init__(self, descriptor: int, nodeid: int, shard: int, flags: int, opener: tuple[int, int] = (0, 0)) -> None:
        self.descriptor = descriptor
        self.nodeid = nodeid
        self.shard = shard
        self.file = 0
        self.mount = 0
        self.flags = flags
        self.direct = bool(flags & os.O_DIRECT)
        self.pages: PageCache | None = None
        self.backing = 0
        self.lent = False
        self.read_flags: int | None = None
        self.write_flags: int | None = None
        self.shared = False
        self.opener = opener
        self.locking_group = -1
        self.uncached = False
        self.unsized = False
        self.append = False
        self.writeback_errors = 0
        self.entries: list[DirectoryEntry] | None = None
        self.snapshot = -1
        self.place = 0

    @property
    def is_writable(self) -> bool:
        """Whether the file is open for writing."""
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    def note_mode(self, attributes: Attributes) -> None:
        """Note what follows from the mode that the file has now."""
        self.locking_group = attributes.gid if is_mandatory_lock_mode(attributes.mode) else -1


class Handles:
    """All open files and directories by number.

    Args:
        journal: where the next front finds them.
        generation: how many fronts there have been, this one included; no two give out the same number.
        shares: how many descriptors each user may hold.
        count: a cell for how many are.
        writeback: whether the kernel collects writes.

    Attributes:
        written: the page caches of the inodes that are open and were opened for writing.
    """

    def __init__(
        self,
        journal: Journal,
        generation: int,
        shares: Shares,
        count: memoryview | None = None,
        *,
        writeback: bool = False,
    ) -> None:
        self._journal = journal
        self.shares = shares
        self._count = own_cell() if count is None else count
        self._count[0] = 0
        self._table: dict[int, Handle] = {}
        self._of_inode: dict[int, list[Handle]] = {}
        self._next = generation * HANDLES_PER_FRONT
        self.written: dict[int, PageCache] = {}
        self._writeback = writeback

    @property
    def next_number(self) -> int:
        """The number that the next handle gets."""
        return self._next

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, number: int) -> bool:
        return number in self._table

    def descriptors(self) -> Iterator[int]:
        """Yield every descriptor that belongs to an open file or directory."""
        for handle in self._table.values():
            yield handle.descriptor
            if handle.snapshot >= 0:
                yield handle.snapshot

    def open_inodes(self) -> Container[int]:
        """Return the inodes that are open."""
        return self._of_inode

    def add(self, handle: Handle) -> int:
        """Take *handle* in and return its number."""
        number = self._next
        self._next = number + 1
        uid, gid = handle.opener
        fields = (number, handle.nodeid, handle.descriptor, handle.flags, 0, 0, uid << 32 | gid, 0)
        handle.place = self._journal.add(HANDLE, fields)
        self._enter(number, handle)
        return number

    def _enter(self, number: int, handle: Handle) -> None:
        self.shares.take(handle.opener[0])
        self._table[number] = handle
        self._count[0] = len(self._table)
        nodeid = handle.nodeid
        handles = self._of_inode.setdefault(nodeid, [])
        handles.append(handle)
        if nodeid in self.written:
            handle.pages = self.written[nodeid]
        elif handle.flags & os.O_ACCMODE:
            pages = self.written[nodeid] = PageCache()
            for one in handles:
                one.pages = pages

    def take_over(self, number: int, handle: Handle, place: int) -> None:
        """Take in a handle of a front that is gone, whose record is at *place*."""
        handle.place = place
        self._enter(number, handle)

    def take_over_snapshot(self, handle: Handle, descriptor: int, left: set[int]) -> None:
        """Take in the snapshot of a front that is gone, if it is among the descriptors that are *left*."""
        if descriptor in left and is_snapshot(descriptor):
            left.discard(descriptor)
            handle.snapshot = descriptor
            self.shares.take(handle.opener[0])
        else:
            self._journal.set(handle.place, _SNAPSHOT, 0)

    def note_backing(self, handle: Handle, backing: int) -> None:
        """Note by which registration the kernel does the I/O of *handle* itself."""
        handle.backing = backing
        self._journal.set(handle.place, _BACKING, backing)

    def note_snapshot(self, handle: Handle, descriptor: int) -> None:
        """Note a descriptor of memory with a directory's entries, or -1, and close the one before it."""
        old, handle.snapshot = handle.snapshot, descriptor
        self._journal.set(handle.place, _SNAPSHOT, descriptor + 1)
        if descriptor >= 0:
            self.shares.take(handle.opener[0])
        if old >= 0:
            self.shares.give_back(handle.opener[0])
            os.close(old)

    def get(self, number: int) -> Handle:
        """Return the handle with that number.

        Raises:
            OSError: EBADF if there is none.
        """
        handle = self._table.get(number)
        if handle is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return handle

    def remove(self, number: int) -> Handle:
        """Take the handle out; closing its descriptors is left to the caller.

        Raises:
            OSError: EBADF if there is none.
        """
        handle = self.get(number)
        self._journal.remove(handle.place)  # before its descriptors are closed: no record names one that is not its own
        del self._table[number]
        self._count[0] = len(self._table)
        uid, _ = handle.opener
        self.shares.give_back(uid)
        if handle.snapshot >= 0:
            self.shares.give_back(uid)
        others = self._of_inode[handle.nodeid]
        if len(others) == 1:
            del self._of_inode[handle.nodeid]
            self.written.pop(handle.nodeid, None)
        else:
            others.remove(handle)
        return handle

    def writer(self, handle: Handle) -> tuple[int, int]:
        """Return the uid and gid as whose counts what the kernel writes through *handle* from its page cache.

        It can come from any process that has the file open for writing. So it is root's only if nobody else has.
        """
        if handle.opener[0] == 0:
            for other in self._of_inode[handle.nodeid]:
                if other.opener[0] and other.is_writable:
                    return other.opener
        return handle.opener

    def may_be_dirty(self, nodeid: int) -> bool:
        """Whether the kernel may have pages of an inode that it has not written yet.

        It can if somebody may have a shared mapping for writing, for which the file must be open for both reading and
        writing. The file stays open as long as the mapping exists. Where the kernel collects writes, it also can if the
        file is open for writing.
        """
        if nodeid not in self.written:
            return False
        modes = [handle.flags & os.O_ACCMODE for handle in self._of_inode[nodeid] if not handle.backing]
        return any(modes) if self._writeback else os.O_RDWR in modes

    def of_inode(self, nodeid: int) -> list[Handle]:
        """Return the open handles of an inode."""
        return self._of_inode.get(nodeid, [])
