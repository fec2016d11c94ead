"""A program that waits for a source that hangs can be killed, and what it had asked for does no harm later.

A stopped worker and a frozen file system stand for sources that hang.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llloop.control import client
from tests import filesystems
from tests.conftest import Serve
from tests.server import Server
from tests.server_processes import descriptors, front_report, stop_process, titles, wait_until, workers
from tests.syscalls import opened

pytestmark = [pytest.mark.mounted, pytest.mark.own_loop, pytest.mark.user]

LARGE = 1 << 20  # bytes; more than the front does by itself
FATAL = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


@contextmanager
def stopped_worker(server: Server) -> Iterator[None]:
    """Nothing that the only worker has to do is done in the block."""
    (pid,) = workers(server).values()
    stop_process(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def used_slots(server: Server) -> int:
    """How many requests are with workers, or with threads of the front that do not lead."""
    return int(client.ask_mount(str(server.mountpoint), "stats")["slots"]["used"])


def program(server: Server, code: str, *fds: int) -> subprocess.Popen[bytes]:
    """Runs Python code that makes a call in which it waits when this returns; Ctrl-C ends it as it ends others."""
    before = used_slots(server)
    process = waiting_program(code, *fds)
    assert wait_until(lambda: waits(process) and used_slots(server) > before), process.poll()
    return process


def waiting_program(code: str, *fds: int) -> subprocess.Popen[bytes]:
    """Like `program`, for a request that need not occupy a slot."""
    default = "import os, signal; signal.signal(signal.SIGINT, signal.SIG_DFL)"
    process = subprocess.Popen([sys.executable, "-c", f"{default}\n{code}"], pass_fds=fds)
    assert wait_until(lambda: waits(process)), process.poll()
    return process


def kill_front(server: Server) -> None:
    """Kills the front and waits for the next one."""
    before = titles(server)["llloop-front"]
    os.kill(before, signal.SIGKILL)
    assert wait_until(lambda: titles(server).get("llloop-front", before) != before)
    os.stat(server.mountpoint)


def waits(process: subprocess.Popen[bytes]) -> bool:
    """Whether it waits for an answer of the server."""
    assert process.poll() is None, "it has ended"
    return Path(f"/proc/{process.pid}/wchan").read_text() == "request_wait_answer"


def is_idle(server: Server) -> bool:
    """Whether no request occupies a slot."""
    return used_slots(server) == 0


@pytest.mark.parametrize("number", FATAL)
def test_killed_program_ends(serve: Serve, number: int) -> None:
    server = serve("--workers", "1", "--metadata", "front")
    with opened(server.mountpoint / "file", os.O_RDWR | os.O_CREAT) as fd:
        with stopped_worker(server):
            waiting = program(server, f"os.fsync({fd})", fd)
            waiting.send_signal(number)
            assert waiting.wait(30) == -number
        os.fsync(fd)
        assert wait_until(lambda: is_idle(server))


def test_other_signals_end_nothing(serve: Serve) -> None:
    server = serve("--workers", "1", "--metadata", "front")
    code = "signal.signal(signal.SIGUSR1, lambda *_: None)\nos.fsync({0})\nos._exit(7)"
    files = (opened(server.mountpoint / name, os.O_RDWR | os.O_CREAT) for name in ("first", "second"))
    with contextlib.ExitStack() as stack:
        fds = [stack.enter_context(file) for file in files]
        with stopped_worker(server):
            first, second = (program(server, code.format(fd), fd) for fd in fds)
            for process in (first, second):
                process.send_signal(signal.SIGUSR1)
                process.send_signal(signal.SIGCHLD)
            # A fatal signal after another one, of which the kernel tells nothing.
            second.kill()
            assert second.wait(30) == -signal.SIGKILL
            assert waits(first)
        assert first.wait(30) == 7
        assert wait_until(lambda: is_idle(server))


def test_parked_requests_end_too(serve: Serve) -> None:
    server = serve("--workers", "1", "--metadata", "front", "--slots", "8")
    with contextlib.ExitStack() as stack:
        files = (opened(server.mountpoint / f"file{number}", os.O_RDWR | os.O_CREAT) for number in range(12))
        fds = [stack.enter_context(file) for file in files]
        with stopped_worker(server):
            # Half of the slots; further requests are parked.
            waiting = [program(server, f"os.fsync({fd})", fd) for fd in fds[:4]]
            waiting += [waiting_program(f"os.fsync({fd})", fd) for fd in fds[4:]]
            for process in waiting:
                process.kill()
            for process in waiting:
                assert process.wait(30) == -signal.SIGKILL
        for fd in fds:
            os.fsync(fd)
        assert wait_until(lambda: is_idle(server))


@pytest.mark.by_workers
@pytest.mark.at_once("the kernel writes by itself")
def test_data_that_is_written_later_is_seen(serve: Serve) -> None:
    server = serve("--workers", "1", "--metadata", "front", "--cache", "auto")
    path = server.mountpoint / "file"
    path.write_bytes(b"old" * LARGE)
    with opened(path, os.O_RDWR) as fd:
        assert os.pread(fd, 3, 0) == b"old"
        with stopped_worker(server):
            writer = program(server, f"os.pwrite({fd}, b'new' * {LARGE}, 0)", fd)
            writer.kill()
            assert writer.wait(30) == -signal.SIGKILL
        # The kernel sends a large write in several requests; the first was with the worker.
        assert wait_until(lambda: (server.source / "file").read_bytes()[:3] == b"new")
        os.fsync(fd)  # after the write
        assert wait_until(lambda: is_idle(server))
        assert os.pread(fd, 3 * LARGE, 0) == (server.source / "file").read_bytes()


@pytest.mark.by_workers
@pytest.mark.at_once("the kernel writes by itself")
def test_files_that_were_open_are_not_mixed_up(serve: Serve) -> None:
    """The kernel closes the file of a killed program, although a worker still has to write into it."""
    server = serve("--workers", "1", "--metadata", "front")
    names = [f"file{number}" for number in range(8)]
    for name in names:
        (server.mountpoint / name).write_bytes(b"x" * LARGE)
    with stopped_worker(server):
        code = f"fd = os.open({str(server.mountpoint / names[0])!r}, os.O_RDWR)\nos.pwrite(fd, b'y' * {LARGE}, 0)"
        writer = program(server, code)
        writer.kill()
        assert writer.wait(30) == -signal.SIGKILL
        # The descriptor's number must not become that of another file.
        others = [os.open(server.mountpoint / name, os.O_RDWR) for name in names[1:]]
    try:
        for fd in others:
            os.fsync(fd)
    finally:
        for fd in others:
            os.close(fd)
    assert wait_until(lambda: is_idle(server))
    # The kernel sends a large write in several requests; the first was with the worker.
    assert (server.source / names[0]).read_bytes().lstrip(b"y").strip(b"x") == b""
    for name in names[1:]:
        assert (server.source / name).read_bytes() == b"x" * LARGE
    assert wait_until(lambda: front_report(server).handles == 0)


@pytest.mark.by_workers
@pytest.mark.at_once("the kernel writes by itself")
@pytest.mark.parametrize("deaths", [0, 1])
@pytest.mark.parametrize("change", ["os.pwrite({0}, b'newer', 0)", "os.ftruncate({0}, 0)"])
def test_killed_write_undoes_nothing(serve: Serve, deaths: int, change: str) -> None:
    """What a program does after the death of another one stays, although a worker has not done the other's write."""
    server = serve("--workers", "1", "--metadata", "front")
    if deaths:
        server.expect_log("takes over")
    path = server.mountpoint / "file"
    path.write_bytes(b"old" * LARGE)
    with opened(path, os.O_RDWR) as fd:
        with stopped_worker(server):
            writer = program(server, f"os.pwrite({fd}, b'x' * {LARGE}, 0)", fd)
            writer.kill()
            assert writer.wait(30) == -signal.SIGKILL
            for _ in range(deaths):
                kill_front(server)
            cancelled = waiting_program(f"os.pwrite({fd}, b'cancelled', 0)", fd)
            cancelled.kill()
            assert cancelled.wait(30) == -signal.SIGKILL
            later = waiting_program(f"{change.format(fd)}\nos._exit(7)", fd)
            for _ in range(deaths):
                kill_front(server)
        assert later.wait(30) == 7
        content = (server.source / "file").read_bytes()
        assert content == b"" if "truncate" in change else content.startswith(b"newerxxx")
        assert wait_until(lambda: is_idle(server))
        assert path.read_bytes() == content


