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

from . import syscalls, wire

# How many large writes can be on their way at once; beyond that they are copied into their slots.
_MOST = 16
# An ordinary user has 64 MiB for all his pipes (pipe(7), pipe-user-pages-soft), and may serve more than one mount.
_MOST_OF_A_USER = 4
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
        needed = payload + 2 * wire.PAGE_SIZE
        self._request = wire.WRITE_HEADER_SIZE + payload
        self._pipes: list[tuple[int, int]] = []
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        effective, _, _ = syscalls.get_capabilities()
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
