"""link, symlink, readlink, unlink."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from tests.expect import fails, outcome, same_status
from tests.server import Tree
from tests.syscalls import AT_SYMLINK_FOLLOW, link_descriptor, linkat, opened


def test_second_name(tree: Tree) -> None:
    (tree.mnt / "first").write_bytes(b"shared")
    (tree.mnt / "directory").mkdir()
    os.link(tree.mnt / "first", tree.mnt / "directory" / "second")
    for name in ("first", "directory/second"):
        assert os.stat(tree.mnt / name).st_nlink == 2
        same_status(tree.mnt / name, tree.src / name)
    assert os.path.samefile(tree.mnt / "first", tree.mnt / "directory" / "second")
    assert os.path.samefile(tree.src / "first", tree.src / "directory" / "second")
    (tree.mnt / "directory" / "second").write_bytes(b"changed by the other")
    assert (tree.mnt / "first").read_bytes() == b"changed by the other"
    os.chmod(tree.mnt / "first", 0o600)
    assert stat.S_IMODE(os.stat(tree.mnt / "directory" / "second").st_mode) == 0o600
    os.unlink(tree.mnt / "directory" / "second")
    assert os.stat(tree.mnt / "first").st_nlink == 1


def test_first_name_removed(tree: Tree) -> None:
    (tree.mnt / "a").mkdir()
    (tree.mnt / "b").mkdir()
    (tree.mnt / "a" / "first").write_bytes(b"content")
    os.link(tree.mnt / "a" / "first", tree.mnt / "b" / "second")
    os.unlink(tree.mnt / "a" / "first")
    os.rmdir(tree.mnt / "a")
    second = tree.mnt / "b" / "second"
    assert os.stat(second).st_nlink == 1
    assert second.read_bytes() == b"content"
    os.chmod(second, 0o640)
    os.utime(second, ns=(1, 2))
    os.truncate(second, 4)
    with opened(second, os.O_RDWR | os.O_APPEND) as descriptor:
        os.write(descriptor, b"inue")
    os.link(second, tree.mnt / "third")
    os.unlink(second)
    assert (tree.mnt / "third").read_bytes() == (tree.src / "third").read_bytes() == b"continue"
    same_status(tree.mnt / "third", tree.src / "third")


def test_second_name_removed(tree: Tree) -> None:
    (tree.mnt / "first").write_bytes(b"content")
    os.link(tree.mnt / "first", tree.mnt / "second")
    assert (tree.mnt / "second").read_bytes() == b"content"
    os.unlink(tree.mnt / "second")
    os.chmod(tree.mnt / "first", 0o600)
    assert (tree.mnt / "first").read_bytes() == b"content"
    same_status(tree.mnt / "first", tree.src / "first")


def test_names_change_while_the_file_is_open(tree: Tree) -> None:
    with opened(tree.mnt / "name0", os.O_CREAT | os.O_RDWR) as descriptor:
        for number in range(20):
            os.link(tree.mnt / f"name{number}", tree.mnt / f"name{number + 1}")
            assert os.fstat(descriptor).st_nlink == 2
            os.unlink(tree.mnt / f"name{number}")
            assert os.fstat(descriptor).st_nlink == 1
            os.write(descriptor, b"%02d" % number)
            os.chmod(tree.mnt / f"name{number + 1}", 0o600 + number)
            assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o600 + number
            assert os.stat(tree.mnt / f"name{number + 1}").st_size == 2 * number + 2
    assert os.listdir(tree.src) == ["name20"]


def test_one_of_two_names_is_replaced_by_rename(tree: Tree) -> None:
    (tree.mnt / "first").write_bytes(b"linked")
    os.link(tree.mnt / "first", tree.mnt / "second")
    (tree.mnt / "new").write_bytes(b"new")
    with opened(tree.mnt / "first", os.O_RDWR) as descriptor:
        os.rename(tree.mnt / "new", tree.mnt / "first")
        assert os.fstat(descriptor).st_nlink == 1
        os.pwrite(descriptor, b"L", 0)
    assert (tree.mnt / "second").read_bytes() == b"Linked"
    assert (tree.mnt / "first").read_bytes() == b"new"


def test_name_is_reused_for_another_file(tree: Tree) -> None:
    (tree.mnt / "first").write_bytes(b"old file")
    os.link(tree.mnt / "first", tree.mnt / "second")
    os.unlink(tree.mnt / "first")
    (tree.mnt / "first").write_bytes(b"new")
    os.chmod(tree.mnt / "second", 0o600)
    os.truncate(tree.mnt / "second", 3)
    assert (tree.src / "first").read_bytes() == b"new"
    assert (tree.src / "second").read_bytes() == b"old"
    assert stat.S_IMODE(os.stat(tree.src / "first").st_mode) == 0o644
    assert os.stat(tree.mnt / "first").st_ino != os.stat(tree.mnt / "second").st_ino


def test_many_names(tree: Tree) -> None:
    (tree.mnt / "0").write_bytes(b"many")
    for number in range(1, 300):
        os.link(tree.mnt / "0", tree.mnt / f"{number}")
    assert os.stat(tree.mnt / "150").st_nlink == 300
    for number in range(299):
        os.unlink(tree.mnt / f"{number}")
    assert os.stat(tree.mnt / "299").st_nlink == 1
    assert (tree.mnt / "299").read_bytes() == b"many"


def test_link_errors(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    (tree.mnt / "directory").mkdir()
    with fails(errno.EEXIST):
        os.link(tree.mnt / "file", tree.mnt / "directory")
    with fails(errno.EEXIST):
        os.link(tree.mnt / "file", tree.mnt / "file")
    with fails(errno.EPERM):
        os.link(tree.mnt / "directory", tree.mnt / "new")
    with fails(errno.ENOENT):
        os.link(tree.mnt / "missing", tree.mnt / "new")
    with fails(errno.ENOENT):
        os.link(tree.mnt / "file", tree.mnt / "missing" / "new")
    assert sorted(os.listdir(tree.src)) == ["directory", "file"]
    assert os.stat(tree.mnt / "file").st_nlink == 1


def test_link_to_a_symlink_and_to_its_target(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"target")
    os.symlink("file", tree.mnt / "symlink")
    linkat(tree.mnt / "symlink", tree.mnt / "same-symlink")
    linkat(tree.mnt / "symlink", tree.mnt / "same-file", AT_SYMLINK_FOLLOW)
    assert os.readlink(tree.src / "same-symlink") == "file"
    assert os.lstat(tree.mnt / "symlink").st_nlink == 2
    assert os.path.samefile(tree.src / "file", tree.src / "same-file")
    assert os.lstat(tree.mnt / "file").st_nlink == 2


def test_links_of_special_files(tree: Tree) -> None:
    os.mkfifo(tree.mnt / "fifo")
    os.link(tree.mnt / "fifo", tree.mnt / "second")
    os.unlink(tree.mnt / "fifo")
    assert stat.S_ISFIFO(os.lstat(tree.mnt / "second").st_mode)
    os.chmod(tree.mnt / "second", 0o601)
    same_status(tree.mnt / "second", tree.src / "second")


def test_link_of_an_open_file_by_descriptor(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        os.write(descriptor, b"content")
        link_descriptor(descriptor, tree.mnt / "second")
        assert os.fstat(descriptor).st_nlink == 2
    assert (tree.src / "second").read_bytes() == b"content"


def test_unlinked_file_cannot_be_linked(tree: Tree) -> None:
    for side, name in ((tree.src, "reference"), (tree.mnt, "file")):
        with opened(side / name, os.O_CREAT | os.O_RDWR) as descriptor:
            os.write(descriptor, b"content")
            os.unlink(side / name)
            with fails(errno.ENOENT):
                link_descriptor(descriptor, side / "back")
            assert os.pread(descriptor, 10, 0) == b"content"
    assert os.listdir(tree.src) == []


@pytest.mark.parametrize("length", [1, 2, 100, 1000, 4000, 4094, 4095])
def test_symlinks_of_any_length(tree: Tree, length: int) -> None:
    target = ("d/" * 4096)[: length - 1] + "x"
    # Some file systems store the target in one block with other data.
    expected = outcome(os.symlink, target, tree.src / "reference")
    assert outcome(os.symlink, target, tree.mnt / "symlink") == expected
    if expected is None:
        assert os.readlink(tree.mnt / "symlink") == target
        assert os.readlink(tree.src / "symlink") == target
        assert os.lstat(tree.mnt / "symlink").st_size == length
        same_status(tree.mnt / "symlink", tree.src / "symlink")


def test_symlink_errors(tree: Tree) -> None:
    with fails(errno.ENOENT):
        os.symlink("", tree.mnt / "empty")
    with fails(errno.ENAMETOOLONG):
        os.symlink("x" * 4096, tree.mnt / "long")
    (tree.mnt / "file").touch()
    with fails(errno.EEXIST):
        os.symlink("x", tree.mnt / "file")
    with fails(errno.EINVAL):
        os.readlink(tree.mnt / "file")
    with fails(errno.EINVAL):
        os.readlink(tree.mnt)
    with fails(errno.ENOENT):
        os.readlink(tree.mnt / "missing")
    assert os.listdir(tree.src) == ["file"]


def test_symlink_targets_of_any_bytes(tree: Tree) -> None:
    for number, target in enumerate(
        (b"\xff\xfe not UTF-8", b"new\nline", b" ", b"../..//./x", b"/absolute", bytes(range(1, 256)))
    ):
        path = os.fsencode(tree.mnt) + b"/%d" % number
        os.symlink(target, path)
        assert os.readlink(path) == target
        assert os.readlink(os.fsencode(tree.src) + b"/%d" % number) == target


def test_replaced_symlink_has_its_new_target(tree: Tree) -> None:
    os.symlink("one", tree.mnt / "current")
    assert os.readlink(tree.mnt / "current") == "one"
    os.symlink("two", tree.mnt / "next")
    os.rename(tree.mnt / "next", tree.mnt / "current")
    assert os.readlink(tree.mnt / "current") == "two"
    os.unlink(tree.mnt / "current")
    os.symlink("three", tree.mnt / "current")
    assert os.readlink(tree.mnt / "current") == "three"


def test_removed_symlink_is_read_by_descriptor(tree: Tree) -> None:
    os.symlink("still readable", tree.mnt / "symlink")
    with opened(tree.mnt / "symlink", os.O_PATH | os.O_NOFOLLOW) as descriptor:
        os.unlink(tree.mnt / "symlink")
        assert os.readlink("", dir_fd=descriptor) == "still readable"
        assert os.fstat(descriptor).st_nlink == 0


def test_unlink(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    (tree.mnt / "directory").mkdir()
    os.symlink("file", tree.mnt / "symlink")
    os.unlink(tree.mnt / "symlink")
    assert sorted(os.listdir(tree.src)) == ["directory", "file"]
    with fails(errno.EISDIR):
        os.unlink(tree.mnt / "directory")
    with fails(errno.ENOENT):
        os.unlink(tree.mnt / "missing")
    with fails(errno.ENOTDIR):
        os.unlink(tree.mnt / "file" / "below")
    os.unlink(tree.mnt / "file")
    with fails(errno.ENOENT):
        os.unlink(tree.mnt / "file")
    assert os.listdir(tree.src) == os.listdir(tree.mnt) == ["directory"]