@pytest.mark.parametrize("order", ["front, then program", "program, then front"])
def test_front_dies(serve: Serve, order: str) -> None:
    server = serve("--workers", "1", "--metadata", "front")
    server.expect_log("takes over")
    with stopped_worker(server):
        waiting = program(server, f"os.fsync(os.open({str(server.mountpoint / 'file')!r}, os.O_RDWR | os.O_CREAT))")
        if order.startswith("front"):
            kill_front(server)
        waiting.kill()
        assert waiting.wait(30) == -signal.SIGKILL
        if order.startswith("program"):
            kill_front(server)
    (server.mountpoint / "other").mkdir()
    assert wait_until(lambda: is_idle(server))
    assert wait_until(lambda: front_report(server).handles == 0)
    (worker,) = workers(server).values()
    assert wait_until(lambda: str(server.source / "file") not in descriptors(worker))


def test_names_wait_for_workers(serve: Serve) -> None:
    """What has not begun when its program is killed is not done later."""
    server = serve("--workers", "1", "--metadata", "workers")
    (server.mountpoint / "directory").mkdir()
    with stopped_worker(server):
        for code in ("os.mkdir({!r})", "os.stat({!r})", "os.open({!r}, os.O_CREAT)"):
            waiting = program(server, code.format(str(server.mountpoint / "directory" / "new")))
            waiting.terminate()
            assert waiting.wait(30) == -signal.SIGTERM
    (server.mountpoint / "other").mkdir()
    assert wait_until(lambda: is_idle(server))
    assert os.listdir(server.source / "directory") == []


