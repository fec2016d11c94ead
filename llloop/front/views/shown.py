"""Owners and modes that are only shown (`--force-user`, `--force-group`, `--mode`)."""

from __future__ import annotations

import stat
from array import array

from llloop.linux import fuse
from llloop.linux.credentials import SETID_BITS
from llloop.linux.syscalls import STATX_SIZE, Attributes
from llloop.mode_changes import ModeChange

# Offsets in struct statx.
_UID, _GID, _MODE = 20, 24, 28


class Shown:
    """Converts attributes of the source into those that the mount shows.

    Files other than directories never show set-ID bits: such a program would run as the shown owner, who may neither
    own it nor know what is in it.

    Args:
        user, group: the owner and the group of all files, or None for those of the source.
        mode: the change of permissions, or None.
    """

    def __init__(self, user: int | None, group: int | None, mode: ModeChange | None) -> None:
        self._user = user
        self._group = group
        self._change = mode

    def of(self, attributes: Attributes) -> Attributes:
        """Return the attributes that the mount shows for a file with *attributes* in the source."""
        return attributes._replace(
            uid=attributes.uid if self._user is None else self._user,
            gid=attributes.gid if self._group is None else self._group,
            mode=self._mode(attributes.mode),
        )

    def _mode(self, mode: int) -> int:
        if not stat.S_ISDIR(mode):
            mode &= ~SETID_BITS
        return mode if self._change is None else self._change.applied(mode)

    def fields(self, number: int, attributes: Attributes) -> tuple[int, ...]:
        """Return the fields of struct fuse_attr; *number* is the inode number in the mount."""
        return fuse.attribute_fields(number, self.of(attributes))

    def convert(self, rows: memoryview, count: int) -> None:
        """Convert the first *count* of successive ``struct statx`` in place."""
        words = rows[: count * STATX_SIZE].cast("I")
        step = STATX_SIZE // words.itemsize
        for field, forced in ((_UID, self._user), (_GID, self._group)):
            if forced is not None:
                words[field // words.itemsize :: step] = memoryview(array("I", [forced]) * count)
        modes = rows[: count * STATX_SIZE].cast("H")[_MODE // 2 :: STATX_SIZE // 2]
        modes[:] = memoryview(array("H", map(self._mode, modes.tolist())))
