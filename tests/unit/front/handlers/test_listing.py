"""Conversion of directory entries, for any names in any order."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llloop.front.handlers.listing import Listing, Part, name_of
from llloop.front.recovery import snapshots
from llloop.linux import fuse
from llloop.linux.syscalls import DirectoryBlocks, read_directory
from tests.expect import fails

# struct linux_dirent64 (getdents(2))
_LINUX_DIRENT = struct.Struct("=QqHB")

Entry = tuple[int, int, bytes]

NAMES: dict[str, Callable[[int], str]] = {
    "one length": lambda number: f"name-{number:06}",
    "growing": lambda number: f"f{number}",
    "of one size as records only": lambda number: "x" * (13 + number % 8) + f"{number:05}",
    "runs between others": lambda number: f"a-run-{number:07}" if number % 300 > 2 else f"{number}",
    "long": lambda number: f"{number:05}" + "l" * 250,
    "any": lambda number: f"{number}-" + "x" * random.Random(number).randrange(200),
}


def block_of(entries: list[Entry], filler: bytes = b"\xa5") -> bytes:
    """What the kernel would return; it leaves what is behind a name's NUL as it was."""
    block = b""
    for position, (ino, kind, name) in enumerate(entries):
        length = (_LINUX_DIRENT.size + len(name) + 8) & ~7
        record = _LINUX_DIRENT.pack(ino, position * 7, length, kind) + name + b"\0"
        block += record.ljust(length, filler)
    return block


def parsed(data: bytes, before: int = 0) -> list[Entry]:
    """The entries, of which so many came before."""
    found: list[Entry] = []
    position = 0
    while position < len(data):
        ino, cookie, length, kind = fuse.DIRENT.unpack_from(data, position)
        position += fuse.DIRENT.size
        found.append((ino, kind, data[position : position + length]))
        assert cookie == before + len(found)
        position += length + 7 & ~7
    assert position == len(data)
    return found


def all_of(listing: Listing, size: int) -> list[Entry]:
    found: list[Entry] = []
    while piece := listing.fitting(len(found), size)[0]:
        assert len(piece) <= size
        found += parsed(piece, len(found))
    assert len(found) == len(listing)
    return found


@pytest.mark.parametrize("style", NAMES)
@pytest.mark.parametrize("filler", [b"\0", b"\xa5"])
@pytest.mark.parametrize("size", [512, 32768])
def test_each_entry_is_converted_once(style: str, filler: bytes, size: int) -> None:
    kinds = (8, 4, 10, 1)
    entries = [((1 << 40) + 257 * n, kinds[n // 3 % 4], NAMES[style](n).encode()) for n in range(2000)]
    for order in (entries, random.Random(style).sample(entries, len(entries))):
        blocks = [block_of(order[start : start + 700], filler) for start in range(0, len(order), 700)]
        listing = Listing(blocks, lambda ino: ino, foreign=False)
        assert all_of(listing, size) == order
        records = listing.records(1234, 1 << 20, 128)
        assert parsed(b"".join(records), 1234) == order[1234:1400], "what one block has brought"
        assert [name_of(record) for record in records] == [name for _, _, name in order[1234:1400]]


@pytest.mark.parametrize("style", NAMES)
def test_real_directories(style: str, tmp_path: Path) -> None:
    for number in range(600):
        path = tmp_path / NAMES[style](number)
        if number % 50:
            path.touch()
        else:
            path.mkdir()
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        expected = read_directory(fd)
        assert all_of(Listing(DirectoryBlocks(fd), lambda ino: ino, foreign=False), 4096) == expected
    finally:
        os.close(fd)
    assert {kind for _, kind, _ in expected} == {stat.S_IFREG >> 12, stat.S_IFDIR >> 12}


@pytest.mark.parametrize("foreign", [False, True])
def test_inode_numbers_are_mapped(foreign: bool) -> None:
    entries = [(5, 4, b"."), (2, 4, b".."), *((100 + n, 8, b"%03d" % n) for n in range(200))]
    listing = Listing([block_of(entries)], lambda ino: ino + 1000, foreign=foreign)
    shown = [ino for ino, _, _ in all_of(listing, 4096)]
    assert shown[:2] == [1005, 1002]
    assert shown[2:] == [number + 1000 * foreign for number in range(100, 300)]


def test_records_fit_the_size() -> None:
    listing = Listing([block_of([(n, 8, b"%08d" % n) for n in range(1, 41)])], lambda ino: ino, foreign=False)
    assert len(listing.records(0, 10 * 160, 128)) == 10
    assert len(listing.records(0, 10 * 160 - 1, 128)) == 9
    assert len(listing.records(35, 10 * 160, 128)) == 5
    assert listing.records(40, 10 * 160, 128) == []


def test_empty_listing_and_cookie_beyond_the_end() -> None:
    assert Listing([], lambda ino: ino, foreign=False).fitting(0, 4096) == (b"", 0)
    assert Listing([block_of([(5, 4, b".")])], lambda ino: ino, foreign=False).fitting(9, 4096) == (b"", 9)


def numbered(start: int, end: int) -> list[Entry]:
    return [(n, 8, b"%08d" % n) for n in range(start, end)]


def test_directory_is_read_only_as_far_as_requested() -> None:
    taken = []

    def blocks() -> Iterator[bytes]:
        for start in range(1, 1001, 100):
            taken.append(start)
            yield block_of(numbered(start, start + 100))

    listing = Listing(blocks(), lambda ino: ino, foreign=False)
    assert taken == []
    assert parsed(listing.fitting(0, 4096)[0]) == numbered(1, 101)
    assert taken == [1]
    assert parsed(listing.fitting(99, 4096)[0], 99) == numbered(100, 101)
    assert taken == [1], "the rest of a part is no reason to read on"
    assert len(listing.records(100, 4096, 0)) == 100
    assert taken == [1, 101]
    assert parsed(listing.fitting(50, 4096)[0], 50) == numbered(51, 101), "seekdir(3) leads back"
    assert not listing.complete


def test_listing_continues_after_saved_entries() -> None:
    first = Listing([block_of(numbered(1, 101))], lambda ino: ino, foreign=False)
    first.fitting(0, 4096)
    assert first.position == 99 * 7, "the directory's own cookie of the last entry"
    snapshot = snapshots.make()
    try:
        assert snapshots.load(snapshot) == (b"", 0)
        snapshots.append(snapshot, first.parts[0].data, first.position)
        os.pwrite(snapshot, b"what a front was about to add when it died", os.fstat(snapshot).st_size)
        data, position = snapshots.load(snapshot)
    finally:
        os.close(snapshot)
    assert position == 99 * 7
    rest = [block_of(numbered(101, 151))]
    second = Listing(rest, lambda ino: ino, foreign=False, first=Part.restored(data))
    assert all_of(second, 1000) == numbered(1, 151)


def test_failed_read_is_repeated(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    failures = [-1]

    def fail_once(*arguments: Any) -> int:
        ctypes.set_errno(errno.EIO)
        return failures.pop() if failures else arguments[0](*arguments[1:])

    try:
        listing = Listing(DirectoryBlocks(fd, 0, fail_once), lambda ino: ino, foreign=False)
        with fails(errno.EIO):
            listing.fitting(0, 4096)
        assert len(all_of(listing, 4096)) == 2
    finally:
        os.close(fd)
