"""An unexpected exception in a handler gives EIO, is logged with a traceback, and does not end the mount."""

from __future__ import annotations

import errno
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import running
from tests.expect import fails, pattern
from tests.kernel_caches import forget_unused
from tests.server import Server, reachable_directory
from tests.syscalls import RENAME_NOREPLACE, fallocate, opened, renameat2, statx
from tests.watchdog import Watchdog

pytestmark = pytest.mark.mounted

LARGE = 3 * 1024 * 1024
MUCH = 200_000  # bytes; the front gives a write of this size to a worker


@dataclass
class Faulty:
    """A mount whose handlers fail on demand, with an empty directory for each test."""

    server: Server
    trigger: Path
    src: Path
    mnt: Path

    @contextmanager
    def fault(self, method: str) -> Iterator[None]:
        """While in the block this method fails; afterwards the log tells of it, and the mount serves as before."""
        pattern_of_it = rf"Traceback.*RuntimeError: injected into {re.escape(method)}\b"
        self.server.expect_log(pattern_of_it)
        processes = self.server.processes()
        self.trigger.write_text(method)
        try:
            yield
            self.server.wait_for_log(pattern_of_it)
        finally:
            self.trigger.write_text("")
        assert self.server.alive()
        # No process died and was replaced.
        assert self.server.processes() == processes
        probe = self.mnt / "probe"
        probe.write_bytes(b"alive")
        assert probe.read_bytes() == (self.src / "probe").read_bytes() == b"alive"
        os.unlink(probe)


@pytest.fixture(scope="module")
def faulty_server(via: str, serve_options: list[str], watchdog: Watchdog) -> Iterator[tuple[Server, Path]]:
    directory = reachable_directory("llloop-faults-")
    trigger = directory / "trigger"
    trigger.touch()
    command = [sys.executable, str(Path(__file__).with_name("faulty_server.py")), str(trigger), "serve"]
    # Without caches every call reaches its handler.
    timeouts = ["--attr-timeout", "0", "--entry-timeout", "0"]
    try:
        with running(Server.prepare(via, watchdog, [*serve_options, *timeouts], command=command)) as server:
            yield server, trigger
    finally:
        trigger.unlink()
        directory.rmdir()


@pytest.fixture
def faulty(faulty_server: tuple[Server, Path], request: pytest.FixtureRequest) -> Iterator[Faulty]:
    server, trigger = faulty_server
    name = re.sub("[^A-Za-z0-9_]+", "-", request.node.name)
    own = Faulty(server, trigger, server.source / name, server.mountpoint / name)
    own.src.mkdir()
    (own.src / "file").write_bytes(pattern(LARGE))
    (own.src / "directory").mkdir()
    (own.src / "symlink").symlink_to("file")
    os.setxattr(own.src / "file", "user.there", b"value")
    yield own
    assert server.alive()
    server.check_log()


REQUESTS: dict[str, Callable[[Path], object]] = {
    "Tree.find": lambda mnt: os.stat(mnt / "file"),
    "Tree.setattr": lambda mnt: os.chmod(mnt / "file", 0o600),
    "Tree.readlink": lambda mnt: os.readlink(mnt / "symlink"),
    "Tree.mknod": lambda mnt: os.mkfifo(mnt / "new"),
    "Tree.mkdir": lambda mnt: os.mkdir(mnt / "new"),
    "Tree.symlink": lambda mnt: os.symlink("x", mnt / "new"),
    "Tree.link": lambda mnt: os.link(mnt / "file", mnt / "new"),
    "Tree.unlink": lambda mnt: os.unlink(mnt / "file"),
    "Tree.rmdir": lambda mnt: os.rmdir(mnt / "directory"),
    "Tree.rename": lambda mnt: os.rename(mnt / "file", mnt / "new"),
    "Tree.statfs": lambda mnt: os.statvfs(mnt),
    "Tree.setxattr": lambda mnt: os.setxattr(mnt / "file", "user.new", b"v"),
    "Tree.getxattr": lambda mnt: os.getxattr(mnt / "file", "user.there"),
    "Tree.listxattr": lambda mnt: os.listxattr(mnt / "file"),
    "Tree.removexattr": lambda mnt: os.removexattr(mnt / "file", "user.there"),
    "Files.open": lambda mnt: os.open(mnt / "file", os.O_RDONLY),
    "Files.create": lambda mnt: os.open(mnt / "new", os.O_CREAT | os.O_WRONLY),
    "Files.opendir": lambda mnt: os.listdir(mnt / "directory"),
    "Files.entries": lambda mnt: os.listdir(mnt / "directory"),
}

# The methods that the own loop calls instead of others.
OF_OWN_LOOP = {"Files.entries": "DirectoryRequests._listing"}

OWN_REQUESTS: dict[str, Callable[[Path], object]] = {
    "Tree.rename": lambda mnt: renameat2(mnt / "file", mnt / "new", RENAME_NOREPLACE),
    "Tree.statx_raw": lambda mnt: statx(mnt / "file"),
    "Files.tmpfile": lambda mnt: os.open(mnt, os.O_TMPFILE | os.O_RDWR),
}


