"""What stands in for the kernel's side and for statx(2) where nothing is mounted."""

from __future__ import annotations

import copy
import fcntl
import gc
import os
import stat
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from llloop.linux import fuse
from llloop.linux.credentials import Writer
from llloop.linux.syscalls import Attributes
from llloop.shared.journal import Journal

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
    """The attributes of a file that need not exist."""
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
    """One reply as the kernel would read it."""

    unique: int
    error: int
    payload: bytes


class OwnIdentity(Writer):
    """A writer that always stays itself, for the sake of the other tests in this process."""

    def assume(self, uid: int, gid: int) -> None:
        """Change nothing."""


class ClosedAtOnce(list[int]):
    """In the place of the list of what a front closes when it has answered."""

    def append(self, fd: int, /) -> None:
        os.close(fd)


class Device:
    """A file in the place of /dev/fuse: what is written or spliced to it is read back as replies."""

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
    """A pipe in packet mode for that many messages, whose ends do not block."""
    reader, writer = os.pipe2(os.O_DIRECT | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(writer, F_SETPIPE_SZ, room * fuse.PAGE_SIZE)
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def packets(reader: int) -> list[bytes]:
    """All messages that lie in a pipe."""
    found = []
    while True:
        try:
            found.append(os.read(reader, fuse.PAGE_SIZE))
        except BlockingIOError:
            return found


def heir(journal: Journal) -> Journal:
    """The same memory as another process finds it that was forked before anything was recorded."""
    own = copy.copy(journal)
    own._free = array("Q")
    own._age = 0
    return own


def close_journal(journal: Journal) -> None:
    """Close its descriptor now, not when it is collected as garbage, while another test counts descriptors."""
    journal.cells.release()
    journal.memory.close()


def open_descriptors() -> int:
    """How many descriptors this process has open; without those of garbage, which go at a moment of their own."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
