"""What changes the tree, and must not be done twice when it is sent twice: each handler says which request it does."""

from __future__ import annotations

import os

from llloop.front.handlers.base import Responder, malformed
from llloop.front.requester import Requester
from llloop.linux import fuse
from llloop.shared.negotiation import Feature


class MutationRequests(Responder):
    """The handlers; see `Responder`. `Attempts.unique` has to be set before the tree is asked to do anything."""

    def _names(self, start: int, end: int) -> tuple[bytes, bytes]:
        """Return the two strings that follow each other at *start*."""
        first = self._string(start, end)
        return first, self._string(start + len(first) + 1, end)

    def mknod(self, base: int, length: int) -> None:
        """FUSE_MKNOD."""
        request = fuse.MKNOD_REQUEST
        unique, parent, uid, gid, pid, mode, device, umask = request.unpack_from(self._memory, base)
        name = self._string(base + request.size, base + length)
        self._intents.unique = unique
        number = os.makedev(*fuse.decode_device(device))
        self._reply_entry(unique, *self._tree.mknod(parent, name, mode, number, Requester(uid, gid, umask, pid)))

    def mkdir(self, base: int, length: int) -> None:
        """FUSE_MKDIR."""
        request = fuse.MKDIR_REQUEST
        unique, parent, uid, gid, pid, mode, umask = request.unpack_from(self._memory, base)
        name = self._string(base + request.size, base + length)
        self._intents.unique = unique
        self._reply_entry(unique, *self._tree.mkdir(parent, name, mode, Requester(uid, gid, umask, pid)))

    def symlink(self, base: int, length: int) -> None:
        """FUSE_SYMLINK."""
        request = fuse.SYMLINK_REQUEST
        unique, parent, uid, gid, pid = request.unpack_from(self._memory, base)
        name, target = self._names(base + request.size, base + length)
        self._intents.unique = unique
        self._reply_entry(unique, *self._tree.symlink(parent, name, target, Requester(uid, gid, pid=pid)))

    def link(self, base: int, length: int) -> None:
        """FUSE_LINK."""
        request = fuse.LINK_REQUEST
        unique, parent, uid, gid, pid, nodeid = request.unpack_from(self._memory, base)
        name = self._string(base + request.size, base + length)
        self._intents.unique = unique
        self._reply_entry(unique, *self._tree.link(nodeid, parent, name, Requester(uid, gid, pid=pid)))

    def unlink(self, base: int, length: int) -> None:
        """FUSE_UNLINK."""
        unique, parent, uid, gid, pid = fuse.CALLER_REQUEST.unpack_from(self._memory, base)
        self._intents.unique = unique
        self._tree.unlink(parent, self._name(base, length), Requester(uid, gid, pid=pid))
        self._send(fuse.error_reply(unique, 0))

    def rmdir(self, base: int, length: int) -> None:
        """FUSE_RMDIR."""
        unique, parent, uid, gid, pid = fuse.CALLER_REQUEST.unpack_from(self._memory, base)
        self._intents.unique = unique
        self._tree.rmdir(parent, self._name(base, length), Requester(uid, gid, pid=pid))
        self._send(fuse.error_reply(unique, 0))

    def rename(self, base: int, length: int) -> None:
        """FUSE_RENAME."""
        request = fuse.RENAME_REQUEST
        unique, parent, uid, gid, pid, new_parent = request.unpack_from(self._memory, base)
        name, new_name = self._names(base + request.size, base + length)
        self._intents.unique = unique
        self._tree.rename(parent, name, new_parent, new_name, 0, Requester(uid, gid, pid=pid))
        self._send(fuse.error_reply(unique, 0))

    def rename2(self, base: int, length: int) -> None:
        """FUSE_RENAME2: rename with flags."""
        request = fuse.RENAME2_REQUEST
        unique, parent, uid, gid, pid, new_parent, flags = request.unpack_from(self._memory, base)
        name, new_name = self._names(base + request.size, base + length)
        self._intents.unique = unique
        self._tree.rename(parent, name, new_parent, new_name, flags, Requester(uid, gid, pid=pid))
        self._send(fuse.error_reply(unique, 0))

    def setxattr(self, base: int, length: int) -> None:
        """FUSE_SETXATTR, in its extended form where that was agreed on (SETXATTR_EXT, Linux 5.14)."""
        if Feature.SETXATTR_EXT in self._context.features:
            request = fuse.SETXATTR_REQUEST
            unique, nodeid, uid, gid, pid, size, flags, xattr_flags, _ = request.unpack_from(self._memory, base)
        else:
            request = fuse.SHORT_SETXATTR_REQUEST
            unique, nodeid, uid, gid, pid, size, flags = request.unpack_from(self._memory, base)
            xattr_flags = 0
        self._check_xattr()
        name = self._string(base + request.size, base + length)
        start = base + request.size + len(name) + 1
        if start + size > base + length:
            raise malformed()
        value = self._memory[start : start + size]
        self._intents.unique = unique
        who = Requester(uid, gid, pid=pid)
        kill_sgid = bool(xattr_flags & fuse.FUSE_SETXATTR_ACL_KILL_SGID)
        self._tree.setxattr(nodeid, name, value, flags, who, kill_sgid=kill_sgid)
        self._send(fuse.error_reply(unique, 0))

    def removexattr(self, base: int, length: int) -> None:
        """FUSE_REMOVEXATTR."""
        unique, nodeid, uid, gid, pid = fuse.CALLER_REQUEST.unpack_from(self._memory, base)
        self._check_xattr()
        self._intents.unique = unique
        self._tree.removexattr(nodeid, self._name(base, length), Requester(uid, gid, pid=pid))
        self._send(fuse.error_reply(unique, 0))