@pytest.mark.parametrize("method", REQUESTS)
def test_exception_in_a_handler(faulty: Faulty, method: str) -> None:
    before = sorted(os.listdir(faulty.src))
    called = OF_OWN_LOOP.get(method, method) if faulty.server.via == "own" else method
    with faulty.fault(called), fails(errno.EIO):
        REQUESTS[method](faulty.mnt)
    assert sorted(os.listdir(faulty.src)) == before
    assert (faulty.mnt / "file").read_bytes() == pattern(LARGE)


@pytest.mark.own_loop
@pytest.mark.parametrize("method", OWN_REQUESTS)
def test_exception_in_a_handler_of_the_own_loop(faulty: Faulty, method: str) -> None:
    before = sorted(os.listdir(faulty.src))
    with faulty.fault(method), fails(errno.EIO):
        OWN_REQUESTS[method](faulty.mnt)
    assert sorted(os.listdir(faulty.src)) == before


def test_exception_in_getattr(faulty: Faulty) -> None:
    with opened(faulty.mnt / "file", os.O_RDONLY) as descriptor:
        os.fstat(descriptor)
        with faulty.fault("Tree.getattr"), fails(errno.EIO):
            os.fstat(descriptor)
        assert os.fstat(descriptor).st_size == LARGE


def test_exception_in_release(faulty: Faulty) -> None:
    """RELEASE has no caller that could get an error."""
    with faulty.fault("Files.release"):
        os.close(os.open(faulty.mnt / "file", os.O_RDONLY))


@pytest.mark.root
def test_exception_in_forget(faulty: Faulty) -> None:
    # Hold the file open. Otherwise the kernel, which caches no names here, may forget the inode before the fault.
    descriptors = [os.open(faulty.mnt / f"{number}", os.O_CREAT | os.O_RDONLY) for number in range(50)]
    with faulty.fault("Tree.forget"):
        for descriptor in descriptors:
            os.close(descriptor)
        forget_unused(faulty.server.mountpoint)


@pytest.mark.by_workers
def test_exception_in_a_workers_read(faulty: Faulty) -> None:
    """With O_DIRECT, because the kernel repeats failed read-ahead page by page, and the front reads pages."""
    with opened(faulty.mnt / "file", os.O_RDONLY | os.O_DIRECT) as descriptor, mmap.mmap(-1, LARGE) as buffer:
        with faulty.fault("Operations._read"), fails(errno.EIO):
            os.preadv(descriptor, [buffer], 0)
        assert os.preadv(descriptor, [buffer], 0) == LARGE
        assert buffer[:] == pattern(LARGE)


@pytest.mark.at_once("errors of collected writes are told at fsync or close")
@pytest.mark.by_workers
def test_exception_in_a_workers_write(faulty: Faulty) -> None:
    with opened(faulty.mnt / "file", os.O_RDWR) as descriptor:
        with faulty.fault("Operations._write"), fails(errno.EIO):
            os.pwrite(descriptor, b"x" * MUCH, 0)
        assert (faulty.src / "file").read_bytes() == pattern(LARGE)
        assert os.pwrite(descriptor, b"x" * MUCH, 0) == MUCH
    assert (faulty.src / "file").read_bytes() == b"x" * MUCH + pattern(LARGE)[MUCH:]


def test_exception_in_a_workers_fsync(faulty: Faulty) -> None:
    with opened(faulty.mnt / "file", os.O_RDWR) as descriptor:
        os.pwrite(descriptor, b"x", 0)
        with faulty.fault("Operations._fsync"), fails(errno.EIO):
            os.fsync(descriptor)
        os.fsync(descriptor)


@pytest.mark.own_loop
@pytest.mark.parametrize("method", ["Operations._fallocate", "Operations._lseek", "Operations._copy_file_range"])
def test_exception_in_other_requests_of_a_worker(faulty: Faulty, method: str) -> None:
    with (
        opened(faulty.mnt / "file", os.O_RDWR) as descriptor,
        opened(faulty.mnt / "copy", os.O_CREAT | os.O_RDWR) as copy,
    ):
        actions: dict[str, Callable[[], object]] = {
            "Operations._fallocate": lambda: fallocate(descriptor, 0, LARGE, 4096),
            "Operations._lseek": lambda: os.lseek(descriptor, 0, os.SEEK_HOLE),
            "Operations._copy_file_range": lambda: os.copy_file_range(descriptor, copy, 1000, 0, 0),
        }
        with faulty.fault(method), fails(errno.EIO):
            actions[method]()
        actions[method]()


def test_hundred_exceptions_in_succession(faulty: Faulty) -> None:
    with faulty.fault("Tree.mkdir"):
        for _ in range(100):
            with fails(errno.EIO):
                os.mkdir(faulty.mnt / "new")
    os.mkdir(faulty.mnt / "new")
    assert (faulty.src / "new").is_dir()
