"""INTERRUPT: a program that waits for a hanging source can be killed, as without llloop.

The kernel sends INTERRUPT once for each request, at the first signal to the waiting thread. On a local file system,
only fatal signals end a call on a file. So llloop answers a request with EINTR only if its thread is being killed: no
program ever sees this error. The kernel sends nothing when a fatal signal follows another one, so the front looks at
interrupted requests again from time to time.

* A request that has not begun is *withdrawn*: nobody serves it later.
* A request that a worker or a stalled thread has begun is *left*: it goes on, because nothing can stop a system call
  that hangs in the kernel. The kernel refuses its answer later. Until then, its descriptors stay open. Requests that
  change the same inodes, and lookups of the same names, wait. So a left request never undoes what happens after the
  death of its program.

Some requests are answered only when they are done: those whose late effect the kernel would not notice, see
`_can_be_left`.

If the front dies, a worker goes on with a left request. The kernel does not send it again, so the next front makes the
worker give back its slot (`Router.finish_takeover`). Until then, it counts as left.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from typing import NamedTuple

from llloop.front.context import Context
from llloop.front.handlers.base import Replies
from llloop.front.preflight import Preflight
from llloop.front.request import FuseRequest
from llloop.front.router import Served
from llloop.front.set_aside import SetAside
from llloop.linux import fuse
from llloop.linux.fuse import Opcode
from llloop.linux.process_credentials import is_being_killed
from llloop.shared.messages import DATA_CHANGES, Operation, Request
from llloop.shared.negotiation import Feature
from llloop.shared.notifications import expire_all_entries, expire_attributes

Buffer = bytes | mmap.mmap
# An inode, or a directory and a name in it.
_Place = int | tuple[int, bytes]

# The interval between two looks at interrupted requests, in milliseconds.
INTERVAL = 100
_NANOSECONDS = INTERVAL * 1_000_000

# The requests that change inodes, and where the second one stands if there are two.
_CHANGES = frozenset(
    {
        *(Opcode.SETATTR, Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.LINK, Opcode.UNLINK, Opcode.RMDIR),
        *(Opcode.RENAME, Opcode.RENAME2, Opcode.SETXATTR, Opcode.REMOVEXATTR, Opcode.OPEN, Opcode.CREATE, Opcode.WRITE),
        *(Opcode.FALLOCATE, Opcode.COPY_FILE_RANGE, Opcode.IOCTL),
    }
)
_SECOND = {
    Opcode.LINK: fuse.LINK_REQUEST,
    Opcode.RENAME: fuse.RENAME_REQUEST,
    Opcode.RENAME2: fuse.RENAME_REQUEST,
    Opcode.COPY_FILE_RANGE: fuse.COPY_TARGET,
}
# Those that change data of a file.
CHANGES_DATA = frozenset({Opcode.SETATTR, Opcode.WRITE, Opcode.FALLOCATE, Opcode.COPY_FILE_RANGE})


class _Left(NamedTuple):
    """What a left request uses.

    Attributes:
        changes: the inodes and names that it changes.
        descriptors: the front's descriptors that its worker may still fetch.
        handles: the file handles by which the worker keeps them.
        shard: the worker, -1 for a thread of the front.
    """

    changes: tuple[_Place, ...]
    descriptors: tuple[int, ...]
    handles: tuple[int, ...]
    shard: int


class Interrupts(Replies):
    """Handles INTERRUPT.

    Args:
        context: the objects that handlers work on.
        device: a descriptor of /dev/fuse.
        set_aside: the requests that wait in the loop.
        preflight: the requests that wait for a PROBE; None without preflight checks.

    Attributes:
        kept: descriptors that must stay open because of left requests.
        changing: the inodes and names that left requests change.
    """

    def __init__(self, context: Context, device: int, set_aside: SetAside, preflight: Preflight | None) -> None:
        super().__init__(device)
        self._router = context.router
        self._handles = context.handles
        self._memory = context.router.slots.memory
        self._writeback = Feature.WRITEBACK_CACHE in context.features
        self._set_aside = set_aside
        self._preflight = preflight
        # The `unique` of each interrupted request, and what it uses if it was left.
        self._interrupted: dict[int, _Left | None] = {}
        self.kept: frozenset[int] = frozenset()
        self.changing: frozenset[_Place] = frozenset()
        self._next = 0

    @property
    def waiting(self) -> bool:
        """Whether `look` must be called from time to time."""
        return bool(self._interrupted)

    def interrupt(self, request: FuseRequest) -> None:
        """FUSE_INTERRUPT: without reply. ENOSYS would tell the kernel not to send it."""
        (unique,) = fuse.INTERRUPT_REQUEST.unpack_from(self._memory, request.base)
        self._interrupted.setdefault(unique, None)
        self._router.attentive = self._router.backlog = True
        self._look()

    def inherit(self) -> None:
        """Take the requests that workers have from previous fronts for left ones, until the kernel sends them again."""
        for found in self._router.inherited():
            self._interrupted[found.unique & ~fuse.FUSE_UNIQUE_RESEND] = self._leave(found)
        self._note_all()
        if self._interrupted:
            self._router.attentive = self._router.backlog = True

    def is_claimed(self, unique: int) -> None:
        """Note that a worker answers a request that the kernel has sent again: it is not a left one."""
        self._interrupted.pop(unique & ~fuse.FUSE_UNIQUE_RESEND, None)
        self._note_all()

    def look(self) -> None:
        """Look at the interrupted requests again, unless this was done a moment ago."""
        if time.monotonic_ns() >= self._next:
            self._look()

    def must_wait(self, memory: Buffer, base: int, opcode: int) -> bool:
        """Return whether a request changes an inode, or looks up a name, that a left request is changing.

        It is the one at the offset *base* in *memory*.
        """
        return not self.changing.isdisjoint(
            _looked_up(memory, base) if opcode == Opcode.LOOKUP else _changed_by(memory, base, opcode)
        )

    def _look(self) -> None:
        self._next = time.monotonic_ns() + _NANOSECONDS
        for unique, left in list(self._interrupted.items()):
            if left is None:
                self._look_at(unique)
            elif (found := self._router.find(unique)) is None or self._router.is_done(found):
                del self._interrupted[unique]
                self._is_done(left)
        self._note_all()

    def _look_at(self, unique: int) -> None:
        """Answer a request with EINTR if its program is being killed, and if it can be withdrawn or left."""
        interrupted = self._interrupted
        caller = self._caller_of_waiting(unique)
        if caller is not None:
            if is_being_killed(caller):
                del interrupted[unique]
                self._withdraw(unique)
                self._send(fuse.error_reply(unique, errno.EINTR))
            return
        found = self._router.find(unique)
        if found is None:
            del interrupted[unique]
        elif (
            is_being_killed(found.caller)
            and self._can_be_left(found)
            and self._send(fuse.error_reply(unique, errno.EINTR))  # refused if the request has just been answered
        ):
            interrupted[unique] = self._leave(found)

    def _note_all(self) -> None:
        left = [one for one in self._interrupted.values() if one is not None]
        self.kept = frozenset(fd for one in left for fd in one.descriptors)
        self.changing = frozenset(nodeid for one in left for nodeid in one.changes)

    def _caller_of_waiting(self, unique: int) -> int | None:
        """Return the calling thread of a request that has not begun; None if it has begun, or there is none."""
        waiting = self._set_aside.find(unique)
        if waiting is None and self._preflight is not None:
            waiting = self._preflight.waiting(unique)
        return self._router.caller_of_parked(unique) if waiting is None else waiting.caller

    def _withdraw(self, unique: int) -> None:
        """Forget a request that has not begun. It may wait here and have a PROBE that is parked."""
        self._set_aside.withdraw(unique)
        if self._preflight is not None:
            self._preflight.withdraw(unique)
        self._router.unpark(unique)

    def _can_be_left(self, found: Served) -> bool:
        """Return whether a request that has begun can be answered before it is done.

        * If the front dies, a worker that has not begun the request gets the file from the next front. So it must be
          able to check that it is the same file.
        * With a writeback cache, the kernel does not take a file's size from the server. So it must hear of each
          change.
        """
        message = found.message
        if message is None:
            base = found.base
            _, opcode = fuse.OPCODE.unpack_from(self._memory, base)
            truncates = opcode in (Opcode.SETATTR, Opcode.OPEN) and bool(_changed_by(self._memory, base, opcode))
            return not (self._writeback and truncates)
        if message.operation in DATA_CHANGES and self._writeback:
            return False
        return message.operation == Operation.GETATTR or 0 not in _identities(message)

    def _leave(self, found: Served) -> _Left:
        message = found.message
        if message is None:
            _, opcode = fuse.OPCODE.unpack_from(self._memory, found.base)
            changed = _changed_by(self._memory, found.base, opcode)
            return _Left((*changed, *_changed_names(self._memory, found.base, opcode)), (), (), -1)
        changes = (message.nodeid,) if message.operation in DATA_CHANGES else ()
        if message.operation == Operation.GETATTR:  # the reply is ready
            return _Left((), (), (), found.shard)
        source = message.extra[:2] if message.operation == Operation.COPY_FILE_RANGE else ()
        return _Left(changes, (message.descriptor, *source[1:]), (message.handle, *source[:1]), found.shard)

    def _is_done(self, left: _Left) -> None:
        """Clean up after a left request."""
        for number in left.handles:
            if number not in self._handles:  # the worker may have fetched the file after its release
                self._router.release_again(left.shard, number)
        if left.shard < 0 and left.changes:
            # The kernel has got no answer, and may have cached the state before the change. An open file keeps its
            # inode from being evicted, so that this does not wait.
            for place in left.changes:
                if isinstance(place, int) and self._handles.of_inode(place):
                    expire_attributes(self._device, place)
            expire_all_entries(self._device)


def _identities(message: Request) -> tuple[int, ...]:
    """Return the identities of the files that a worker uses for a request; 0 stands for an unknown one."""
    if message.operation == Operation.COPY_FILE_RANGE:
        return message.file, message.extra[4]
    return (message.file,)


def _changed_by(memory: Buffer, base: int, opcode: int) -> tuple[int, ...]:
    """Return the inodes that a request changes: the one of *opcode* at the offset *base* in *memory*."""
    if opcode not in _CHANGES:
        return ()
    nodeid = fuse.REQUEST_HEAD.unpack_from(memory, base)[3]
    if opcode == Opcode.OPEN and not fuse.OPEN_REQUEST.unpack_from(memory, base)[0] & os.O_TRUNC:
        return ()
    second = _SECOND.get(Opcode(opcode))
    return (nodeid,) if second is None else (nodeid, *second.unpack_from(memory, base))


def _changed_names(memory: Buffer, base: int, opcode: int) -> tuple[tuple[int, bytes], ...]:
    """Return the names that a request in *memory* at *base* changes, each with its directory."""
    start = fuse.NAME_OFFSETS.get(Opcode(opcode))
    if start is None or opcode not in _CHANGES:
        return ()
    nodeid = fuse.REQUEST_HEAD.unpack_from(memory, base)[3]
    name = _name(memory, base + start)
    if opcode not in (Opcode.RENAME, Opcode.RENAME2):
        return ((nodeid, name),)
    (new_parent,) = fuse.RENAME_REQUEST.unpack_from(memory, base)
    return (nodeid, name), (new_parent, _name(memory, base + start + len(name) + 1))


def _looked_up(memory: Buffer, base: int) -> tuple[tuple[int, bytes], ...]:
    """Return the name that a LOOKUP is for."""
    nodeid = fuse.REQUEST_HEAD.unpack_from(memory, base)[3]
    return ((nodeid, _name(memory, base + fuse.NAME_OFFSETS[Opcode.LOOKUP])),)


def _name(memory: Buffer, start: int) -> bytes:
    """Return the NUL-terminated name at *start*."""
    return memory[start : memory.find(b"\0", start)]
