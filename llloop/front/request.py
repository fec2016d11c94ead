"""The request that a thread of the front is serving."""

from __future__ import annotations

import errno
import mmap
import os

from llloop.front.recovery.intents import Note
from llloop.front.requester import Requester
from llloop.linux import fuse
from llloop.linux.process_credentials import ANY_IDS, Callers

_unpack_head = fuse.REQUEST_HEAD.unpack_from
_unpack_caller = fuse.CALLER.unpack_from
# The uid and gid of a request that does not contain its caller's ids (FUSE_INVALID_UIDGID)
NO_ID = 2**32 - 1


def malformed() -> OSError:
    """Return the error EINVAL for a request that does not match its opcode."""
    return OSError(errno.EINVAL, os.strerror(errno.EINVAL))


class FuseRequest:
    """A request of the kernel, from its reception until it is answered or given to a worker.

    Each thread of the front has one such object and reuses it for each request.

    Attributes:
        slot: the slot that contains the request. After the request was given to a worker: the slot for the next one.
        base: the offset of its header in the memory of the slots.
        received: its length as received, in bytes.
        length, opcode, unique, nodeid: the fields of its header (struct fuse_in_header).
        taken: when it was received (monotonic clock, nanoseconds).
        piped: whether its payload is still in the pipe of the slot.
        dispatched: whether it was given to a worker or is parked for one. Then the worker answers and counts it.
        note: notes what the next front must know of it.
        held: the slot that this thread kept when another thread became the leader.

    Args:
        memory: the memory of the slots.
        note: the note of the thread.
        callers: tells the ids of callers whose requests do not contain them.
    """

    __slots__ = (
        "_callers",
        "_memory",
        "base",
        "dispatched",
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

    def __init__(self, memory: mmap.mmap, note: Note, callers: Callers = ANY_IDS) -> None:
        self._memory = memory
        self._callers = callers
        self.note = note
        self.slot = self.base = self.received = self.length = self.opcode = self.unique = self.nodeid = self.taken = 0
        self.held = -1
        self.piped = self.dispatched = False

    def is_received(self, base: int, received: int, taken: int) -> None:
        """Read the header of a request that was received in `slot`; for the arguments see the attributes."""
        self.base = base
        self.received = received
        self.taken = taken
        self.length, self.opcode, unique, self.nodeid = _unpack_head(self._memory, base)
        self.unique = self.note.unique = unique

    def data(self) -> bytes:
        """Return a copy of the whole request, to set it aside while its slot is reused."""
        return self._memory[self.base : self.base + self.received]

    def caller(self) -> Requester:
        """Return the requester of a request that creates nothing."""
        uid, gid, pid = _unpack_caller(self._memory, self.base)
        if uid == NO_ID:
            uid, gid = self._callers.ids_of(pid)
        # Half the time of Requester(...), whose __new__ is a Python function.
        return tuple.__new__(Requester, (uid, gid, 0, pid, self.note))

    def creator(self, umask: int = 0) -> Requester:
        """Return the requester of a request that creates an object, which then belongs to the requester.

        Args:
            umask: the umask in the request, if it contains one.

        Raises:
            OSError: EOVERFLOW if an id of the requester has none in the source that stands for it.
        """
        uid, gid, pid = _unpack_caller(self._memory, self.base)
        if NO_ID in (uid, gid):
            raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
        return tuple.__new__(Requester, (uid, gid, umask, pid, self.note))

    def pid(self) -> int:
        """Return the id of the calling thread, 0 if it is outside of the server's PID namespace."""
        pid: int = fuse.PID.unpack_from(self._memory, self.base)[0]
        return pid

    def name(self) -> bytes:
        """Return the name, if the request contains nothing else after its header."""
        end = self.base + self.received - 1
        if self._memory[end]:
            raise malformed()
        return self._memory[self.base + fuse.IN_HEADER_SIZE : end]

    def string(self, offset: int) -> bytes:
        """Return the NUL-terminated string at *offset*, counted from the start of the header."""
        start = self.base + offset
        end = self._memory.find(b"\0", start, self.base + self.received)
        if end < 0:
            raise malformed()
        return self._memory[start:end]

    def strings(self, offset: int) -> tuple[bytes, bytes]:
        """Return two successive NUL-terminated strings at *offset*."""
        first = self.string(offset)
        return first, self.string(offset + len(first) + 1)

    def payload(self, offset: int, size: int) -> bytes:
        """Return *size* bytes at *offset*."""
        if offset + size > self.received:
            raise malformed()
        return self._memory[self.base + offset : self.base + offset + size]
