"""What takes long in a worker keeps nobody waiting who has to do with another file, though it is the only worker.

A file system that is frozen stands for every source in which calls take long, for it lets them wait until it is thawed.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests import filesystems
from tests.conftest import Serve
from tests.expect import pattern
from tests.mount.test_waiting import doing, in_calls
from tests.server import Server
from tests.server_processes import wait_until, workers
from tests.syscalls import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate

pytestmark = [pytest.mark.mounted, pytest.mark.own_loop, pytest.mark.root, pytest.mark.by_workers]

DEATH_OF_A_WORKER = "llloop-worker-0 was killed by signal 9"
LARGE = 300_000  # bytes; the front gives a write of this size to a worker
MUCH = pattern(LARGE, 1)
PAGE = 4096
# A read that does not block ends within this time, even on a busy machine. A read from a frozen disk never ends.
TIMEOUT = 20.0


@pytest.fixture(params=["front", "workers"])
def server(request: pytest.FixtureRequest, serve: Serve, tmp_path: Path) -> Iterator[Server]:
    """A mount of one worker whose source is a file system of its own, which can be frozen."""
    with filesystems.ext4(tmp_path) as source:
        for number in range(24):
            (source / f"file{number}").write_bytes(pattern(LARGE, number))
        own = serve("--workers", "1", "--metadata", request.param, "--cache", "never", source=source)
        yield own
        own.stop()


def worker_of(server: Server) -> int:
    (pid,) = workers(server).values()
    return pid


def forget_pages(path: Path) -> None:
    """Have the next read of a file of the source wait for its disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def check_reading(server: Server, *names: str) -> None:
    """Reads go on, of pages that are in memory and of others, small and large; in a thread, so that the test ends."""
    done = []

    def read() -> None:
        for name in names:
            expected = pattern(LARGE, int(name.removeprefix("file")))
            for size in (PAGE, LARGE):
                forget_pages(server.source / name)
                fd = os.open(server.mountpoint / name, os.O_RDONLY)
                try:
                    assert os.pread(fd, size, 0) == expected[:size]
                finally:
                    os.close(fd)
        done.append(True)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    assert done, "a reader waits for somebody who writes to another file"


def write_to(path: Path, flags: int = 0) -> None:
    fd = os.open(path, os.O_RDWR | flags)
    try:
        assert os.pwrite(fd, MUCH, 0) == LARGE
    finally:
        os.close(fd)


def with_file(act: Callable[[int], object]) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        fd = os.open(path, os.O_RDWR)
        try:
            act(fd)
        finally:
            os.close(fd)

    return do


CALLS: dict[str, Callable[[Path], object]] = {
    "write": write_to,
    "append": lambda path: write_to(path, os.O_APPEND),
    "punch": with_file(lambda fd: fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 1 << 16)),
    "copy": with_file(lambda fd: os.copy_file_range(fd, fd, 1 << 16, 0, 1 << 18)),
}


@pytest.mark.parametrize("call", CALLS)
def test_blocked_call_of_the_only_worker_does_not_block_reads(server: Server, call: str) -> None:
    mount, pid = server.mountpoint, worker_of(server)
    check_reading(server, "file1")
    with filesystems.frozen(server.source), doing(lambda: CALLS[call](mount / "file0")) as threads:
        assert wait_until(lambda: in_calls(pid) > 0)
        check_reading(server, "file1", "file2")
        if "--writeback" not in server.arguments or call in ("write", "append"):
            # Otherwise the kernel locks the inode, and close(2) waits for that lock (fs/fuse/file.c, fuse_flush()).
            check_reading(server, "file0")
        assert threads[0].is_alive()
        filesystems.thaw(server.source)
    expected = bytearray(pattern(LARGE, 0))
    if call == "write":
        expected[:] = MUCH
    elif call == "append":
        expected += MUCH
    elif call == "punch":
        expected[: 1 << 16] = bytes(1 << 16)
    else:
        expected[1 << 18 :] = expected[: 1 << 16]
    assert (server.source / "file0").read_bytes() == (mount / "file0").read_bytes() == expected


def test_more_blocked_writes_than_slots(server: Server) -> None:
    mount, pid = server.mountpoint, worker_of(server)
    written = [f"file{number}" for number in range(2, 24)]
    writers = [partial(write_to, mount / name, os.O_APPEND) for name in written]
    with filesystems.frozen(server.source), doing(*writers) as threads:
        assert wait_until(lambda: in_calls(pid) >= 8)
        check_reading(server, "file0", "file1")
        assert all(thread.is_alive() for thread in threads)
        filesystems.thaw(server.source)
    for name in written:
        assert (server.source / name).read_bytes() == pattern(LARGE, int(name[4:])) + MUCH


def test_blocked_appends_of_a_killed_worker_are_done_once(server: Server) -> None:
    server.expect_log(DEATH_OF_A_WORKER)
    mount, pid = server.mountpoint, worker_of(server)
    written = [f"file{number}" for number in range(2, 8)]
    writers = [partial(write_to, mount / name, os.O_APPEND) for name in written]
    with filesystems.frozen(server.source), doing(*writers):
        assert wait_until(lambda: in_calls(pid) == len(written))
        os.kill(pid, signal.SIGKILL)
        filesystems.thaw(server.source)
    for name in written:
        assert (server.source / name).read_bytes() == pattern(LARGE, int(name[4:])) + MUCH
    assert worker_of(server) != pid
