"""Replacements for the kernel and for statx(2) in tests without a mount."""

from __future__ import annotations

import copy
import fcntl
import gc
import os
import stat
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from llloop.front.inodes import Inodes
from llloop.linux import fuse
from llloop.linux.credentials import Writer
from llloop.linux.syscalls import Attributes
from llloop.shared.journal import Journal
from llloop.shared.table import Table

F_SETPIPE_SZ = 1031  # <linux/fcntl.h>


def attributes(
    ino: int = 100,
    *,
    device: int = 0x801,
    birth: int = 1,
    nlink: int = 1,
    mode: int = stat.S_IFREG | 0o644,
    size: int = 0,
    mtime: tuple[int, int] = (0, 0),
    ctime: tuple[int, int] = (0, 0),
) -> Attributes:
    """Returns attributes of a fictitious file."""
    seconds, nanoseconds = divmod(birth, 1_000_000_000)
    zero = Attributes._make([0] * len(Attributes._fields))
    return zero._replace(
        ino=ino,
        device=device,
        btime=seconds,
        btime_nsec=nanoseconds,
        nlink=nlink,
        mode=mode,
        size=size,
        mtime=mtime[0],
        mtime_nsec=mtime[1],
        ctime=ctime[0],
        ctime_nsec=ctime[1],
    )


class Reply(NamedTuple):
    """One reply as the kernel reads it."""

    unique: int
    error: int
    payload: bytes


class OwnIdentity(Writer):
    """A writer that never changes its ids, because other tests run in this process."""

    def assume(self, uid: int, gid: int) -> None:
        """Change nothing."""


class ClosedAtOnce(list[int]):
    """Replaces the list of descriptors to close later; closes them immediately."""

    def append(self, fd: int, /) -> None:
        os.close(fd)


class Device:
    """A file instead of /dev/fuse: replies that are written or spliced to it can be read."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("device", os.MFD_CLOEXEC)
        self._taken = 0

    def take(self) -> list[Reply]:
        """The replies since the last call."""
        end = os.fstat(self.fd).st_size
        data = os.pread(self.fd, end - self._taken, self._taken)
        self._taken = end
        replies = []
        while data:
            length, error, unique = fuse.OUT_HEADER.unpack_from(data)
            assert fuse.OUT_HEADER_SIZE <= length <= len(data), "a reply does not have the length that it announces"
            replies.append(Reply(unique, -error, data[fuse.OUT_HEADER_SIZE : length]))
            data = data[length:]
        return replies

    def only(self) -> Reply:
        """The one reply since the last call."""
        replies = self.take()
        assert len(replies) == 1, replies
        return replies[0]

    def close(self) -> None:
        os.close(self.fd)


@contextmanager
def packet_pipe(room: int = 16) -> Iterator[tuple[int, int]]:
    """Creates a non-blocking pipe in packet mode for that many messages."""
    reader, writer = os.pipe2(os.O_DIRECT | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(writer, F_SETPIPE_SZ, room * fuse.PAGE_SIZE)
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def packets(reader: int) -> list[bytes]:
    """Returns all messages in a pipe."""
    found = []
    while True:
        try:
            found.append(os.read(reader, fuse.PAGE_SIZE))
        except BlockingIOError:
            return found


class Heir(Journal):
    """A journal as another process sees it that was forked before anything was recorded."""

    def __init__(self, journal: Journal) -> None:
        vars(self).update(vars(journal))
        self._free = array("Q")


def heir_of_table(table: Table) -> Table:
    """Returns the table as another process sees it that has not called `recover` yet."""
    return copy.copy(table)


def some_inodes() -> Inodes:
    """Returns a table that contains only the root."""
    return Inodes(attributes(2), Table(64))


def nodeid_of(inodes: Inodes, path: Path) -> int:
    """Returns the nodeid of a file in the source, 0 if the kernel does not know it."""
    number = os.lstat(path).st_ino
    return next((nodeid for nodeid in inodes if inodes.get(nodeid).number == number), 0)


def close_journal(journal: Journal) -> None:
    """Closes the journal's descriptor now, because other tests count descriptors."""
    journal.cells.release()
    journal.memory.close()


def open_descriptors() -> int:
    """Returns the number of open descriptors, after a garbage collection."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
