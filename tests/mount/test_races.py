"""Names are swapped for what leads elsewhere while others use them: nothing else is read or changed.

The symlinks are relative: from SRC they lead to the canary, from the mount to nothing. So only the server itself
could reach it, by following one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llloop.linux import syscalls
from tests import expect
from tests.as_user import MYSELF, Caller, Child
from tests.conftest import Serve
from tests.server import Server, Tree

pytestmark = [pytest.mark.mounted, pytest.mark.user]

SECONDS = 2.5
INSIDE, OUTSIDE = b"inside" * 5, b"outside"
# The errors that a call may return while its names change.
EXPECTED = {
    *(errno.ENOENT, errno.ESTALE, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.EINVAL, errno.ENODATA, errno.EBUSY, errno.EPERM, errno.EOPNOTSUPP),
}
# The kernel keeps times and sends them later. If the file is missing by then, the next user of the file gets EIO.
LATE = {errno.EIO}


def set_up(server: Server) -> Path:
    """SRC/top with a directory and a file, and symlinks to take their places; returns the canary."""
    top = server.source / "top"
    (top / "directory").mkdir(parents=True)
    for place in (top / "file", top / "directory" / "file"):
        place.write_bytes(INSIDE)
    canary = server.source.parent / "canary"
    canary.mkdir()
    (canary / "file").write_bytes(OUTSIDE)
    for path in (canary / "file", canary):
        os.utime(path, ns=(10**18, 10**18 + 1))  # otherwise a read would change the access time (mount(8), relatime)
    (top / "to-directory").symlink_to("../../canary")
    (top / "to-file").symlink_to("../../canary/file")
    return canary


def state_of(canary: Path) -> list[object]:
    found: list[object] = []
    for path in (canary, canary / "file"):
        status = path.stat()
        found += [status.st_mode, status.st_size, status.st_nlink, status.st_uid, status.st_ino]
        found += [status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns, os.listxattr(path)]
    return found


def swap_behind(top: Path, until: float) -> int:
    """Each exchange is one step: there is no moment without a directory, or a symlink, of that name."""
    directory = os.open(top, os.O_RDONLY)
    count = 0
    while time.monotonic() < until:
        for name in (b"directory", b"file"):
            with contextlib.suppress(FileNotFoundError):  # the mount has renamed it meanwhile
                syscalls.renameat2(directory, name, directory, b"to-" + name, syscalls.RENAME_EXCHANGE)
                count += 1
        if count % 64 == 0:
            time.sleep(0.001)
    return count


def swap_through(top: Path, until: float) -> int:
    """The same through the mount, which has the last word on what is a directory there."""
    count = 0
    while time.monotonic() < until:
        for name in ("directory", "file"):
            try:
                os.rename(top / name, top / f"{name}-moved")
                os.rename(top / f"to-{name}", top / name)
                os.rename(top / name, top / f"to-{name}")
                os.rename(top / f"{name}-moved", top / name)
                count += 1
            except OSError as error:
                assert error.errno in EXPECTED, error
    return count


def read_file(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        content = file.read(1000)
        assert content is not None and OUTSIDE not in content
        assert not content.strip(b"\0") or INSIDE[:6] in content or b"written" in content, content


def write_file(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, b"written" * 10_000, 0)
    finally:
        os.close(fd)


def create(path: Path) -> None:
    os.close(os.open(path.with_name("created"), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    os.unlink(path.with_name("created"))


def make_directory(path: Path) -> None:
    os.mkdir(path.with_name("made"))
    os.rmdir(path.with_name("made"))


def link(path: Path) -> None:
    os.link(path, path.with_name("linked"), follow_symlinks=False)
    os.unlink(path.with_name("linked"))


def rename(path: Path) -> None:
    os.rename(path, path.with_name("renamed"))
    os.rename(path.with_name("renamed"), path)


def list_directory(path: Path) -> None:
    assert set(os.listdir(path.parent)) - {"file", "created", "made", "linked", "renamed"} == set()


ACTIONS: list[Callable[[Path], object]] = [
    read_file,
    write_file,
    create,
    make_directory,
    link,
    rename,
    os.lstat,
    lambda path: os.chmod(path, 0o640),
    lambda path: os.truncate(path, 40),
    lambda path: os.setxattr(path, "user.llloop", b"x"),
    lambda path: os.utime(path, ns=(5, 5)),
    lambda path: os.chown(path, os.getuid(), os.getgid()),
]


def use(top: Path, seed: int, until: float) -> tuple[int, int]:
    """Everything at random by both names; returns how often it went well and how often not."""
    choose = random.Random(seed)
    well = badly = 0
    while time.monotonic() < until:
        below = choose.random() < 0.7
        actions = [*ACTIONS, list_directory] if below else ACTIONS
        try:
            choose.choice(actions)(top / "directory" / "file" if below else top / "file")
            well += 1
        except OSError as error:
            assert error.errno in (EXPECTED | LATE if expect.collecting else EXPECTED), error
            badly += 1
    return well, badly


@pytest.mark.parametrize("cache", ["never", "auto"])
@pytest.mark.parametrize("side", ["behind", "through"])
def test_nothing_outside_the_source_is_reached(serve: Serve, cache: str, side: str) -> None:
    server = serve("--cache", cache, "--workers", "2")
    server.expect_log("ESTALE|Stale", required=False)
    canary = set_up(server)
    before = state_of(canary)
    until = time.monotonic() + SECONDS
    swapper = (swap_behind, server.source / "top") if side == "behind" else (swap_through, server.mountpoint / "top")
    swapping = Child(*swapper, until)
    using = [Child(use, server.mountpoint / "top", seed, until) for seed in range(3)]
    results = [child.result() for child in using]
    assert swapping.result() > 20
    assert state_of(canary) == before
    assert (canary / "file").read_bytes() == OUTSIDE
    assert sum(well for well, _ in results) > 20, results
    assert sorted(os.listdir(canary.parent)) == ["canary", "source"]


def test_directory_moved_out_of_the_source_is_not_found(serve: Serve) -> None:
    """A process that has it open can still use it; others do not find it."""
    server = serve("--cache", "never", "--workers", "1")
    (server.source / "directory" / "below").mkdir(parents=True)
    inside = os.open(server.mountpoint / "directory", os.O_RDONLY)
    try:
        os.stat(server.mountpoint / "directory" / "below")
        os.rename(server.source / "directory", server.source.parent / "moved")
        (server.source.parent / "moved" / "secret").write_text("secret")
        for path in ("directory", "directory/secret", "directory/below"):
            with pytest.raises(FileNotFoundError):
                os.stat(server.mountpoint / path)
    finally:
        os.close(inside)


USER = Caller(4001, 4001)
NAMED = ("file", "directory")
# An ACL that gives all rights to everybody, in the format of `system.posix_acl_access` (version; tag, permissions, id).
OPEN_ACL = struct.pack("<I" + "HHI" * 3, 2, 1, 7, 0xFFFFFFFF, 4, 7, 0xFFFFFFFF, 0x20, 7, 0xFFFFFFFF)


def set_up_hostile(server: Server) -> Path:
    """A sticky directory with a file and a directory of USER's, and what takes their places; returns the canary.

    It is root's, and USER may do nothing to it: a file, a directory, symlinks out of SRC, a fifo and a device.
    """
    canary = set_up(server)
    top = server.source / "top"
    for path in (top / "directory" / "file", top / "directory", top / "file"):
        os.chown(path, USER.uid or 0, USER.gid or 0)
    top.chmod(0o1777)
    (top / "root-file").write_bytes(OUTSIDE)
    (top / "root-directory").mkdir()
    (top / "root-directory" / "file").write_bytes(OUTSIDE)
    os.mkfifo(top / "root-fifo")
    os.mknod(top / "root-device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    for path in (top / "root-file", top / "root-directory" / "file", top / "root-fifo"):
        path.chmod(0o600)
    (top / "root-directory").chmod(0o700)
    for path in (top / "root-directory" / "file", top / "root-directory", top / "root-file"):
        os.utime(path, ns=(10**18, 10**18 + 1))
    return canary


def what_can_be_seen_of(path: Path) -> list[object]:
    """All but the time of the last change of its inode, which a change of its name sets."""
    status = path.lstat()
    acls = os.listxattr(path, follow_symlinks=False)
    content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    return [status.st_mode, status.st_size, status.st_uid, status.st_gid, status.st_nlink, status.st_mtime_ns,
            acls, content]  # fmt: skip


def swap_for_hostile_ones(top: Path, seed: int, until: float) -> int:
    """Exchange the user's names for root's, and back."""
    choose = random.Random(seed)
    directory = os.open(top, os.O_RDONLY)
    hostile = [name for name in os.listdir(directory) if name.startswith(("root-", "to-"))]
    count = 0
    while time.monotonic() < until:
        names = [os.fsencode(name) for name in (choose.choice(NAMED), choose.choice(hostile))]
        for _ in range(2):
            with contextlib.suppress(OSError):
                syscalls.renameat2(directory, names[0], directory, names[1], syscalls.RENAME_EXCHANGE)
                count += 1
            time.sleep(choose.random() * 0.004)
    return count


def overwrite(path: Path, flags: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | flags, 0o666)
    try:
        os.pwrite(fd, b"hostile", 0)
        os.fchmod(fd, 0o666)
    finally:
        os.close(fd)


def take_name(path: Path) -> None:
    """Make a link and remove it. Afterwards the name is as before."""
    os.link(path, path.with_name(f"linked-{os.getpid()}"), follow_symlinks=False)
    os.unlink(path.with_name(f"linked-{os.getpid()}"))


def replace(path: Path) -> None:
    """Remove a name, or rename another over it; in a sticky directory only of what is one's own."""
    other = path.with_name(f"other-{os.getpid()}")
    other.write_bytes(INSIDE)
    os.rename(other, path)


