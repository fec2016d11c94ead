"""Mapped users and groups: what belongs to one user in SRC belongs to another in MNT, and nobody gets more rights."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llloop
from tests.as_user import Caller, Child, run_as
from tests.conftest import Serve
from tests.expect import fails, outcome
from tests.mount.command_line import llloop as run_llloop
from tests.server import Server, reachable_directory
from tests.server_processes import is_replaced, process_ids
from tests.syscalls import link_descriptor, opened
from tests.watchdog import mount_entry

pytestmark = [pytest.mark.root, pytest.mark.mounted, pytest.mark.own_loop]

# The users 4001 to 4010 of SRC are the users 7001 to 7010 of MNT; the same for groups.
MAPS = ("--map-users=4001:7001:10", "--map-groups=4001:7001:10")
INSIDE = Caller(4001, 4001)
OWNER = Caller(7001, 7001)
FRIEND = Caller(7002, 7002, groups=(7005,))
UNMAPPED = Caller(4001, 4001)  # a user of SRC who has no place in MNT
NOBODY = 65534
TEAM = 4005  # 7005 in MNT
# Attributes in the kernel's cache are as old as these tests; nothing but llloop's own check can refuse.
STALE = ("--attr-timeout=1000", "--entry-timeout=1000")


def make(path: Path, mode: int, uid: int = 4001, gid: int = 4001) -> Path:
    """A file in SRC, or a directory if the name ends with "directory"."""
    if path.name.endswith("directory"):
        path.mkdir()
    else:
        path.write_bytes(b"content")
    os.chown(path, uid, gid)
    path.chmod(mode)
    return path


def owner(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid


@pytest.fixture
def mapped(serve: Serve) -> Iterator[Server]:
    server = serve(*MAPS)
    os.chown(server.source, 4001, 4001)
    server.source.chmod(0o777)
    yield server


def test_owners_are_mapped_both_ways(mapped: Server) -> None:
    mnt, src = mapped.mountpoint, mapped.source
    make(src / "file", 0o600)
    assert owner(mnt / "file") == (7001, 7001)
    assert run_as(OWNER, (mnt / "file").read_bytes) == b"content"

    def create() -> None:
        (mnt / "new").write_bytes(b"x")
        (mnt / "directory").mkdir()
        (mnt / "symlink").symlink_to("new")
        os.mkfifo(mnt / "fifo")
        os.link(mnt / "new", mnt / "link")
        fd = os.open(mnt, os.O_TMPFILE | os.O_RDWR)
        link_descriptor(fd, mnt / "unnamed")
        os.rename(mnt / "new", mnt / "directory/renamed")

    run_as(FRIEND, create)
    for name in ("directory", "symlink", "fifo", "link", "unnamed", "directory/renamed"):
        assert owner(src / name) == (4002, 4002), name
        assert owner(mnt / name) == (7002, 7002), name
    assert {entry.name: entry.stat(follow_symlinks=False).st_uid for entry in os.scandir(mnt)}["fifo"] == 7002

    os.chown(mnt / "link", 7003, 7005)
    assert owner(src / "link") == (4003, TEAM)


def test_changes_of_the_owner(mapped: Server) -> None:
    mnt, src = mapped.mountpoint, mapped.source
    make(src / "file", 0o600)
    path = mnt / "file"

    def change() -> None:
        path.write_bytes(b"longer content")
        os.truncate(path, 3)
        os.chmod(path, 0o640)
        os.utime(path, (1, 2))
        os.setxattr(path, "user.name", b"value")
        with opened(path, os.O_RDWR) as fd:
            os.pwrite(fd, b"CON", 0)
            os.fchmod(fd, 0o660)
            os.posix_fallocate(fd, 0, 100)

    run_as(OWNER, change)
    found = (src / "file").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_size, found.st_uid) == (0o660, 100, 4001)
    assert (src / "file").read_bytes()[:3] == b"CON"
    run_as(OWNER, os.unlink, path)
    assert not (src / "file").exists()


def test_groups_are_mapped(mapped: Server) -> None:
    mnt, src = mapped.mountpoint, mapped.source
    make(src / "file", 0o660, 4001, TEAM)
    make(src / "team-directory", 0o2770, 4001, TEAM)
    run_as(FRIEND, (mnt / "file").write_bytes, b"of a member")
    run_as(FRIEND, (mnt / "team-directory/new").write_bytes, b"x")
    assert owner(src / "team-directory/new") == (4002, TEAM)
    run_as(FRIEND, os.unlink, mnt / "team-directory/new")
    stranger = Caller(7002, 7002, groups=(TEAM,))  # the group's id in SRC counts for nothing in MNT
    with fails(errno.EACCES):
        run_as(stranger, (mnt / "file").read_bytes)


def test_acls_are_mapped(mapped: Server) -> None:
    mnt, src = mapped.mountpoint, mapped.source
    make(src / "file", 0o600)
    run_as(OWNER, subprocess.run, ["setfacl", "-m", "u:7002:r,g:7005:rw", str(mnt / "file")])
    listed = subprocess.run(["getfacl", "-cn", src / "file"], capture_output=True, text=True, check=True).stdout
    assert "user:4002:r--" in listed
    assert f"group:{TEAM}:rw-" in listed
    assert run_as(FRIEND, (mnt / "file").read_bytes) == b"content"
    with fails(errno.EACCES):
        run_as(Caller(7003, 7003), (mnt / "file").read_bytes)


def test_users_that_are_not_mapped(mapped: Server) -> None:
    mnt, src = mapped.mountpoint, mapped.source
    make(src / "public", 0o666)
    make(src / "foreign", 0o666, 0, 0)
    make(src / "foreign-directory", 0o777, 0, 0)
    assert owner(mnt / "foreign") == (NOBODY, NOBODY)
    for caller in (UNMAPPED, Caller(0, 0)):
        for action in (os.mkfifo, os.mkdir, Path.touch):
            with fails(errno.EOVERFLOW):
                run_as(caller, action, mnt / "new")
        with fails(errno.EOVERFLOW):
            run_as(caller, os.open, mnt, os.O_TMPFILE | os.O_RDWR)
        with fails(errno.EACCES):
            run_as(caller, (mnt / "foreign").write_bytes, b"x")  # nobody could be its owner
    with fails(errno.EPERM):
        run_as(UNMAPPED, os.chmod, mnt / "public", 0o600)
    with fails(errno.EOVERFLOW):
        os.chown(mnt / "public", 0, 0)
    run_as(UNMAPPED, (mnt / "public").write_bytes, b"written")
    assert (src / "public").read_bytes() == b"written"


def test_root_administrates_what_is_mapped(mapped: Server) -> None:
    mnt, src = mapped.mountpoint, mapped.source
    make(src / "directory", 0o700)
    make(src / "directory/file", 0o600)
    assert (mnt / "directory/file").read_bytes() == b"content"
    (mnt / "directory/file").write_bytes(b"changed")
    os.chmod(mnt / "directory/file", 0o604)
    os.setxattr(mnt / "directory/file", "trusted.name", b"value")
    assert os.listxattr(mnt / "directory/file") == ["trusted.name"]
    assert run_as(OWNER, os.listxattr, mnt / "directory/file") == []
    os.unlink(mnt / "directory/file")
    os.rmdir(mnt / "directory")
    assert os.listdir(src) == []


def test_only_users_are_mapped(serve: Serve) -> None:
    server = serve("--map-users=4001:7001:1")
    make(server.source / "file", 0o600, 4001, 4005)
    assert owner(server.mountpoint / "file") == (7001, 4005)


class Holding:
    """A user who has opened `path` and acts when told, on a path and through the descriptor."""

    def __init__(self, path: Path, flags: int, act: Callable[[int, Path], Any], caller: Caller) -> None:
        waiting, self._go = os.pipe()
        prepared, ready = os.pipe()

        def run() -> Any:
            os.close(self._go)
            fd = os.open(path, flags)
            os.write(ready, b"!")
            os.read(waiting, 1)
            return outcome(act, fd, path)

        self._child = Child(run, caller=caller)
        os.close(ready)
        os.close(waiting)
        assert os.read(prepared, 1) == b"!"
        os.close(prepared)

    def act(self) -> Any:
        os.close(self._go)
        return self._child.result()


def reopen(flags: int) -> Callable[[int, Path], Any]:
    return lambda fd, path: os.close(os.open(path, flags))


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda fd, path: os.fchmod(fd, 0o666), "EPERM"),
        (lambda fd, path: os.chmod(path, 0o666), "EPERM"),
        (lambda fd, path: os.fchown(fd, -1, 7001), "EPERM"),
        (lambda fd, path: os.utime(path, (1, 1)), "EPERM"),
        (lambda fd, path: os.setxattr(fd, "user.name", b"value"), "EACCES"),
        (lambda fd, path: os.truncate(path, 0), "EACCES"),
        (reopen(os.O_RDONLY), "EACCES"),
        (reopen(os.O_WRONLY | os.O_TRUNC), "EACCES"),
    ],
    ids=["fchmod", "chmod", "chgrp", "utime", "setxattr", "truncate", "open", "open and truncate"],
)
def test_lost_file_stays_lost(serve: Serve, act: Callable[[int, Path], Any], error: str) -> None:
    """The kernel still takes the caller for the owner, because of its cache; llloop does not."""
    server = serve(*MAPS, *STALE)
    file = make(server.source / "file", 0o600)
    holding = Holding(server.mountpoint / "file", os.O_RDONLY, act, OWNER)
    os.chown(file, 4002, 4002)
    assert holding.act() == error
    found = file.stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode), found.st_size) == (4002, 0o600, 7)


each_change_of_a_directory = pytest.mark.parametrize(
    "act",
    [
        lambda fd, path: os.unlink(path / "file"),
        lambda fd, path: os.rename(path / "file", path / "other"),
        lambda fd, path: os.link(path / "file", path / "other"),
        lambda fd, path: os.mkdir(path / "other"),
        lambda fd, path: (path / "other").touch(),
    ],
    ids=["unlink", "rename", "link", "mkdir", "create"],
)


def check_lost_directory(server: Server, act: Callable[[int, Path], Any], owner: Caller) -> None:
    """Check that a former owner, whom the kernel still takes for the owner, cannot change a directory."""
    directory = make(server.source / "directory", 0o755)
    make(directory / "file", 0o666)
    (server.mountpoint / "directory/file").stat()
    holding = Holding(server.mountpoint / "directory", os.O_RDONLY | os.O_DIRECTORY, act, owner)
    os.chown(directory, 4002, 4002)
    assert holding.act() == "EACCES"
    assert os.listdir(directory) == ["file"]


@each_change_of_a_directory
def test_lost_directory_stays_lost(serve: Serve, act: Callable[[int, Path], Any]) -> None:
    check_lost_directory(serve(*MAPS, *STALE), act, OWNER)


def test_sticky_directory(mapped: Server) -> None:
    mnt, src = mapped.mountpoint, mapped.source
    make(src / "sticky-directory", 0o1777, 4003, 4003)
    make(src / "sticky-directory/file", 0o644)
    with fails(errno.EPERM):
        run_as(FRIEND, os.unlink, mnt / "sticky-directory/file")
    run_as(OWNER, os.unlink, mnt / "sticky-directory/file")


def test_new_front_knows_the_maps(mapped: Server) -> None:
    """After the death of the front, and after a reload."""
    mnt = mapped.mountpoint
    mapped.expect_log("llloop-front was killed by signal 9")
    for number, signal_or_command in enumerate(("kill", "reload")):
        (before,) = process_ids(mapped, "front")
        if signal_or_command == "kill":
            os.kill(before, 9)
        else:
            assert run_llloop("control", mnt, "reload").code == 0
        assert is_replaced(mapped, "front", before)
        path = mnt / str(number)
        run_as(OWNER, path.write_bytes, b"x")
        run_as(OWNER, os.chmod, path, 0o600)
        with fails(errno.EACCES):
            run_as(FRIEND, path.read_bytes)
        assert owner(mapped.source / str(number)) == (4001, 4001)


def test_unmapped_mount_is_never_visible(serve: Serve) -> None:
    """A user of SRC who is nobody in MNT never gets at a file, also while the mount is made."""
    source = reachable_directory("llloop-source-")
    server = Server.prepare("own", None, MAPS, source)  # type: ignore[arg-type]
    try:
        make(source / "file", 0o600)
        stop, stopper = os.pipe()

        def look() -> set[int]:
            os.set_blocking(stop, False)
            found = set()
            while True:
                try:
                    found.add((server.mountpoint / "file").stat().st_uid)
                except OSError as error:
                    found.add(-(error.errno or 0))
                try:
                    os.read(stop, 1)
                    return found
                except BlockingIOError:
                    pass

        looking = Child(look, caller=UNMAPPED)
        for _ in range(3):
            command = [sys.executable, "-m", "llloop", "serve", "--daemon", *MAPS]
            subprocess.run([*command, source, server.mountpoint], check=True, cwd="/", timeout=60)
            assert run_llloop("umount", server.mountpoint).code == 0
        os.write(stopper, b"!")
        assert looking.result() <= {7001, -errno.ENOENT, -errno.ENOTCONN, -errno.ECONNABORTED}
    finally:
        server.forget_files()
        subprocess.run(["rm", "-r", source], check=True)


def test_mount_options(serve: Serve) -> None:
    server = serve(*MAPS, "-o", "ro,noexec,sync,max_read=65536", "--fsname=a name, with a comma", "--no-allow-other")
    entry = mount_entry(str(server.mountpoint))
    assert entry is not None
    line = next(one for one in Path("/proc/self/mountinfo").read_text().splitlines() if str(server.mountpoint) in one)
    mounted, of_file_system = line.split(" - ")
    assert {"ro", "nosuid", "nodev", "noexec", "idmapped"} <= set(mounted.split()[5].split(","))
    kind, name, options = of_file_system.split()
    assert (kind, name) == ("fuse.llloop", r"a\040name,\040with\040a\040comma")
    assert {"ro", "sync", "max_read=65536", "default_permissions"} <= set(options.split(","))
    assert "allow_other" not in options
    shown = " ".join(run_llloop("status", server.mountpoint).stdout.split())
    assert "map-users 4001:7001:10, map-groups 4001:7001:10" in shown


def test_python() -> None:
    state = reachable_directory("llloop-test-")
    try:
        for name in ("src", "mnt"):
            (state / name).mkdir()
        make(state / "src/file", 0o600)
        with llloop.mount(state / "src", state / "mnt", map_users="4001:7001:1", map_groups=["4001:7002:1"]):
            assert owner(state / "mnt/file") == (7001, 7002)
        assert not os.path.ismount(state / "mnt")
    finally:
        subprocess.run(["rm", "-r", state], check=True)


def test_refusals(tmp_path: Path) -> None:
    for name in ("src", "mnt"):
        (tmp_path / name).mkdir()
    places = tmp_path / "src", tmp_path / "mnt"
    for arguments, part in (
        (["--map-users=1000"], "must be SRC:MNT:COUNT"),
        (["--map-users=1:2:3,4"], "not '4'"),
        (["--map-users=1:2:0"], "COUNT must be at least 1"),
        (["--map-users=nosuchuser:1:1"], "there is no user called 'nosuchuser'"),
        (["--map-groups=1:nosuchgroup:1"], "there is no group called 'nosuchgroup'"),
        (["--map-users=1:1:4294967295"], "the largest id is 4294967294"),
        (["--map-users=1:10:5", "--map-users=20:12:5"], "overlap"),
        (["--map-users=1:1:1", "--loop=llfuse"], "exclude each other"),
    ):
        ended = run_llloop("serve", *places, *arguments)
        assert (ended.code, part in ended.complaint()) == (2, True), ended
    state = reachable_directory("llloop-test-")
    try:
        (state / "mnt").mkdir(mode=0o777)
        (state / "mnt").chmod(0o777)
        user = ("setpriv", "--reuid=4001", "--regid=4001", "--clear-groups")
        ended = run_llloop("serve", "/etc", state / "mnt", "--map-users=1:1:1", prefix=user)
        assert (ended.code, "they need root" in ended.complaint()) == (5, True), ended
    finally:
        subprocess.run(["rm", "-r", state], check=True)
