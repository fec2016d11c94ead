"""Sandboxes and user namespaces: a mount bound into a sandbox, and a server inside."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.as_user import Caller, Child
from tests.conftest import Serve
from tests.mount.command_line import environment, in_other_mounts, wait_until
from tests.server import Server, Tree, reachable_directory, remove_tree
from tests.syscalls import unshare_user
from tests.twins import Twins, demand_equal, outcomes
from tests.watchdog import kill_session

T = TypeVar("T")

LLLOOP = f"{sys.executable} -m llloop"
SERVE = f"{LLLOOP} serve --daemon --workers 1 --log-level warning src mnt"
SECONDS = 30.0
pytestmark = pytest.mark.mounted


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(
        list(map(str, command)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        kill_session(process.pid)
        process.wait()
    return subprocess.CompletedProcess(command, process.returncode, output)


def in_sandbox(server: Server, how: str, script: str) -> subprocess.CompletedProcess[str]:
    """Runs a script that sees /usr and, as /data, the mirror, bound with that option of bwrap(1)."""
    bwrap = shutil.which("bwrap")
    assert bwrap, "bwrap is missing; scripts/setup --test installs bubblewrap"
    links = [part for name in ("bin", "lib", "lib64") for part in ("--symlink", f"usr/{name}", f"/{name}")]
    places = ["--ro-bind", "/usr", "/usr", *links, "--dev", "/dev", how, str(server.mountpoint), "/data"]
    return run(bwrap, "--unshare-all", *places, "bash", "-c", script)


def test_sandbox_reads_and_writes_the_mount(serve: Serve) -> None:
    server = serve()
    (server.source / "file").write_text("from outside\n")
    done = in_sandbox(server, "--bind", "cat /data/file && echo from inside >/data/new && ls /data")
    assert (done.returncode, done.stdout) == (0, "from outside\nfile\nnew\n")
    assert (server.source / "new").read_text() == "from inside\n"
    assert (server.source / "new").stat().st_uid == os.getuid()


def test_sandbox_cannot_write_a_read_only_bind(serve: Serve) -> None:
    server = serve()
    (server.source / "file").write_text("from outside\n")
    done = in_sandbox(server, "--ro-bind", "cat /data/file; echo from inside >/data/file")
    assert done.stdout.startswith("from outside\n")
    assert "Read-only file system" in done.stdout
    assert (server.source / "file").read_text() == "from outside\n"


@pytest.fixture
def place() -> Iterator[Path]:
    directory = reachable_directory("llloop-containers-")
    (directory / "src").mkdir()
    (directory / "mnt").mkdir()
    yield directory
    remove_tree(directory)


def test_user_serves_as_root_of_a_user_namespace(place: Path) -> None:
    (place / "src" / "file").write_text("mirrored\n")
    script = f"cd {place}; {SERVE} && cat mnt/file && echo new >mnt/new && stat -c %u mnt/new && {LLLOOP} umount mnt"
    apart = in_other_mounts() if os.geteuid() == 0 else []
    done = run(*apart, "unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script)
    assert (done.returncode, done.stdout) == (0, "mirrored\n0\n")
    assert (place / "src" / "new").stat().st_uid == os.getuid()
    assert os.listdir(place / "mnt") == []


@pytest.mark.root
def test_users_serve_in_separate_user_namespaces(place: Path) -> None:
    """All of them have user id 0 there, and share /tmp."""
    users = (4001, 4002)
    for user in users:
        for name in (f"{user}", f"{user}/src", f"{user}/mnt"):
            (place / name).mkdir()
            os.chown(place / name, user, user)
    (place / "script").write_text(
        f'cd "$1"; {SERVE} --log-file log && touch ready && read go; '
        f"{LLLOOP} status mnt | head -1; {LLLOOP} umount mnt; cat log"
    )
    (place / "script").chmod(0o755)
    os.mknod(place / "fuse", stat.S_IFCHR | 0o666, os.makedev(10, 229))
    (place / "fuse").chmod(0o666)  # on machines where /dev/fuse is not open to everybody
    running = [
        subprocess.Popen(
            [
                *in_other_mounts(f"mount --bind {place}/fuse /dev/fuse", user),
                *("unshare", "--user", "--map-root-user", "--mount", "bash", f"{place}/script", f"{place}/{user}"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment({"HOME": "/tmp", "XDG_RUNTIME_DIR": ""}),
            start_new_session=True,
        )
        for user in users
    ]
    try:
        wait_until(lambda: all((place / f"{user}" / "ready").exists() for user in users), "both serve")
        for process in running:
            output, _ = process.communicate("go\n", timeout=SECONDS)
            assert "serving" in output.splitlines()[0], output
            assert "control socket" not in output
    finally:
        for process in running:
            kill_session(process.pid)
            process.wait()
        for path in Path("/tmp").glob("llloop-0*"):
            if path.stat().st_uid in users:
                remove_tree(path)


@pytest.mark.root
def test_files_belong_to_each_user_of_a_user_namespace(place: Path) -> None:
    """Root of the namespace has its capabilities only there, but can create files for all mapped users."""
    (place / "src").chmod(0o777)
    inside = (
        f"cd {place}; {SERVE} && "
        "setpriv --reuid 1000 --regid 1000 --clear-groups touch mnt/of-1000 && touch mnt/of-root && "
        f"stat -c %u mnt/of-1000 mnt/of-root && {LLLOOP} umount mnt"
    )
    process = subprocess.Popen(
        [
            *in_other_mounts(),
            *("unshare", "--user", "--mount", "bash", "-c"),
            'read; exec setpriv --reuid 0 --regid 0 --clear-groups bash -c "$0"',
            inside,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        own = os.readlink("/proc/self/ns/user")
        wait_until(lambda: os.readlink(f"/proc/{process.pid}/ns/user") != own, "the namespace is made")
        for kind in ("uid_map", "gid_map"):
            Path(f"/proc/{process.pid}/{kind}").write_text("0 0 65536")
        output, _ = process.communicate("go\n", timeout=SECONDS)
    finally:
        kill_session(process.pid)
        process.wait()
    assert (process.returncode, output) == (0, "1000\n0\n")
    assert (place / "src" / "of-1000").stat().st_uid == 1000
    assert (place / "src" / "of-root").stat().st_uid == 0


def as_root_of_namespace(first: int, action: Callable[..., T], *args: Any) -> T:
    """Runs a function as root of a user namespace whose ids begin at *first* outside of it."""
    (ready, is_ready), (go_on, may_go_on) = os.pipe(), os.pipe()

    def inside() -> T:
        unshare_user()
        os.write(is_ready, b"x")
        os.read(go_on, 1)
        Caller(0, 0).become()
        return action(*args)

    child = Child(inside)
    try:
        os.read(ready, 1)
        for kind in ("uid_map", "gid_map"):
            Path(f"/proc/{child.pid}/{kind}").write_text(f"0 {first} 65536")
        os.write(may_go_on, b"x")
        return child.result()
    finally:
        for fd in (ready, is_ready, go_on, may_go_on):
            os.close(fd)


NAMESPACES = (100_000, 200_000)


@pytest.mark.root
def test_two_user_namespaces_use_one_mount(tree: Tree) -> None:
    """Root of each may do everything to the files of its own users, and nothing to others'."""

    def prepare(directory: Path) -> None:
        directory.chmod(0o1777)
        for first in NAMESPACES:
            home = directory / f"{first}"
            home.mkdir()
            (home / "of nobody").write_text("x")
            for path in (home, *(directory / f"{first}-{what}" for what in ("link", "rename", "unlink", "change"))):
                path.mkdir(exist_ok=True) if path == home else path.write_text("x")
                path.chmod(0o755 if path == home else 0o600)
                os.chown(path, first + 5, first + 7)

    def act(directory: Path, first: int) -> dict[str, Any]:
        home, own = directory / f"{first}", f"{directory}/{first}-"
        return outcomes(
            {
                "link": lambda: os.link(f"{own}link", directory / f"{first}-linked"),
                "rename": lambda: os.rename(f"{own}rename", directory / f"{first}-renamed"),
                "unlink": lambda: os.unlink(f"{own}unlink"),
                "chmod": lambda: os.chmod(f"{own}change", 0o2775),
                "chown": lambda: os.chown(f"{own}change", 6, 8),
                "chown to nobody": lambda: os.chown(f"{own}change", 65_536, -1),
                "unlink of nobody's": lambda: os.unlink(home / "of nobody"),
                "create": lambda: os.close(os.open(home / "new", os.O_CREAT, 0o600)),
            }
        )

    twins = Twins.of(tree)
    twins.prepare(prepare)
    for own in NAMESPACES:
        for first in (*(other for other in NAMESPACES if other != own), own):
            found = [as_root_of_namespace(own, act, side, first) for side in (twins.native, twins.mounted)]
            demand_equal(found[1], found[0], f"another outcome for {first}'s files in the namespace of {own}")
            twins.compare()
            assert (found[0]["unlink"] is None) == (first == own)
