"""renameat2: rename without replacing, and exchange."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from tests.expect import fails, same_status
from tests.server import Tree
from tests.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, opened, renameat2

pytestmark = pytest.mark.own_loop


def test_noreplace(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"moved")
    (tree.mnt / "directory").mkdir()
    renameat2(tree.mnt / "file", tree.mnt / "new", RENAME_NOREPLACE)
    renameat2(tree.mnt / "new", tree.mnt / "directory" / "newer", RENAME_NOREPLACE)
    renameat2(tree.mnt / "directory", tree.mnt / "renamed", RENAME_NOREPLACE)
    assert (tree.src / "renamed" / "newer").read_bytes() == b"moved"
    assert (tree.mnt / "renamed" / "newer").read_bytes() == b"moved"
    assert os.listdir(tree.mnt) == os.listdir(tree.src) == ["renamed"]


def test_noreplace_gives_eexist(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"mover")
    (tree.mnt / "other").write_bytes(b"kept")
    (tree.mnt / "directory").mkdir()
    os.symlink("nowhere", tree.mnt / "dangling")
    for name in ("other", "directory", "dangling", "file"):
        with fails(errno.EEXIST):
            renameat2(tree.mnt / "file", tree.mnt / name, RENAME_NOREPLACE)
    with fails(errno.ENOENT):
        renameat2(tree.mnt / "missing", tree.mnt / "new", RENAME_NOREPLACE)
    assert (tree.src / "file").read_bytes() == b"mover"
    assert (tree.src / "other").read_bytes() == b"kept"
    assert sorted(os.listdir(tree.src)) == ["dangling", "directory", "file", "other"]


def test_noreplace_of_a_file_created_in_the_source(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"mover")
    with fails(errno.ENOENT):
        os.stat(tree.mnt / "target")
    (tree.src / "target").write_bytes(b"made directly")
    with fails(errno.EEXIST):
        renameat2(tree.mnt / "file", tree.mnt / "target", RENAME_NOREPLACE)
    assert (tree.src / "target").read_bytes() == b"made directly"


def test_exchange_of_files(tree: Tree) -> None:
    (tree.mnt / "one").write_bytes(b"one")
    (tree.mnt / "two").write_bytes(b"number two")
    inodes = os.stat(tree.mnt / "one").st_ino, os.stat(tree.mnt / "two").st_ino
    with opened(tree.mnt / "one", os.O_RDWR) as one, opened(tree.mnt / "two", os.O_RDWR) as two:
        renameat2(tree.mnt / "one", tree.mnt / "two", RENAME_EXCHANGE)
        assert (os.stat(tree.mnt / "two").st_ino, os.stat(tree.mnt / "one").st_ino) == inodes
        assert (tree.mnt / "one").read_bytes() == (tree.src / "one").read_bytes() == b"number two"
        assert (tree.mnt / "two").read_bytes() == (tree.src / "two").read_bytes() == b"one"
        os.pwrite(one, b"O", 0)
        os.pwrite(two, b"N", 0)
        assert os.fstat(one).st_nlink == os.fstat(two).st_nlink == 1
    os.chmod(tree.mnt / "one", 0o601)
    os.truncate(tree.mnt / "two", 2)
    for name in ("one", "two"):
        same_status(tree.mnt / name, tree.src / name)
    assert (tree.src / "one").read_bytes() == b"Number two"
    assert (tree.src / "two").read_bytes() == b"On"
    assert stat.S_IMODE(os.stat(tree.src / "one").st_mode) == 0o601


def test_exchange_across_directories_and_kinds(tree: Tree) -> None:
    (tree.mnt / "a").mkdir()
    (tree.mnt / "b" / "directory").mkdir(parents=True)
    (tree.mnt / "b" / "directory" / "inside").write_bytes(b"inside")
    (tree.mnt / "a" / "file").write_bytes(b"file")
    assert os.stat(tree.mnt / "b" / "directory" / "inside").st_size == 6
    renameat2(tree.mnt / "a" / "file", tree.mnt / "b" / "directory", RENAME_EXCHANGE)
    assert (tree.mnt / "b" / "directory").read_bytes() == b"file"
    assert (tree.mnt / "a" / "file" / "inside").read_bytes() == b"inside"
    (tree.mnt / "a" / "file" / "inside").write_bytes(b"changed")
    (tree.mnt / "a" / "file" / "second").touch()
    assert sorted(os.listdir(tree.src / "a" / "file")) == ["inside", "second"]
    assert (tree.src / "a" / "file" / "inside").read_bytes() == b"changed"
    for name in ("a", "b", "a/file", "b/directory"):
        same_status(tree.mnt / name, tree.src / name)
    assert os.stat(tree.mnt / "a" / "file" / "..").st_ino == os.stat(tree.mnt / "a").st_ino


def test_exchange_of_directories_in_use(tree: Tree) -> None:
    for name in ("one", "two"):
        (tree.mnt / name / "sub").mkdir(parents=True)
        (tree.mnt / name / "sub" / "file").write_text(name)
    with opened(tree.mnt / "one", os.O_RDONLY) as one, opened(tree.mnt / "two" / "sub", os.O_RDONLY) as two:
        renameat2(tree.mnt / "one", tree.mnt / "two", RENAME_EXCHANGE)
        assert os.stat("sub/file", dir_fd=one).st_ino == os.stat(tree.src / "two" / "sub" / "file").st_ino
        os.close(os.open("by-one", os.O_CREAT | os.O_WRONLY, dir_fd=one))
        os.close(os.open("by-two", os.O_CREAT | os.O_WRONLY, dir_fd=two))
    assert (tree.mnt / "one" / "sub" / "file").read_text() == "two"
    assert (tree.mnt / "two" / "sub" / "file").read_text() == "one"
    assert sorted(os.listdir(tree.src / "two")) == ["by-one", "sub"]
    assert sorted(os.listdir(tree.src / "one" / "sub")) == ["by-two", "file"]


def test_exchange_of_two_names_of_one_file(tree: Tree) -> None:
    (tree.mnt / "one").write_bytes(b"same")
    os.link(tree.mnt / "one", tree.mnt / "two")
    renameat2(tree.mnt / "one", tree.mnt / "two", RENAME_EXCHANGE)
    os.unlink(tree.mnt / "one")
    assert (tree.mnt / "two").read_bytes() == b"same"
    assert os.stat(tree.mnt / "two").st_nlink == 1


def test_exchange_errors(tree: Tree) -> None:
    (tree.mnt / "directory" / "sub").mkdir(parents=True)
    (tree.mnt / "file").touch()
    with fails(errno.ENOENT):
        renameat2(tree.mnt / "file", tree.mnt / "missing", RENAME_EXCHANGE)
    with fails(errno.ENOENT):
        renameat2(tree.mnt / "missing", tree.mnt / "file", RENAME_EXCHANGE)
    with fails(errno.EINVAL):
        renameat2(tree.mnt / "directory", tree.mnt / "directory" / "sub", RENAME_EXCHANGE)
    with fails(errno.EINVAL):
        renameat2(tree.mnt / "file", tree.mnt / "directory", RENAME_EXCHANGE | RENAME_NOREPLACE)
    with fails(errno.EINVAL):
        renameat2(tree.mnt / "file", tree.mnt / "new", 0x100)
    assert sorted(os.listdir(tree.src)) == ["directory", "file"]


def test_mv_without_clobbering(tree: Tree) -> None:
    (tree.mnt / "one").write_bytes(b"1")
    (tree.mnt / "two").write_bytes(b"2")
    moving = os.posix_spawnp("mv", ["mv", "-n", str(tree.mnt / "one"), str(tree.mnt / "two")], dict(os.environ))
    os.waitpid(moving, 0)
    assert (tree.src / "one").read_bytes() == b"1"
    assert (tree.src / "two").read_bytes() == b"2"
