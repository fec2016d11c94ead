"""Sending a worker's answers, to the kernel through /dev/fuse or to a front that waits for them."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
import threading
import time
from typing import Protocol

from llloop.linux import fuse
from llloop.shared import notifications
from llloop.shared.leadership import Leadership
from llloop.shared.messages import SINGLE_CALL, Request, encode
from llloop.shared.slots import Slots
from llloop.shared.trace import Ring

# Up to this size, in bytes, copying through a buffer costs less than the system calls of a splice.
COPY_LIMIT = 32 * 1024


class Replies(Protocol):
    """Answers requests."""

    @property
    def accepted(self) -> bool:
        """Whether the kernel (or the front) has accepted the last answer."""

    def expire(self, nodeid: int) -> None:
        """Make the kernel drop an inode's cached attributes, which the next answer does not contain."""

    def error(self, request: Request, number: int) -> None:
        """Answer with an errno, or with 0 for success without a result."""

    def count(self, request: Request, count: int) -> None:
        """Answer with the number of bytes written."""

    def position(self, request: Request, offset: int) -> None:
        """Answer with an offset in the file."""

    def data(self, request: Request, fd: int) -> int:
        """Answer with the requested bytes of *fd*; return their number."""

    def ready(self, reply: bytes) -> None:
        """Answer with a complete reply that the front has prepared."""


