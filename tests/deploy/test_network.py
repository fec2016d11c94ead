"""A source on the network (sshfs from a local SSH server) that answers, hangs, and recovers."""

from __future__ import annotations

import errno
import filecmp
import getpass
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.deploy.ports import accepts, free_port
from tests.expect import pattern
from tests.server import Server, reachable_directory, remove_tree
from tests.server_processes import titles, wait_until
from tests.watchdog import abort_connection, unmount_lazily

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
pytestmark = [
    pytest.mark.mounted,
    pytest.mark.own_loop,
    pytest.mark.skipif(
        not (shutil.which("sshfs") and os.access(SSHD, os.X_OK)),
        reason="needs sshfs and an SSH server (openssh-server)",
    ),
]

# With its caches, sshfs would answer for some time without the server.
UNCACHED = "dir_cache=no,attr_timeout=0,entry_timeout=0"
LARGE = 3_000_000  # bytes
# After this time, in seconds, a call counts as hanging.
TIMEOUT = 1.0


@dataclass
class Remote:
    """A directory that an SSH server serves, and where sshfs shows it.

    Attributes:
        directory: what the server serves.
        sshd_pid: the process id of its sshd.
    """

    directory: Path
    state: Path
    port: int
    sshd_pid: int
    mounted: list[Path]

    def mount(self, mountpoint: Path) -> None:
        self.mounted.append(mountpoint)
        options = f"port={self.port},IdentityFile={self.state}/user,UserKnownHostsFile={self.state}/known,{UNCACHED}"
        login = f"{getpass.getuser()}@127.0.0.1:{self.directory}"
        subprocess.run(
            ["sshfs", "-F", "/dev/null", "-o", f"{options},IdentitiesOnly=yes,BatchMode=yes", login, str(mountpoint)],
            check=True,
            timeout=20,
        )

    def processes(self) -> list[int]:
        """The processes of the server, including those that serve files."""
        found, fresh = [], [self.sshd_pid]
        while fresh:
            found += fresh
            fresh = [int(child) for pid in fresh for child in children(pid)]
        return found

    def hang(self) -> None:
        """Stop the server. As with a broken network, the connections stay, but nothing answers."""
        for pid in self.processes():
            os.kill(pid, signal.SIGSTOP)

    def come_back(self) -> None:
        for pid in reversed(self.processes()):
            os.kill(pid, signal.SIGCONT)


def children(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []


def make_key(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True, timeout=20)
    return path.with_suffix(".pub").read_text()


@pytest.fixture
def remote() -> Iterator[Remote]:
    state = reachable_directory("llloop-network-")
    process: subprocess.Popen[bytes] | None = None
    try:
        host_key = make_key(state / "host")
        (state / "authorized").write_text(make_key(state / "user"))
        port = free_port()
        (state / "known").write_text(f"[127.0.0.1]:{port} {host_key}")
        (state / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1:{port}\nHostKey {state}/host\nAuthorizedKeysFile {state}/authorized\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\nStrictModes no\nPidFile none\n"
            "PermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\n"
        )
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # the server requires it, and it is only created at boot
        with (state / "sshd.log").open("wb") as log:
            process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(state / "sshd_config")], stderr=log)
        assert wait_until(lambda: accepts(port)), (state / "sshd.log").read_text()
        (state / "exported").mkdir()
        served = Remote(state / "exported", state, port, process.pid, [])
        try:
            yield served
        finally:
            served.come_back()
            for mountpoint in served.mounted:
                abort_connection(str(mountpoint))
                unmount_lazily(str(mountpoint))
    finally:
        if process is not None:
            for pid in reversed(served.processes() if accepts(port) else [process.pid]):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(30)
        remove_tree(state)


@pytest.fixture
def far(remote: Remote) -> Iterator[Path]:
    """An empty directory of the SSH server, as sshfs shows it."""
    mountpoint = remote.state / "far"
    mountpoint.mkdir()
    remote.mount(mountpoint)
    yield mountpoint


def ready_line(server: Server) -> str:
    return server.output.read_text()


