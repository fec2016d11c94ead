"""`llloop trace`, with real mounts."""

from __future__ import annotations

import json
import mmap
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Serve
from tests.mount.command_line import environment, llloop, wait_until
from tests.server import Server
from tests.server_processes import stop_process, titles
from tests.syscalls import opened

pytestmark = [pytest.mark.mounted, pytest.mark.own_loop, pytest.mark.user]

MIB = 1 << 20


class Trace:
    """A running `llloop trace`, which traces when the constructor returns."""

    def __init__(self, server: Server, *arguments: str) -> None:
        self._stdout = server.state / "trace-stdout"
        self._stderr = server.state / "trace-stderr"
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llloop", "trace", str(server.mountpoint), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=environment(),
                cwd="/",
                # A script may have started these tests in the background, where SIGINT is ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        wait_until(lambda: "tracing" in self.stderr, "the trace begins")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    @property
    def text(self) -> str:
        return self._stdout.read_text()

    def requests(self) -> list[dict[str, Any]]:
        """The complete lines of --json."""
        return [json.loads(line) for line in self.text.split("\n")[:-1]]

    def wait_for(self, operation: str, path: str, result: str = "OK") -> dict[str, Any]:
        """Waits for a request, and returns it."""

        def found() -> list[dict[str, Any]]:
            wanted = (operation, path, result)
            return [one for one in self.requests() if (one["operation"], one["path"], one["result"]) == wanted]

        wait_until(lambda: bool(found()), f"{operation} {path} {result}")
        return found()[-1]

    def end(self, number: int = signal.SIGINT) -> int:
        """Sends a signal; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)


@contextmanager
def tracing(server: Server, *arguments: str) -> Iterator[Trace]:
    trace = Trace(server, *arguments)
    try:
        yield trace
    finally:
        trace.process.kill()
        trace.process.wait()


def test_each_request_is_a_line(serve: Serve) -> None:
    server = serve()
    with tracing(server, "--json") as trace:
        maker = subprocess.Popen(["mkdir", server.mountpoint / "directory"])
        assert maker.wait() == 0
        made = trace.wait_for("MKDIR", "/directory")
        (server.mountpoint / "directory" / "file").write_bytes(b"data")
        os.rename(server.mountpoint / "directory" / "file", server.mountpoint / "other")
        renamed = trace.wait_for("RENAME", "/directory/file")
        with pytest.raises(FileNotFoundError):
            os.stat(server.mountpoint / "missing")
        missing = trace.wait_for("LOOKUP", "/missing", "ENOENT")
        assert trace.end() == 0
    assert (made["pid"], made["program"], made["uid"]) == (maker.pid, "mkdir", os.geteuid())
    assert 0 < made["microseconds"] < 60e6
    assert abs(made["time"] - os.stat(server.source / "directory").st_ctime) < 60
    assert renamed["target"] == "/other"
    assert renamed["pid"] == missing["pid"] == os.getpid()


@pytest.mark.by_workers
@pytest.mark.at_once("the kernel writes later, and in other pieces")
def test_reads_and_writes_show_their_bytes(serve: Serve) -> None:
    server = serve()
    data = mmap.mmap(-1, MIB)
    with tracing(server, "--json") as trace:
        with opened(server.mountpoint / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT) as fd:
            for size in (4096, MIB):
                assert os.pwritev(fd, [memoryview(data)[:size]], 0) == size
                assert os.preadv(fd, [memoryview(data)[:size]], 0) == size
        os.unlink(server.mountpoint / "file")
        trace.wait_for("UNLINK", "/file")

        def moved(operation: str) -> list[int]:
            return [one["bytes"] for one in trace.requests() if one["operation"] == operation]

        # A worker's ring is read in the same interval or the next.
        wait_until(lambda: sum(moved("WRITE")) == sum(moved("READ")) == 4096 + MIB, "all bytes")
        assert {one["path"] for one in trace.requests() if one["operation"] in ("READ", "WRITE")} == {"/file"}
        assert trace.end() == 0


def test_choosing_requests(serve: Serve) -> None:
    server = serve()
    with tracing(server, "--json", "--path", "*.log", "--path", "/directory/*") as trace:
        for name in ("a.log", "a.txt", "directory"):
            os.mkdir(server.mountpoint / name)
        os.mkdir(server.mountpoint / "directory" / "below")
        trace.wait_for("MKDIR", "/directory/below")
        assert trace.end() == 0
        assert {one["path"] for one in trace.requests()} == {"/a.log", "/directory/below"}
    with tracing(server, "--json", "--errors", "--path", f"{server.mountpoint}/*") as trace:
        os.rmdir(server.mountpoint / "a.log")
        with pytest.raises(OSError):
            os.rmdir(server.mountpoint / "directory")
        trace.wait_for("RMDIR", "/directory", "ENOTEMPTY")
        assert trace.end() == 0
        assert {one["result"] for one in trace.requests()} <= {"ENOTEMPTY", "ENOENT", "ENOSYS", "ENODATA"}


def test_names_of_any_bytes(serve: Serve) -> None:
    server = serve()
    name = b"\x1b[31mred\n\xff\xe2\x80\xae"
    for arguments in ((), ("--json",)):
        with tracing(server, *arguments) as trace:
            os.mkdir(os.fsencode(server.mountpoint) + b"/" + name)
            os.rmdir(os.fsencode(server.mountpoint) + b"/" + name)
            wait_until(lambda text=trace: "RMDIR" in text.text, "the requests")  # type: ignore[misc]
            assert trace.end() == 0
            if arguments:
                assert {os.fsencode(one["path"]) for one in trace.requests() if one["operation"] == "RMDIR"} == {
                    b"/" + name
                }
            else:
                assert r"/\x1b[31mred\n\udcff\u202e" in trace.text
                assert trace.text.isascii() and "\x1b" not in trace.text


def test_removed_files(serve: Serve) -> None:
    server = serve()
    with opened(server.mountpoint / "file", os.O_RDWR | os.O_CREAT) as fd:
        os.unlink(server.mountpoint / "file")
        with tracing(server, "--json") as trace:
            os.fchmod(fd, 0o600)
            trace.wait_for("SETATTR", "(removed)")
            assert trace.end() == 0


@pytest.mark.parametrize("title", ["llloop-front", "llloop-worker-0"])
def test_trace_continues_after_a_death(serve: Serve, title: str) -> None:
    server = serve("--workers", "1")
    server.expect_log("takes over")
    with tracing(server, "--json") as trace:
        os.kill(titles(server)[title], signal.SIGKILL)
        os.mkdir(server.mountpoint / "directory")
        trace.wait_for("MKDIR", "/directory")
        with opened(server.mountpoint / "file", os.O_RDWR | os.O_CREAT) as fd:
            os.fsync(fd)
        trace.wait_for("FSYNC", "/file")
        assert trace.end() == 0


def test_slow_reader_delays_nobody(serve: Serve) -> None:
    server = serve("--negative-timeout", "0")
    with tracing(server, "--json") as trace:
        trace.process.send_signal(signal.SIGSTOP)
        for number in range(20_000):
            assert not os.path.exists(server.mountpoint / f"{number:0100}")
        trace.process.send_signal(signal.SIGCONT)
        wait_until(lambda: "requests are missing" in trace.stderr, "what is missing")
        os.mkdir(server.mountpoint / "directory")
        trace.wait_for("MKDIR", "/directory")
        assert trace.end() == 0
        missing = int(trace.stderr.splitlines()[-1].split()[1])
        shown = sum(len(one["path"]) == 101 for one in trace.requests())
        assert 20_000 <= missing + shown < 21_000  # the kernel requests the attributes of the root now and then


def test_killed_readers_are_noticed(serve: Serve) -> None:
    server = serve()
    for number in range(20):  # more than may read at a time
        with tracing(server, "--json") as trace:
            os.mkdir(server.mountpoint / f"{number}")
            trace.wait_for("MKDIR", f"/{number}")
            assert trace.end(signal.SIGKILL) == -signal.SIGKILL
    with tracing(server, "--json") as first, tracing(server) as second:
        os.mkdir(server.mountpoint / "directory")
        wait_until(lambda: "/directory" in second.text, "the request")
        assert second.end(signal.SIGTERM) == first.end() == 0


def test_closed_output(serve: Serve) -> None:
    server = serve()
    with subprocess.Popen(
        [sys.executable, "-m", "llloop", "trace", str(server.mountpoint)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout and process.stderr
        assert b"tracing" in process.stderr.readline()
        process.stdout.close()
        os.mkdir(server.mountpoint / "directory")
        assert process.wait(30) == 0
        assert process.stderr.read() == b""


def test_unanswered_requests(serve: Serve) -> None:
    server = serve("--workers", "1")
    with opened(server.mountpoint / "file", os.O_RDWR | os.O_CREAT) as fd:
        worker = titles(server)["llloop-worker-0"]
        with tracing(server) as trace:
            stop_process(worker)
            try:
                caller = subprocess.Popen([sys.executable, "-c", f"import os; os.fsync({fd})"], pass_fds=[fd])
                os.mkdir(server.mountpoint / "directory")
                wait_until(lambda: "/directory" in trace.text, "the later request")
                wait_until(lambda: Path(f"/proc/{caller.pid}/wchan").read_text().startswith("request_wait"), "a wait")
                assert trace.end() == 0
            finally:
                os.kill(worker, signal.SIGCONT)
            assert caller.wait(30) == 0
            (line,) = [line for line in trace.text.splitlines() if "unanswered" in line]
            assert "FSYNC" in line and "/file" in line and str(caller.pid) in line


def test_end_of_the_mount_ends_the_trace(serve: Serve) -> None:
    server = serve()
    with tracing(server) as trace:
        server.stop()
        assert trace.process.wait(30) == 1
        assert "has ended the trace" in trace.stderr


@pytest.mark.root
def test_other_users_cannot_trace(serve: Serve) -> None:
    server = serve("--allow-other")
    nobody = pwd.getpwnam("nobody").pw_uid
    ended = llloop(
        "trace", server.mountpoint, prefix=["setpriv", f"--reuid={nobody}", f"--regid={nobody}", "--clear-groups"]
    )
    assert ended.code == 1
    assert "belongs to another user" in ended.complaint()


@pytest.mark.root
def test_io_of_the_kernel_is_mentioned(serve: Serve) -> None:
    with tracing(serve("--io", "kernel", "--cache", "auto")) as trace:
        assert "the kernel reads and writes files itself (--io kernel)" in trace.stderr
        assert trace.end() == 0


def test_no_mount(tmp_path: Path) -> None:
    ended = llloop("trace", tmp_path)
    assert ended.code == 4
    assert "nothing is mounted there" in ended.complaint()
