"""rename: over files and directories, of open files, across directories, and errors."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.expect import fails, python, same_status
from tests.server import Tree
from tests.syscalls import opened


@contextmanager
def working_directory(path: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def test_to_a_new_name(tree: Tree) -> None:
    (tree.mnt / "old").write_bytes(b"content")
    inode = os.stat(tree.mnt / "old").st_ino
    os.rename(tree.mnt / "old", tree.mnt / "new")
    assert os.listdir(tree.src) == os.listdir(tree.mnt) == ["new"]
    assert (tree.src / "new").read_bytes() == (tree.mnt / "new").read_bytes() == b"content"
    assert os.stat(tree.mnt / "new").st_ino == inode
    with fails(errno.ENOENT):
        os.stat(tree.mnt / "old")
    same_status(tree.mnt / "new", tree.src / "new")


def test_across_directories(tree: Tree) -> None:
    (tree.mnt / "a").mkdir()
    (tree.mnt / "b").mkdir()
    (tree.mnt / "a" / "file").write_bytes(b"moved")
    os.rename(tree.mnt / "a" / "file", tree.mnt / "b" / "other")
    assert os.listdir(tree.src / "a") == os.listdir(tree.mnt / "a") == []
    assert os.listdir(tree.src / "b") == os.listdir(tree.mnt / "b") == ["other"]
    assert (tree.src / "b" / "other").read_bytes() == b"moved"


def test_over_a_file(tree: Tree) -> None:
    (tree.mnt / "old").write_bytes(b"replacing")
    (tree.mnt / "victim").write_bytes(b"replaced")
    os.link(tree.mnt / "victim", tree.mnt / "second")
    os.rename(tree.mnt / "old", tree.mnt / "victim")
    assert (tree.mnt / "victim").read_bytes() == (tree.src / "victim").read_bytes() == b"replacing"
    assert (tree.mnt / "second").read_bytes() == b"replaced"
    assert os.stat(tree.mnt / "second").st_nlink == 1
    assert sorted(os.listdir(tree.src)) == ["second", "victim"]


def test_over_an_open_file(tree: Tree) -> None:
    (tree.mnt / "new").write_bytes(b"new content")
    (tree.mnt / "victim").write_bytes(b"old content")
    with opened(tree.mnt / "victim", os.O_RDWR) as victim, opened(tree.mnt / "new", os.O_RDWR) as new:
        os.rename(tree.mnt / "new", tree.mnt / "victim")
        assert os.pread(victim, 100, 0) == b"old content"
        assert os.pread(new, 100, 0) == b"new content"
        assert os.fstat(victim).st_nlink == 0
        assert os.fstat(new).st_nlink == 1
        os.pwrite(victim, b"OLD", 0)
        os.pwrite(new, b"NEW", 0)
        os.fchmod(victim, 0o600)
        assert os.pread(victim, 100, 0) == b"OLD content"
        assert (tree.mnt / "victim").read_bytes() == b"NEW content"
    assert (tree.src / "victim").read_bytes() == b"NEW content"
    assert os.listdir(tree.src) == ["victim"]


def test_save_as_editors_do(tree: Tree) -> None:
    (tree.mnt / "document").write_bytes(b"version 0")
    for version in range(1, 100):
        (tree.mnt / "document.tmp").write_bytes(b"version %d" % version)
        os.rename(tree.mnt / "document.tmp", tree.mnt / "document")
        assert (tree.mnt / "document").read_bytes() == b"version %d" % version
    assert os.listdir(tree.mnt) == ["document"]


def test_of_an_open_file(tree: Tree) -> None:
    (tree.mnt / "directory").mkdir()
    with opened(tree.mnt / "first", os.O_CREAT | os.O_RDWR) as descriptor:
        os.write(descriptor, b"one ")
        os.rename(tree.mnt / "first", tree.mnt / "second")
        os.write(descriptor, b"two ")
        os.rename(tree.mnt / "second", tree.mnt / "directory" / "third")
        os.write(descriptor, b"three")
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, 12)
        assert os.fstat(descriptor).st_nlink == 1
        os.rename(tree.mnt / "directory", tree.mnt / "renamed")
        assert os.pread(descriptor, 100, 0) == b"one two thre"
        assert os.fstat(descriptor).st_size == 12
    assert (tree.src / "renamed" / "third").read_bytes() == b"one two thre"
    assert stat.S_IMODE(os.stat(tree.src / "renamed" / "third").st_mode) == 0o600


def test_of_two_names_of_one_file_does_nothing(tree: Tree) -> None:
    (tree.mnt / "one").write_bytes(b"content")
    os.link(tree.mnt / "one", tree.mnt / "two")
    os.rename(tree.mnt / "one", tree.mnt / "two")
    os.rename(tree.mnt / "one", tree.mnt / "one")
    assert sorted(os.listdir(tree.src)) == sorted(os.listdir(tree.mnt)) == ["one", "two"]
    assert os.stat(tree.mnt / "one").st_nlink == 2
    assert (tree.mnt / "one").read_bytes() == (tree.mnt / "two").read_bytes() == b"content"


def test_of_a_directory(tree: Tree) -> None:
    (tree.mnt / "old" / "deep" / "er").mkdir(parents=True)
    (tree.mnt / "old" / "deep" / "er" / "file").write_bytes(b"deep")
    assert os.stat(tree.mnt / "old" / "deep" / "er" / "file").st_size == 4
    os.rename(tree.mnt / "old", tree.mnt / "new")
    assert (tree.mnt / "new" / "deep" / "er" / "file").read_bytes() == b"deep"
    (tree.mnt / "new" / "deep" / "er" / "second").write_bytes(b"made after")
    assert (tree.src / "new" / "deep" / "er" / "second").read_bytes() == b"made after"
    with fails(errno.ENOENT):
        os.stat(tree.mnt / "old" / "deep" / "er" / "file")
    # A new directory may get the old name.
    (tree.mnt / "old" / "deep").mkdir(parents=True)
    assert os.listdir(tree.mnt / "old" / "deep") == []
    assert os.listdir(tree.mnt / "new" / "deep") == ["er"]


def test_of_a_directory_to_another_parent(tree: Tree) -> None:
    (tree.mnt / "a" / "moved").mkdir(parents=True)
    (tree.mnt / "b").mkdir()
    os.rename(tree.mnt / "a" / "moved", tree.mnt / "b" / "moved")
    for name in ("a", "b", "b/moved"):
        same_status(tree.mnt / name, tree.src / name)
    assert os.stat(tree.mnt / "b" / "moved" / "..").st_ino == os.stat(tree.mnt / "b").st_ino
    assert os.stat(f"{tree.mnt}/b/moved/../moved").st_ino == os.stat(tree.mnt / "b" / "moved").st_ino


def test_over_directories(tree: Tree) -> None:
    for name in ("moved", "empty", "full"):
        (tree.mnt / name).mkdir()
    (tree.mnt / "moved" / "content").touch()
    (tree.mnt / "full" / "content").touch()
    with fails(errno.ENOTEMPTY, errno.EEXIST):
        os.rename(tree.mnt / "moved", tree.mnt / "full")
    os.rename(tree.mnt / "moved", tree.mnt / "empty")
    assert sorted(os.listdir(tree.src)) == sorted(os.listdir(tree.mnt)) == ["empty", "full"]
    assert os.listdir(tree.mnt / "empty") == ["content"]


def test_rename_errors(tree: Tree) -> None:
    (tree.mnt / "directory" / "sub").mkdir(parents=True)
    (tree.mnt / "file").write_bytes(b"kept")
    with fails(errno.EISDIR):
        os.rename(tree.mnt / "file", tree.mnt / "directory")
    with fails(errno.ENOTDIR):
        os.rename(tree.mnt / "directory", tree.mnt / "file")
    with fails(errno.ENOENT):
        os.rename(tree.mnt / "missing", tree.mnt / "file")
    with fails(errno.ENOENT):
        os.rename(tree.mnt / "file", tree.mnt / "missing" / "file")
    with fails(errno.ENOTDIR):
        os.rename(tree.mnt / "file", tree.mnt / "file" / "below")
    with fails(errno.EINVAL):
        os.rename(tree.mnt / "directory", tree.mnt / "directory" / "sub" / "itself")
    with fails(errno.ENOTEMPTY):
        os.rename(tree.mnt / "directory" / "sub", tree.mnt / "directory")
    with fails(errno.EBUSY, errno.EINVAL):
        os.rename(f"{tree.mnt}/directory/.", tree.mnt / "other")
    with fails(errno.ENOTDIR):
        os.rename(f"{tree.mnt}/file/", tree.mnt / "other")
    assert (tree.src / "file").read_bytes() == b"kept"
    assert os.listdir(tree.src / "directory") == ["sub"]
    assert sorted(os.listdir(tree.src)) == ["directory", "file"]


@pytest.mark.mounted
def test_out_of_the_mount(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    with fails(errno.EXDEV):
        os.rename(tree.mnt / "file", tree.src / "outside")
    with fails(errno.EXDEV):
        os.link(tree.mnt / "file", tree.src / "outside")
    assert os.listdir(tree.src) == ["file"]


def test_of_symlinks_and_special_files(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"target")
    os.symlink("file", tree.mnt / "symlink")
    os.mkfifo(tree.mnt / "fifo")
    os.rename(tree.mnt / "symlink", tree.mnt / "renamed")
    assert os.readlink(tree.src / "renamed") == "file"
    assert os.path.isfile(tree.src / "file")
    os.rename(tree.mnt / "fifo", tree.mnt / "renamed")
    assert stat.S_ISFIFO(os.lstat(tree.mnt / "renamed").st_mode)
    os.rename(tree.mnt / "file", tree.mnt / "renamed")
    assert os.listdir(tree.src) == ["renamed"]
    assert (tree.mnt / "renamed").read_bytes() == b"target"


def test_open_directory_stays_usable(tree: Tree) -> None:
    (tree.mnt / "old" / "sub").mkdir(parents=True)
    (tree.mnt / "elsewhere").mkdir()
    with opened(tree.mnt / "old", os.O_RDONLY | os.O_DIRECTORY) as directory:
        for number, target in enumerate(("new", "elsewhere/again")):
            os.rename(tree.mnt / ("old", "new")[number], tree.mnt / target)
            with opened(f"file{number}", os.O_CREAT | os.O_WRONLY, dir_fd=directory) as descriptor:
                os.write(descriptor, b"created below a renamed directory")
            os.mkdir(f"directory{number}", dir_fd=directory)
            os.symlink("x", f"symlink{number}", dir_fd=directory)
            os.rename(f"symlink{number}", f"sub/symlink{number}", src_dir_fd=directory, dst_dir_fd=directory)
            assert os.stat(f"file{number}", dir_fd=directory).st_size == 33
            assert f"file{number}" in os.listdir(directory)
        assert os.path.samestat(os.fstat(directory), os.stat(tree.mnt / "elsewhere" / "again"))
        os.fchmod(directory, 0o711)
        os.unlink("file0", dir_fd=directory)
    assert sorted(os.listdir(tree.src / "elsewhere" / "again")) == ["directory0", "directory1", "file1", "sub"]
    assert sorted(os.listdir(tree.src / "elsewhere" / "again" / "sub")) == ["symlink0", "symlink1"]
    assert stat.S_IMODE(os.stat(tree.src / "elsewhere" / "again").st_mode) == 0o711


def test_working_directory_stays_usable(tree: Tree) -> None:
    (tree.mnt / "a" / "work").mkdir(parents=True)
    (tree.mnt / "b").mkdir()
    with working_directory(tree.mnt / "a" / "work"):
        Path("before").write_bytes(b"1")
        os.rename(tree.mnt / "a", tree.mnt / "renamed")
        Path("between").write_bytes(b"2")
        os.rename(tree.mnt / "renamed" / "work", tree.mnt / "b" / "moved")
        Path("after").write_bytes(b"3")
        assert os.getcwd() == str(tree.mnt / "b" / "moved")
        assert sorted(os.listdir(".")) == ["after", "before", "between"]
        assert os.listdir("..") == ["moved"]
        assert Path("before").read_bytes() == b"1"
        assert python("import os; print(os.getcwd(), len(os.listdir()))").stdout == f"{tree.mnt}/b/moved 3\n"
    assert sorted(os.listdir(tree.src / "b" / "moved")) == ["after", "before", "between"]


def test_open_files_below_a_renamed_directory(tree: Tree) -> None:
    (tree.mnt / "x0" / "sub").mkdir(parents=True)
    with opened(tree.mnt / "x0" / "sub" / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        for number in range(30):
            os.rename(tree.mnt / f"x{number}", tree.mnt / f"x{number + 1}")
            os.write(descriptor, b"%02d" % number)
            os.truncate(tree.mnt / f"x{number + 1}" / "sub" / "file", 2 * number + 2)
            os.utime(tree.mnt / f"x{number + 1}" / "sub" / "file", ns=(number, number))
            assert os.fstat(descriptor).st_mtime_ns == number
    assert (tree.src / "x30" / "sub" / "file").read_bytes() == b"".join(b"%02d" % number for number in range(30))


def test_chain_of_renamed_directories(tree: Tree) -> None:
    for number in range(10):
        (tree.mnt / f"{number}").write_bytes(b"%d" % number)
    for turn in range(20):
        os.rename(tree.mnt / "0", tree.mnt / "held")
        for number in range(9):
            os.rename(tree.mnt / f"{number + 1}", tree.mnt / f"{number}")
        os.rename(tree.mnt / "held", tree.mnt / "9")
        for number in range(10):
            assert (tree.mnt / f"{number}").read_bytes() == b"%d" % ((number + turn + 1) % 10)


def test_exchange_of_files_and_directories_names(tree: Tree) -> None:
    (tree.mnt / "one").write_bytes(b"a file")
    (tree.mnt / "two").mkdir()
    os.rename(tree.mnt / "one", tree.mnt / "held")
    os.rename(tree.mnt / "two", tree.mnt / "one")
    os.rename(tree.mnt / "held", tree.mnt / "two")
    assert stat.S_ISDIR(os.stat(tree.mnt / "one").st_mode)
    assert (tree.mnt / "two").read_bytes() == b"a file"
