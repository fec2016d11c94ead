"""Data that only the kernel has: stores into mappings, and with --writeback all writes."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.expect import outcome, start_python
from tests.server import Server, Tree
from tests.server_processes import stop_process, titles, wait_until
from tests.syscalls import (
    FALLOC_FL_COLLAPSE_RANGE,
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    fallocate,
    opened,
)

PAGE = mmap.PAGESIZE
MIB = 1024 * 1024

pytestmark = [pytest.mark.own_loop, pytest.mark.timeout(60)]


def all_hole(path: Path, size: int) -> None:
    """Makes a file without data that the kernel has looked at, so that it knows its attributes and its pages."""
    with opened(path, os.O_CREAT | os.O_WRONLY) as descriptor:
        os.ftruncate(descriptor, size)
    path.read_bytes()


@contextmanager
def stored(path: Path, size: int, *pieces: tuple[int, bytes]) -> Iterator[mmap.mmap]:
    """A mapping into which was stored what nobody has written out."""
    with opened(path, os.O_RDWR) as descriptor, mmap.mmap(descriptor, size) as mapped:
        for offset, piece in pieces:
            mapped[offset : offset + len(piece)] = piece
        yield mapped


def data_of(descriptor: int) -> list[tuple[int, int]]:
    """The ranges that hold data, as SEEK_DATA and SEEK_HOLE tell.

    The file must be open before it is stored into, for the kernel may write dirty pages when it is opened.
    """
    found: list[tuple[int, int]] = []
    end = 0
    while True:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:  # ENXIO: no more data
            return found
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        found.append((start, end))


def is_data(descriptor: int, offset: int) -> bool:
    return any(start <= offset < end for start, end in data_of(descriptor))


def run(*command: str, cwd: Path, check: bool = True) -> None:
    subprocess.run(command, cwd=cwd, check=check, timeout=30, stderr=None if check else subprocess.DEVNULL)


def test_lseek_finds_stored_data(tree: Tree) -> None:
    all_hole(tree.mnt / "file", 4 * MIB)
    with (
        opened(tree.mnt / "file", os.O_RDONLY) as reading,
        stored(tree.mnt / "file", 4 * MIB, (MIB, b"one"), (3 * MIB + 17, b"two")) as mapped,
    ):
        assert is_data(reading, MIB)
        assert is_data(reading, 3 * MIB + 17)
        assert not is_data(reading, 2 * MIB), "all of it counts as data"
        mapped[2 * MIB : 2 * MIB + 5] = b"later"
        assert is_data(reading, 2 * MIB)
        assert mapped[MIB : MIB + 3] == b"one"


def test_lseek_finds_data_stored_into_a_written_page(tree: Tree) -> None:
    """Such a page needs no READ before a store."""
    all_hole(tree.mnt / "file", 4 * MIB)
    with (
        opened(tree.mnt / "file", os.O_RDWR) as descriptor,
        mmap.mmap(descriptor, 4 * MIB) as mapped,
    ):
        data_of(descriptor)
        os.pwrite(descriptor, b"w" * PAGE, MIB)
        fallocate(descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4 * MIB)
        mapped[MIB : MIB + 3] = b"new"
        assert is_data(descriptor, MIB)


def test_lseek_finds_data_just_written(tree: Tree) -> None:
    with (
        opened(tree.mnt / "file", os.O_CREAT | os.O_WRONLY) as writing,
        opened(tree.mnt / "file", os.O_RDONLY) as reading,
    ):
        os.pwrite(writing, b"x" * 10_000, 2 * MIB)
        assert is_data(reading, 2 * MIB) and is_data(reading, 2 * MIB + 9_999)
        assert not is_data(reading, MIB)
        os.pwrite(writing, b"y" * PAGE, MIB)
        assert is_data(reading, MIB)


@pytest.mark.mounted
def test_copies_contain_stored_data(serve: Serve) -> None:
    directory = serve("--cache", "always").mountpoint  # opening a file does not write its dirty pages in this mode
    all_hole(directory / "file", 4 * MIB)
    # Use another process: a command started here would close descriptors of the file, and this writes dirty pages, too.
    storing = start_python(STORE, directory / "file")
    assert storing.stdin and storing.stdout
    for number, command in enumerate(
        (
            ["cp", "file", "copy"],
            ["cp", "--reflink=auto", "--sparse=always", "file", "copy"],
            ["tar", "-cSf", "archive", "file"],
            ["dd", "if=file", "of=copy", "conv=sparse", "bs=64K", "status=none"],
        )
    ):
        where, data = (number + 1) * MIB // 2, f"stored {number}"
        storing.stdin.write(f"{where} {data}\n")
        storing.stdin.flush()
        assert storing.stdout.readline() == "done\n"
        # If tar causes the write of dirty pages, it sees a newer mtime and ends with exit code 1.
        run(*command, cwd=directory, check=command[0] != "tar")
        if command[0] == "tar":
            (directory / "out").mkdir()
            run("tar", "-xf", "archive", "-C", "out", cwd=directory)
            os.rename(directory / "out/file", directory / "copy")
        copied = (directory / "copy").read_bytes()
        assert len(copied) == 4 * MIB, command
        assert copied[where : where + 8] == data.encode(), command
        assert os.stat(directory / "copy").st_blocks * 512 < 2 * MIB, command
        os.unlink(directory / "copy")
    storing.communicate(timeout=30)


STORE = """
import mmap, os, sys
mapped = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0)
for line in sys.stdin:
    where, data = line.rstrip().encode().split(b" ", 1)
    mapped[int(where) : int(where) + len(data)] = data
    print("done", flush=True)
