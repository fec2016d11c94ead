"""What the kernel may cache: never old data because of a timestamp that a later write could leave as well."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llloop.config import Cache, ServeConfig
from llloop.front.cache_policy import CachePolicy, split
from llloop.front.inodes import ROOT
from llloop.linux import fuse
from llloop.linux.syscalls import Attributes
from tests.unit.support import attributes, some_inodes

NOW = 1_000_000.5


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)


def policy(cache: Cache = Cache.AUTO, direct_mmap: bool = True, **options: float) -> CachePolicy:
    config = ServeConfig(source="/src", mountpoint="/mnt", cache=cache, **options)  # type: ignore[arg-type]
    return CachePolicy(config, direct_mmap, 0)


def settled(size: int = 10, mtime: tuple[int, int] = (900_000, 1), ctime: tuple[int, int] = (900_000, 2)) -> Attributes:
    return attributes(size=size, mtime=mtime, ctime=ctime)


def test_pages_of_an_unchanged_file_are_kept() -> None:
    inodes, own = some_inodes(), policy()
    assert own.open_flags(inodes, ROOT, settled()) == 0, "nothing is known of what the kernel has cached before"
    assert own.open_flags(inodes, ROOT, settled()) == fuse.FOPEN_KEEP_CACHE
    assert own.open_flags(inodes, ROOT, settled()) == fuse.FOPEN_KEEP_CACHE


@pytest.mark.parametrize(
    "changed",
    [
        settled(size=11),
        settled(mtime=(900_001, 1)),
        settled(mtime=(900_000, 9)),
        settled(ctime=(900_001, 2)),
        settled(ctime=(900_000, 9)),
    ],
)
def test_pages_of_a_changed_file_are_dropped(changed: Attributes) -> None:
    inodes, own = some_inodes(), policy()
    own.open_flags(inodes, ROOT, settled())
    assert own.open_flags(inodes, ROOT, changed) == 0
    assert own.open_flags(inodes, ROOT, changed) == fuse.FOPEN_KEEP_CACHE
    assert own.open_flags(inodes, ROOT, settled()) == 0


def test_stamp_of_a_dead_front_is_not_trusted() -> None:
    """Its reply, with which the kernel was to drop what it had, may not have been sent."""
    inodes = some_inodes()
    config = ServeConfig(source="/src", mountpoint="/mnt")
    for front in range(2):
        own = CachePolicy(config, True, front)
        assert own.open_flags(inodes, ROOT, settled()) == 0
        assert own.open_flags(inodes, ROOT, settled()) == fuse.FOPEN_KEEP_CACHE


@pytest.mark.parametrize("age", [0, 1])
def test_recent_timestamp_is_not_trusted(age: int) -> None:
    """A write in the same tick would leave the same timestamp."""
    fresh = settled(ctime=(int(NOW) - age + 1, 0))
    inodes, own = some_inodes(), policy()
    for _ in range(3):
        assert own.open_flags(inodes, ROOT, fresh) == 0


def test_future_timestamp_is_not_trusted() -> None:
    future = settled(ctime=(int(NOW) + 86400, 0))
    inodes, own = some_inodes(), policy()
    for _ in range(3):
        assert own.open_flags(inodes, ROOT, future) == 0


def test_old_mtime_with_recent_ctime_is_not_trusted() -> None:
    """utimensat(2) sets it to anything; only the change time cannot be set."""
    forged = settled(mtime=(1, 0), ctime=(int(NOW) + 1, 0))
    inodes, own = some_inodes(), policy()
    own.open_flags(inodes, ROOT, forged)
    assert own.open_flags(inodes, ROOT, forged) == 0


def test_recent_change_drops_the_noted_timestamps() -> None:
    inodes, own = some_inodes(), policy()
    own.open_flags(inodes, ROOT, settled())
    own.open_flags(inodes, ROOT, settled(ctime=(int(NOW) + 1, 0)))
    assert own.open_flags(inodes, ROOT, settled()) == 0


def test_cache_never_uses_direct_io_if_mmap_is_possible() -> None:
    assert policy(Cache.NEVER).open_flags(some_inodes(), ROOT, settled()) == fuse.FOPEN_DIRECT_IO
    own, inodes = policy(Cache.NEVER, direct_mmap=False), some_inodes()
    for _ in range(3):
        assert own.open_flags(inodes, ROOT, settled()) == 0


def test_always_keeps_whatever_happens() -> None:
    inodes, own = some_inodes(), policy(Cache.ALWAYS)
    assert own.open_flags(inodes, ROOT, settled()) == fuse.FOPEN_KEEP_CACHE
    assert own.open_flags(inodes, ROOT, settled(size=99)) == fuse.FOPEN_KEEP_CACHE


def test_timeouts_equal_the_options() -> None:
    own = policy(attr_timeout=1.5, entry_timeout=0.25, negative_timeout=3)
    assert own.validity.attributes == (1, 500_000_000)
    assert own.validity.both == (0, 1, 250_000_000, 500_000_000)
    assert own.validity.only_entry == (0, 0, 250_000_000, 0)
    assert own.validity.negative == fuse.ENTRY_HEAD.pack(0, 0, 3, 0, 0, 0) + bytes(fuse.ATTR.size)
    never = policy(Cache.NEVER)
    assert never.validity == ((0, 0, 0, 0), (0, 0, 0, 0), (0, 0), b"")


@given(st.floats(0, 2**31))
def test_timeout_is_split_into_seconds_and_nanoseconds(seconds: float) -> None:
    whole, nanoseconds = split(seconds)
    assert 0 <= nanoseconds < 1_000_000_000
    assert abs(whole + nanoseconds / 1e9 - seconds) < 1e-6


KEPT = fuse.FOPEN_CACHE_DIR | fuse.FOPEN_KEEP_CACHE


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The monotonic clock in nanoseconds, to be set."""
    now = [5_000_000_000]
    monkeypatch.setattr(time, "monotonic_ns", lambda: now[0])
    return now


