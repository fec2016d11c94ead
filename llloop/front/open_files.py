"""Open files and directories: one descriptor for each open(2), with a file handle that is never reused."""

from __future__ import annotations

import errno
import os
from collections.abc import Container, Iterator

from llloop.front.descriptor_shares import Shares
from llloop.front.page_cache import PageCache
from llloop.front.recovery.snapshots import is_snapshot
from llloop.linux.credentials import is_mandatory_lock_mode
from llloop.linux.syscalls import Attributes, DirectoryEntry
from llloop.shared.journal import Journal
from llloop.shared.messages import HANDLES_PER_FRONT
from llloop.shared.metrics import own_cell

# The fields of a handle's record: number, nodeid, descriptor, open(2) flags, backing id, the snapshot's descriptor + 1,
# the opener's uid and gid.
_BACKING, _SNAPSHOT = 4, 5


class Handle:
    """One open file or directory.

    Attributes:
        descriptor: the front's descriptor.
        nodeid: the inode.
        shard: the worker that does its I/O.
        file: the identity of the file, with which a worker checks the descriptor (`messages.identity_of`); 0 if files
            have no lasting identity.
        mount: the mount through which it was opened, as in `llloop.linux.syscalls.Attributes`; the device if there is
            no mount ID.
        flags: the caller's open(2) flags.
        direct: whether the flags contain O_DIRECT.
        pages: the state of the inode's cached pages; None if the inode was not opened for writing since its first
            handle.
        backing: the backing id with which the kernel does the I/O itself, or 0.
        in_worker: whether that worker may have the descriptor too, so that it must get the release.
        in_all_workers: whether any worker may have it, because data was copied from the file.
        read_flags, write_flags: the RWF_ flags (preadv2(2)) with which the front may try a small read or write, or None
            if it must not.
        unsized: whether the file's size is meaningless (see `llloop.front.unsized_files`).
        entries: a directory's entries when it was opened or rewound, or None; only with `--loop llfuse`.
        snapshot: a memfd that contains the directory's entries for the next front, or -1.
        place: the place of its record in the journal.
        opener: the uid and gid of the process that opened it; writes from the kernel's page cache use them.
        locking_group: the group whose members do not clear the set-group-ID bit by writing; -1 if every write clears
            it.
        uncached: whether the kernel bypasses its page cache, so that it does not ask for set-ID bits to be cleared
            before a write; True also if that is unknown.
        writeback_errors: how many writes had failed in its worker when it was opened for writing.
        append: whether it was opened with O_APPEND; only with `--loop llfuse`, whose write handler does not know.
    """

    __slots__ = (
        "append",
        "backing",
        "descriptor",
        "direct",
        "entries",
        "file",
        "flags",
        "in_all_workers",
        "in_worker",
        "locking_group",
        "mount",
        "nodeid",
        "opener",
        "pages",
        "place",
        "read_flags",
        "shard",
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
        self.in_worker = False
        self.read_flags: int | None = None
        self.write_flags: int | None = None
        self.in_all_workers = False
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
        """Note the locking group that follows from the file's current mode."""
        self.locking_group = attributes.gid if is_mandatory_lock_mode(attributes.mode) else -1


class Handles:
    """All open files and directories by file handle.

    Args:
        journal: contains their records for the next front.
        generation: the number of this front, counted from 1, so that no two fronts assign the same handle.
        shares: limits each user's descriptors.
        count: the gauge of open handles.
        writeback: whether the kernel caches writes.

    Attributes:
        written: the page caches of open inodes that were opened for writing.
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

    def __iter__(self) -> Iterator[int]:
        return iter(self._table)

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
        """Add *handle* and return its number."""
        number = self._next
        self._next = number + 1
        uid, gid = handle.opener
        opener = uid << 32 | gid
        handle.place = self._journal.add(number, handle.nodeid, handle.descriptor, handle.flags, 0, 0, opener, 0)
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
        """Add a handle of a dead front, whose record is at *place*."""
        handle.place = place
        self._enter(number, handle)

    def take_over_snapshot(self, handle: Handle, descriptor: int, left: set[int]) -> None:
        """Add the snapshot of a dead front to *handle*, if its descriptor is in *left*, and remove it from there."""
        if descriptor in left and is_snapshot(descriptor):
            left.discard(descriptor)
            handle.snapshot = descriptor
            self.shares.take(handle.opener[0])
        else:
            self._journal.set(handle.place, _SNAPSHOT, 0)

    def note_backing(self, handle: Handle, backing: int) -> None:
        """Note the backing id with which the kernel does the I/O of *handle* itself."""
        handle.backing = backing
        self._journal.set(handle.place, _BACKING, backing)

    def note_snapshot(self, handle: Handle, descriptor: int) -> None:
        """Note a memfd with a directory's entries, or -1, and close the previous one."""
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
        """Remove and return a handle; the caller must close its descriptors.

        Raises:
            OSError: EBADF if there is none.
        """
        handle = self.get(number)
        self._journal.remove(handle.place)  # before its descriptors are closed, whose numbers may be reused
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
        """Return the uid and gid for a write from the kernel's page cache through *handle*.

        The data may come from any process that has the file open for writing. So root's ids are only used if no other
        user has it open for writing.
        """
        if handle.opener[0] == 0:
            for other in self._of_inode[handle.nodeid]:
                if other.opener[0] and other.is_writable:
                    return other.opener
        return handle.opener

    def may_be_dirty(self, nodeid: int) -> bool:
        """Return whether the kernel may have dirty pages of an inode.

        It may if a process may have a shared writable mapping. That requires that the file is open for reading and
        writing, and keeps it open. With a writeback cache, it also may if the file is open for writing.
        """
        if nodeid not in self.written:
            return False
        modes = [handle.flags & os.O_ACCMODE for handle in self._of_inode[nodeid] if not handle.backing]
        return any(modes) if self._writeback else os.O_RDWR in modes

    def of_inode(self, nodeid: int) -> list[Handle]:
        """Return the open handles of an inode."""
        return self._of_inode.get(nodeid, [])