"""


def test_file_with_stored_data_has_blocks(tree: Tree) -> None:
    """`tar --sparse` treats a file without blocks as one hole and does not read it."""
    all_hole(tree.mnt / "file", MIB)
    assert os.stat(tree.mnt / "file").st_blocks == 0
    with stored(tree.mnt / "file", MIB, (0, b"data")) as mapped:
        assert os.stat(tree.mnt / "file").st_blocks > 0
        assert [entry.stat().st_blocks > 0 for entry in os.scandir(tree.mnt)] == [True]
        with opened(tree.mnt / "file", os.O_RDWR) as descriptor:
            os.ftruncate(descriptor, 2 * MIB)
        assert os.stat(tree.mnt / "file").st_blocks > 0
        mapped.flush()
    assert os.stat(tree.mnt / "file").st_blocks == os.stat(tree.src / "file").st_blocks


def test_new_file_has_blocks_after_a_write(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_WRONLY) as descriptor:
        os.write(descriptor, b"x" * 20_000)
        assert os.stat(tree.mnt / "file").st_blocks > 0


def test_collapse_and_insert_include_stored_data(tree: Tree) -> None:
    all_hole(tree.mnt / "file", 16 * PAGE)
    with (
        stored(tree.mnt / "file", 16 * PAGE, (0, b"a" * 16 * PAGE)) as mapped,
        opened(tree.mnt / "file", os.O_RDWR) as descriptor,
    ):
        fallocate(descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 100, 2 * PAGE)
        mapped[50:60] = b"b" * 10
        zeroed = outcome(fallocate, descriptor, FALLOC_FL_ZERO_RANGE, 8 * PAGE + 100, 200)
        expected = bytearray(b"a" * 16 * PAGE)
        expected[50:60] = b"b" * 10
        expected[100 : 100 + 2 * PAGE] = bytes(2 * PAGE)
        if zeroed is None:  # tmpfs cannot
            expected[8 * PAGE + 100 : 8 * PAGE + 300] = bytes(200)
        assert mapped[:] == expected
        with opened(tree.mnt / "copy", os.O_CREAT | os.O_RDWR) as copy:
            mapped[5 * PAGE : 5 * PAGE + 5] = expected[5 * PAGE : 5 * PAGE + 5] = b"moved"
            assert os.copy_file_range(descriptor, copy, 16 * PAGE, 0, 0) == 16 * PAGE
            assert os.pread(copy, 17 * PAGE, 0) == expected
        mapped[6 * PAGE : 6 * PAGE + 5] = b"stale"
        assert os.copy_file_range(descriptor, descriptor, PAGE, 5 * PAGE, 6 * PAGE) == PAGE
        assert mapped[6 * PAGE : 6 * PAGE + 5] == b"moved"
        assert outcome(fallocate, descriptor, FALLOC_FL_COLLAPSE_RANGE, 0, PAGE) in (None, "ENOTSUP")


@pytest.mark.mounted
@pytest.mark.by_workers
@pytest.mark.parametrize("victim", ["llloop-invalidator", "llloop-worker-0", "llloop-front"])
def test_lseek_survives_death_of_processes(serve: Serve, victim: str) -> None:
    server = serve("--workers", "1")
    path = server.mountpoint / "file"
    all_hole(path, 4 * MIB)
    with opened(path, os.O_RDONLY) as reading, stored(path, 4 * MIB, (MIB, b"hello")):
        found: list[list[tuple[int, int]]] = []
        stopped = titles(server)["llloop-invalidator"]
        stop_process(stopped)
        seeking = threading.Thread(target=lambda: found.append(data_of(reading)))
        seeking.start()
        try:
            # Only the invalidator sees that the worker has sent its request. A short wait is enough.
            seeking.join(0.2)
            assert seeking.is_alive(), "it did not wait for the dirty pages"
            server.expect_log(f"{victim} was killed")
            os.kill(titles(server)[victim], signal.SIGKILL)
        finally:
            if victim != "llloop-invalidator":
                os.kill(stopped, signal.SIGCONT)
        seeking.join(30)
        assert found and any(start <= MIB < end for start, end in found[0])


@pytest.mark.mounted
@pytest.mark.by_workers
def test_waiting_lseek_does_not_block_others(serve: Serve) -> None:
    server = serve("--workers", "1")
    path = server.mountpoint / "file"
    all_hole(path, 4 * MIB)
    (server.mountpoint / "other").write_bytes(b"x" * MIB)
    with opened(path, os.O_RDONLY) as reading, stored(path, 4 * MIB, (MIB, b"hello")):
        stopped = titles(server)["llloop-invalidator"]
        stop_process(stopped)
        try:
            seeking = threading.Thread(target=data_of, args=(reading,))
            seeking.start()
            for number in range(20):
                (server.mountpoint / f"new-{number}").write_bytes(b"y" * 300_000)
                assert (server.mountpoint / "other").read_bytes() == b"x" * MIB
            assert seeking.is_alive()
        finally:
            os.kill(stopped, signal.SIGCONT)
        seeking.join(30)
        assert not seeking.is_alive()


class SlowBuffer:
    """Two pages of memory. A read of the second one blocks until `release` is called."""

    def __init__(self, server: Server, content: bytes) -> None:
        (server.source / "slow").write_bytes(content)
        self.front = titles(server)["llloop-front"]
        with opened(server.mountpoint / "slow", os.O_RDONLY) as descriptor:
            self.memory = mmap.mmap(descriptor, 2 * PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ)
        self.memory.madvise(mmap.MADV_RANDOM)  # no read-ahead
        assert self.memory[0] == content[0]
        self.workers = [pid for title, pid in titles(server).items() if title.startswith("llloop-worker")]
        for pid in (self.front, *self.workers):
            stop_process(pid)

    def release(self) -> None:
        for pid in (self.front, *self.workers):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.mounted
@pytest.mark.by_workers
@pytest.mark.at_once("pages with collected writes are written before they are dropped")
@pytest.mark.parametrize("cache", ["auto", "always"])
def test_page_dropped_during_a_write_is_not_stale(serve: Serve, cache: str) -> None:
    """The kernel has written data into a page but not sent it. Then the page is dropped and read again."""
    server, other = serve("--cache", cache, "--attr-timeout", "0"), serve()
    path = server.mountpoint / "file"
    path.write_bytes(b"o" * 4 * PAGE)
    buffer = SlowBuffer(other, b"n" * 2 * PAGE)
    try:
        with (
            opened(path, os.O_WRONLY) as writing,
            opened(path, os.O_RDONLY) as reading,
            mmap.mmap(reading, 4 * PAGE, mmap.MAP_SHARED, mmap.PROT_READ) as mapped,
        ):
            assert mapped[0] == ord("o")
            writer = threading.Thread(target=os.pwritev, args=(writing, [buffer.memory], 0))
            writer.start()
            # The mapping shows the data as soon as the kernel has entered it into the page.
            assert wait_until(lambda: mapped[0] == ord("n"))
            # A new mtime makes the kernel drop all pages.
            os.utime(server.source / "file", ns=(10**18, 10**18))
            assert wait_until(lambda: os.pread(reading, 1, 0) == b"o"), "the page was not dropped"
            buffer.release()
            writer.join(30)
            assert not writer.is_alive()
            assert wait_until(lambda: mapped[0] == ord("n")), "old data stays in the page cache"
            assert mapped[: 3 * PAGE] == b"n" * 2 * PAGE + b"o" * PAGE
    finally:
        buffer.release()


@pytest.mark.mounted
@pytest.mark.by_workers
def test_processes_sharing_a_page_read_their_own_data(tree: Tree) -> None:
    """Two processes write separate ranges of one page, and read them through another descriptor."""
    path = tree.mnt / "file"
    path.write_bytes(bytes(2 * PAGE))
    children = [
        os.posix_spawn("/proc/self/exe", ["python", "-c", NEIGHBOUR, str(path), str(own)], os.environ)
        for own in range(2)
    ]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


NEIGHBOUR = """
import os, sys, time
path, own = sys.argv[1], int(sys.argv[2])
writing, reading = os.open(path, os.O_WRONLY), os.open(path, os.O_RDONLY)
stop, number = time.monotonic() + 2, 0
while time.monotonic() < stop:
    number += 1
    offset, data = (2 * (number % 4) + own) * 1000, b"%c%07d" % (65 + own, number) * 125
    os.pwrite(writing, data, offset)
    assert os.pread(reading, 1000, offset) == data, number
"""


def test_stores_update_the_times(tree: Tree) -> None:
    """At the latest when they are written back or unmapped."""
    (tree.mnt / "file").write_bytes(bytes(2 * PAGE))
    with opened(tree.mnt / "file", os.O_RDWR) as descriptor:
        for write_out in (lambda mapped: mapped.flush(), lambda mapped: os.fsync(descriptor), lambda mapped: None):
            os.utime(tree.mnt / "file", ns=(10**18, 10**18))
            mapped = mmap.mmap(descriptor, 2 * PAGE)
            os.stat(tree.mnt / "file")
            mapped[5] = 1
            write_out(mapped)
            mapped.close()
            before = time.time() - 60
            assert os.stat(tree.mnt / "file").st_mtime > before
            assert os.fstat(descriptor).st_ctime > before
            assert [entry.stat().st_mtime > before for entry in os.scandir(tree.mnt)] == [True]
