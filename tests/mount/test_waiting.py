"""What one user does takes long in the source, and keeps nobody else waiting.

A file system that is frozen stands for every source in which calls take long, for it lets them wait until it is thawed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import filesystems
from tests.conftest import Serve
from tests.server import Server
from tests.server_processes import process_ids, wait_until

pytestmark = [pytest.mark.mounted, pytest.mark.own_loop, pytest.mark.root]

DEATH_OF_THE_FRONT = "llloop-front was killed by signal 9"
CONTENT = b"content\n" * 500
SMALL = b"small"


@pytest.fixture(params=["front", "workers"])
def server(request: pytest.FixtureRequest, serve: Serve, tmp_path: Path) -> Iterator[Server]:
    """A mount whose source is a file system of its own, which can be frozen."""
    with filesystems.ext4(tmp_path) as source:
        for number in range(8):
            (source / f"file{number}").write_bytes(CONTENT)
        (source / "directory").mkdir()
        (source / "directory/entry").touch()
        # The kernel itself locks a directory while an entry is created or removed.
        (source / "changes").mkdir()
        (source / "changes/file0").write_bytes(CONTENT)
        (source / "changes/other").write_bytes(CONTENT)
        own = serve("--workers", "2", "--metadata", request.param, source=source)
        yield own
        own.stop()


@contextlib.contextmanager
def doing(*actions: Callable[[], object]) -> Iterator[list[threading.Thread]]:
    """Do it all at once, each in a thread; at the end all of it must have been done, without an error."""
    failures: list[BaseException] = []

    def run(action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(action,), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    yield threads
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


def front_of(server: Server) -> int:
    (pid,) = process_ids(server, "front")
    return pid


def in_calls(pid: int) -> int:
    """How many threads of a process wait for what cannot be interrupted."""
    states = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
    return states.count("D")


def check_reading(server: Server, *, opened: int) -> None:
    """All that changes nothing goes on; with another thread, so that the test ends if it does not."""
    done = []

    def read() -> None:
        mount = server.mountpoint
        assert os.pread(opened, 100, 8) == CONTENT[8:108]
        for number in range(1, 8):
            assert (mount / f"file{number}").read_bytes() == CONTENT
        assert os.listdir(mount / "directory") == ["entry"]
        assert "file7" in os.listdir(mount)
        assert (mount / "directory/entry").stat().st_size == 0
        with pytest.raises(FileNotFoundError):
            (mount / "nothing").stat()
        with pytest.raises(OSError):
            os.getxattr(mount / "file1", "user.nothing")
        assert os.statvfs(mount).f_bsize
        done.append(True)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(8)
    assert done, "somebody who only reads waits for somebody who changes something"


CHANGES: dict[str, Callable[[Path], object]] = {
    "create": lambda mount: (mount / "new").write_bytes(SMALL),
    "mkdir": lambda mount: (mount / "newdir").mkdir(),
    "symlink": lambda mount: (mount / "link").symlink_to("other"),
    "link": lambda mount: (mount / "hard").hardlink_to(mount / "other"),
    "unlink": lambda mount: (mount / "file0").unlink(),
    "rename": lambda mount: (mount / "file0").rename(mount / "moved"),
    "chmod": lambda mount: (mount / "file0").chmod(0o600),
    "utime": lambda mount: os.utime(mount / "file0", (1, 1)),
    "truncate": lambda mount: os.truncate(mount / "file0", 3),
    "open with O_TRUNC": lambda mount: (mount / "file0").write_bytes(SMALL),
    "setxattr": lambda mount: os.setxattr(mount / "file0", "user.name", b"value"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_blocked_change_does_not_block_reads(server: Server, change: str) -> None:
    mount = server.mountpoint
    opened = os.open(mount / "file1", os.O_RDONLY)
    try:
        with filesystems.frozen(server.source), doing(lambda: CHANGES[change](mount / "changes")) as threads:
            assert wait_until(lambda: in_calls(front_of(server)) > 0)
            check_reading(server, opened=opened)
            assert threads[0].is_alive()
            filesystems.thaw(server.source)
    finally:
        os.close(opened)
    CHECKS[change](server.source / "changes")
    (mount / "afterwards").write_bytes(SMALL)
    assert (server.source / "afterwards").read_bytes() == SMALL


def _is(path: Path, content: bytes) -> None:
    assert path.read_bytes() == content


def _gone(path: Path) -> None:
    assert not path.exists()


CHECKS: dict[str, Callable[[Path], object]] = {
    "create": lambda source: _is(source / "new", SMALL),
    "mkdir": lambda source: os.rmdir(source / "newdir"),
    "symlink": lambda source: _is(source / "link", CONTENT),
    "link": lambda source: _is(source / "hard", CONTENT),
    "unlink": lambda source: _gone(source / "file0"),
    "rename": lambda source: _is(source / "moved", CONTENT),
    "chmod": lambda source: _is(source / "file0", CONTENT),
    "utime": lambda source: _is(source / "file0", CONTENT),
    "truncate": lambda source: _is(source / "file0", CONTENT[:3]),
    "open with O_TRUNC": lambda source: _is(source / "file0", SMALL),
    "setxattr": lambda source: os.getxattr(source / "file0", "user.name"),
}


def test_more_blocked_changes_than_threads(server: Server) -> None:
    mount = server.mountpoint
    many = 60
    opened = os.open(mount / "file1", os.O_RDONLY)
    directories = [mount / f"of{number}" for number in range(many)]
    for directory in directories:
        directory.mkdir()
    try:
        makers = [(directory / "new").touch for directory in directories]
        with filesystems.frozen(server.source), doing(*makers) as threads:
            assert wait_until(lambda: in_calls(front_of(server)) > 30)
            check_reading(server, opened=opened)
            assert all(thread.is_alive() for thread in threads)
            filesystems.thaw(server.source)
    finally:
        os.close(opened)
    assert all((server.source / directory.name / "new").exists() for directory in directories)


def test_blocked_changes_of_a_killed_front_are_done_once(server: Server) -> None:
    mount = server.mountpoint
    server.expect_log(DEATH_OF_THE_FRONT)
    many = 20
    directories = [mount / f"of{number}" for number in range(many)]
    for directory in directories:
        directory.mkdir()
    makers = [(directory / "new").mkdir for directory in directories]
    with filesystems.frozen(server.source), doing(*makers):
        pid = front_of(server)
        assert wait_until(lambda: in_calls(pid) >= many)
        os.kill(pid, signal.SIGKILL)
        filesystems.thaw(server.source)
    assert all((server.source / directory.name / "new").is_dir() for directory in directories)
