"""A killed supervisor leaves neither a process nor a dead mount."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import time

import pytest

from tests.as_user import Child
from tests.conftest import Serve
from tests.expect import fails, outcome
from tests.server import Server
from tests.server_processes import stop_process, titles, wait_until

pytestmark = [pytest.mark.mounted, pytest.mark.user]

DETACHED = "the supervisor has died; the keeper has detached"
LARGE = 200_000  # bytes; the front gives a write of this size to a worker
# The errors that a program may get if the server ends during its call.
GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)


def kill_supervisor(server: Server) -> None:
    """And take notice of it: until its parent does, its process id is still there."""
    assert server.process
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait(30)


def check_nothing_is_left(server: Server) -> None:
    assert wait_until(lambda: not server.mounted()), server.all_output()
    assert wait_until(lambda: server.processes() == []), server.processes()
    assert os.listdir(server.mountpoint) == [], "the plain directory is there again"


def test_idle_mount_is_detached(serve: Serve) -> None:
    server = serve("--workers", "2")
    (server.mountpoint / "file").write_bytes(bytes(LARGE))
    server.expect_log(DETACHED)
    kill_supervisor(server)
    check_nothing_is_left(server)
    assert (server.source / "file").read_bytes() == bytes(LARGE)
    server.check_log()
    server.clean_up()


@pytest.mark.at_once("a collected write does not wait for its answer")
def test_mount_in_use_is_detached(serve: Serve) -> None:
    """Processes that use the mount get errors, and do not prevent a new mount."""
    server = serve("--workers", "1")
    content = b"content"
    (server.source / "directory").mkdir()
    (server.source / "file").write_bytes(content)
    server.expect_log(DETACHED)
    fd = os.open(server.mountpoint / "file", os.O_RDWR)
    worker = subprocess.Popen(["sleep", "60"], cwd=server.mountpoint / "directory")
    try:
        kill_supervisor(server)
        check_nothing_is_left(server)
        if "--io=kernel" in server.arguments:
            # The kernel itself writes to the file in the source while it is open, without the server.
            content = b"written later"
            assert os.pwrite(fd, content, 0) == len(content)
        else:
            with fails(*GONE):
                os.pwrite(fd, bytes(LARGE), 0)
        with fails(*GONE):
            os.listdir(f"/proc/{worker.pid}/cwd")
    finally:
        worker.kill()
        worker.wait()
        with contextlib.suppress(OSError):  # close(2) may send a request, which fails without a server
            os.close(fd)
    server.check_log()
    server.clean_up()
    server.start()
    assert (server.mountpoint / "file").read_bytes() == content


@pytest.mark.at_once("a collected write does not wait for its answer")
@pytest.mark.by_workers
def test_request_in_flight_gets_an_error(serve: Serve) -> None:
    server = serve("--workers", "1")
    server.expect_log(DETACHED)
    fd = os.open(server.mountpoint / "file", os.O_RDWR | os.O_CREAT)
    stop_process(titles(server)["llloop-worker-0"])
    writing = Child(outcome, os.pwrite, fd, bytes(LARGE), 0)
    time.sleep(0.2)  # nothing shows that it waits
    kill_supervisor(server)
    assert writing.result() in {errno.errorcode[number] for number in GONE}
    with contextlib.suppress(OSError):  # close(2) may send a request, which fails without a server
        os.close(fd)
    check_nothing_is_left(server)
    server.check_log()
    server.clean_up()


@pytest.mark.root
def test_another_mount_at_the_same_path_stays(serve: Serve) -> None:
    server = serve("--workers", "1")
    subprocess.run(["mount", "-t", "tmpfs", "none", server.mountpoint], check=True, timeout=30)
    try:
        (server.mountpoint / "theirs").touch()
        kill_supervisor(server)
        assert wait_until(lambda: server.processes() == []), server.processes()
        assert os.listdir(server.mountpoint) == ["theirs"]
    finally:
        subprocess.run(["umount", server.mountpoint], check=True, timeout=30)
        server.clean_up()


def test_keeper_is_replaced_when_it_dies(serve: Serve) -> None:
    server = serve("--workers", "1")
    server.expect_log("llloop-keeper was killed by signal 9; a new process takes over")
    server.expect_log(DETACHED)
    first = titles(server)["llloop-keeper"]
    os.kill(first, signal.SIGKILL)

    def another_is_there() -> bool:
        with contextlib.suppress(AssertionError, OSError):  # a new process has no title yet
            return titles(server).get("llloop-keeper", first) != first
        return False

    assert wait_until(another_is_there), server.all_output()
    assert wait_until(lambda: "llloop-keeper was killed" in server.log.read_text())
    kill_supervisor(server)
    check_nothing_is_left(server)
    server.check_log()
    server.clean_up()
