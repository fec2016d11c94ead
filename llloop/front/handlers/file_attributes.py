"""File attributes: the flags and project ids of `lsattr` and `chattr` (ioctl_iflags(2), FS_IOC_FSGETXATTR).

The kernel turns these four ioctls of a program into a FUSE_OPEN, a FUSE_IOCTL of fixed size, and a FUSE_RELEASE
(fs/fuse/ioctl.c, fuse_fileattr_get() and fuse_fileattr_set()). An ioctl that it does not know itself has arguments in
the memory of the program, which a server cannot reach: those get ENOTTY, as from a file system that lacks them.
"""

from __future__ import annotations

import errno
import os

from llloop.front.handlers.base import Responder
from llloop.front.request import FuseRequest
from llloop.linux import fuse, syscalls

# How many bytes each command reads or writes.
_READS = {syscalls.FS_IOC_GETFLAGS: 4, syscalls.FS_IOC_FSGETXATTR: syscalls.FSXATTR_SIZE}
_WRITES = {syscalls.FS_IOC_SETFLAGS: 4, syscalls.FS_IOC_FSSETXATTR: syscalls.FSXATTR_SIZE}


class FileAttributeRequests(Responder):
    """The handlers; see `Responder`."""

    def ioctl(self, request: FuseRequest) -> None:
        """FUSE_IOCTL: get or set flags, extended flags and project id of the file that a handle has open."""
        number, command, in_size, out_size = fuse.IOCTL_REQUEST.unpack_from(self._memory, request.base)
        handle = self._handles.get(number)
        if _READS.get(command) == out_size:
            data = self._tree.get_file_attributes(handle, command, out_size)
        elif _WRITES.get(command) == in_size:
            given = request.payload(fuse.IOCTL_REQUEST.size, in_size)
            self._tree.set_file_attributes(handle, command, given, request.caller())
            data = b""
        else:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        self._send(fuse.reply(request.unique, fuse.IOCTL_OUT.pack(0, 0, 0, 0) + data))