def test_listing_is_kept_while_attributes_are_valid(stopwatch: list[int]) -> None:
    inodes, own = some_inodes(), policy(attr_timeout=3.0, entry_timeout=2.0)
    assert own.directory_flags(inodes, ROOT, settled()) == fuse.FOPEN_CACHE_DIR
    stopwatch[0] += 1_999_999_999
    assert own.directory_flags(inodes, ROOT, settled()) == KEPT
    stopwatch[0] += 1
    assert own.directory_flags(inodes, ROOT, settled()) == fuse.FOPEN_CACHE_DIR, "it is listed anew, with attributes"
    assert own.directory_flags(inodes, ROOT, settled()) == KEPT


@pytest.mark.parametrize("changed", [settled(mtime=(900_000, 9)), settled(ctime=(900_000, 9))])
@pytest.mark.parametrize("cache", [Cache.AUTO, Cache.ALWAYS])
def test_listing_of_a_changed_directory_is_dropped(cache: Cache, changed: Attributes, stopwatch: list[int]) -> None:
    inodes, own = some_inodes(), policy(cache)
    own.directory_flags(inodes, ROOT, settled())
    assert own.directory_flags(inodes, ROOT, changed) == fuse.FOPEN_CACHE_DIR
    assert own.directory_flags(inodes, ROOT, changed) == KEPT


def test_listing_with_recent_timestamp_is_not_kept(stopwatch: list[int]) -> None:
    fresh = settled(ctime=(1_000_000, 0))
    inodes, own = some_inodes(), policy()
    assert own.directory_flags(inodes, ROOT, fresh) == own.directory_flags(inodes, ROOT, fresh) == fuse.FOPEN_CACHE_DIR


def test_no_listing_is_kept_where_nothing_is(stopwatch: list[int]) -> None:
    inodes, own = some_inodes(), policy(Cache.NEVER)
    assert own.directory_flags(inodes, ROOT, settled()) == own.directory_flags(inodes, ROOT, settled()) == 0
