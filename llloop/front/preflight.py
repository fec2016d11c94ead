"""Preflight checks: a worker accesses the files of a request before the front does, in case the source hangs.

The front's loop must never wait. If a file server is gone, a system call on its files can hang forever. So if the
source can hang (`--metadata workers`), the front sets a request aside and sends a PROBE to a worker, which accesses the
same places. When the worker answers, the file server has just answered for these places, whatever the result. Then the
front serves the request as usual. A worker that hangs only delays requests on the same places and its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from zlib import crc32

from llloop.front.context import Context
from llloop.front.inodes import ROOT, stale
from llloop.front.open_files import Handle
from llloop.front.request import FuseRequest
from llloop.front.set_aside import Received
from llloop.front.tree import check_name
from llloop.linux import fuse
from llloop.linux.fuse import Opcode
from llloop.shared.messages import ASK_SERVER, PROBED, Operation

_ANSWERS_AT_ONCE = 512
# The maximum length of all paths together, in bytes, that fits into a message. Deeper paths are not probed.
_MAX_PATHS_LENGTH = 3800

# A descriptor of the front's, or -1 for the source, and a path from there.
_Place = tuple[int, bytes]

_RENAMES = (Opcode.RENAME, Opcode.RENAME2)
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
# A network file system may answer these from its cache.
_MAY_USE_CACHE = frozenset({Opcode.LOOKUP, Opcode.GETATTR, Opcode.STATX})


class Preflight:
    """The requests that wait for a worker's PROBE.

    Only this process knows them. They are unanswered, so the kernel sends them again to the next front.

    Args:
        context: what handlers work on.
        answers: the read end of the pipe to which workers write when a PROBE is done.

    Attributes:
        answers: the same.
        opcodes: the requests that need a PROBE.
    """

    def __init__(self, context: Context, answers: int) -> None:
        self.answers = answers
        self._inodes = context.inodes
        self._directory_fds = context.tree.directory_fds
        self._handles = context.handles
        self._router = context.router
        self._memory = context.router.slots.memory
        self._asked: dict[int, Received] = {}  # by `unique`
        self._probe_handles = [Handle(-1, 0, shard, 0) for shard in range(len(context.router.slots.metrics.workers))]
        finders: dict[Opcode, Callable[[FuseRequest], list[_Place]]] = dict.fromkeys(fuse.NAME_OFFSETS, self._of_name)
        finders |= dict.fromkeys(_RENAMES, self._of_rename)
        finders |= dict.fromkeys(_ON_INODES, self._of_inode)
        finders |= {
            Opcode.LINK: self._of_link,
            Opcode.READDIR: self._of_inode,
            Opcode.RELEASE: self._of_handle,
        }
        self._finders = finders
        self.opcodes = list(finders)

    def __len__(self) -> int:
        return len(self._asked)

    def ask(self, request: FuseRequest) -> bool:
        """Set a request aside and send a PROBE for its places to a worker.

        Args:
            request: a request whose opcode is in `opcodes`.

        Returns:
            False if there is nothing to probe, so that the front must serve the request now.
        """
        kind = Opcode(request.opcode)
        try:
            places = self._finders[kind](request)
        except OSError:  # an unknown inode or an invalid name; the handler reports it
            return False
        if not places or sum(len(path) for _, path in places) > _MAX_PATHS_LENGTH:
            return False
        flags = 0 if kind in _MAY_USE_CACHE else ASK_SERVER
        router = self._router
        self._asked[request.unique] = Received(request.data(), request.taken)
        # Choose the worker by path: if it hangs, all requests on one object wait for the same worker, and requests on
        # its neighbours do not.
        descriptor, path = places[0]
        probe_handle = self._probe_handles[router.shard_of(crc32(path) if descriptor < 0 else request.nodeid)]
        router.dispatch(request, probe_handle, -1, Operation.PROBE, flags=flags, extra=tuple(places))
        return True

    def answered(self) -> Iterator[Received]:
        """Yield each request whose PROBE is done; `answers` must be readable."""
        for (unique,) in PROBED.iter_unpack(os.read(self.answers, PROBED.size * _ANSWERS_AT_ONCE)):
            asked = self._asked.pop(unique, None)
            if asked is not None:  # None for a request of a dead front, and for a second answer after a worker's death
                yield asked

    def waiting(self, unique: int) -> Received | None:
        """Return the request with that `unique` if it waits for its PROBE, else None."""
        return self._asked.get(unique)

    def withdraw(self, unique: int) -> None:
        """Forget a request that waits for its PROBE, because it is answered."""
        self._asked.pop(unique, None)

    # The places of each kind of request

    def _of_name(self, request: FuseRequest) -> list[_Place]:
        return [self._place(request.nodeid, check_name(request.string(fuse.NAME_OFFSETS[Opcode(request.opcode)])))]

    def _of_rename(self, request: FuseRequest) -> list[_Place]:
        (new_parent,) = fuse.RENAME_REQUEST.unpack_from(self._memory, request.base)
        name, new_name = request.strings(fuse.NAME_OFFSETS[Opcode(request.opcode)])
        return [self._place(request.nodeid, check_name(name)), self._place(new_parent, check_name(new_name))]

    def _of_link(self, request: FuseRequest) -> list[_Place]:
        (nodeid,) = fuse.LINK_REQUEST.unpack_from(self._memory, request.base)
        name = check_name(request.string(fuse.LINK_REQUEST.size))
        return [self._place(request.nodeid, name), self._place(nodeid)]

    def _of_inode(self, request: FuseRequest) -> list[_Place]:
        return [self._place(request.nodeid)]

    def _of_handle(self, request: FuseRequest) -> list[_Place]:
        """Return the place of a file that is closed, so that the worker waits if close(2) waits for a server."""
        (number,) = fuse.RELEASE_REQUEST.unpack_from(self._memory, request.base)
        return [(self._handles.get(number).descriptor, b"")]

    def _place(self, nodeid: int, name: bytes | None = None) -> _Place:
        """Return the place of an inode, or of a name in it.

        It is a path from the source: unlike a descriptor, it cannot be reused for another file before the worker gets
        the message. Only an inode without a path has a descriptor as its place.
        """
        names = [] if name is None else [name]
        number = nodeid
        length = 0
        while number != ROOT:
            inode = self._inodes.get(number)
            if not inode.parent:
                return self._descriptor(number), b"/".join(reversed(names))
            length += len(inode.name) + 1
            # This also ends a cycle: moves in the source can put two directories below each other.
            if length > _MAX_PATHS_LENGTH:
                raise stale()
            names.append(inode.name)
            number = inode.parent
        return -1, b"/".join(reversed(names))

    def _descriptor(self, nodeid: int) -> int:
        """Return a descriptor of an inode without a name."""
        held = self._directory_fds.held(nodeid)
        if held is not None:
            return held
        handles = self._handles.of_inode(nodeid)
        if not handles:
            raise stale()
        return handles[0].descriptor
