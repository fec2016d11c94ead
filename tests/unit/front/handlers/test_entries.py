"""Conversion of struct statx into struct fuse_entry_out, column by column."""

from __future__ import annotations

import random
import struct

import pytest

from llloop.front.handlers.entries import entries
from llloop.linux import fuse
from llloop.linux.syscalls import STATX_SIZE, StatxTable

# struct statx (statx(2)) up to stx_dev_minor
_STATX = struct.Struct("=IIQIIIHHQQQQqI4xqI4xqI4xqI4xIIII")


def fill(table: StatxTable, row: int, dice: random.Random, rdev: tuple[int, int]) -> bytes:
    """Write any attributes into a row; return what the kernel is to be told of them as inode 7 + *row*."""
    nlink, uid, gid, blksize = (dice.getrandbits(32) for _ in range(4))
    mode = dice.getrandbits(16)
    size, blocks = dice.getrandbits(63), dice.getrandbits(63)
    times = [(dice.randrange(-(1 << 40), 1 << 40), dice.randrange(1_000_000_000)) for _ in range(4)]
    atime, _, ctime, mtime = times
    flat = [part for time in times for part in time]
    given = (0xFFF, blksize, 1, nlink, uid, gid, mode, 0, 99, size, blocks, 1, *flat, *rdev, 1, 2)
    table.memory[row * STATX_SIZE : (row + 1) * STATX_SIZE] = _STATX.pack(*given).ljust(STATX_SIZE, b"\xa5")
    seconds, nanoseconds = zip(atime, mtime, ctime, strict=True)
    device = fuse.encode_device(*rdev)
    attr = (70 + row, size, blocks, *seconds, *nanoseconds, mode, nlink, uid, gid, device, blksize, 0)
    return fuse.ENTRY.pack(7 + row, 0, 1, 2, 3, 4, *attr)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("rdev", [(0, 0), (8, 17), (259, 70000), (0, 3)])
def test_each_field_is_converted(rows: int, rdev: tuple[int, int]) -> None:
    dice, table = random.Random(rows), StatxTable(5)
    expected = [fill(table, row, dice, rdev if row % 2 == 0 else (0, 0)) for row in range(rows)]
    nodeids, shown = ([first + row for row in range(rows)] for first in (7, 70))
    made = entries(table, nodeids, shown, (1, 2, 3, 4))
    assert made == expected