HOSTILE: list[Callable[[Path], object]] = [
    overwrite,
    lambda path: overwrite(path, os.O_TRUNC),
    lambda path: overwrite(path, os.O_CREAT),
    lambda path: overwrite(path, os.O_CREAT | os.O_TRUNC),
    lambda path: os.truncate(path, 3),
    lambda path: os.chmod(path, 0o666),
    lambda path: os.chown(path, -1, USER.gid or -1),
    lambda path: os.utime(path, ns=(5, 5)),
    lambda path: os.setxattr(path, "user.llloop", b"x"),
    lambda path: os.setxattr(path, "system.posix_acl_access", OPEN_ACL),
    lambda path: os.removexattr(path, "system.posix_acl_access"),
    take_name,
    replace,
]


def attack(top: Path, seed: int, until: float) -> int:
    """Change by path what is one's own; what is not follows from the names that somebody exchanges."""
    choose = random.Random(seed)
    count = 0
    while time.monotonic() < until:
        path = choose.choice((top / "file", top / "directory", top / "directory" / "file"))
        with contextlib.suppress(OSError):
            choose.choice(HOSTILE)(path)
            count += 1
    return count


@pytest.mark.root
@pytest.mark.parametrize("attacker", ["a user", "root"])
# llfuse lacks RENAME_EXCHANGE, which swaps names through the mount.
@pytest.mark.parametrize("side", ["behind", pytest.param("through", marks=pytest.mark.own_loop)])
def test_only_the_named_file_is_changed(serve: Serve, side: str, attacker: str) -> None:
    """With root's permissions, root's files in the source may change, but nothing outside of it."""
    server = serve("--workers", "2", "--entry-timeout", "0.01", "--attr-timeout", "0.01")
    server.expect_log("ESTALE|Stale|could not be written and is lost", required=False)
    canary = set_up_hostile(server)
    top = server.source / "top"
    roots = [*top.glob("root-*"), top / "root-directory" / "file", *top.glob("to-*")]
    before = state_of(canary)
    seen = {path.name: what_can_be_seen_of(path) for path in roots}
    until = time.monotonic() + SECONDS
    swapping = Child(swap_for_hostile_ones, top if side == "behind" else server.mountpoint / "top", 1, until)
    caller = USER if attacker == "a user" else MYSELF
    attacking = [Child(attack, server.mountpoint / "top", seed, until, caller=caller) for seed in range(3)]
    done = [child.result() for child in attacking]
    assert swapping.result() > 20
    assert sum(done) > 20, done
    assert state_of(canary) == before
    assert (canary / "file").read_bytes() == OUTSIDE
    assert sorted(os.listdir(canary.parent)) == ["canary", "source"]
    if attacker == "a user":
        assert {path.name: what_can_be_seen_of(path) for path in roots} == seen


OPENING: dict[str, tuple[int, Callable[[Path], object]]] = {
    "open for reading": (os.O_WRONLY, lambda path: os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))),
    "open for writing": (os.O_RDONLY, lambda path: os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))),
    "truncate": (os.O_RDONLY, lambda path: os.truncate(path, 0)),
}


@pytest.mark.parametrize("how", OPENING)
def test_fifo_that_replaces_a_file_is_not_opened(tree: Tree, how: str) -> None:
    """A process at its other end would notice an open; opening a device can have effects."""
    awaited, act = OPENING[how]
    (tree.src / "file").write_bytes(INSIDE)
    os.mkfifo(tree.src / "fifo")
    waiting = Child(os.open, tree.src / "fifo", awaited)
    deadline = time.monotonic() + 30
    while b"partner" not in Path(f"/proc/{waiting.pid}/wchan").read_bytes() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.stat(tree.mnt / "file")
    os.rename(tree.src / "fifo", tree.src / "file")
    try:
        with contextlib.suppress(OSError):
            act(tree.mnt / "file")
        time.sleep(0.1)
        assert not waiting.is_done()
    finally:
        os.close(os.open(tree.src / "file", os.O_RDWR))
        waiting.result()
