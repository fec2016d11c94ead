"""The pipes that the data of large writes wait in, so that the front need not copy them.

The kernel moves a WRITE request into a pipe as references to its pages (splice(2) from /dev/fuse), and the
worker moves them on from the pipe into the file: the bytes are copied once, there. A pipe belongs to a slot of the
arena and is made before the first fork, so that it lives on when a worker dies. What the worker had moved until then
is out of the pipe and in the file, and the kernel keeps the two equal, so the rest tells a successor where to go on.
"""

from __future__ import annotations

import fcntl
import os
import resource
import termios
from struct import Struct

from llloop.linux import fuse, syscalls

# How many large writes can be on their way at once; beyond that they are copied into their slots.
_MOST = 16
# An ordinary user has 64 MiB for all his pipes (pipe(7), pipe-user-pages-soft), and may serve more than one mount.
_MOST_OF_A_USER = 4
# How many payloads can wait in pipes of their own for a pipe of a slot; beyond that they are copied. So many of these
# pipes are kept for the next ones.
_MOST_SPARE = 4096
_KEPT_SPARE = 32
# Where a process may open few files, most of them are for those of the mount.
_SHARE = 32
_INT = Struct("=i")


class PayloadPipes:
    """A pipe for each of the first slots.

    Args:
        slots: how many slots there are.
        payload: the largest payload of a WRITE request in bytes.
    """

    def __init__(self, slots: int, payload: int) -> None:
        # The headers take a page of their own.
        needed = payload + 2 * fuse.PAGE_SIZE
        self._request = fuse.WRITE_HEADER_SIZE + payload
        self._pipes: list[tuple[int, int]] = []
        self._needed = needed
        self._spare: list[tuple[int, int]] = []
        self._lent = 0
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        effective, _, _ = syscalls.get_capabilities()
        self._most_spare = min(_MOST_SPARE, descriptors // _SHARE) if effective & 1 << syscalls.CAP_SYS_ADMIN else 0
        most = _MOST if effective & 1 << syscalls.CAP_SYS_ADMIN else _MOST_OF_A_USER
        for _ in range(min(slots, most, descriptors // _SHARE)):
            reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, needed)
            except PermissionError:  # the user's share of pipe pages is used up (pipe(7))
                os.close(reader)
                os.close(writer)
                break
            self._pipes.append((reader, writer))

    def __len__(self) -> int:
        return len(self._pipes)

    @property
    def descriptors(self) -> list[int]:
        """All ends of all pipes."""
        return [end for pipe in self._pipes for end in pipe]

    def receive(self, slot: int, device: int) -> int:
        """Move the next request of *device* into the pipe of *slot* and return its length.

        Raises:
            OSError: as read(2) of the device.
        """
        return os.splice(device, self._pipes[slot][1], self._request)

    def take(self, slot: int, buffer: memoryview) -> int:
        """Copy bytes out of the pipe of *slot* into *buffer* and return how many."""
        return os.readv(self._pipes[slot][0], [buffer])

    def left(self, slot: int) -> int:
        """Return how many bytes the pipe of *slot* holds."""
        (count,) = _INT.unpack(fcntl.ioctl(self._pipes[slot][0], termios.FIONREAD, bytes(_INT.size)))
        return int(count)

    def move(self, slot: int, fd: int, length: int, offset: int) -> int:
        """Move bytes from the pipe of *slot* to *offset* of the file *fd* and return how many (splice(2))."""
        return os.splice(self._pipes[slot][0], fd, length, offset_dst=offset)

    def set_aside(self, slot: int, length: int) -> tuple[int, int] | None:
        """Move a payload of *length* bytes out of the pipe of *slot* into another, and return that.

        Returns:
            None if there can be no more pipes; then nothing was moved.
        """
        spare = self._spare.pop() if self._spare else self._make_spare()
        if spare is not None:
            self._lent += 1
            _move_all(self._pipes[slot][0], spare[1], length)
        return spare

    def bring_back(self, slot: int, spare: tuple[int, int], length: int) -> None:
        """Move a payload that was set aside into the pipe of *slot*; *spare* is for others then."""
        _move_all(spare[0], self._pipes[slot][1], length)
        self._lent -= 1
        if len(self._spare) < _KEPT_SPARE:
            self._spare.append(spare)
        else:
            os.close(spare[0])
            os.close(spare[1])

    def _make_spare(self) -> tuple[int, int] | None:
        if self._lent >= self._most_spare:
            return None
        try:
            reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:  # no descriptors are left
            return None
        try:
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, self._needed)
        except OSError:
            os.close(reader)
            os.close(writer)
            return None
        return reader, writer


def _move_all(source: int, target: int, length: int) -> None:
    """Move bytes from one pipe to another that has room for them (splice(2)): its pages, not their content."""
    while length:
        length -= os.splice(source, target, length)
