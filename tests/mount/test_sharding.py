"""One worker does all I/O of a file, other workers that of other files, and administrators can observe it."""

import mmap
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.server import Server
from tests.server_processes import bytes_moved, descriptors, titles, wait_until, workers
from tests.syscalls import opened

pytestmark = pytest.mark.mounted

# The front gives a write of this size to a worker.
MIB = 1024 * 1024
PIECE = b"x" * 300_000


def holders(server: Server, path: Path) -> set[str]:
    """The workers that hold a descriptor of this file of the source."""
    return {title for title, pid in workers(server).items() if str(path) in descriptors(pid)}


def test_processes_are_named_in_ps(serve: Serve) -> None:
    server = serve("--workers", "3")
    found = titles(server)
    # With --loop llfuse, no request waits until the kernel has dropped pages.
    assert set(found) | {"llloop-invalidator"} == {
        "llloop-invalidator",
        "llloop-supervisor",
        "llloop-keeper",
        "llloop-front",
        *(f"llloop-worker-{n}" for n in range(3)),
    }
    assert found["llloop-supervisor"] == server.pid
    shown = subprocess.run(["ps", "-o", "pid=,args="], capture_output=True, text=True, check=False)
    if shown.returncode == 0:
        for title, pid in found.items():
            line = subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=True)
            assert line.stdout.startswith(title)
    for title, pid in found.items():
        # The kernel cuts the thread name, which top shows, at 15 bytes.
        assert Path(f"/proc/{pid}/comm").read_text().rstrip("\n") == title[:15]


@pytest.mark.by_workers
def test_open_file_is_held_by_one_worker(serve: Serve) -> None:
    server = serve("--workers", "4")
    for number in range(8):
        name = f"file{number}"
        with opened(server.mountpoint / name, os.O_RDWR | os.O_CREAT) as fd:
            os.pwrite(fd, PIECE, 0)
            os.fsync(fd)
            first = holders(server, server.source / name)
            assert len(first) == 1
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, len(PIECE), 0) == PIECE
            os.fsync(fd)
            assert holders(server, server.source / name) == first
            # The flags may differ, but the file is the same.
            with opened(server.mountpoint / name, os.O_WRONLY | os.O_APPEND) as second:
                os.write(second, PIECE)
                os.fsync(second)
                assert holders(server, server.source / name) == first
        with opened(server.mountpoint / name, os.O_RDWR) as fd:
            os.pwrite(fd, PIECE, 0)
            os.fsync(fd)
            assert holders(server, server.source / name) == first, "another worker after a fresh open"


@pytest.mark.by_workers
def test_io_of_many_files_is_distributed(serve: Serve) -> None:
    count, shards = 240, 4
    server = serve("--workers", str(shards))
    files = [os.open(server.mountpoint / f"file{number}", os.O_RDWR | os.O_CREAT) for number in range(count)]
    try:
        for fd in files:
            os.pwrite(fd, PIECE[:200_000], 0)
            os.fsync(fd)
        held = {
            title: {path for path in descriptors(pid) if path.startswith(str(server.source / "file"))}
            for title, pid in workers(server).items()
        }
    finally:
        for fd in files:
            os.close(fd)
    assert len(held) == shards
    # Exactly one worker has each file.
    assert sum(len(paths) for paths in held.values()) == len(set().union(*held.values())) == count
    # The expected number is 60 for each worker; 30 is four and a half standard deviations less.
    assert min(len(paths) for paths in held.values()) >= 30, {title: len(paths) for title, paths in held.items()}


def test_descriptors_are_closed_after_close(serve: Serve) -> None:
    server = serve("--workers", "2")
    # The supervisor has no file open, but sometimes a descriptor for itself.
    processes = {title: pid for title, pid in titles(server).items() if title != "llloop-supervisor"}
    # With its first file, each worker opens descriptors that stay, for example a pidfd of the front.
    for number in range(20):
        (server.mountpoint / f"first{number}").write_bytes(PIECE)

    def counts() -> dict[str, int]:
        return {title: len(descriptors(pid)) for title, pid in processes.items()}

    assert wait_until(lambda: not any(holders(server, server.source / f"first{number}") for number in range(20)))
    before = counts()
    files = [os.open(server.mountpoint / f"file{number}", os.O_RDWR | os.O_CREAT) for number in range(100)]
    for fd in files:
        os.pwrite(fd, PIECE, 0)
        os.pread(fd, 100, 0)
    assert counts()["llloop-front"] >= before["llloop-front"] + 100
    for fd in files:
        os.close(fd)
    assert wait_until(lambda: counts() == before), f"before {before}, after {counts()}"


@pytest.mark.own_loop
def test_front_does_not_touch_data_of_large_reads(serve: Serve) -> None:
    """The worker moves the data from the file to the kernel; the front only reads the request."""
    server = serve("--workers", "2")
    size = 64 << 20
    with open(server.source / "file", "wb") as file:
        file.truncate(size)
    front = titles(server)["llloop-front"]
    before = bytes_moved(front)
    with opened(server.mountpoint / "file", os.O_RDONLY) as fd:
        while os.read(fd, 1 << 20):
            pass
    assert bytes_moved(front) - before < size // 32


def test_single_worker(serve: Serve) -> None:
    server = serve("--workers", "1")
    (server.mountpoint / "file").write_bytes(PIECE)
    assert (server.mountpoint / "file").read_bytes() == PIECE
    assert set(workers(server)) == {"llloop-worker-0"}


@pytest.mark.by_workers
def test_sigusr1_logs_counters(serve: Serve) -> None:
    """SIGUSR1 logs the requests and bytes of each worker, and the front's state."""
    server = serve("--workers", "4")
    for number in range(16):
        with opened(server.mountpoint / f"file{number}", os.O_RDWR | os.O_CREAT | os.O_DIRECT) as fd:
            os.write(fd, mmap.mmap(-1, MIB))
    # The workers get the RELEASE messages before this request, so they have finished them.
    os.statvfs(server.mountpoint)
    os.kill(server.pid, signal.SIGUSR1)

    def reported() -> bool:
        # With --loop llfuse, the front handles a signal only with its next request.
        os.statvfs(server.mountpoint)
        return "slots in use" in server.log.read_text()

    line = re.compile(r"(llloop-worker-\d): (\d+) requests, (\d+) errors, (\d+) bytes read, (\d+) bytes written, 0 re")
    assert wait_until(reported)
    found = line.findall(server.log.read_text())
    assert [title for title, *_ in found] == [f"llloop-worker-{number}" for number in range(4)]
    assert sum(int(written) for *_, written in found) == 16 * MIB
    for title, requests, errors, read, written in found:
        # The worker that holds a file counts all of its bytes.
        assert (int(errors), int(read), int(written) % MIB) == (0, 0, 0), title
        assert int(requests) >= int(written) // MIB
    assert re.search(r"llloop-front: 17 inodes, 0 open handles", server.log.read_text())
