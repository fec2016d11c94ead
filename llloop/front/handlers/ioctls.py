"""FUSE_IOCTL: the ioctls of file attributes, and that of `llloop control MNT release PATH`."""

from __future__ import annotations

import errno
import os

from llloop.front.context import Context
from llloop.front.handlers.file_attributes import FileAttributeRequests
from llloop.front.inodes import ROOT
from llloop.front.permissions import not_permitted
from llloop.front.request import FuseRequest
from llloop.linux import fuse
from llloop.linux.descriptor_paths import is_at_or_below, path_of
from llloop.shared.notifications import expire_all_entries
from llloop.shared.release import ANSWER, PATH_SIZE, RELEASE


class IoctlRequests(FileAttributeRequests):
    """The handlers; see `Responder`."""

    def __init__(self, context: Context, device: int) -> None:
        super().__init__(context, device)
        self._closing = context.closing

    def ioctl(self, request: FuseRequest) -> None:
        """FUSE_IOCTL."""
        number, command, in_size, _ = fuse.IOCTL_REQUEST.unpack_from(self._memory, request.base)
        if command != RELEASE:
            super().ioctl(request)
            return
        if request.caller().uid not in (0, os.geteuid()):
            raise not_permitted()
        if in_size != PATH_SIZE or self._handles.get(number).nodeid != ROOT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        path = request.payload(fuse.IOCTL_REQUEST.size, in_size).rstrip(b"\0")
        answer = ANSWER.pack(*self._release(path))
        self._send(fuse.reply(request.unique, fuse.IOCTL_OUT.pack(0, 0, 0, 0) + answer))

    def _release(self, path: bytes) -> tuple[int, int]:
        """Close the descriptors below a path that no program needs, after this request.

        Args:
            path: the path from the source.

        Returns:
            How many files below the path programs have open, and how many descriptors are yet to be closed.
        """
        fds = self._tree.directory_fds
        place = os.path.join(path_of(fds.root), path)

        def is_below(fd: int) -> bool:
            return is_at_or_below(path_of(fd), place)

        fds.close_where(is_below)
        fds.pins.close_where(is_below, self._handles.open_inodes())
        expire_all_entries(self._device)  # what the kernel has cached is wrong when a file system is unmounted
        handles = [self._handles.get(number) for number in self._handles]
        used = sum(1 for handle in handles if is_below(handle.descriptor))
        return used, sum(map(is_below, self._closing))
