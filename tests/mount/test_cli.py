"""The command: effects of its options, output, clean stops."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llloop.version import __version__
from tests.as_user import Caller, run_as
from tests.conftest import Serve
from tests.mount.command_line import (
    Ground,
    check_complaint,
    environment,
    ground,
    llloop,
    process_titles,
    stopped,
    wait_until,
)
from tests.server import READY, Server
from tests.server_processes import kill_all_at_once
from tests.watchdog import Watchdog, kill_session, mount_entry, processes_of_session, unmount_lazily

pytestmark = [pytest.mark.mounted, pytest.mark.user]

NOBODY = Caller(uid=65534, gid=65534)


@pytest.fixture
def place(via: str, watchdog: Watchdog) -> Iterator[Ground]:
    with ground(Server.prepare(via, watchdog), via) as prepared:
        yield prepared


def ready_line(server: Server) -> str:
    (line,) = [line for line in server.output.read_text().splitlines() if line.startswith(READY)]
    return line


# Starting


def test_ready_line_names_source_mount_point_and_mode(serve: Serve, via: str) -> None:
    server = serve("--workers", "3")
    line = ready_line(server)
    assert str(server.source) in line and str(server.mountpoint) in line
    assert "3 workers" in line
    assert ("own loop" in line) == (via == "own")
    assert ("fallback" in line or "llfuse's loop" in line) == (via == "llfuse")


def test_processes_have_titles(serve: Serve) -> None:
    server = serve("--workers", "3")
    titles = process_titles(server.pid)
    assert [title for title in titles if title.startswith("llloop-worker-")] == [f"llloop-worker-{n}" for n in range(3)]
    assert {"llloop-supervisor", "llloop-keeper", "llloop-front"} <= set(titles)


def test_default_number_of_workers(serve: Serve) -> None:
    one_cpu = str(min(os.sched_getaffinity(0)))
    server = serve(command=["taskset", "-c", one_cpu, sys.executable, "-m", "llloop", "serve"])
    assert [title for title in process_titles(server.pid) if "worker" in title] == ["llloop-worker-0"]


def test_read_only(serve: Serve) -> None:
    server = serve("--read-only")
    (server.source / "file").write_text("content")
    assert (server.mountpoint / "file").read_text() == "content"
    for change in (
        lambda: (server.mountpoint / "file").write_text("other"),
        lambda: (server.mountpoint / "new").mkdir(),
        lambda: (server.mountpoint / "file").unlink(),
        lambda: (server.mountpoint / "file").chmod(0o600),
    ):
        with pytest.raises(OSError) as raised:
            change()
        assert raised.value.errno == errno.EROFS
    assert os.statvfs(server.mountpoint).f_flag & os.ST_RDONLY
    assert (server.source / "file").read_text() == "content"


@pytest.mark.parametrize("seed", ["0", "1", "2", "3"])  # the seed of string hashes, which decides the order of sets
def test_read_only_overrides_rw(serve: Serve, seed: str) -> None:
    server = serve("--read-only", "-o", "rw", env={"PYTHONHASHSEED": seed})
    assert os.statvfs(server.mountpoint).f_flag & os.ST_RDONLY


def test_no_xattr(serve: Serve) -> None:
    server = serve("--no-xattr")
    (server.mountpoint / "file").write_text("content")
    for call in (
        lambda: os.setxattr(server.mountpoint / "file", "user.llloop", b"value"),
        lambda: os.getxattr(server.mountpoint / "file", "user.llloop"),
        lambda: os.listxattr(server.mountpoint / "file"),
    ):
        with pytest.raises(OSError) as raised:
            call()
        assert raised.value.errno == errno.EOPNOTSUPP
    assert (server.mountpoint / "file").read_text() == "content"


def test_further_mount_options(serve: Serve) -> None:
    server = serve("-o", "noexec,noatime", "-o", "nodev")
    entry = mount_entry(str(server.mountpoint))
    assert entry
    assert {"noexec", "noatime", "nodev"} <= set(entry[5].split(","))
    program = server.mountpoint / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    with pytest.raises(PermissionError):
        subprocess.run([program], check=False)


@pytest.mark.parametrize("name", ["plain", "with, a comma", "two  blanks", "back\\slash"])
def test_fsname(serve: Serve, name: str) -> None:
    server = serve("--fsname", name)
    listed = subprocess.run(
        ["findmnt", "--noheadings", "--raw", "--output", "SOURCE", server.mountpoint], capture_output=True, check=True
    )
    # findmnt --raw escapes spaces and similar characters as \x20.
    assert listed.stdout.decode("unicode_escape").encode("latin-1").decode().rstrip("\n") == name
    assert (server.mountpoint / "..").exists()


@pytest.mark.root
@pytest.mark.parametrize("allowed", [True, False, None])
def test_allow_other(serve: Serve, allowed: bool | None) -> None:
    server = serve(*{True: ["--allow-other"], False: ["--no-allow-other"], None: []}[allowed])
    (server.source / "file").write_text("content")
    read = (server.mountpoint / "file").read_text
    if allowed is False:
        with pytest.raises(PermissionError):
            run_as(NOBODY, read)
    else:
        assert run_as(NOBODY, read) == "content"
    assert read() == "content"


@pytest.mark.at_once("the kernel takes its own word for sizes and times of a file that it knows")
@pytest.mark.parametrize("option", ["--entry-timeout", "--attr-timeout"])
def test_zero_timeouts_show_changes_immediately(serve: Serve, option: str) -> None:
    server = serve("--cache", "always", option, "0")
    (server.source / "file").write_text("one")
    assert (server.mountpoint / "file").stat().st_size == 3
    if option == "--entry-timeout":
        (server.source / "file").rename(server.source / "renamed")
        assert not (server.mountpoint / "file").exists()
        assert (server.mountpoint / "renamed").exists()
    else:
        (server.source / "file").write_text("three")
        assert (server.mountpoint / "file").stat().st_size == 5


def test_negative_timeout_hides_a_new_file(serve: Serve) -> None:
    long, short = serve("--negative-timeout", "60"), serve("--negative-timeout", "0.2")
    for server in (long, short):
        assert not (server.mountpoint / "file").exists()
        (server.source / "file").touch()
    wait_until((short.mountpoint / "file").exists, "the file shows")
    assert not (long.mountpoint / "file").exists()


def test_environment_variables_set_options(serve: Serve) -> None:
    server = serve(env={"LLLOOP_SERVE_WORKERS": "1", "LLLOOP_SERVE_READ_ONLY": "1", "LLLOOP_SERVE_FSNAME": "named"})
    assert "1 worker" in ready_line(server)
    entry = mount_entry(str(server.mountpoint))
    assert entry and "ro" in entry[5].split(",") and entry[entry.index("-") + 2] == "named"


def test_option_overrides_its_environment_variable(serve: Serve) -> None:
    server = serve("--workers", "2", env={"LLLOOP_SERVE_WORKERS": "1"})
    assert "2 workers" in ready_line(server)


def test_nonempty_hides_files_until_unmount(place: Ground, serve: Serve) -> None:
    hidden = place.mountpoint / "hidden"
    hidden.write_text("under the mount")
    (place.source / "shown").write_text("in the source")
    arguments = [*place.loop, str(place.source), str(place.mountpoint), "--nonempty"]
    with running("serve", *arguments, mountpoint=place.mountpoint) as server:
        assert os.listdir(place.mountpoint) == ["shown"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    assert os.listdir(place.mountpoint) == ["hidden"]


class running:
    """A server that is not the `serve` fixture's: its command line is the test's own."""

    def __init__(self, *arguments: str, mountpoint: Path, cwd: Path | str = "/") -> None:
        self.mountpoint = mountpoint
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llloop", *arguments],
            cwd=cwd,
            env=environment({"PYTHONUNBUFFERED": "1"}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # The ready line contains a name that is not UTF-8.
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )

    def __enter__(self) -> subprocess.Popen[str]:
        assert self.process.stdout and self.process.stderr
        line = self.process.stdout.readline()
        if not line.startswith(READY):
            self.__exit__()
            raise AssertionError(f"not ready: {line!r}")
        return self.process

    def __exit__(self, *_: object) -> None:
        kill_session(self.process.pid)
        self.process.communicate()
        # Unmount without a check, because escapes in mountinfo may hide the name. Without a mount this does nothing.
        unmount_lazily(str(self.mountpoint))


def test_relative_paths_and_symlinks(place: Ground) -> None:
    (place.source / "file").write_text("content")
    (place.state / "link-to-source").symlink_to(place.source)
    (place.state / "link-to-mnt").symlink_to("mnt")
    arguments = [*place.loop, "link-to-source", "./link-to-mnt/../mnt"]
    with running("serve", *arguments, mountpoint=place.mountpoint, cwd=place.state) as server:
        assert (place.mountpoint / "file").read_text() == "content"
        assert llloop("umount", "link-to-mnt", cwd=place.state).code == 0
        assert server.wait(30) == 0


@pytest.mark.parametrize("name", ["with blank", "com,ma", "back\\slash", "new\nline", "grün", "\udcff not UTF-8"])
def test_mount_points_with_odd_names(place: Ground, name: str) -> None:
    odd = place.state / name
    odd.mkdir()
    (place.source / "file").write_text("content")
    with running("serve", *place.loop, str(place.source), str(odd), mountpoint=odd) as server:
        assert (odd / "file").read_text() == "content"
        ended = llloop("umount", str(odd))
        assert ended.code == 0, ended.stderr
        assert server.wait(30) == 0
    assert os.listdir(odd) == []


@pytest.mark.parametrize("name", ["with blank", "com,ma", "new\nline", "\udcff not UTF-8"])
def test_sources_with_odd_names(serve: Serve, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "file").write_text("content")
    server = serve(source=tmp_path / name)
    assert (server.mountpoint / "file").read_text() == "content"


# Logging


def test_log_level(serve: Serve) -> None:
    talkative, silent = serve("--log-level", "debug"), serve("--log-level", "error")
    for server in (talkative, silent):
        os.listdir(server.mountpoint)
    talkative.wait_for_log("DEBUG")
    assert silent.log.read_text() == ""


def test_log_goes_to_stderr_by_default(place: Ground) -> None:
    arguments = [*place.loop, str(place.source), str(place.mountpoint), "--log-level", "debug"]
    with running("serve", *arguments, mountpoint=place.mountpoint) as server:
        server.send_signal(signal.SIGTERM)
        stdout, stderr = server.communicate(timeout=30)
    assert stdout == "", "only the ready line goes to stdout"
    assert "DEBUG" in stderr


# The daemon


@contextlib.contextmanager
def daemon(place: Ground, pid_file: Path) -> Iterator[None]:
    """Nothing of a daemon is left after the block, however far it came."""
    try:
        yield
    finally:
        if pid_file.exists():
            kill_session(os.getsid(int(pid_file.read_text())))
        unmount_lazily(str(place.mountpoint))


def test_daemon_returns_when_ready_and_writes_pid_file(place: Ground) -> None:
    (place.source / "file").write_text("content")
    pid_file, log = place.state / "pid", place.state / "log"
    with daemon(place, pid_file):
        # Read all of its output to the end. This would hang if the daemon or a child of it kept the output open.
        ended = place.serve("--daemon", "--pid-file", pid_file, "--log-file", log)
        assert ended.code == 0, ended.stderr
        assert (place.mountpoint / "file").read_text() == "content"
        pid = int(pid_file.read_text())
        session = os.getsid(pid)
        assert session != os.getsid(0)
        assert "llloop-supervisor" in process_titles(session)
        for member in processes_of_session(session):
            assert os.readlink(f"/proc/{member}/cwd") == "/"
            assert {os.readlink(f"/proc/{member}/fd/{number}") for number in (0, 1, 2)} == {"/dev/null"}
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not processes_of_session(session), "the daemon's processes are gone")
        assert mount_entry(str(place.mountpoint)) is None
        assert not pid_file.exists()
        assert "Traceback" not in log.read_text()


def test_daemon_with_relative_paths(place: Ground) -> None:
    with daemon(place, place.state / "pid"):
        source = os.path.relpath(place.source, place.state)
        arguments = ["--daemon", "--pid-file", "pid", "--log-file", "relative-log"]
        ended = llloop("serve", *place.loop, source, "mnt", *arguments, cwd=place.state)
        assert ended.code == 0, ended.stderr
        session = os.getsid(int((place.state / "pid").read_text()))
        assert (place.state / "relative-log").exists()
        # df and mount show the source, so it must be an absolute path.
        entry = mount_entry(str(place.mountpoint))
        assert entry and entry[entry.index("-") + 2] == str(place.source)
        ended = llloop("umount", "mnt", cwd=place.state)
        assert ended.code == 0, ended.stderr
        wait_until(lambda: not processes_of_session(session), "the daemon's processes are gone")
        assert mount_entry(str(place.mountpoint)) is None
        assert not (place.state / "pid").exists()


def test_daemon_reports_a_failed_start(place: Ground) -> None:
    (place.mountpoint / "file").touch()
    pid_file = place.state / "pid"
    place.refused(4, "not empty", "--daemon", "--pid-file", pid_file)
    assert not pid_file.exists()


def test_pid_file_without_daemon(serve: Serve, tmp_path: Path) -> None:
    server = serve("--pid-file", str(tmp_path / "pid"))
    assert int((tmp_path / "pid").read_text()) == server.pid
    server.stop()
    assert not (tmp_path / "pid").exists()


# Stopping


def terminate_twice(server: Server) -> None:
    os.kill(server.pid, signal.SIGTERM)
    os.kill(server.pid, signal.SIGTERM)


STOPS: dict[str, Callable[[Server], object]] = {
    "SIGINT": lambda server: os.kill(server.pid, signal.SIGINT),
    "SIGTERM": lambda server: os.kill(server.pid, signal.SIGTERM),
    "Ctrl-C in a terminal": lambda server: os.killpg(server.pid, signal.SIGINT),
    "SIGTERM to all processes": lambda server: os.killpg(server.pid, signal.SIGTERM),
    "SIGTERM twice": terminate_twice,
    "umount": lambda server: subprocess.run(["umount", server.mountpoint], check=True, timeout=30),
    "fusermount -u": lambda server: subprocess.run(["fusermount", "-u", server.mountpoint], check=True, timeout=30),
    "umount -l": lambda server: unmount_lazily(str(server.mountpoint)),
    "llloop umount": lambda server: umount_succeeds(server.mountpoint),
    "llloop umount --lazy": lambda server: umount_succeeds(server.mountpoint, "--lazy"),
}


def umount_succeeds(*arguments: str | Path) -> None:
    ended = llloop("umount", *arguments)
    assert (ended.code, ended.stderr) == (0, "")


@pytest.mark.parametrize("how", STOPS)
def test_clean_stop(serve: Serve, how: str) -> None:
    if how == "umount" and os.geteuid() != 0:
        pytest.skip("umount(8) is for root; users have fusermount -u")
    server = serve()
    (server.mountpoint / "file").write_text("content")
    STOPS[how](server)
    stopped(server)
    assert (server.source / "file").read_text() == "content"
    assert os.listdir(server.mountpoint) == []
    server.check_log()


def test_data_written_before_a_stop_is_in_the_source(serve: Serve) -> None:
    server = serve("--workers", "4")
    content = os.urandom(1 << 20)
    for number in range(20):
        (server.mountpoint / f"file-{number}").write_bytes(content)
    os.kill(server.pid, signal.SIGTERM)
    stopped(server)
    assert {path.read_bytes() == content for path in server.source.iterdir()} == {True}
    assert len(os.listdir(server.source)) == 20


def test_stop_detaches_a_busy_mount_and_logs_it(serve: Serve) -> None:
    server = serve()
    server.expect_log("(?i)busy.*lazi")
    server.expect_log("still in use", required=False)
    # The server has ended before this is closed, so the close may fail.
    with contextlib.suppress(OSError), open(server.mountpoint / "file", "w") as held:
        held.write("content")
        held.flush()
        os.kill(server.pid, signal.SIGTERM)
        stopped(server)
        assert os.listdir(server.mountpoint) == []
    assert (server.source / "file").read_text() == "content"


def test_stop_under_load_leaves_no_process_waiting(serve: Serve) -> None:
    server = serve("--workers", "2")
    server.expect_log("(?i)busy|lazi|still in use", required=False)
    errors: list[int | None] = []

    def write_on(path: Path) -> None:
        try:
            while True:
                path.write_bytes(bytes(300_000))
                path.read_bytes()
        except OSError as error:
            errors.append(error.errno)

    # The mount point is an empty directory again, so a directory below it cannot be written.
    (server.mountpoint / "busy").mkdir()
    threads = [threading.Thread(target=write_on, args=(server.mountpoint / "busy" / f"{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    os.kill(server.pid, signal.SIGTERM)
    stopped(server)
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert len(errors) == 4 and set(errors) <= {errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT, errno.EIO}


# llloop umount


def test_umount_of_a_busy_mount_fails(serve: Serve) -> None:
    server = serve()
    (server.source / "file").write_text("content")
    with open(server.mountpoint / "file"):
        complaint = check_complaint(llloop("umount", server.mountpoint), 4, "busy")
        assert "--lazy" in complaint
        assert (server.mountpoint / "file").read_text() == "content"
        assert server.alive()


def test_lazy_umount_serves_open_files_until_close(serve: Serve) -> None:
    server = serve()
    (server.source / "file").write_text("content")
    with open(server.mountpoint / "file") as held:
        umount_succeeds(server.mountpoint, "--lazy")
        assert not server.mounted()
        assert held.read() == "content"
        assert server.process and server.process.poll() is None
    stopped(server)


def test_umount_without_a_mount(place: Ground) -> None:
    check_complaint(llloop("umount", place.mountpoint), 4, "not")
    check_complaint(llloop("umount", place.mountpoint / "missing"), 4, "not|no such")


@pytest.mark.root
def test_umount_refuses_other_file_systems(place: Ground) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "llloop-test", place.mountpoint], check=True)
    try:
        check_complaint(llloop("umount", place.mountpoint), 4, "not")
        assert mount_entry(str(place.mountpoint)) is not None
    finally:
        subprocess.run(["umount", place.mountpoint], check=True)


def test_umount_removes_a_dead_mount(serve: Serve) -> None:
    server = serve()
    kill_all_at_once(server)
    umount_succeeds(server.mountpoint)
    assert not server.mounted()
    server.clean_up()


# Commands that need no mount


def test_version() -> None:
    installed = subprocess.run(
        [Path(sys.executable).parent / "llloop", "--version"], capture_output=True, text=True, check=True
    )
    assert installed.stdout == llloop("--version").stdout
    assert __version__ in installed.stdout.split()


def test_help_shows_each_public_option() -> None:
    text = llloop("serve", "--help").stdout
    options = {
        *(
            "--workers",
            "--read-only",
            "--allow-other",
            "--no-allow-other",
            "--cache",
            "--attr-timeout",
            "--entry-timeout",
        ),
        *("--negative-timeout", "--xattr", "--no-xattr", "-o", "--fsname", "--nonempty", "--daemon", "--pid-file"),
        *("--log-level", "--log-file", "--replace-dead", "--loop"),
    }
    for option in options:
        assert option in text
    assert "--slots" not in text
    overview = llloop("--help").stdout
    assert "LLLOOP_SERVE_WORKERS" in overview, "the environment variables are documented"
    assert {"serve", "umount"} <= set(overview.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str) -> None:
    command = [Path(sys.executable).parent / "llloop"]
    source = subprocess.run(
        command, env=environment({"_LLLOOP_COMPLETE": f"{shell}_source"}), capture_output=True, text=True, timeout=30
    )
    assert source.returncode == 0, source.stderr
    assert "_LLLOOP_COMPLETE" in source.stdout
    words = {"_LLLOOP_COMPLETE": f"{shell}_complete", "COMP_WORDS": "llloop serve --work", "COMP_CWORD": "2"}
    if shell == "fish":
        words["COMP_CWORD"] = "--work"
    completed = subprocess.run(command, env=environment(words), capture_output=True, text=True, timeout=30)
    assert "--workers" in completed.stdout


def test_server_survives_a_closed_standard_output(place: Ground) -> None:
    """A script may have closed the pipe; the mount must still serve."""
    reading, writing = os.pipe()
    os.close(reading)
    log = place.state / "log"
    process = subprocess.Popen(
        [sys.executable, "-m", "llloop", "serve", *place.loop, "--log-file", log, place.source, place.mountpoint],
        stdin=subprocess.DEVNULL,
        stdout=writing,
        stderr=subprocess.DEVNULL,
        env=environment(),
        cwd="/",
        start_new_session=True,
    )
    os.close(writing)
    try:
        # A signal that comes before the server is ready gives another exit code.
        wait_until(lambda: log.exists() and f"serving {place.source}" in log.read_text(), "ready")
        (place.mountpoint / "file").write_text("content")
        assert (place.source / "file").read_text() == "content"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    finally:
        kill_session(process.pid)
        process.wait()
        unmount_lazily(str(place.mountpoint))