@pytest.mark.root
@pytest.mark.parametrize("made", ["os.mkdir({!r})", "os.open({!r}, os.O_CREAT | os.O_WRONLY)"])
def test_frozen_source(serve: Serve, tmp_path: Path, made: str) -> None:
    with filesystems.ext4(tmp_path) as source:
        server = serve("--workers", "1", "--metadata", "front", "--cache", "always", source=source)
        new = server.mountpoint / "new"
        with filesystems.frozen(source):
            waiting = program(server, made.format(str(new)))
            waiting.kill()
            assert waiting.wait(30) == -signal.SIGKILL
        # The call of the front goes on, as that of a program in SRC would; the kernel has cached that there is no name.
        assert wait_until((source / "new").exists)
        assert wait_until(new.exists)
        (server.mountpoint / "other").mkdir()
        assert wait_until(lambda: is_idle(server))
        assert front_report(server).handles == 0
        server.stop()


@pytest.mark.root
def test_names_change_in_order(serve: Serve, tmp_path: Path) -> None:
    """A file that is created after the death of a program that was removing its predecessor stays."""
    with filesystems.ext4(tmp_path) as source:
        server = serve("--workers", "1", "--metadata", "front", source=source)
        file = server.mountpoint / "file"
        file.write_bytes(b"old")
        with filesystems.frozen(source):
            killed = program(server, f"os.unlink({str(file)!r})")
            killed.kill()
            assert killed.wait(30) == -signal.SIGKILL
            cancelled = waiting_program(f"os.mkdir({str(server.mountpoint / 'cancelled')!r})")
            cancelled.kill()
            assert cancelled.wait(30) == -signal.SIGKILL
            later = waiting_program(f"os.write(os.open({str(file)!r}, os.O_CREAT | os.O_WRONLY), b'new')\nos._exit(7)")
        assert later.wait(30) == 7
        assert (source / "file").read_bytes() == b"new"
        assert not (source / "cancelled").exists()
        assert wait_until(lambda: is_idle(server))
        server.stop()
