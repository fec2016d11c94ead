"""Conversion of many ``struct statx`` into ``struct fuse_entry_out`` for FUSE_READDIRPLUS.

Both structs have mostly the same fields in another order. Converting them one by one would cost as much as the system
call. So arrays of them are copied column by column, as in `listing`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from llloop.linux import fuse
from llloop.linux.syscalls import STATX_SIZE, StatxTable

_SIZE = fuse.ENTRY.size
# Offsets of each field in struct statx and in struct fuse_entry_out.
_LONG = (
    (40, 48),  # size
    (48, 56),  # blocks
    (64, 64),  # atime
    (112, 72),  # mtime
    (96, 80),  # ctime
)
_SHORT = (
    (72, 88),  # the nanoseconds of atime
    (120, 92),  # ... of mtime
    (104, 96),  # ... of ctime
    (16, 104),  # nlink
    (20, 108),  # uid
    (24, 112),  # gid
    (4, 120),  # blksize
)
_STATX_MODE, _STATX_MAJOR, _STATX_MINOR = 28, 128, 132
_NODEID, _INO, _MODE, _RDEV = 0, 40, 100, 116


def _column(rows: memoryview, size: int, position: int) -> memoryview:
    """Return a view of the field at *position* in all rows, each *size* bytes long.

    The items of *rows* must be as long as the field.
    """
    return rows[position // rows.itemsize :: size // rows.itemsize]


def entries(
    table: StatxTable,
    nodeids: Sequence[int],
    shown: Iterable[int],
    validity: tuple[int, int, int, int],
) -> list[bytes]:
    """Return ``struct fuse_entry_out`` for each of the first rows of a table.

    Args:
        table: the results of statx(2).
        nodeids: the nodeid of each.
        shown: the inode number in the mount of each.
        validity: entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec.
    """
    count = len(nodeids)
    given = table.memory[: count * STATX_SIZE]
    data = bytearray((fuse.ENTRY_HEAD.pack(0, 0, *validity) + bytes(fuse.ATTR.size)) * count)
    made = memoryview(data)
    given_long, made_long = given.cast("Q"), made.cast("Q")
    given_short, made_short = given.cast("I"), made.cast("I")
    for source, target in _LONG:
        _column(made_long, _SIZE, target)[:] = _column(given_long, STATX_SIZE, source)
    for source, target in _SHORT:
        _column(made_short, _SIZE, target)[:] = _column(given_short, STATX_SIZE, source)
    _column(made_long, _SIZE, _NODEID)[:] = memoryview(array("Q", nodeids))
    _column(made_long, _SIZE, _INO)[:] = memoryview(array("Q", shown))
    _column(made_short, _SIZE, _MODE)[:] = memoryview(array("I", _column(given.cast("H"), STATX_SIZE, _STATX_MODE)))
    majors, minors = (_column(given_short, STATX_SIZE, field).tolist() for field in (_STATX_MAJOR, _STATX_MINOR))
    if any(majors) or any(minors):
        devices = array("I", map(fuse.encode_device, majors, minors))
        _column(made_short, _SIZE, _RDEV)[:] = memoryview(devices)
    return [bytes(data[start : start + _SIZE]) for start in range(0, len(data), _SIZE)]
