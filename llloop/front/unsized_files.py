"""Which files have data although their size is 0: those of proc, sysfs, cgroup, tracefs and the like."""

from __future__ import annotations

import os
import stat
from enum import Enum, auto

from llloop.linux.syscalls import CLOSE_CAN_FAIL, RAM_FILE_SYSTEMS, STACKED, Attributes, file_system


class _Kind(Enum):
    """What the sizes of a file system's files are worth."""

    TRUE = auto()
    # It makes up what is read when it is read.
    NONE = auto()
    # A server's: its files of size 0 can be such, and mostly are empty.
    DOUBTFUL = auto()


class Sizes:
    """Decides, mount by mount, whether the size of a file says how much can be read from it."""

    def __init__(self) -> None:
        self._kinds: dict[int, _Kind] = {}

    def are_void(self, descriptor: int, attributes: Attributes, flags: int, *, is_new: bool) -> bool:
        """Whether the size of a file just opened says nothing, so that it is to be read without the page cache.

        Args:
            descriptor: the file.
            attributes: its attributes.
            flags: the open(2) flags.
            is_new: whether the open has made it.
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
    # No blocks: nothing is stored there. A tmpfs without a limit says so, too.
    is_made_up = found.blocks == 0 and found.type not in RAM_FILE_SYSTEMS and found.type not in STACKED
    return _Kind.NONE if is_made_up else _Kind.TRUE
