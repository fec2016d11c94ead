"""The claims of the security page about llloop's processes and other users."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from llloop.linux import syscalls
from llloop.linux.credentials import FRONT_CAPABILITIES, WORKER_CAPABILITIES
from tests.as_user import Caller, run_as
from tests.conftest import Serve
from tests.expect import fails, outcome
from tests.server import Server, Tree
from tests.server_processes import titles

pytestmark = [pytest.mark.mounted, pytest.mark.user]

STRANGER = Caller(4001, 4001)
REFUSED = {"EACCES", "EPERM"}


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


def do_everything(tree: Tree) -> None:
    """Acting for others changes what a process may do, for a moment; afterwards it has to be as before."""

    def act() -> None:
        (tree.mnt / "directory").mkdir()
        (tree.mnt / "file").write_bytes(bytes(300_000))
        os.chmod(tree.mnt / "file", 0o4755)
        os.truncate(tree.mnt / "file", 5)

    tree.src.chmod(0o777)
    if os.geteuid() == 0:
        run_as(STRANGER, act)
    else:
        act()


def test_processes_keep_only_needed_privileges(tree: Tree) -> None:
    do_everything(tree)
    own = int(status_of(os.getpid())["CapPrm"], 16)
    for title, pid in titles(tree.server).items():
        status = status_of(pid)
        if title in ("llloop-supervisor", "llloop-keeper"):
            assert int(status["CapPrm"], 16) == own
            assert status["NoNewPrivs"] == "0", "an ordinary user's could not execute fusermount"
            continue
        kept = own & {"llloop-front": FRONT_CAPABILITIES, "llloop-invalidator": 0}.get(title, WORKER_CAPABILITIES)
        assert int(status["CapPrm"], 16) == kept, title
        # The server drops and regains CAP_FSETID, depending on the request.
        assert int(status["CapEff"], 16) | (kept & 1 << syscalls.CAP_FSETID) == kept, title
        assert int(status["CapInh"], 16) & ~kept == int(status["CapAmb"], 16) == 0, title
        if os.geteuid() == 0:
            assert int(status["CapBnd"], 16) & ~kept == 0, title
        assert status["NoNewPrivs"] == "1", title
        assert status["Uid"].split()[0] == str(os.geteuid())


def seize(pid: int) -> int:
    """Duplicate a descriptor of another process, as a worker does."""
    pidfd = os.pidfd_open(pid)
    try:
        return syscalls.pidfd_getfd(pidfd, 0)
    finally:
        os.close(pidfd)


def open_for(name: str, flags: int) -> Callable[[int], int]:
    return lambda pid: os.open(f"/proc/{pid}/{name}", flags)


@pytest.mark.root
@pytest.mark.parametrize("moment", ["at first", "after it has acted for this very user"])
def test_other_users_cannot_access_the_processes(tree: Tree, moment: str) -> None:
    intents: list[Callable[[int], object]] = [
        lambda pid: os.kill(pid, signal.SIGTERM),
        lambda pid: os.listdir(f"/proc/{pid}/fd"),
        lambda pid: os.readlink(f"/proc/{pid}/cwd"),
        lambda pid: Path(f"/proc/{pid}/environ").read_bytes(),
        open_for("mem", os.O_RDWR),
        open_for("fd/0", os.O_RDONLY),
        seize,
    ]

    def intent(pids: list[int]) -> list[object]:
        return [outcome(one, pid) for pid in pids for one in intents]

    if moment != "at first":
        do_everything(tree)
    results = run_as(STRANGER, intent, list(titles(tree.server).values()))
    assert set(results) <= REFUSED, results


def test_symlink_out_of_the_source_is_followed_as_the_caller(tree: Tree) -> None:
    secret = tree.server.state / "secret"
    secret.write_text("secret")
    secret.chmod(0o600)
    (tree.src / "link").symlink_to(secret)
    assert os.readlink(tree.mnt / "link") == str(secret)
    if os.geteuid() == 0:
        with fails(errno.EACCES):
            run_as(STRANGER, (tree.mnt / "link").read_text)
    with fails(errno.ELOOP):
        os.open(tree.mnt / "link", os.O_RDONLY | os.O_NOFOLLOW)


def test_parent_of_the_root_is_the_mount_points_parent(server: Server) -> None:
    above = os.stat(server.mountpoint / "..")
    assert os.path.samestat(above, os.stat(server.mountpoint.parent))
    assert not os.path.samestat(above, os.stat(server.source.parent))


def test_path_of_a_moved_directory_expires_with_the_entry_timeout(serve: Serve) -> None:
    server = serve("--entry-timeout", "0", "--workers", "1")
    (server.source / "directory").mkdir()
    (server.source / "directory" / "file").touch()
    os.stat(server.mountpoint / "directory" / "file")
    (server.source / "directory").rename(server.source.parent / "moved")
    with fails(errno.ENOENT):
        os.stat(server.mountpoint / "directory" / "file")
