"""Decides when a read must reach the source so that the source updates the access time.

A read that the kernel answers from its page cache does not reach the source. With relatime (mount(8)), few reads update
the access time: the first one after a change, and then one each day. The page cache is dropped at the open before such
a read.
"""

from __future__ import annotations

import os
import time

from llloop.front.inodes import Inodes
from llloop.front.open_files import Handle
from llloop.linux.syscalls import Attributes

_DAY = 24 * 60 * 60  # seconds
_MASK = (1 << 64) - 1


class AccessTimes:
    """Decides for each file; knows which mounts of the source have access times.

    Args:
        inodes: where it is kept what was said of each file.
        front: as for `llloop.front.cache_policy.CachePolicy`.
    """

    def __init__(self, inodes: Inodes, front: int) -> None:
        self._inodes = inodes
        self._front = front
        self._kept: dict[int, bool] = {}

    def must_update(self, handle: Handle, attributes: Attributes) -> bool:
        """Return whether the next read through a handle must update the access time.

        It returns True only once for each access time, because a file may never update it (chattr +A).

        Args:
            handle: the file that was just opened.
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
        said = hash((self._front, *accessed)) & _MASK
        if self._inodes.accessed(handle.nodeid) == said or not self._are_kept(handle):
            return False
        self._inodes.set_accessed(handle.nodeid, said)
        return True

    def _are_kept(self, handle: Handle) -> bool:
        kept = self._kept.get(handle.mount)
        if kept is None:
            flags = os.fstatvfs(handle.descriptor).f_flag
            kept = self._kept[handle.mount] = not flags & (os.ST_NOATIME | os.ST_RDONLY)
        return kept
