"""When a read must reach the source, so that it sets the access time there.

A read that the kernel answers from its page cache does not. On a mount with relatime (mount(8)) few reads set the
access time: the first one after a change, and then one a day. At an open before such a read the page cache is dropped.
"""

from __future__ import annotations

import os
import time

from llloop.front.inodes import Inode
from llloop.front.open_files import Handle
from llloop.linux.syscalls import Attributes

_DAY = 24 * 60 * 60  # seconds


class AccessTimes:
    """Decides, file by file, and knows for each mount of the source whether it keeps access times."""

    def __init__(self) -> None:
        self._kept: dict[int, bool] = {}

    def are_due(self, handle: Handle, inode: Inode, attributes: Attributes) -> bool:
        """Whether the next read through a handle is to set the access time.

        That is said once for each access time, since a file may keep its own although the mount does not (chattr +A).

        Args:
            handle: the file just opened.
            inode: its inode.
            attributes: its attributes.
        """
        flags = handle.flags
        if flags & os.O_ACCMODE == os.O_WRONLY or flags & os.O_NOATIME:
            return False
        accessed = attributes.atime, attributes.atime_nsec
        if (
            accessed > (attributes.mtime, attributes.mtime_nsec)
            and accessed > (attributes.ctime, attributes.ctime_nsec)
            and time.time() - attributes.atime < _DAY
        ):
            return False
        if inode.accessed == accessed or not self._are_kept(handle):
            return False
        inode.accessed = accessed
        return True

    def _are_kept(self, handle: Handle) -> bool:
        kept = self._kept.get(handle.mount)
        if kept is None:
            flags = os.fstatvfs(handle.descriptor).f_flag
            kept = self._kept[handle.mount] = not flags & (os.ST_NOATIME | os.ST_RDONLY)
        return kept
