"""Open files and directories: one descriptor per open(2), under a number that is never used again."""

from __future__ import annotations

import errno
import os
from collections.abc import Container

from ..metrics import own_cell
from ..protocol import HANDLES_PER_FRONT
from ..syscalls import DirectoryEntry


class Handle:
    """One open file or directory.

    Attributes:
        descriptor: the front's descriptor of it.
        nodeid: its inode.
        shard: the worker that does its I/O.
        device: the file system it is on, as in `llloop.syscalls.Attributes`.
        direct: whether it was opened with O_DIRECT.
        backed: whether the kernel does its I/O itself.
        lent: whether that worker may hold the descriptor too and must be told of the release.
        shared: whether any worker may, because the file was copied from.
        read_flags, write_flags: the RWF_ flags (preadv2(2)) with which the front may try a small read or write itself
            because it cannot block, or None if it may not.
        entries: a directory's entries as they were when it was opened or rewound, or None.
        append, writer: whether it was opened with O_APPEND, and by which uid and gid; only used where llfuse runs
            the loop, whose write handler says neither.
    """

    __slots__ = (
        "append",
        "backed",
        "descriptor",
        "device",
        "direct",
        "entries",
        "lent",
        "nodeid",
        "read_flags",
        "shard",
        "shared",
        "write_flags",
        "writer",
    )

    def __init__(self, descriptor: int, nodeid: int, shard: int, direct: bool) -> None:
        self.descriptor = descriptor
        self.nodeid = nodeid
        self.shard = shard
        self.device = 0
        self.direct = direct
        self.backed = False
        self.lent = False
        self.read_flags: int | None = None
        self.write_flags: int | None = None
        self.shared = False
        self.append = False
        self.writer = (0, 0)
        self.entries: list[DirectoryEntry] | None = None


class Handles:
    """All open files and directories by number.

    Args:
        generation: how many fronts there have been, this one included. A number given out by an earlier front means
            nothing to this one: whoever still has it open gets EBADF, never somebody else's file.
        capacity: how many may be open, so that descriptors are left for names and directories.
        count: a cell for how many are.
    """

    def __init__(self, generation: int = 1, capacity: int = 1 << 30, count: memoryview | None = None) -> None:
        self._capacity = capacity
        self._count = own_cell() if count is None else count
        self._count[0] = 0
        self._table: dict[int, Handle] = {}
        self._of_inode: dict[int, list[Handle]] = {}
        self._next = generation * HANDLES_PER_FRONT

    def __len__(self) -> int:
        return len(self._table)

    def open_inodes(self) -> Container[int]:
        """Return the inodes that are open."""
        return self._of_inode

    def ensure_room(self) -> None:
        """Refuse one more open file if there are as many as may be.

        Raises:
            OSError: ENFILE.
        """
        if len(self._table) >= self._capacity:
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

    def add(self, handle: Handle) -> int:
        """Take *handle* in and return its number."""
        number = self._next
        self._next = number + 1
        self._table[number] = handle
        self._count[0] = len(self._table)
        self._of_inode.setdefault(handle.nodeid, []).append(handle)
        return number

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
        """Take the handle out; closing its descriptor is left to the caller.

        Raises:
            OSError: EBADF if there is none.
        """
        handle = self.get(number)
        del self._table[number]
        self._count[0] = len(self._table)
        others = self._of_inode[handle.nodeid]
        if len(others) == 1:
            del self._of_inode[handle.nodeid]
        else:
            others.remove(handle)
        return handle

    def of_inode(self, nodeid: int) -> list[Handle]:
        """Return the open handles of an inode."""
        return self._of_inode.get(nodeid, [])
