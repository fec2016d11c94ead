"""Pipes for the data of large writes, so that the front does not copy the data.

With splice(2) from /dev/fuse, the kernel moves references to a WRITE request's pages into a pipe. The worker splices
them from the pipe into the file. The data is copied only once, into the file. Each pipe belongs to a slot. The
supervisor creates it before the first fork, so it survives a worker. If a worker dies in the middle, exactly the bytes
that are not yet in the file remain in the pipe. So its successor knows where to continue.
"""

from __future__ import annotations

import fcntl
import os
import resource
import termios
from itertools import chain
from struct import Struct

from llloop.linux import fuse, syscalls

# The number of slots with a pipe. Further large writes are copied into their slots.
_MOST = 16
# An ordinary user has 64 MiB for all pipes (pipe(7), pipe-user-pages-soft), and may serve more than one mount.
_MOST_OF_A_USER = 4
# The maximum number of spare pipes, in which payloads wait for the pipe of a slot. Further payloads are copied. So many
# spare pipes stay open for reuse.
_MOST_SPARE = 4096
_KEPT_SPARE = 32
# The pipes may use this fraction of the descriptors (1/32). The rest is for files of the mount.
_SHARE = 32
_INT = Struct("=i")


class PayloadPipes:
    """The pipes of the first slots, and spare pipes.

    Args:
        slots: the number of slots.
        payload: the largest payload of a WRITE request in bytes.

    Attributes:
        lent: the number of spare pipes with payloads.
    """

    def __init__(self, slots: int, payload: int) -> None:
        # The headers occupy a page of their own.
        needed = payload + 2 * fuse.PAGE_SIZE
        self._request = fuse.WRITE_HEADER_SIZE + payload
        self._pipes: list[tuple[int, int]] = []
        self._needed = needed
        self._spare: list[tuple[int, int]] = []
        self.lent = 0
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        effective, _, _ = syscalls.get_capabilities()
        self._most_spare = min(_MOST_SPARE, descriptors // _SHARE) if effective & 1 << syscalls.CAP_SYS_ADMIN else 0
        most = _MOST if effective & 1 << syscalls.CAP_SYS_ADMIN else _MOST_OF_A_USER
        for _ in range(min(slots, most, descriptors // _SHARE)):
            reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, needed)
            except PermissionError:  # the user's limit of pipe pages is reached (pipe(7))
                os.close(reader)
                os.close(writer)
                break
            self._pipes.append((reader, writer))

    def __len__(self) -> int:
        return len(self._pipes)

    @property
    def descriptors(self) -> list[int]:
        """The descriptors of both ends of all pipes."""
        return [end for pipe in self._pipes for end in pipe]

    def close(self) -> None:
        """Close all pipes, also the spare ones that contain no payload."""
        for end in chain(*self._pipes, *self._spare):
            os.close(end)

    def receive(self, slot: int, device: int) -> int:
        """Splice the next request from *device* into the pipe of *slot*; return its length in bytes.

        Raises:
            OSError: as for read(2) on /dev/fuse.
        """
        return os.splice(device, self._pipes[slot][1], self._request)

    def take(self, slot: int, buffer: memoryview) -> int:
        """Read from the pipe of *slot* into *buffer*; return the number of bytes."""
        return os.readv(self._pipes[slot][0], [buffer])

    def take_all(self, slot: int, buffer: memoryview) -> None:
        """Fill *buffer* from the pipe of *slot*, which contains as much."""
        _read_all(self._pipes[slot][0], buffer)

    def left(self, slot: int) -> int:
        """Return the number of bytes in the pipe of *slot*."""
        (count,) = _INT.unpack(fcntl.ioctl(self._pipes[slot][0], termios.FIONREAD, bytes(_INT.size)))
        return int(count)

    def move(self, slot: int, fd: int, length: int, offset: int) -> int:
        """Splice up to *length* bytes from the pipe of *slot* to *offset* of the file *fd*; return the number."""
        return os.splice(self._pipes[slot][0], fd, length, offset_dst=offset)

    def set_aside(self, slot: int, length: int) -> tuple[int, int] | None:
        """Move a payload of *length* bytes from the pipe of *slot* into a spare pipe.

        Returns:
            The spare pipe (read end, write end); None if there is none, and nothing was moved.
        """
        spare = self._spare.pop() if self._spare else self._make_spare()
        if spare is not None:
            self.lent += 1
            _move_all(self._pipes[slot][0], spare[1], length)
        return spare

    def bring_back(self, slot: int, spare: tuple[int, int], length: int) -> None:
        """Move a payload of *length* bytes that was set aside into the pipe of *slot*, and free its *spare* pipe."""
        _move_all(spare[0], self._pipes[slot][1], length)
        self._free(spare)

    def copy_back(self, buffer: memoryview, spare: tuple[int, int]) -> None:
        """Fill *buffer* with a payload that was set aside, and free its *spare* pipe."""
        _read_all(spare[0], buffer)
        self._free(spare)

    def discard(self, spare: tuple[int, int]) -> None:
        """Close a *spare* pipe with the payload in it."""
        self.lent -= 1
        for end in spare:
            os.close(end)

    def _free(self, spare: tuple[int, int]) -> None:
        self.lent -= 1
        if len(self._spare) < _KEPT_SPARE:
            self._spare.append(spare)
        else:
            os.close(spare[0])
            os.close(spare[1])

    def _make_spare(self) -> tuple[int, int] | None:
        if self.lent >= self._most_spare:
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


def _read_all(source: int, buffer: memoryview) -> None:
    """Fill *buffer* from a pipe that contains as much."""
    while buffer:
        buffer = buffer[os.readv(source, [buffer]) :]


def _move_all(source: int, target: int, length: int) -> None:
    """Move *length* bytes from one pipe to another one with enough room, without copying them (splice(2))."""
    while length:
        length -= os.splice(source, target, length)
