"""The requests of the event relay (`llloop.watch.relay`), which are answered without any change in the source.

The relay makes system calls on the mount so that the kernel makes inotify and fanotify events there. For example, it
"creates" a file that somebody has created in the source: the answer to its LOOKUP is ENOENT, and the answer to its
MKNOD is an entry. Why such a request never creates, changes or removes anything in the source, whichever process is
killed:

* The relay's file system uid is `RELAY_UID`, and the kernel puts it into the header of each request. This uid is the
  same for every relay, and every front of the mount knows it from its start. So no handshake is needed, and there is no
  moment at which a front does not know the relay. A request that a dead front has left is recognised in the same way.
  (With id maps, requests that create nothing contain no uid. So such a mount has no relay.)
* A request with this uid that changes something comes here and never to an ordinary handler, even if it is not the
  relay's or does not belong to the relay's current system call. It then gets EPERM or ESTALE.
* Nothing here can change the source: no object with access to it is used, apart from a function that reads attributes.
* Only root can take a file system uid (setfsuid(2)). So no user can pose as the relay. If root, or a server of root
  that acts for somebody, takes this uid, the process id differs.

A LOOKUP is answered with a *phantom*, an inode that does not exist in the source, if the kernel does not know the file.
Nobody can watch an inode that the kernel does not know, but its directory. The timeout of a phantom's entry is 0: as
soon as a program uses the name, the kernel looks it up again and gets the true answer.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import sys
from collections.abc import Callable, Sequence

from llloop.front.handlers.base import Replies
from llloop.front.inodes import GENERATION, ROOT, Inodes, stale
from llloop.front.permissions import not_permitted
from llloop.front.request import FuseRequest
from llloop.linux import fuse
from llloop.linux.fuse import Opcode
from llloop.linux.syscalls import Attributes
from llloop.shared.relay import INODE_QUESTION, RELAY_UID, Place, RelayState

_Handler = Callable[[FuseRequest], None]

# The handle of each file that the relay opens. No front assigns it.
_HANDLE = (1 << 64) - 1
# The pages in the kernel's cache stay. Such an open neither prevents passthrough nor is it used for writeback.
_OPEN_FLAGS = fuse.FOPEN_DIRECT_IO | fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_NOFLUSH

# Requests that change something or open a file, and those that the relay needs. Its other requests only read, so
# ordinary handlers serve them. Requests on an open file need a handle, which no ordinary handler gives to the relay.
_GUARDED = (
    *fuse.NAME_OFFSETS,
    Opcode.GETATTR,
    Opcode.GETXATTR,
    Opcode.SETATTR,
    Opcode.SETXATTR,
    Opcode.REMOVEXATTR,
    Opcode.OPEN,
    Opcode.TMPFILE,
)

_UID = RELAY_UID.to_bytes(4, sys.byteorder)


class RelayedRequests(Replies):
    """The handlers of the relay's requests.

    Args:
        state: what the relay does.
        device: a descriptor of /dev/fuse.
        memory: the memory of the slots.
        inodes: counts the kernel's lookups.
        attributes_of: returns the attributes of an inode; OSError if no name leads to it and it is not open.
        attribute_fields: see `Context`.
    """

    def __init__(
        self,
        state: RelayState,
        device: int,
        memory: mmap.mmap,
        inodes: Inodes,
        attributes_of: Callable[[int], Attributes],
        attribute_fields: Callable[[int, Attributes], tuple[int, ...]] = fuse.attribute_fields,
    ) -> None:
        super().__init__(device)
        self._state = state
        self._memory = memory
        self._inodes = inodes
        self._attributes_of = attributes_of
        self._attribute_fields = attribute_fields

    def before(self, table: Sequence[_Handler]) -> list[_Handler]:
        """Return handlers by opcode that serve the relay's requests here, and call those of *table* for all others."""
        own: dict[Opcode, _Handler] = {
            Opcode.LOOKUP: self._lookup(table[Opcode.LOOKUP]),
            Opcode.MKNOD: self._create,
            Opcode.MKDIR: self._create,
            Opcode.UNLINK: self._remove,
            Opcode.RMDIR: self._remove,
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename,
            Opcode.GETATTR: self._getattr(table[Opcode.GETATTR]),
            Opcode.GETXATTR: self._getxattr(table[Opcode.GETXATTR]),
            Opcode.SETATTR: self._setattr,
            Opcode.OPEN: self._open,
        }
        guarded = list(table)
        for opcode in _GUARDED:
            guarded[opcode] = self._guard(own.get(opcode, _refuse), table[opcode])
        for opcode in (Opcode.FLUSH, Opcode.RELEASE):
            guarded[opcode] = self._close(table[opcode])
        return guarded

    def _guard(self, relayed: _Handler, ordinary: _Handler) -> _Handler:
        memory, state = self._memory, self._state

        def handler(request: FuseRequest) -> None:
            uid = request.base + fuse.UID_OFFSET
            if memory[uid : uid + 4] != _UID:
                ordinary(request)
            elif request.pid() == state.pid:
                relayed(request)
            else:
                _refuse(request)

        return handler

    def _close(self, ordinary: _Handler) -> _Handler:
        """Return a handler of RELEASE, which brings no uid, and of FLUSH, which comes with a writeback cache."""
        memory = self._memory

        def handler(request: FuseRequest) -> None:
            if fuse.RELEASE_REQUEST.unpack_from(memory, request.base)[0] == _HANDLE:
                self._send(fuse.error_reply(request.unique, 0))
            else:
                ordinary(request)

        return handler

    def _lookup(self, ordinary: _Handler) -> _Handler:
        state = self._state

        def handler(request: FuseRequest) -> None:
            name = request.name()
            if request.nodeid == ROOT and name == INODE_QUESTION:
                if state.asked in self._inodes:
                    inode = self._inodes.get(state.asked)
                    state.answer(GENERATION, Place(inode.parent, inode.name))
                raise _missing()
            index = state.find(request.nodeid, name)
            if index is None:
                ordinary(request)  # a directory that has lost its name in the kernel's cache
                return
            nodeid, attributes = state.look_up(index)
            is_victim = index > 0
            if not nodeid or (is_victim and not self._has_name(nodeid, request.nodeid, name)):
                raise _missing()
            if nodeid == state.phantom:
                self._reply_phantom(request)
            else:
                self._reply_known(request, nodeid, attributes)

        return handler

    def _has_name(self, nodeid: int, parent: int, name: bytes) -> bool:
        """Return whether the kernel knows an inode by a name. The relay only supposes which one a rename replaces."""
        return nodeid in self._inodes and self._inodes.has_name(nodeid, parent, name)

    def _reply_phantom(self, request: FuseRequest) -> None:
        entry = fuse.ENTRY_HEAD.pack(self._state.phantom, 0, 0, 0, 0, 0)
        self._send(fuse.reply(request.unique, entry + self._phantom()))

    def _phantom(self) -> bytes:
        """Return ``struct fuse_attr`` of the phantom."""
        kind = stat.S_IFDIR if self._state.is_directory else stat.S_IFREG
        return fuse.ATTR.pack(self._state.phantom, *(0,) * 8, kind, 1, 0, 0, 0, 0, 0)

    def _reply_known(self, request: FuseRequest, nodeid: int, attributes: bytes) -> None:
        """Answer with the entry of an inode that the kernel knows."""
        entry = fuse.ENTRY_HEAD.pack(nodeid, GENERATION, 0, 0, 0, 0)
        if self._send(fuse.reply(request.unique, entry + self._attributes(nodeid, attributes))):
            self._inodes.count(nodeid)

    def _attributes(self, nodeid: int, attributes: bytes) -> bytes:
        """Return ``struct fuse_attr`` of an inode; *attributes* if it is gone.

        The kernel's own attributes would be too old if a program has just extended the file. The kernel would drop the
        pages beyond the end. Of a file that is gone and not open, there are no such pages.
        """
        try:
            true = self._attributes_of(nodeid)
        except OSError:
            return attributes
        return fuse.ATTR.pack(*self._attribute_fields(self._inodes.shown(true.device, true.ino), true))

    def _create(self, request: FuseRequest) -> None:
        """MKNOD and MKDIR: the new inode is a phantom."""
        self._check(request.nodeid, request.string(fuse.NAME_OFFSETS[Opcode(request.opcode)]), is_there=False)
        self._reply_phantom(request)

    def _remove(self, request: FuseRequest) -> None:
        """UNLINK and RMDIR."""
        self._check(request.nodeid, request.name(), is_there=True)
        self._send(fuse.error_reply(request.unique, 0))

    def _rename(self, request: FuseRequest) -> None:
        """RENAME and RENAME2."""
        (new_parent,) = fuse.RENAME_REQUEST.unpack_from(self._memory, request.base)
        name, new_name = request.strings(fuse.NAME_OFFSETS[Opcode(request.opcode)])
        self._check(request.nodeid, name, is_there=True)
        self._check(new_parent, new_name)
        self._send(fuse.error_reply(request.unique, 0))

    def _check(self, parent: int, name: bytes, *, is_there: bool | None = None) -> None:
        """Check that the relay's current system call has looked up a name.

        Otherwise the kernel has another inode in its cache than the one that the event is about.

        Raises:
            OSError: ESTALE. The kernel then looks the name up and tries again.
        """
        index = self._state.find(parent, name)
        nodeid = None if index is None else self._state.looked_up(index)
        if nodeid is None or (is_there is not None and bool(nodeid) != is_there):
            raise stale()

    def _getattr(self, ordinary: _Handler) -> _Handler:
        def handler(request: FuseRequest) -> None:
            if request.nodeid == self._state.target:
                self._setattr(request)
            else:
                ordinary(request)  # the kernel checks the permissions of a directory

        return handler

    def _getxattr(self, ordinary: _Handler) -> _Handler:
        """Return a handler for the ACL of a directory that a rename moves to another directory.

        The source may have it under its new name only, which the front does not know yet. The kernel drops the ACL
        before it uses it for anybody else, because the attributes are not valid.
        """

        def handler(request: FuseRequest) -> None:
            try:
                ordinary(request)
            except OSError as error:
                if request.nodeid != self._state.target or error.errno != errno.ESTALE:
                    raise
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA)) from None

        return handler

    def _setattr(self, request: FuseRequest) -> None:
        """SETATTR: the reply contains the attributes as they are."""
        self._check_target(request)
        nodeid = request.nodeid
        if nodeid == self._state.phantom:
            attributes = self._phantom()
        else:
            attributes = self._attributes(nodeid, self._state.attributes(0))
        self._send(fuse.reply(request.unique, fuse.ATTR_HEAD.pack(0, 0) + attributes))

    def _open(self, request: FuseRequest) -> None:
        """OPEN: nothing is opened in the source."""
        self._check_target(request)
        self._send(fuse.OPEN_REPLY.pack(fuse.OPEN_REPLY.size, 0, request.unique, _HANDLE, _OPEN_FLAGS, 0))

    def _check_target(self, request: FuseRequest) -> None:
        """Check that the relay's current system call is about this inode.

        Raises:
            OSError: ESTALE.
        """
        if request.nodeid != self._state.target:
            raise stale()


def _missing() -> OSError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def _refuse(request: FuseRequest) -> None:
    raise not_permitted()
