"""Owners and modes that are only shown, who gets which rights by them, and who owns new files."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llloop
from tests.as_user import Caller, run_as
from tests.conftest import Serve
from tests.expect import fails, outcome
from tests.mount.command_line import check_refused
from tests.mount.command_line import llloop as run_llloop
from tests.mount.test_id_maps import Holding, check_lost_directory, each_change_of_a_directory, make, owner
from tests.server import Server, reachable_directory
from tests.server_processes import is_replaced, process_ids
from tests.syscalls import link_descriptor, opened, statx

pytestmark = [pytest.mark.root, pytest.mark.mounted, pytest.mark.own_loop]

SHOWN = Caller(7001, 7001)
TRUE_OWNER = Caller(4001, 4001)
MEMBER = Caller(7005, 7005, groups=(7002,))
OTHER = Caller(7009, 7009)
FORCED = ("--force-user=7001", "--force-group=7002")
# Attributes in the kernel's cache are as old as these tests; nothing but llloop's own check can refuse.
STALE = ("--attr-timeout=1000", "--entry-timeout=1000")

FS_IOC_SETFLAGS, FS_NODUMP_FL = 0x40086602, 0x40  # <linux/fs.h>


@pytest.fixture
def serve(serve: Serve) -> Serve:
    """Starts mounts whose root the kernel knows: with --watch, it may drop the first attributes that it gets."""

    def start(*arguments: str, **how: Any) -> Server:
        server = serve(*arguments, **how)
        server.mountpoint.stat()
        return server

    return start


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_every_reply_shows_the_same(serve: Serve) -> None:
    server = serve(*FORCED, "--mode=u=rwX,g=rX,o=")
    mnt, src = server.mountpoint, server.source
    make(src / "listed-directory", 0o2711)
    make(src / "listed-directory/a", 0o4755)
    make(src / "listed-directory/b", 0o604)
    (src / "listed-directory/c").symlink_to("a")
    expected = {"a": 0o750, "b": 0o640, "c": 0o777}

    def check(found: os.stat_result, shown: int) -> None:
        assert (found.st_uid, found.st_gid, oct(stat.S_IMODE(found.st_mode))) == (7001, 7002, oct(shown))

    listed = {one.name: one.stat(follow_symlinks=False) for one in os.scandir(mnt / "listed-directory")}  # READDIRPLUS
    assert listed.keys() == expected.keys()
    for name, shown in expected.items():
        check(listed[name], shown)
        check((mnt / "listed-directory" / name).lstat(), shown)  # LOOKUP, GETATTR
    found = statx(mnt / "listed-directory/a")  # STATX
    assert (found.stx_uid, found.stx_gid, found.stx_mode & 0o7777) == (7001, 7002, 0o750)
    check((mnt / "listed-directory").lstat(), 0o2750)
    check(mnt.lstat(), 0o750)
    with opened(mnt / "new", os.O_CREAT | os.O_RDWR, 0o666) as fd:  # CREATE
        check(os.fstat(fd), 0o640)
        os.ftruncate(fd, 5)  # SETATTR
        check(os.fstat(fd), 0o640)
    (mnt / "made").mkdir()
    check((mnt / "made").lstat(), 0o750)
    os.link(mnt / "new", mnt / "link")
    check((mnt / "link").lstat(), 0o640)


def test_the_shown_owner_has_the_rights(serve: Serve) -> None:
    server = serve(*FORCED)
    mnt, src = server.mountpoint, server.source
    src.chmod(0o750)
    make(src / "secret-directory", 0o700, 0, 0)
    make(src / "secret-directory/file", 0o600)

    def use() -> None:
        file = mnt / "secret-directory/file"
        assert file.read_bytes() == b"content"
        file.write_bytes(b"changed")
        os.truncate(file, 3)
        file.chmod(0o640)
        os.utime(file, (1, 2))
        os.setxattr(file, "user.name", b"value")
        assert os.getxattr(file, "user.name") == b"value"
        os.link(file, mnt / "link")
        os.rename(mnt / "link", mnt / "secret-directory/renamed")
        os.unlink(mnt / "secret-directory/renamed")
        (mnt / "secret-directory/new").touch()
        (mnt / "secret-directory/made").mkdir()

    run_as(SHOWN, use)
    file = src / "secret-directory/file"
    assert (owner(file), mode(file), file.read_bytes()) == ((4001, 4001), 0o640, b"cha")
    assert owner(src / "secret-directory/new") == owner(src / "secret-directory/made") == (7001, 7001)
    for caller in (TRUE_OWNER, OTHER):
        with fails(errno.EACCES):
            run_as(caller, os.listdir, mnt)
    assert run_as(MEMBER, os.listdir, mnt) == ["secret-directory"]
    with fails(errno.EACCES):
        run_as(MEMBER, (mnt / "new").touch)


def set_flags(file: Path) -> None:
    with opened(file, os.O_RDONLY) as fd:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, FS_NODUMP_FL.to_bytes(8, sys.byteorder))


@pytest.mark.parametrize(
    "act",
    [
        lambda file: os.chown(file, -1, 7001),
        lambda file: os.setxattr(file, "security.name", b"value"),
        lambda file: os.setxattr(file, "trusted.name", b"value"),
        lambda file: os.chown(file, 0, -1),
        set_flags,
    ],
    ids=["chgrp", "security", "trusted", "chown", "flags"],
)
def test_rights_that_outlast_the_mount_need_the_true_owner(serve: Serve, act: Callable[[Path], Any]) -> None:
    server = serve(*FORCED)
    make(server.source / "file", 0o666, 0, 0)
    before = (server.source / "file").lstat()
    with fails(errno.EPERM):
        run_as(SHOWN, act, server.mountpoint / "file")
    after = (server.source / "file").lstat()
    assert (after.st_uid, after.st_gid, after.st_ctime_ns) == (before.st_uid, before.st_gid, before.st_ctime_ns)


def test_a_chown_to_what_is_shown_gives_nothing_away(serve: Serve) -> None:
    server = serve("--force-user=7001", "--force-group=7001")
    make(server.source / "file", 0o600, 0, 0)
    run_as(SHOWN, os.chown, server.mountpoint / "file", 7001, 7001)
    assert owner(server.source / "file") == (0, 0)
    os.chown(server.mountpoint / "file", 7001, 4005)  # root does change the source
    assert owner(server.source / "file") == (7001, 4005)


@pytest.mark.parametrize("true_owner", [0, 4001])
def test_nobody_makes_a_set_id_program_of_another_user(serve: Serve, true_owner: int) -> None:
    server = serve(*FORCED, "-o", "suid")
    mnt, src = server.mountpoint, server.source
    for name in ("file", "program"):
        make(src / name, 0o755, true_owner, true_owner)
    (src / "program").chmod(0o6755)
    assert mode(mnt / "program") == 0o755
    run_as(SHOWN, os.chmod, mnt / "file", 0o6755)
    assert mode(src / "file") == 0o755
    run_as(SHOWN, (mnt / "program").write_bytes, b"#!/bin/sh")
    assert mode(src / "program") == 0o755


def test_set_id_bits_of_own_files(serve: Serve) -> None:
    """The owner in the source can set them, but the set-group-ID bit only as a member of the group in the source."""
    server = serve("--force-user=7001")
    mnt, src = server.mountpoint, server.source
    make(src / "file", 0o755, 7001, 0)
    run_as(SHOWN, os.chmod, mnt / "file", 0o6755)
    assert mode(src / "file") == 0o4755
    assert mode(mnt / "file") == 0o755
    src.chmod(0o777)
    run_as(SHOWN, os.mknod, mnt / "made", 0o104755)
    assert mode(src / "made") == 0o755


@pytest.mark.parametrize("writes", ["write", "truncate", "open"])
def test_writes_clear_set_id_bits(serve: Serve, writes: str) -> None:
    server = serve(*FORCED)
    file = server.mountpoint / "program"
    make(server.source / "program", 0o6777, 0, 0)

    def change() -> None:
        if writes == "write":
            with file.open("r+b", buffering=0) as opened_file:
                opened_file.write(b"x")
                os.fsync(opened_file.fileno())
        elif writes == "truncate":
            os.truncate(file, 1)
        else:
            file.open("wb").close()

    run_as(SHOWN, change)
    assert mode(server.source / "program") == 0o777


def test_shown_modes_give_rights(serve: Serve) -> None:
    server = serve("--mode=a+rX")
    mnt, src = server.mountpoint, server.source
    src.chmod(0o700)
    make(src / "private-directory", 0o700)
    make(src / "private-directory/file", 0o600)
    assert mode(mnt / "private-directory/file") == 0o644
    assert run_as(OTHER, (mnt / "private-directory/file").read_bytes) == b"content"
    with fails(errno.EACCES):
        run_as(OTHER, (mnt / "private-directory/file").write_bytes, b"x")
    with fails(errno.EPERM):
        run_as(OTHER, os.chmod, mnt / "private-directory/file", 0o666)


def test_shown_modes_take_rights(serve: Serve) -> None:
    server = serve("--mode=a-w")
    make(server.source / "file", 0o666)
    with fails(errno.EACCES):
        run_as(TRUE_OWNER, (server.mountpoint / "file").write_bytes, b"x")


def test_sticky_directory(serve: Serve) -> None:
    server = serve("--mode=a+rwX")
    make(server.source / "sticky-directory", 0o1700, 4003, 4003)
    make(server.source / "sticky-directory/file", 0o600)
    path = server.mountpoint / "sticky-directory/file"
    for act in (os.unlink, lambda file: os.rename(file, f"{file}-renamed")):
        with fails(errno.EPERM):
            run_as(OTHER, act, path)
    run_as(TRUE_OWNER, os.unlink, path)


def test_acls_are_neither_shown_nor_used(serve: Serve) -> None:
    server = serve("--force-user=7001")
    mnt, src = server.mountpoint, server.source
    src.chmod(0o755)
    make(src / "file", 0o600)
    subprocess.run(["setfacl", "-m", f"u:{OTHER.uid}:rw", src / "file"], check=True)
    assert os.listxattr(mnt / "file") == []
    assert outcome(os.getxattr, mnt / "file", "system.posix_acl_access") == "ENOTSUP"
    acl = os.getxattr(src / "file", "system.posix_acl_access")
    assert outcome(os.setxattr, mnt / "file", "system.posix_acl_access", acl) == "ENOTSUP"
    with fails(errno.EACCES):
        run_as(OTHER, (mnt / "file").read_bytes)


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda fd, path: os.fchmod(fd, 0o666), "EPERM"),
        (lambda fd, path: os.utime(path, (1, 1)), "EPERM"),
        (lambda fd, path: os.setxattr(fd, "user.name", b"value"), "EACCES"),
        (lambda fd, path: os.truncate(path, 0), "EACCES"),
        (lambda fd, path: os.close(os.open(path, os.O_RDONLY)), "EACCES"),
    ],
    ids=["fchmod", "utime", "setxattr", "truncate", "open"],
)
def test_what_is_shown_now_counts(serve: Serve, act: Callable[[int, Path], Any], error: str) -> None:
    """The kernel still takes the caller for the owner, because of its cache; llloop does not."""
    server = serve("--mode=go-w", *STALE)
    file = make(server.source / "file", 0o600)
    holding = Holding(server.mountpoint / "file", os.O_RDONLY, act, TRUE_OWNER)
    os.chown(file, 4002, 4002)
    assert holding.act() == error
    assert (mode(file), file.stat().st_size) == (0o600, 7)


@each_change_of_a_directory
def test_directory_as_shown_now_counts(serve: Serve, act: Callable[[int, Path], Any]) -> None:
    check_lost_directory(serve("--mode=go=rX", *STALE), act, TRUE_OWNER)


def create_named(mnt: Path) -> None:
    (mnt / "file").touch()
    (mnt / "directory").mkdir()
    (mnt / "symlink").symlink_to("file")
    os.mkfifo(mnt / "fifo")


def create_all(mnt: Path) -> None:
    create_named(mnt)
    fd = os.open(mnt, os.O_TMPFILE | os.O_RDWR, 0o666)
    link_descriptor(fd, mnt / "unnamed")
    os.close(fd)


NEW = ("file", "directory", "symlink", "fifo", "unnamed")


def test_new_files_belong_to_somebody_else(serve: Serve) -> None:
    server = serve("--create-user=7001", "--create-group=7002")
    mnt, src = server.mountpoint, server.source
    make(src / "given-directory", 0o700)
    run_as(TRUE_OWNER, create_named, mnt / "given-directory")
    for name in NEW[:-1]:
        assert owner(src / "given-directory" / name) == owner(mnt / "given-directory" / name) == (7001, 7002), name
    with opened(mnt / "setid", os.O_CREAT, 0o6777):
        os.mknod(mnt / "made", 0o106777)
    assert [mode(src / name) for name in ("setid", "made")] == [0o755, 0o755]
    with fails(errno.EACCES):
        run_as(OTHER, create_named, mnt / "given-directory")
    with fails(errno.EPERM):
        run_as(TRUE_OWNER, os.chmod, mnt / "given-directory/file", 0o666)


def test_modes_of_new_files(serve: Serve) -> None:
    server = serve("--create-mode=g=u,o=,ug+X")
    mnt, src = server.mountpoint, server.source
    src.chmod(0o777)
    run_as(OTHER.with_umask(0o077), create_all, mnt)
    assert {name: oct(mode(src / name)) for name in NEW} == {
        "file": "0o660",
        "directory": "0o770",
        "symlink": "0o777",
        "fifo": "0o660",
        "unnamed": "0o660",
    }
    assert owner(src / "file") == (OTHER.uid, OTHER.gid)


def test_views_survive_the_front(serve: Serve) -> None:
    server = serve(*FORCED, "--create-user=4001", "--mode=o=")
    server.expect_log("llloop-front was killed by signal 9")
    (before,) = process_ids(server, "front")
    os.kill(before, 9)
    assert is_replaced(server, "front", before)
    run_as(SHOWN, (server.mountpoint / "new").touch)
    assert owner(server.mountpoint / "new") == (7001, 7002)
    assert owner(server.source / "new") == (4001, 7001)
    with fails(errno.EACCES):
        run_as(OTHER, os.listdir, server.mountpoint)


def test_only_root_gives_new_files_away() -> None:
    state = reachable_directory("llloop-test-")
    try:
        (state / "mnt").mkdir(mode=0o777)
        (state / "mnt").chmod(0o777)
        user = ("setpriv", "--reuid=4001", "--regid=4001", "--clear-groups")
        ended = run_llloop("serve", "/etc", state / "mnt", "--create-user=7001", "--check", prefix=user)
        assert ended.code == 5, ended
    finally:
        subprocess.run(["rm", "-r", state], check=True)


def test_python() -> None:
    state = reachable_directory("llloop-test-")
    try:
        for name in ("src", "mnt"):
            (state / name).mkdir()
        make(state / "src/file", 0o600)
        with llloop.mount(state / "src", state / "mnt", force_user=7001, mode="a+r", create_mode="0600"):
            assert (owner(state / "mnt/file"), mode(state / "mnt/file")) == ((7001, 4001), 0o644)
            (state / "mnt/new").touch()
            assert mode(state / "src/new") == 0o600
    finally:
        subprocess.run(["rm", "-r", state], check=True)


def test_refusals(tmp_path: Path) -> None:
    check_refused(
        tmp_path,
        (["--force-user=nosuchuser"], "there is no user called 'nosuchuser'"),
        (["--create-group=nosuchgroup"], "there is no group called 'nosuchgroup'"),
        (["--force-group=4294967295"], "the largest id is 4294967294"),
        (["--mode=u=rwz"], "must be permissions such as 0644"),
        (["--create-mode=4755"], "is more than 777"),
        (["--force-user=1", "--map-users=1:1:1"], "exclude each other"),
        (["--create-mode=0600", "--map-groups=1:1:1"], "exclude each other"),
        (["--mode=0600", "--loop=llfuse"], "exclude each other"),
    )
