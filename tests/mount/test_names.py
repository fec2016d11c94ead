"""File names of any length that the source allows, and of any bytes."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from tests.expect import fails
from tests.server import Tree
from tests.syscalls import opened

ODD = (
    b"with space",
    b" ",
    b"new\nline",
    b"tab\tand\rreturn",
    b"back\\slash",
    b"quote'\"`$(x)",
    b"-rf",
    b"*?[x]",
    b".hidden",
    b"..three",
    b"...",
    b"dot.",
    "\u00e4\u00f6\u00fc\u4e16\u754c".encode(),
    "\U0001f600".encode(),
    "caf\u00e9".encode(),
    "cafe\u0301".encode(),
    b"\xff\xfe\x80",
    b"half \xc3",
    b"\xed\xa0\x80 surrogate",
    b"\x7f\x01\x1b[31m",
    b"Case",
    b"case",
    b"C:",
    b"x" * 255,
    "\u4e16".encode() * 85,
)


def mnt(tree: Tree, name: bytes) -> bytes:
    return os.fsencode(tree.mnt) + b"/" + name


def src(tree: Tree, name: bytes) -> bytes:
    return os.fsencode(tree.src) + b"/" + name


def test_files_of_any_name(tree: Tree) -> None:
    for number, name in enumerate(ODD):
        with opened(mnt(tree, name), os.O_CREAT | os.O_EXCL | os.O_WRONLY) as descriptor:
            os.write(descriptor, b"%d" % number)
    assert sorted(os.listdir(os.fsencode(tree.src))) == sorted(ODD)
    assert sorted(os.listdir(os.fsencode(tree.mnt))) == sorted(ODD)
    for number, name in enumerate(ODD):
        for path in (mnt(tree, name), src(tree, name)):
            with opened(path, os.O_RDONLY) as descriptor:
                assert os.read(descriptor, 10) == b"%d" % number


@pytest.mark.parametrize("name", ODD, ids=repr)
def test_each_request_with_a_name(tree: Tree, name: bytes) -> None:
    os.mkdir(mnt(tree, name))
    os.mkdir(mnt(tree, name) + b"/" + name)
    os.rmdir(mnt(tree, name) + b"/" + name)
    assert stat.S_ISDIR(os.stat(src(tree, name)).st_mode)
    os.rename(mnt(tree, name), mnt(tree, b"d"))
    os.rename(mnt(tree, b"d"), mnt(tree, name))
    os.rmdir(mnt(tree, name))
    os.symlink(name, mnt(tree, b"points"))
    assert os.readlink(src(tree, b"points")) == name
    os.symlink(b"x", mnt(tree, name))
    assert os.readlink(mnt(tree, name)) == b"x"
    os.unlink(mnt(tree, name))
    os.mkfifo(mnt(tree, name))
    os.link(mnt(tree, name), mnt(tree, b"second"))
    os.unlink(mnt(tree, name))
    os.link(mnt(tree, b"second"), mnt(tree, name))
    assert os.lstat(mnt(tree, name)).st_nlink == 2
    os.chmod(mnt(tree, name), 0o600)
    assert sorted(os.listdir(os.fsencode(tree.src))) == sorted([name, b"points", b"second"])


def test_each_byte(tree: Tree) -> None:
    names = [bytes([value]) for value in range(1, 256) if value not in b"./"]
    for name in names:
        os.close(os.open(mnt(tree, name), os.O_CREAT | os.O_EXCL))
    assert sorted(os.listdir(os.fsencode(tree.mnt))) == sorted(os.listdir(os.fsencode(tree.src))) == names
    for name in names:
        os.unlink(mnt(tree, name))
    assert os.listdir(tree.src) == []


@pytest.mark.parametrize("length", [256, 257, 1000, 4000])
def test_names_that_are_too_long(tree: Tree, length: int) -> None:
    (tree.mnt / "file").touch()
    long = mnt(tree, b"n" * length)
    for action in (
        lambda: os.stat(long),
        lambda: os.open(long, os.O_RDONLY),
        lambda: os.open(long, os.O_CREAT | os.O_WRONLY),
        lambda: os.mkdir(long),
        lambda: os.rmdir(long),
        lambda: os.unlink(long),
        lambda: os.mkfifo(long),
        lambda: os.symlink("x", long),
        lambda: os.readlink(long),
        lambda: os.link(mnt(tree, b"file"), long),
        lambda: os.rename(mnt(tree, b"file"), long),
        lambda: os.rename(long, mnt(tree, b"file")),
        lambda: os.chmod(long, 0o600),
        lambda: os.truncate(long, 0),
        lambda: os.utime(long),
        lambda: os.listdir(long),
        lambda: os.getxattr(long, "user.x"),
    ):
        with fails(errno.ENAMETOOLONG):
            action()
    assert os.listdir(tree.src) == ["file"]


def test_long_names_in_a_long_listing(tree: Tree) -> None:
    names = {f"{number:03}".encode() + b"n" * 252 for number in range(500)}
    for name in names:
        os.close(os.open(src(tree, name), os.O_CREAT))
    listed = os.listdir(os.fsencode(tree.mnt))
    assert len(listed) == 500
    assert set(listed) == names


def test_a_path_as_long_as_possible(tree: Tree) -> None:
    directory = os.fsencode(tree.mnt)
    while len(directory) + 201 < 4095 - 255:
        directory += b"/" + b"d" * 200
        os.mkdir(directory)
    name = b"f" * (4095 - len(directory) - 1)
    with opened(directory + b"/" + name[:255], os.O_CREAT | os.O_WRONLY) as descriptor:
        os.write(descriptor, b"far away")
    assert os.stat(directory + b"/" + name[:255]).st_size == 8
    with fails(errno.ENAMETOOLONG):
        os.stat(directory + b"/" + name[:255].ljust(4096 - len(directory) - 1, b"x"))
