"""When a read must reach the source to update the access time: the rules of relatime, once for each time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from llloop.front.access_times import AccessTimes
from llloop.front.inodes import ROOT
from llloop.front.open_files import Handle
from tests.unit.support import attributes, some_inodes

NOW = 1_000_000.5
FRESH, OLD = (999_999, 5), (900_000, 5)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    yield opened
    os.close(opened)


def mounted_with(monkeypatch: pytest.MonkeyPatch, flags: int) -> None:
    monkeypatch.setattr(os, "fstatvfs", lambda descriptor: SimpleNamespace(f_flag=flags))


@pytest.mark.parametrize(
    ("atime", "mtime", "ctime", "due"),
    [
        (FRESH, OLD, OLD, False),
        (FRESH, FRESH, OLD, True),
        (FRESH, OLD, FRESH, True),
        (FRESH, OLD, (999_999, 4), False),
        ((913_000, 0), OLD, OLD, True),  # more than a day
        ((914_200, 0), OLD, OLD, False),
    ],
)
def test_relatime(
    monkeypatch: pytest.MonkeyPatch,
    descriptor: int,
    atime: tuple[int, int],
    mtime: tuple[int, int],
    ctime: tuple[int, int],
    due: bool,
) -> None:
    mounted_with(monkeypatch, os.ST_RELATIME)
    found = attributes(mtime=mtime, ctime=ctime)._replace(atime=atime[0], atime_nsec=atime[1])
    own = AccessTimes(some_inodes(), 0)
    handle = Handle(descriptor, ROOT, 0, os.O_RDONLY)
    assert own.must_update(handle, found) is due
    assert not own.must_update(handle, found), "once for each access time"
    later = found._replace(atime=found.atime - 1, atime_nsec=0)
    assert own.must_update(handle, later) is (due or (atime[0] - 1, 0) <= max(mtime, ctime))


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDONLY | os.O_NOATIME])
def test_opens_that_do_not_update_the_access_time(monkeypatch: pytest.MonkeyPatch, descriptor: int, flags: int) -> None:
    mounted_with(monkeypatch, 0)
    found = attributes(mtime=FRESH, ctime=FRESH)
    assert not AccessTimes(some_inodes(), 0).must_update(Handle(descriptor, ROOT, 0, flags), found)


@pytest.mark.parametrize("flag", [os.ST_NOATIME, os.ST_RDONLY])
def test_mounts_without_access_times(monkeypatch: pytest.MonkeyPatch, descriptor: int, flag: int) -> None:
    mounted_with(monkeypatch, flag)
    found = attributes(mtime=FRESH, ctime=FRESH)
    assert not AccessTimes(some_inodes(), 0).must_update(Handle(descriptor, ROOT, 0, os.O_RDONLY), found)