def read_fully(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill *buffer* from *fd* at *offset* up to the end of the file; return the number of bytes.

    To the kernel, a short answer means the end of the file. So a short read is followed by another one. With O_DIRECT,
    that one fails with EINVAL if the first read ended within a block at the end of the file.
    """
    done = os.preadv(fd, [buffer], offset)
    while 0 < done < len(buffer):
        try:
            more = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            if error.errno == errno.EINVAL:
                break
            raise
        if more == 0:
            break
        done += more
    return done


def read_once(fd: int, buffer: memoryview, offset: int) -> int:
    """Read with a single system call; at the file position if the file has no offsets (ESPIPE)."""
    try:
        return os.preadv(fd, [buffer], offset)
    except OSError as error:
        if error.errno != errno.ESPIPE:
            raise
    return os.readv(fd, [buffer])


class KernelReplies(threading.local):
    """Writes answers to /dev/fuse. Large reads are spliced: file -> pipe -> kernel, not through this process's memory.

    Each thread has its own pipe and buffer.

    Args:
        device: a descriptor of /dev/fuse.
        largest: the largest size of a READ in bytes.
        leadership: decides which thread serves.
    """

    def __init__(self, device: int, largest: int, leadership: Leadership | None = None) -> None:
        self._call = (leadership or Leadership()).call_even_in_last_thread
        self._device = device
        self._largest = largest
        # The header is at the end of the first page, so that the data is page-aligned, as O_DIRECT requires.
        self._memory = memoryview(mmap.mmap(-1, fuse.PAGE_SIZE + largest))
        self._header = fuse.PAGE_SIZE - fuse.OUT_HEADER_SIZE
        self._pipe: tuple[int, int] | None = None
        self._room = 0
        self.accepted = True

    def expire(self, nodeid: int) -> None:
        notifications.expire_attributes(self._device, nodeid)

    def error(self, request: Request, number: int) -> None:
        self._send(fuse.error_reply(request.unique, number))

    def count(self, request: Request, count: int) -> None:
        self._send(fuse.WRITE_REPLY.pack(fuse.WRITE_REPLY.size, 0, request.unique, count))

    def position(self, request: Request, offset: int) -> None:
        self._send(fuse.LSEEK_REPLY.pack(fuse.LSEEK_REPLY.size, 0, request.unique, offset))

    def ready(self, reply: bytes) -> None:
        self._send(reply)

    def _send(self, reply: bytes | memoryview) -> None:
        try:
            os.write(self._device, reply)
        except FileNotFoundError:
            self.accepted = False
        else:
            self.accepted = True

    def data(self, request: Request, fd: int) -> int:
        size = request.length
        if size > self._largest:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))  # a truncated answer would mean the end of the file
        if size <= COPY_LIMIT or request.flags & SINGLE_CALL:
            return self._copy(request, fd, 0)
        return self._splice(request, fd)

    def _copy(self, request: Request, fd: int, done: int) -> int:
        """Answer from the buffer, which already contains the first *done* bytes."""
        start = fuse.PAGE_SIZE
        rest = self._memory[start + done : start + request.length]
        read = read_once if request.flags & SINGLE_CALL else read_fully
        done += self._call(read, fd, rest, request.offset + done)
        length = fuse.OUT_HEADER_SIZE + done
        fuse.OUT_HEADER.pack_into(self._memory, self._header, length, 0, request.unique)
        self._send(self._memory[self._header : self._header + length])
        return done

    def _splice(self, request: Request, fd: int) -> int:
        """Answer with splice(2). If the file is shorter than the range, answer from the buffer.

        The header is in the pipe before the data and must contain the exact length. So the header announces the full
        length. In the rare case that less data follows, the content of the pipe is read into the buffer.
        """
        size = request.length
        reader, writer = self._open_pipe()
        if size + 2 * fuse.PAGE_SIZE > self._room:
            return self._copy(request, fd, 0)
        os.write(writer, fuse.OUT_HEADER.pack(fuse.OUT_HEADER_SIZE + size, 0, request.unique))
        moved = 0
        call = self._call
        try:
            while moved < size:
                # Non-blocking, because an unaligned range may need one page more than the pipe has.
                offset = request.offset + moved
                count = call(os.splice, fd, writer, size - moved, offset, flags=os.SPLICE_F_NONBLOCK)
                if count == 0:
                    break
                moved += count
        except OSError as error:
            # The source or the range does not support splice(2), or there is an error that `_copy` will report too.
            if error.errno not in (errno.EINVAL, errno.EAGAIN, errno.EIO):
                self._close_pipe()
                raise
        if moved < size:
            filled = os.readv(reader, [self._memory[self._header : self._header + fuse.OUT_HEADER_SIZE + moved]])
            if filled != fuse.OUT_HEADER_SIZE + moved:
                self._close_pipe()
                moved = 0
            return self._copy(request, fd, moved)
        try:
            os.splice(reader, self._device, fuse.OUT_HEADER_SIZE + size, flags=os.SPLICE_F_MOVE)
            self.accepted = True
        except FileNotFoundError:
            self.accepted = False
            self._close_pipe()
        except OSError:
            self._close_pipe()
            raise
        return size

    def _open_pipe(self) -> tuple[int, int]:
        if self._pipe is None:
            self._pipe = os.pipe2(os.O_CLOEXEC)
            try:
                self._room = fcntl.fcntl(self._pipe[1], fcntl.F_SETPIPE_SZ, self._largest + 2 * fuse.PAGE_SIZE)
            except PermissionError:  # the user's limit of pipe pages is reached (pipe(7))
                self._room = 0
        return self._pipe

    def _close_pipe(self) -> None:
        """Close the pipe, and so discard its content."""
        if self._pipe is not None:
            for end in self._pipe:
                os.close(end)
            self._pipe = None


class FrontReplies:
    """Answers a front that waits (`--loop llfuse`), through a pipe; the data is in the request's slot.

    Args:
        pipe: the write end of the pipe.
        slots: the request slots in shared memory.
        leadership: decides which thread serves.
    """

    def __init__(self, pipe: int, slots: Slots, leadership: Leadership | None = None) -> None:
        self._call = (leadership or Leadership()).call_even_in_last_thread
        self._pipe = pipe
        self._slots = slots
        self.accepted = True

    def expire(self, nodeid: int) -> None:
        """Do nothing: with `--loop llfuse`, the kernel clears set-ID bits itself."""

    def error(self, request: Request, number: int) -> None:
        self._send(request, -number)

    def count(self, request: Request, count: int) -> None:
        self._send(request, count)

    def position(self, request: Request, offset: int) -> None:
        self._send(request, offset)

    def ready(self, reply: bytes) -> None:
        raise NotImplementedError("such a front prepares no replies")

    def data(self, request: Request, fd: int) -> int:
        buffer = self._slots.payload(request.slot, request.length)
        done = self._call(read_fully, fd, buffer, request.offset)
        self._send(request, done)
        return done

    def _send(self, request: Request, result: int) -> None:
        os.write(self._pipe, encode((request.unique, result)))


class TracedReplies:
    """Answers requests as *replies* does, and writes each answer into the trace.

    Args:
        replies: sends the answers.
        ring: the worker's ring.
    """

    def __init__(self, replies: Replies, ring: Ring) -> None:
        self._replies = replies
        self._ring = ring

    @property
    def accepted(self) -> bool:
        return self._replies.accepted

    def expire(self, nodeid: int) -> None:
        self._replies.expire(nodeid)

    def error(self, request: Request, number: int) -> None:
        self._replies.error(request, number)
        self._trace(request.unique, error=fuse.known_errno(number))

    def count(self, request: Request, count: int) -> None:
        self._replies.count(request, count)
        self._trace(request.unique, value=count)

    def position(self, request: Request, offset: int) -> None:
        self._replies.position(request, offset)
        self._trace(request.unique)

    def data(self, request: Request, fd: int) -> int:
        size = self._replies.data(request, fd)
        self._trace(request.unique, size=size)
        return size

    def ready(self, reply: bytes) -> None:
        self._replies.ready(reply)
        self._trace(int.from_bytes(reply[8:16], sys.byteorder))

    def _trace(self, unique: int, error: int = 0, size: int = 0, value: int = 0) -> None:
        if self.accepted:
            self._ring.answered(unique, error, size, value, time.monotonic_ns())
