"""Regression tests for defects that the other tests did not find."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from llloop.config import Cache, IoKind, LoopKind, ServeConfig
from llloop.errors import UsageError
from llloop.front.cache_policy import CachePolicy
from llloop.front.inodes import ROOT
from llloop.front.open_files import Handle
from llloop.front.router import Router
from llloop.linux import mounts
from llloop.linux.fuse import FOPEN_KEEP_CACHE
from llloop.linux.syscalls import statx
from llloop.shared.messages import HANDLES_PER_FRONT, Operation, encode
from llloop.shared.slots import Slots
from llloop.workers import descriptors as descriptors_module
from llloop.workers.descriptors import Descriptors
from tests.expect import fails
from tests.unit.source import MYSELF, Source
from tests.unit.support import attributes, packet_pipe, packets, some_inodes

NOW = 1_000_000.001  # seconds


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    """Interrupt an endless loop before it has eaten the machine's memory, which pytest's own timeout would not."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Names and numbers that others change in the source


def test_swapped_directories_give_estale(source: Source) -> None:
    """Each directory was seen in the other one, before and after the swap."""
    os.makedirs(source.path / "a/b")
    a, _ = source.tree.lookup(ROOT, b"a")
    b, _ = source.tree.lookup(a, b"b")
    source.tree.directory_fds.directory(b)
    (source.path / "a/b").rename(source.path / "b")
    (source.path / "a").rename(source.path / "b/a")
    source.tree.lookup(b, b"a")
    source.tree.directory_fds.shrink()
    for nodeid in (a, b):
        with ends_within(0.5), fails(errno.ESTALE):
            source.tree.directory_fds.directory(nodeid)


def test_open_file_survives_unlink_after_removal_in_source(source: Source) -> None:
    (source.path / "a").write_text("content")
    (source.path / "b").hardlink_to(source.path / "a")
    nodeid, _ = source.tree.lookup(ROOT, b"a")
    source.tree.lookup(ROOT, b"b")
    (source.path / "b").unlink()
    source.tree.lookup(ROOT, b"a")
    source.tree.unlink(ROOT, b"a", MYSELF)
    assert source.tree.getattr(nodeid).nlink == 0


def test_open_file_survives_unlink_after_rename_to_removed_name(source: Source) -> None:
    (source.path / "a").write_text("content")
    (source.path / "b").hardlink_to(source.path / "a")
    nodeid, _ = source.tree.lookup(ROOT, b"b")
    source.tree.lookup(ROOT, b"a")
    (source.path / "b").unlink()
    source.tree.rename(ROOT, b"a", ROOT, b"b", 0, MYSELF)
    source.tree.unlink(ROOT, b"b", MYSELF)
    assert source.tree.getattr(nodeid).nlink == 0


def test_removed_file_is_not_mistaken_for_one_with_its_old_number(source: Source) -> None:
    (source.path / "file").write_text("new file")
    found = statx(source.root, b"file")
    # As if the kernel had been told of an older file with this number.
    nodeid = source.context.inodes.remember(ROOT, b"file", found._replace(btime=found.btime - 1))
    with fails(errno.ESTALE):
        source.tree.unlink(ROOT, b"file", MYSELF)
    assert (source.path / "file").exists()
    with fails(errno.ESTALE):
        source.tree.getattr(nodeid)


# What the kernel may keep


def policy(**options: Any) -> CachePolicy:
    return CachePolicy(ServeConfig(source="/s", mountpoint="/m", **options), True, 0)


@pytest.mark.parametrize(("changed", "trusted"), [((999_999, 998_000_000), False), ((999_998, 998_000_000), True)])
def test_timestamps_are_trusted_after_one_second(
    changed: tuple[int, int], trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)
    seen = attributes(size=5, mtime=changed, ctime=changed)
    inodes = some_inodes()
    policy().open_flags(inodes, ROOT, seen)
    assert (policy().open_flags(inodes, ROOT, seen) == FOPEN_KEEP_CACHE) is trusted


def test_cache_mode_can_be_given_by_name() -> None:
    old = attributes(size=5, mtime=(5, 0), ctime=(5, 0))
    inodes = some_inodes()
    never = policy(cache="never")
    never.open_flags(inodes, ROOT, old)
    assert never.open_flags(inodes, ROOT, old) != FOPEN_KEEP_CACHE


def test_each_choice_can_be_given_by_name() -> None:
    config = ServeConfig(source="/s", mountpoint="/m", cache="always", io="auto", loop="own")  # type: ignore[arg-type]
    assert (config.cache, config.io, config.loop) == (Cache.ALWAYS, IoKind.AUTO, LoopKind.OWN)


@pytest.mark.parametrize(
    "options", [{"workers": "4"}, {"attr_timeout": "1"}, {"cache": "sometimes"}, {"io": "disk"}, {"loop": "nonsense"}]
)
def test_value_of_wrong_type_is_a_usage_error(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ServeConfig(source="/s", mountpoint="/m", **options)


# Between the processes


@contextmanager
def process() -> Iterator[int]:
    """A process that does nothing, by its id."""
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_worker_closes_only_its_own_descriptors_after_death_of_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors_module, "FRONT_TIMEOUT", 0.05)
    fd = os.open(tmp_path, os.O_RDONLY)
    slots = Slots(2, 4096, 1)
    descriptors = Descriptors(slots)
    with process() as first, process() as third:
        slots.set_front(first)
        descriptors.get(HANDLES_PER_FRONT + 1, fd)
        with process() as second:
            pass
        slots.set_front(second)
        with fails(errno.EIO):
            descriptors.get(2 * HANDLES_PER_FRONT + 2, fd)
        # They get the free numbers.
        others = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]
        slots.set_front(third)
        descriptors.get(3 * HANDLES_PER_FRONT + 3, fd)
        assert [os.readlink(f"/proc/self/fd/{other}") for other in others] == ["/dev/null"] * 4
    descriptors.release(3 * HANDLES_PER_FRONT + 3)
    for number in (fd, *others):
        os.close(number)


def test_releases_reach_a_slow_worker_without_further_requests() -> None:
    with packet_pipe(2) as first, packet_pipe(2) as second:
        router = Router(Slots(4, 4096, 2), [first[1], second[1]])
        for shard, (_, writer) in enumerate((first, second)):
            with fails(errno.EAGAIN):
                while os.write(writer, encode((Operation.FSYNC, 0, 0, 0, 0))):
                    pass
            router.release(shard, Handle(5, 100, shard, os.O_RDWR))
        device, request = os.pipe()
        # The second worker has room only after the first. The request that would end the wait comes last.
        timers = [
            threading.Timer(0.1, packets, [first[0]]),
            threading.Timer(0.3, packets, [second[0]]),
            threading.Timer(1.5, os.write, [request, b"!"]),
        ]
        for timer in timers:
            timer.start()
        try:
            router.wait(device)
            assert not router.backlog
        finally:
            for timer in timers:
                timer.join()
            os.close(device)
            os.close(request)


# Unusual states of the machine


def test_mount_point_may_contain_carriage_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel escapes a newline in mountinfo, but not a carriage return."""
    table = tmp_path / "mountinfo"
    table.write_bytes(b"36 35 98:0 / /mnt/a\rb rw - tmpfs tmpfs rw\n")
    monkeypatch.setattr(mounts, "Path", lambda name: table)
    assert [entry.mountpoint for entry in mounts.mounts()] == ["/mnt/a\rb"]
