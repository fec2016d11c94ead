"""Extended attributes, as they are read.

The kernel asks for ``security.capability`` when a file is written for the first time or gets another owner, and for the
access ACL whenever `ls -l` lists it; mostly there is neither.
"""

from __future__ import annotations

import errno
import os

from llloop.front.handlers.base import Responder
from llloop.front.requester import Requester
from llloop.linux import fuse


class XattrRequests(Responder):
    """The handlers; see `Responder`."""

    def getxattr(self, base: int, length: int) -> None:
        """FUSE_GETXATTR."""
        request = fuse.GETXATTR_REQUEST
        unique, nodeid, uid, gid, pid, size = request.unpack_from(self._memory, base)
        self._check_xattr()
        name = self._string(base + request.size, base + length)
        self._reply_value(unique, size, self._tree.getxattr(nodeid, name, Requester(uid, gid, pid=pid)))

    def listxattr(self, base: int, length: int) -> None:
        """FUSE_LISTXATTR."""
        unique, nodeid, uid, gid, _, size = fuse.GETXATTR_REQUEST.unpack_from(self._memory, base)
        self._check_xattr()
        names = self._tree.listxattr(nodeid, Requester(uid, gid))
        self._reply_value(unique, size, b"".join(name + b"\0" for name in names))

    def _reply_value(self, unique: int, size: int, value: bytes) -> None:
        """Reply with *value*, or, if no room is offered for one, with its length."""
        if not size:
            value = fuse.GETXATTR_OUT.pack(len(value))
        elif len(value) > size:
            raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
        self._send(fuse.reply(unique, value))
