"""A worker that is stopped, or hangs in a dead source, blocks only its own files."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llloop.control import client
from tests.conftest import Serve
from tests.expect import pattern
from tests.server import Server
from tests.server_processes import stop_process, wait_until, workers

pytestmark = [pytest.mark.mounted, pytest.mark.own_loop, pytest.mark.by_workers, pytest.mark.user]

LARGE = 200_000  # bytes; the front gives a write of this size to a worker
# Created once: the kernel splits a write from untouched memory into small pieces, which the front writes itself.
CONTENT = b"x" * LARGE
MANY = 300  # more than there are slots
# The stopped worker must only block data, not names.
WORKERS = ("--workers", "2", "--metadata", "front")


def files_by_worker(server: Server, count: int = 16) -> dict[str, list[Path]]:
    """Files in the mount by the worker that does their I/O: the one that moves the bytes."""
    found: dict[str, list[Path]] = {}
    for number in range(count):
        path = server.mountpoint / f"file{number}"
        before = moved_by(server)
        path.write_bytes(pattern(LARGE, number))
        # A worker counts after it has answered.
        assert wait_until(lambda: sum(moved_by(server).values()) == sum(before.values()) + LARGE)  # noqa: B023
        (owner,) = (title for title, moved in moved_by(server).items() if moved != before[title])
        found.setdefault(owner, []).append(path)
    return found


def moved_by(server: Server) -> dict[str, int]:
    """How many bytes of files each worker has moved, by its title."""
    stats = client.ask_mount(str(server.mountpoint), "stats")
    return {f"llloop-{worker['name']}": worker["bytes"] for worker in stats["workers"]}


def files_open_on(device: int) -> int:
    """How many files of a file system this process has open, by what the kernel knows without asking its server."""
    found = 0
    for name in os.listdir("/proc/self/fdinfo"):
        with contextlib.suppress(OSError):
            text = Path("/proc/self/fdinfo", name).read_text()
            mount_id = int(re.findall(r"^mnt_id:\s+(\d+)", text, re.MULTILINE)[0])
            found += mount_id in mounts_of(device)
    return found


def mounts_of(device: int) -> set[int]:
    number = f"{os.major(device)}:{os.minor(device)}"
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return {int(fields[0]) for fields in map(str.split, lines) if fields[2] == number}


def write_some(path: Path) -> None:
    """What may fail is not of interest here, only that it ends."""
    with contextlib.suppress(OSError), path.open("r+b") as file:
        file.write(CONTENT)


def read_all(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.read_bytes()


@contextlib.contextmanager
def in_threads(paths: list[Path], action: Callable[[Path], None] = write_some) -> Iterator[list[threading.Thread]]:
    threads = [threading.Thread(target=action, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    try:
        yield threads
    finally:
        for thread in threads:
            thread.join(20)


def all_works(path: Path) -> None:
    content = os.urandom(LARGE)
    path.write_bytes(content)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read() == content
        os.fsync(file.fileno())


@pytest.mark.at_once("the kernel sends 64 collected writes at a time, whichever workers these wait for")
def test_stopped_worker_does_not_block_others(serve: Serve) -> None:
    server = serve(*WORKERS)
    owners = files_by_worker(server)
    (stopped, theirs), (_, others) = sorted(owners.items())
    stuck = []
    for number in range(MANY):
        # More names of one file do not help: the kernel allows one writer of a file at a time.
        path = server.mountpoint / f"more{number}"
        path.touch()
        stuck.append(path)
    stop_process(workers(server)[stopped])
    try:
        with in_threads([*stuck, *theirs]) as threads:
            try:
                # The writes of the other worker, about 150, are done.
                assert wait_until(lambda: sum(not thread.is_alive() for thread in threads) > MANY // 4)
                assert sum(thread.is_alive() for thread in threads) > MANY // 4
                for path in others[:3]:
                    all_works(path)
                assert len(os.listdir(server.mountpoint)) >= MANY
            finally:
                os.kill(workers(server)[stopped], signal.SIGCONT)
        assert not any(thread.is_alive() for thread in threads), "what was held back is done when the worker goes on"
    finally:
        with contextlib.suppress(KeyError):
            os.kill(workers(server)[stopped], signal.SIGCONT)
    assert all((server.source / path.name).read_bytes() == CONTENT for path in [*stuck, *theirs])
    for path in theirs[:2]:
        all_works(path)


@pytest.mark.at_once("collected writes and read-ahead are 64 at a time, whichever workers these wait for")
def test_many_readers_of_a_stopped_worker_do_not_block_others(serve: Serve) -> None:
    """The kernel limits background requests; readers of the stopped worker must not use them all."""
    server = serve(*WORKERS)
    stopped, _ = sorted(workers(server))
    others = next(paths for owner, paths in files_by_worker(server).items() if owner != stopped)
    paths = [server.mountpoint / f"more{number}" for number in range(MANY)]
    for number in range(MANY):
        (server.source / f"more{number}").write_bytes(CONTENT)
    stop_process(workers(server)[stopped])
    try:
        with in_threads(paths, read_all) as threads:
            try:
                assert wait_until(lambda: sum(not thread.is_alive() for thread in threads) > MANY // 4)
                assert sum(thread.is_alive() for thread in threads) > MANY // 4
                for path in others[:3]:
                    all_works(path)
            finally:
                os.kill(workers(server)[stopped], signal.SIGCONT)
        assert not any(thread.is_alive() for thread in threads)
    finally:
        with contextlib.suppress(KeyError):
            os.kill(workers(server)[stopped], signal.SIGCONT)


@pytest.mark.at_once("a collected write does not wait for its answer")
def test_hanging_source_does_not_block_the_front(serve: Serve) -> None:
    """Data below SRC does not come any more: SRC is another mount, whose worker is stopped.

    There are more requests than slots, and the front must not try its own hand at what is too much for the workers.
    """
    below = serve("--workers", "1", "--metadata", "front")
    for number in range(MANY):
        (below.source / f"{number}").touch()
    outer = serve("--workers", "2", "--metadata", "front", source=below.mountpoint)
    paths = [outer.mountpoint / f"{number}" for number in range(MANY)]
    inner = workers(below)["llloop-worker-0"]
    os.kill(inner, signal.SIGSTOP)
    try:
        with in_threads(paths) as threads:
            try:
                # Each thread has opened its file and writes. The test cannot see its progress.
                device = outer.mountpoint.stat().st_dev
                assert wait_until(lambda: files_open_on(device) == MANY)
                time.sleep(0.5)
                assert len(os.listdir(outer.mountpoint)) == MANY
                (outer.mountpoint / "directory").mkdir()
                assert (outer.mountpoint / "7").stat().st_size == 0
                assert all(thread.is_alive() for thread in threads)
            finally:
                os.kill(inner, signal.SIGCONT)
        assert not any(thread.is_alive() for thread in threads)
    finally:
        os.kill(inner, signal.SIGCONT)
    assert all((below.source / path.name).read_bytes() == CONTENT for path in paths)
    outer.stop()
