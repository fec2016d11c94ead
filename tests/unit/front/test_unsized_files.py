"""Detection of files without a meaningful size."""

from __future__ import annotations

import os
import stat

import pytest

from llloop.front import unsized_files
from llloop.front.unsized_files import UnsizedFiles
from llloop.linux.syscalls import CLOSE_CAN_FAIL, RAM_FILE_SYSTEMS, STACKED, FileSystem
from tests.unit.support import attributes

PROC, EXT4 = 0x9FA0, 0xEF53


@pytest.mark.parametrize(
    ("kind", "blocks", "expected"),
    [
        (EXT4, 1000, "nothing"),
        (PROC, 0, "all"),
        (0x12345678, 0, "all"),
        *((kind, 0, "nothing") for kind in RAM_FILE_SYSTEMS | STACKED),
        *((kind, blocks, "old and empty") for kind in CLOSE_CAN_FAIL for blocks in (0, 1000)),
    ],
)
def test_by_file_system(monkeypatch: pytest.MonkeyPatch, kind: int, blocks: int, expected: str) -> None:
    monkeypatch.setattr(unsized_files, "file_system", lambda fd: FileSystem(kind, blocks))
    known = UnsizedFiles()
    for size in (0, 4096):
        for is_new in (False, True):
            for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_TRUNC):
                is_old_and_empty = not size and not is_new and flags in (os.O_RDONLY, os.O_RDWR)
                found = known.includes(-1, attributes(size=size), flags, is_new=is_new)
                assert found is (expected == "all" or (expected == "old and empty" and is_old_and_empty))
    assert not known.includes(-1, attributes(mode=stat.S_IFDIR), os.O_RDONLY, is_new=False)


def test_each_mount_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By mount ID, because a device number is soon reused."""
    asked = []

    def file_system(fd: int) -> FileSystem:
        asked.append(fd)
        return FileSystem((PROC, EXT4)[fd], fd)

    monkeypatch.setattr(unsized_files, "file_system", file_system)
    known = UnsizedFiles()
    for _ in range(3):
        assert known.includes(0, attributes()._replace(mount=50), os.O_RDONLY, is_new=False)
        assert not known.includes(1, attributes()._replace(mount=51), os.O_RDONLY, is_new=False)
    assert asked == [0, 1]
