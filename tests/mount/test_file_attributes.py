"""File flags and project ids: `lsattr` and `chattr` do the same in the mount as in the source."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from llloop.linux.syscalls import (
    FS_IOC_FSGETXATTR,
    FS_IOC_FSSETXATTR,
    FS_IOC_GETFLAGS,
    FS_IOC_SETFLAGS,
    FSXATTR_SIZE,
)
from tests.as_user import Caller, Child
from tests.conftest import fresh_directory
from tests.expect import fails, outcome
from tests.server import Server, Tree
from tests.syscalls import opened

pytestmark = [pytest.mark.root, pytest.mark.own_loop]

APPEND, IMMUTABLE, NODUMP = 0x20, 0x10, 0x40  # FS_APPEND_FL, FS_IMMUTABLE_FL, FS_NODUMP_FL (<linux/fs.h>)
USER = Caller(uid=4001, gid=4001)
OTHER = Caller(uid=4002, gid=4002)


def flags_of(path: Path) -> int:
    with opened(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
        (flags,) = struct.unpack("=I4x", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8)))
        assert isinstance(flags, int)
        return flags


def set_flags(path: Path, flags: int) -> None:
    with opened(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("=Q", flags))


@pytest.fixture
def tree(disk_server: Server, request: pytest.FixtureRequest) -> Iterator[Tree]:
    with fresh_directory(disk_server, request.node.name) as tree:
        tree.src.chmod(0o777)
        (tree.src / "probe").touch()
        if outcome(flags_of, tree.src / "probe") == "ENOTTY":
            pytest.skip("the source has no file flags")
        yield tree


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_flags_set_in_the_mount_are_set_in_the_source(tree: Tree, kind: str) -> None:
    path = tree.mnt / kind
    path.mkdir() if kind == "directory" else path.touch()
    before = flags_of(tree.src / kind)
    assert flags_of(path) == before
    set_flags(path, before | NODUMP)
    assert flags_of(path) == flags_of(tree.src / kind) == before | NODUMP
    set_flags(tree.src / kind, before)
    assert flags_of(path) == before


def test_lsattr_and_chattr(tree: Tree) -> None:
    if shutil.which("chattr") is None:
        pytest.skip("chattr is not installed")
    (tree.mnt / "file").touch()
    subprocess.run(["chattr", "+d", tree.mnt / "file"], check=True)
    listed = [
        subprocess.run(["lsattr", where / "file"], check=True, capture_output=True, text=True).stdout.split()[0]
        for where in (tree.mnt, tree.src)
    ]
    assert "d" in listed[0]
    assert listed[0] == listed[1]


def test_immutable_file_cannot_be_changed(tree: Tree) -> None:
    (tree.mnt / "file").write_text("before")
    before = flags_of(tree.mnt / "file")
    set_flags(tree.mnt / "file", before | IMMUTABLE)
    try:
        with fails(errno.EPERM):
            (tree.mnt / "file").write_text("after")
        with fails(errno.EPERM):
            (tree.mnt / "file").unlink()
    finally:
        set_flags(tree.mnt / "file", before)
    (tree.mnt / "file").write_text("after")
    assert (tree.src / "file").read_text() == "after"


def test_append_only_file_can_only_grow(tree: Tree) -> None:
    (tree.mnt / "file").write_text("first ")
    before = flags_of(tree.mnt / "file")
    set_flags(tree.mnt / "file", before | APPEND)
    try:
        with fails(errno.EPERM):
            (tree.mnt / "file").write_text("over")
        with (tree.mnt / "file").open("a") as file:
            file.write("second")
    finally:
        set_flags(tree.mnt / "file", before)
    assert (tree.src / "file").read_text() == "first second"


@pytest.mark.parametrize("where", ["source", "mount"])
def test_only_the_owner_sets_flags_and_only_root_immutable(tree: Tree, where: str) -> None:
    """The source is asked the same, to compare with."""
    path = (tree.src if where == "source" else tree.mnt) / "file"
    Child(path.touch, caller=USER).result()
    before = flags_of(path)

    def results(caller: Caller) -> list[object]:
        return [Child(outcome, set_flags, path, before | flag, caller=caller).result() for flag in (NODUMP, IMMUTABLE)]

    assert results(USER) == [None, "EPERM"]
    assert results(OTHER) == ["EPERM", "EPERM"]
    assert flags_of(path) == before | NODUMP


def test_former_owner_cannot_set_flags(tree: Tree) -> None:
    """The kernel still has the old owner in its cache; the source decides."""
    path = tree.mnt / "file"
    Child(path.touch, caller=USER).result()

    def set_after_it_changed_hands() -> object:
        with opened(path, os.O_RDONLY) as fd:
            os.write(ready[1], b"x")
            os.read(changed[0], 1)
            return outcome(fcntl.ioctl, fd, FS_IOC_SETFLAGS, struct.pack("=Q", NODUMP))

    ready, changed = os.pipe(), os.pipe()
    child = Child(set_after_it_changed_hands, caller=USER)
    os.read(ready[0], 1)
    os.chown(tree.src / "file", OTHER.uid or 0, OTHER.gid or 0)
    os.write(changed[1], b"x")
    assert child.result() == "EPERM"
    assert not flags_of(tree.src / "file") & NODUMP
    for fd in (*ready, *changed):
        os.close(fd)


def test_extended_flags_and_project_id(tree: Tree) -> None:
    """ext4 without the project feature refuses an id; the mount answers as the source does."""
    (tree.mnt / "file").touch()

    def get(path: Path) -> bytes:
        with opened(path, os.O_RDONLY) as fd:
            return fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(FSXATTR_SIZE))

    def set_project(path: Path, project: int) -> None:
        value = bytearray(get(path))
        struct.pack_into("=I", value, 12, project)  # fsx_projid
        with opened(path, os.O_RDONLY) as fd:
            fcntl.ioctl(fd, FS_IOC_FSSETXATTR, bytes(value))

    assert get(tree.mnt / "file") == get(tree.src / "file")
    assert outcome(set_project, tree.mnt / "file", 55) == outcome(set_project, tree.src / "file", 55)
    assert outcome(set_project, tree.mnt / "file", 0) is None
    assert get(tree.mnt / "file") == get(tree.src / "file")


def test_other_ioctls_are_refused(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    with opened(tree.mnt / "file", os.O_RDWR) as fd:
        for command in (0x5401, 0x12345678, 0x80087601):  # TCGETS, none, FS_IOC_GETVERSION
            with fails(errno.ENOTTY):
                fcntl.ioctl(fd, command, bytes(64))