class BackgroundCall:
    """A call in its own thread, because it may never return."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.result: object = None
        self.error: OSError | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], object]) -> None:
        try:
            self.result = call()
        except OSError as error:
            self.error = error

    def over(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()


def llloop(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llloop", *arguments], capture_output=True, text=True, timeout=20, check=False
    )


def test_changes_in_the_mount_reach_the_server(remote: Remote, far: Path, serve: Serve) -> None:
    server = serve("--workers", "2", source=far)
    assert "metadata through workers" in ready_line(server)
    mnt, there = server.mountpoint, remote.directory

    data = pattern(LARGE)
    (mnt / "large").write_bytes(data)
    assert (there / "large").read_bytes() == data
    assert filecmp.cmp(there / "large", mnt / "large", shallow=False)

    (mnt / "directory").mkdir()
    for number in range(150):
        (mnt / "directory" / f"{number}").write_bytes(pattern(number, number))
    assert sorted(os.listdir(mnt / "directory"), key=int) == [f"{number}" for number in range(150)]
    assert {entry.name: entry.stat().st_size for entry in os.scandir(mnt / "directory")} == {
        f"{number}": number for number in range(150)
    }

    (mnt / "directory" / "7").rename(mnt / "seven")
    assert (there / "seven").read_bytes() == pattern(7, 7)
    assert not (there / "directory" / "7").exists()
    (mnt / "link").symlink_to("seven")
    assert (mnt / "link").read_bytes() == pattern(7, 7)
    (mnt / "seven").chmod(0o640)
    os.truncate(mnt / "seven", 3)
    assert (there / "seven").stat().st_mode & 0o777 == 0o640
    assert (there / "seven").stat().st_size == 3

    with pytest.raises(FileNotFoundError):
        (mnt / "directory" / "7").stat()
    with pytest.raises(FileExistsError):
        (mnt / "directory").mkdir()
    with pytest.raises(OSError, match="directory") as refused:
        (mnt / "directory").rmdir()
    # The protocol does not support this.
    assert refused.value.errno in (errno.ENOTEMPTY, errno.EPERM, errno.EIO)
    with (mnt / "open").open("w+b") as file:
        file.write(b"still there")
        file.flush()
        (mnt / "open").unlink()
        assert not (mnt / "open").exists()
        assert file.seek(0) == 0
        assert file.read() == b"still there"
    shutil.rmtree(mnt / "directory")
    assert not (there / "directory").exists()
    assert os.statvfs(mnt).f_blocks == os.statvfs(there).f_blocks


def split(local: Path, remote: Remote) -> Path:
    """Make *local* a source that is local except for one directory."""
    far = local / "far"
    far.mkdir()
    remote.mount(far)
    (remote.directory / "file").write_bytes(pattern(LARGE))
    for number in range(32):
        (local / f"near{number}").mkdir()
        (local / f"near{number}" / "file").write_bytes(b"near")
    return far


def use(directory: Path) -> bool:
    """Make each kind of call that the front serves, in one directory."""
    path = directory / "new"
    path.write_bytes(b"new")
    path.rename(directory / "renamed")
    (directory / "renamed").unlink()
    return (directory / "file").read_bytes() == b"near" and os.listdir(directory) == ["file"]


def test_hanging_directory_does_not_block_others(remote: Remote, serve: Serve) -> None:
    source = remote.state / "source"
    source.mkdir()
    split(source, remote)
    server = serve("--workers", "8", "--metadata", "workers", "--cache", "never", source=source)
    mnt = server.mountpoint
    assert (mnt / "far" / "file").stat().st_size == LARGE
    assert all(use(mnt / f"near{number}") for number in range(32))

    remote.hang()
    try:
        stuck = BackgroundCall(lambda: os.listdir(mnt / "far"))
        assert not stuck.over(TIMEOUT)
        # One worker of eight hangs. The requests for its share of the inodes wait.
        calls = [BackgroundCall(partial(use, mnt / f"near{number}")) for number in range(32)]
        deadline = time.monotonic() + 5 * TIMEOUT
        done = [call.over(max(0.0, deadline - time.monotonic())) for call in calls]
        assert done.count(True) >= 4, "the front hangs"
        assert [call.result for call, over in zip(calls, done, strict=True) if over] == [True] * sum(done)

        shown = llloop("status", str(mnt))
        assert shown.returncode == 0, shown.stderr
        assert "serving" in shown.stdout
        assert not stuck.over(0)
    finally:
        remote.come_back()
    assert stuck.over(20)
    assert stuck.error is None
    assert stuck.result == ["file"]
    assert all(call.over(20) and call.result is True for call in calls)
    assert (mnt / "far" / "file").read_bytes() == pattern(LARGE)


def four_readers(server: Server) -> list[BackgroundCall]:
    """Read a file that hangs, four times."""
    calls = [BackgroundCall((server.mountpoint / "file").read_bytes) for _ in range(4)]
    assert not calls[0].over(TIMEOUT)
    return calls


def test_worker_replaced_during_a_probe_blocks_nobody(remote: Remote, far: Path, serve: Serve) -> None:
    (remote.directory / "file").write_bytes(b"data")
    server = serve("--workers", "2", "--cache", "never", source=far)
    server.expect_log("llloop-worker-. was killed by signal 9; a new process takes over")
    remote.hang()
    try:
        stuck = four_readers(server)
        for title, pid in titles(server).items():
            if "worker" in title:
                os.kill(pid, signal.SIGKILL)
    finally:
        remote.come_back()
    assert all(call.over(20) and call.result == b"data" for call in stuck)


def test_requests_are_resent_to_a_replaced_front(remote: Remote, far: Path, serve: Serve) -> None:
    (remote.directory / "file").write_bytes(b"data")
    server = serve("--workers", "2", "--cache", "never", source=far)
    if "has_resend" not in ready_line(server):
        pytest.skip("this kernel does not send requests again")
    server.expect_log("llloop-front was killed by signal 9; a new process takes over")
    remote.hang()
    try:
        stuck = four_readers(server)
        os.kill(titles(server)["llloop-front"], signal.SIGKILL)
        assert not stuck[0].over(TIMEOUT)
    finally:
        remote.come_back()
    assert all(call.over(20) and call.result == b"data" for call in stuck)


def test_mount_of_a_hanging_server_can_be_detached(remote: Remote, far: Path, serve: Serve) -> None:
    (remote.directory / "file").write_bytes(b"data")
    server = serve("--workers", "2", "--cache", "never", source=far)
    remote.hang()
    try:
        stuck = BackgroundCall(lambda: os.listdir(server.mountpoint))
        assert not stuck.over(TIMEOUT)
        detached = llloop("umount", "--lazy", str(server.mountpoint))
        assert detached.returncode == 0, detached.stderr
        assert not server.mounted()
    finally:
        remote.come_back()
    # Programs in it continue, and the mount ends after the last one has left.
    assert stuck.over(20)
    assert stuck.result == ["file"]
    assert server.process is not None
    assert server.process.wait(20) == 0


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_mount_of_a_hanging_server_can_be_stopped(remote: Remote, far: Path, serve: Serve) -> None:
    (remote.directory / "file").write_bytes(b"data")
    server = serve("--workers", "2", "--cache", "never", source=far)
    server.expect_log("busy: detaching it lazily", required=False)
    server.expect_log("is busy, detaching it lazily", required=False)
    server.expect_log("is still in use after")
    server.expect_log("llloop-worker-. waits for the source and ends only when")
    remote.hang()
    try:
        stuck = BackgroundCall(lambda: os.listdir(server.mountpoint))
        assert not stuck.over(TIMEOUT)
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(45) == 0
        assert not server.mounted()
    finally:
        remote.come_back()
    # A worker that waits for an answer ends only when the answer comes. Then the connection to the kernel ends, too.
    assert stuck.over(20)
    assert stuck.error is not None
    assert stuck.error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert wait_until(lambda: not server.processes())
