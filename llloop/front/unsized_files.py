"""Detection of files whose size is 0 although they have data: in proc, sysfs, cgroup, tracefs and similar."""

from __future__ import annotations

import os
import stat
from enum import Enum, auto

from llloop.linux.syscalls import CLOSE_CAN_FAIL, RAM_FILE_SYSTEMS, STACKED, Attributes, file_system


class _Kind(Enum):
    """Whether the sizes of a file system's files are right."""

    TRUE = auto()
    # The file system generates the data when it is read.
    NONE = auto()
    # The file system is on a server. A file of size 0 is mostly empty, but may be such a file.
    DOUBTFUL = auto()


class UnsizedFiles:
    """Decides for each mount whether the size of a file tells how much data it has."""

    def __init__(self) -> None:
        self._kinds: dict[int, _Kind] = {}

    def includes(self, descriptor: int, attributes: Attributes, flags: int, *, is_new: bool) -> bool:
        """Return whether the size of a file that was just opened is meaningless, so that the page cache is unusable.

        Args:
            descriptor: the file.
            attributes: its attributes.
            flags: the open(2) flags.
            is_new: whether the open has created it.
        """
        mount = attributes.mount or attributes.device
        kind = self._kinds.get(mount)
        if kind is None:
            kind = self._kinds[mount] = _kind_of(descriptor)
        if kind is _Kind.TRUE or not stat.S_ISREG(attributes.mode):
            return False
        if kind is _Kind.NONE:
            return True
        return not (attributes.size or is_new or flags & os.O_TRUNC or flags & os.O_ACCMODE == os.O_WRONLY)


def _kind_of(descriptor: int) -> _Kind:
    found = file_system(descriptor)
    if found.type in CLOSE_CAN_FAIL:
        return _Kind.DOUBTFUL
    # A file system without blocks stores nothing, except a tmpfs without a size limit.
    is_made_up = found.blocks == 0 and found.type not in RAM_FILE_SYSTEMS and found.type not in STACKED
    return _Kind.NONE if is_made_up else _Kind.TRUE
