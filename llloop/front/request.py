"""The kernel's request that a thread of the front has at hand."""

from __future__ import annotations

import errno
import mmap
import os

from llloop.front.recovery.intents import Note
from llloop.front.requester import Requester
from llloop.linux import fuse


def malformed() -> OSError:
    """Return the error for a request that is not what its opcode says."""
    return OSError(errno.EINVAL, os.strerror(errno.EINVAL))


class FuseRequest:
    """A request of the kernel, from the moment it is received until it is answered or handed to a worker.

    Each thread of the front has one such object and uses it for one request after the other.

    Attributes:
        slot: where the request lies. Once it is handed to a worker, the slot in which the next one will be received.
        base: where its header begins in the memory of the slots.
        received: how many bytes were received.
        length, opcode, unique, nodeid: what the header says (struct fuse_in_header).
        taken: when it was received (monotonic clock, nanoseconds).
        piped: whether its payload is still in the pipe of the slot.
        entrusted: whether a worker has it, or it waits for one: the worker answers and counts it.
        note: what the next front has to know of it.
        held: the slot that the thread kept when another one took its place.

    Args:
        memory: the memory of the slots.
        note: the note of the thread.
    """

    __slots__ = (
        "_memory",
        "base",
        "entrusted",
        "held",
        "length",
        "nodeid",
        "note",
        "opcode",
        "piped",
        "received",
        "slot",
        "taken",
        "unique",
    )

    def __init__(self, memory: mmap.mmap, note: Note) -> None:
        self._memory = memory
        self.note = note
        self.slot = self.base = self.received = self.length = self.opcode = self.unique = self.nodeid = self.taken = 0
        self.held = -1
        self.piped = self.entrusted = False

    def is_received(self, base: int, received: int, taken: int) -> None:
        """Take in a request that lies in `slot`; for the arguments see the attributes."""
        self.base = base
        self.received = received
        self.taken = taken
        self.length, self.opcode, unique, self.nodeid = fuse.REQUEST_HEAD.unpack_from(self._memory, base)
        self.unique = self.note.unique = unique

    def data(self) -> bytes:
        """Return all of it, for a time when the slot is another request's."""
        return self._memory[self.base : self.base + self.received]

    def caller(self, umask: int = 0) -> Requester:
        """Return who makes the request; *umask* is what the request says of it."""
        uid, gid, pid = fuse.CALLER.unpack_from(self._memory, self.base)
        return Requester(uid, gid, umask, pid, self.note)

    def pid(self) -> int:
        """Return the number of the calling thread, 0 if it is outside of the server's PID namespace."""
        pid: int = fuse.PID.unpack_from(self._memory, self.base)[0]
        return pid

    def name(self) -> bytes:
        """Return the name that is all of the request behind its header."""
        end = self.base + self.received - 1
        if self._memory[end]:
            raise malformed()
        return self._memory[self.base + fuse.IN_HEADER_SIZE : end]

    def string(self, offset: int) -> bytes:
        """Return the NUL-terminated string that begins *offset* bytes behind the start of the header."""
        start = self.base + offset
        end = self._memory.find(b"\0", start, self.base + self.received)
        if end < 0:
            raise malformed()
        return self._memory[start:end]

    def strings(self, offset: int) -> tuple[bytes, bytes]:
        """Return the two strings that follow each other at *offset*."""
        first = self.string(offset)
        return first, self.string(offset + len(first) + 1)

    def payload(self, offset: int, size: int) -> bytes:
        """Return the *size* bytes that begin at *offset*."""
        if offset + size > self.received:
            raise malformed()
        return self._memory[self.base + offset : self.base + offset + size]
