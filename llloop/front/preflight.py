"""Asking first: a worker looks at what a request is about before the front touches it.

The one loop must never wait, and a file server that is gone makes whoever asks for a file of its wait for ever. So
where the source can hang, a request that would touch it is put aside, and a worker is sent to look at the same places.
When it is back, whatever it has found, the server has just answered for them, and the front does the request as it
always does. A worker that is not back keeps nothing waiting but what it was to look at and do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from zlib import crc32

from llloop.front.context import Context
from llloop.front.inodes import ROOT, stale
from llloop.front.open_files import Handle
from llloop.front.request import FuseRequest
from llloop.front.tree import check_name
from llloop.linux import fuse
from llloop.linux.fuse import Opcode
from llloop.shared.messages import ASK_SERVER, PROBED, Operation

_ANSWERS_AT_ONCE = 512
# The longest paths, in bytes and together, that surely fit into a message. What lies deeper is not asked about.
_LONGEST = 3800

# A descriptor of the front's, or -1 for the source, and a path from there.
_Place = tuple[int, bytes]

# Where the name begins in requests on a name in a directory; a few make or remove nothing and may be answered by a
# cache: for all others it is the server that must be known to answer.
_NAME_AT = {
    Opcode.LOOKUP: fuse.IN_HEADER_SIZE,
    Opcode.UNLINK: fuse.IN_HEADER_SIZE,
    Opcode.RMDIR: fuse.IN_HEADER_SIZE,
    Opcode.SYMLINK: fuse.IN_HEADER_SIZE,
    Opcode.MKNOD: fuse.MKNOD_REQUEST.size,
    Opcode.MKDIR: fuse.MKDIR_REQUEST.size,
    Opcode.CREATE: fuse.CREATE_REQUEST.size,
}
_RENAMES = {Opcode.RENAME: fuse.RENAME_REQUEST.size, Opcode.RENAME2: fuse.RENAME2_REQUEST.size}
_ON_INODES = (
    Opcode.GETATTR,
    Opcode.SETATTR,
    Opcode.STATX,
    Opcode.READLINK,
    Opcode.OPEN,
    Opcode.OPENDIR,
    Opcode.TMPFILE,
    Opcode.STATFS,
    Opcode.SYNCFS,
    Opcode.GETXATTR,
    Opcode.SETXATTR,
    Opcode.LISTXATTR,
    Opcode.REMOVEXATTR,
    Opcode.IOCTL,
)
_BY_CACHE = frozenset({Opcode.LOOKUP, Opcode.GETATTR, Opcode.STATX})


class Preflight:
    """Requests that wait for a worker to have looked at what they are about.

    They are kept in this process only: they are unanswered, so the kernel sends them to the next front again.

    Args:
        mirror: what is served.
        answers: the read end of the pipe by which workers tell that they have looked.

    Attributes:
        answers: the same.
        opcodes: the requests that are to be asked about.
    """

    def __init__(self, context: Context, answers: int) -> None:
        self.answers = answers
        self._inodes = context.inodes
        self._directory_fds = context.tree.directory_fds
        self._handles = context.handles
        self._router = context.router
        self._memory = context.router.slots.memory
        # By number: the request, and when it was taken.
        self._asked: dict[int, tuple[bytes, int]] = {}
        self._errands = [Handle(-1, 0, shard, 0) for shard in range(len(context.router.slots.metrics.workers))]
        finders: dict[Opcode, Callable[[FuseRequest], list[_Place]]] = {
            Opcode.LINK: self._of_link,
            Opcode.READDIR: self._of_inode,
            Opcode.RELEASE: self._of_handle,
        }
        finders |= dict.fromkeys(_NAME_AT, self._of_name)
        finders |= dict.fromkeys(_RENAMES, self._of_rename)
        finders |= dict.fromkeys(_ON_INODES, self._of_inode)
        self._finders = finders
        self.opcodes = list(finders)

    def __len__(self) -> int:
        return len(self._asked)

    def ask(self, request: FuseRequest) -> bool:
        """Put a request aside and send a worker to look at what it is about.

        Args:
            request: one of those in `opcodes`.

        Returns:
            False if there is nothing that could be looked at: it is to be served at once.
        """
        kind = Opcode(request.opcode)
        try:
            places = self._finders[kind](request)
        except OSError:  # nothing that is known: the handler will say so
            return False
        if not places or sum(len(path) for _, path in places) > _LONGEST:
            return False
        flags = 0 if kind in _BY_CACHE else ASK_SERVER
        router = self._router
        self._asked[request.unique] = (request.data(), request.taken)
        # By path, so that all requests on one object wait for the same worker if it hangs, and those on its neighbours
        # do not.
        descriptor, path = places[0]
        errand = self._errands[router.shard_of(crc32(path) if descriptor < 0 else request.nodeid)]
        router.entrust(request, errand, -1, Operation.PROBE, flags=flags, extra=tuple(places))
        return True

    def answered(self) -> Iterator[tuple[bytes, int]]:
        """Yield each request of which a worker is back, and when it was taken; `answers` must be readable."""
        for (unique,) in PROBED.iter_unpack(os.read(self.answers, PROBED.size * _ANSWERS_AT_ONCE)):
            asked = self._asked.pop(unique, None)
            if asked is not None:  # else it was a dead front's, or a worker was killed just after it told
                yield asked

    # What requests are about

    def _of_name(self, request: FuseRequest) -> list[_Place]:
        return [self._place(request.nodeid, check_name(request.string(_NAME_AT[Opcode(request.opcode)])))]

    def _of_rename(self, request: FuseRequest) -> list[_Place]:
        (new_parent,) = fuse.RENAME_REQUEST.unpack_from(self._memory, request.base)
        name, new_name = request.strings(_RENAMES[Opcode(request.opcode)])
        return [self._place(request.nodeid, check_name(name)), self._place(new_parent, check_name(new_name))]

    def _of_link(self, request: FuseRequest) -> list[_Place]:
        (nodeid,) = fuse.LINK_REQUEST.unpack_from(self._memory, request.base)
        name = check_name(request.string(fuse.LINK_REQUEST.size))
        return [self._place(request.nodeid, name), self._place(nodeid)]

    def _of_inode(self, request: FuseRequest) -> list[_Place]:
        return [self._place(request.nodeid)]

    def _of_handle(self, request: FuseRequest) -> list[_Place]:
        """What is closed: where close(2) waits for a server, the worker's does."""
        (number,) = fuse.RELEASE_REQUEST.unpack_from(self._memory, request.base)
        return [(self._handles.get(number).descriptor, b"")]

    def _place(self, nodeid: int, name: bytes | None = None) -> _Place:
        """Return where an inode is, or a name in it.

        It is a path from the source, for nothing can come to mean something else then before the worker has it; only
        what has no path any more is told by a descriptor.
        """
        names = [] if name is None else [name]
        number = nodeid
        length = 0
        while number != ROOT:
            inode = self._inodes.get(number)
            if not inode.parent:
                return self._descriptor(number), b"/".join(reversed(names))
            length += len(inode.name) + 1
            if length > _LONGEST:  # or without end: moved behind the mount, two can each be below the other
                raise stale()
            names.append(inode.name)
            number = inode.parent
        return -1, b"/".join(reversed(names))

    def _descriptor(self, nodeid: int) -> int:
        """Return a descriptor of what has no name."""
        held = self._directory_fds.held(nodeid)
        if held is not None:
            return held
        handles = self._handles.of_inode(nodeid)
        if not handles:
            raise stale()
        return handles[0].descriptor
