"""lookup, forget, getattr and access."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable

import pytest

from tests.conftest import Serve
from tests.expect import fails, fields_of, same_status
from tests.kernel_caches import forget_unused
from tests.server import Tree
from tests.syscalls import opened


def test_status_of_each_file_type_equals_the_source(tree: Tree) -> None:
    (tree.src / "file").write_bytes(b"x" * 10_000)
    (tree.src / "file").chmod(0o640)
    (tree.src / "directory").mkdir(mode=0o711)
    (tree.src / "symlink").symlink_to("file")
    os.mkfifo(tree.src / "fifo", 0o600)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree.src / "socket"))
    os.utime(tree.src / "file", ns=(1_234_567_890_123_456_789, 987_654_321_012_345_678))
    for name, kind in (
        ("file", stat.S_ISREG),
        ("directory", stat.S_ISDIR),
        ("symlink", stat.S_ISLNK),
        ("fifo", stat.S_ISFIFO),
        ("socket", stat.S_ISSOCK),
    ):
        assert kind(os.lstat(tree.mnt / name).st_mode), name
        same_status(tree.mnt / name, tree.src / name)
    assert os.stat(tree.mnt / "file").st_mtime_ns == 987_654_321_012_345_678
    assert os.stat(tree.mnt / "file").st_atime_ns == 1_234_567_890_123_456_789


@pytest.mark.root
def test_status_of_devices_with_large_numbers(tree: Tree) -> None:
    for name, kind, device in (
        ("null", stat.S_IFCHR, os.makedev(1, 3)),
        ("large-minor", stat.S_IFBLK, os.makedev(8, 0xABCDE)),
        ("large-major", stat.S_IFCHR, os.makedev(0xABC, 0x12345)),
    ):
        os.mknod(tree.src / name, kind | 0o600, device)
        assert os.stat(tree.mnt / name).st_rdev == device
        same_status(tree.mnt / name, tree.src / name)


def test_status_of_the_root(serve: Serve) -> None:
    server = serve()
    assert stat.S_ISDIR(os.stat(server.mountpoint).st_mode)
    same_status(server.mountpoint, server.source)
    (server.mountpoint / "directory").mkdir()
    os.chmod(server.mountpoint, 0o711)
    same_status(server.mountpoint, server.source)
    assert os.path.samefile(server.mountpoint / "directory" / "..", server.mountpoint)


@pytest.mark.mounted
def test_mount_has_its_own_device_number(tree: Tree) -> None:
    (tree.src / "file").touch()
    (tree.src / "directory").mkdir()
    devices = {
        os.stat(path).st_dev for path in (tree.server.mountpoint, tree.mnt, tree.mnt / "file", tree.mnt / "directory")
    }
    assert len(devices) == 1
    assert devices != {os.stat(tree.src).st_dev}
    assert os.path.ismount(tree.server.mountpoint)


def test_inode_numbers_equal_the_source(tree: Tree) -> None:
    (tree.src / "first").touch()
    (tree.src / "second").touch()
    os.link(tree.src / "first", tree.src / "link")
    numbers = {name: os.stat(tree.mnt / name).st_ino for name in ("first", "second", "link")}
    assert numbers == {name: os.stat(tree.src / name).st_ino for name in numbers}
    assert numbers["first"] == numbers["link"] != numbers["second"]
    assert {entry.name: entry.inode() for entry in os.scandir(tree.mnt)} == numbers


def test_fstat_equals_stat(tree: Tree) -> None:
    (tree.src / "file").write_bytes(b"12345")
    with opened(tree.mnt / "file", os.O_RDONLY) as descriptor:
        assert fields_of(os.fstat(descriptor)) == fields_of(os.stat(tree.src / "file"))
    with opened(tree.mnt, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        assert fields_of(os.fstat(descriptor)) == fields_of(os.stat(tree.src))
    with opened(tree.mnt / "file", os.O_PATH) as descriptor:
        assert fields_of(os.fstat(descriptor)) == fields_of(os.stat(tree.src / "file"))


def test_missing_name(tree: Tree) -> None:
    for _ in range(2):
        with fails(errno.ENOENT):
            os.stat(tree.mnt / "missing")
    with fails(errno.ENOENT):
        os.stat(tree.mnt / "missing" / "below")
    with fails(errno.ENOENT):
        os.stat(f"{tree.mnt}/missing/..")


def test_name_created_after_a_failed_lookup(tree: Tree) -> None:
    with fails(errno.ENOENT):
        os.stat(tree.mnt / "later")
    (tree.mnt / "later").write_bytes(b"here")
    assert os.stat(tree.mnt / "later").st_size == 4
    os.unlink(tree.mnt / "later")
    with fails(errno.ENOENT):
        os.stat(tree.mnt / "later")
    os.mkdir(tree.mnt / "later")
    assert stat.S_ISDIR(os.stat(tree.mnt / "later").st_mode)


def test_file_as_directory_gives_enotdir(tree: Tree) -> None:
    (tree.src / "file").touch()
    with fails(errno.ENOTDIR):
        os.stat(tree.mnt / "file" / "below")
    with fails(errno.ENOTDIR):
        os.stat(f"{tree.mnt}/file/")
    with fails(errno.ENOTDIR):
        os.stat(f"{tree.mnt}/file/.")


def test_dot_and_dotdot(tree: Tree) -> None:
    (tree.src / "a" / "b").mkdir(parents=True)
    (tree.src / "a" / "file").write_bytes(b"123")
    assert os.stat(f"{tree.mnt}/a/b/../file").st_size == 3
    assert os.stat(f"{tree.mnt}/./a/./b/.././file").st_size == 3
    assert os.path.samefile(f"{tree.mnt}/a/b/..", tree.mnt / "a")
    with opened(tree.mnt / "a" / "b", os.O_RDONLY) as descriptor:
        assert os.stat("..", dir_fd=descriptor).st_ino == os.stat(tree.mnt / "a").st_ino
        assert os.stat("../..", dir_fd=descriptor).st_ino == os.stat(tree.mnt).st_ino


def test_symlinks_on_the_path(tree: Tree) -> None:
    (tree.src / "directory").mkdir()
    (tree.src / "directory" / "file").write_bytes(b"behind")
    os.symlink("directory", tree.mnt / "relative")
    os.symlink(tree.mnt / "directory", tree.mnt / "absolute")
    os.symlink("relative/file", tree.mnt / "chain")
    os.symlink("itself", tree.mnt / "itself")
    for path in ("relative/file", "absolute/file", "chain"):
        assert (tree.mnt / path).read_bytes() == b"behind"
        assert os.stat(tree.mnt / path).st_size == 6
    with fails(errno.ELOOP):
        os.stat(tree.mnt / "itself")
    assert stat.S_ISLNK(os.lstat(tree.mnt / "itself").st_mode)


def test_link_counts_of_directories(tree: Tree) -> None:
    os.mkdir(tree.mnt / "d")
    for number in range(3):
        os.mkdir(tree.mnt / "d" / str(number))
        assert os.stat(tree.mnt / "d").st_nlink == os.stat(tree.src / "d").st_nlink
    os.rmdir(tree.mnt / "d" / "1")
    assert os.stat(tree.mnt / "d").st_nlink == os.stat(tree.src / "d").st_nlink
    (tree.mnt / "d" / "file").touch()
    assert os.stat(tree.mnt / "d").st_nlink == os.stat(tree.src / "d").st_nlink


def test_changes_update_the_directory_times(tree: Tree) -> None:
    (tree.mnt / "d").mkdir()
    steps: tuple[Callable[[], object], ...] = (
        lambda: (tree.mnt / "d" / "file").touch(),
        lambda: os.mkdir(tree.mnt / "d" / "sub"),
        lambda: os.symlink("x", tree.mnt / "d" / "link"),
        lambda: os.rename(tree.mnt / "d" / "file", tree.mnt / "d" / "renamed"),
        lambda: os.link(tree.mnt / "d" / "renamed", tree.mnt / "d" / "second"),
        lambda: os.unlink(tree.mnt / "d" / "renamed"),
        lambda: os.rmdir(tree.mnt / "d" / "sub"),
    )
    for step in steps:
        os.utime(tree.mnt / "d", ns=(1, 1))
        assert os.stat(tree.mnt / "d").st_mtime_ns == 1
        step()
        assert os.stat(tree.mnt / "d").st_mtime_ns == os.stat(tree.src / "d").st_mtime_ns > 10**18


def test_access_as_the_owner(tree: Tree) -> None:
    (tree.src / "script").touch(mode=0o755)
    (tree.src / "plain").touch(mode=0o600)
    os.chmod(tree.src / "plain", 0o600)
    assert os.access(tree.mnt / "script", os.R_OK | os.W_OK | os.X_OK)
    assert os.access(tree.mnt / "plain", os.F_OK | os.R_OK | os.W_OK)
    # Not even root may execute a file without any execute bit.
    assert not os.access(tree.mnt / "plain", os.X_OK)
    assert not os.access(tree.mnt / "missing", os.F_OK)
    assert os.access(tree.mnt, os.X_OK | os.W_OK)


@pytest.mark.user
@pytest.mark.skipif(os.geteuid() == 0, reason="root may do all this")
def test_access_where_the_mode_forbids(tree: Tree) -> None:
    (tree.src / "closed").write_bytes(b"secret")
    (tree.src / "closed").chmod(0)
    (tree.src / "hidden").mkdir()
    (tree.src / "hidden" / "file").touch()
    (tree.src / "hidden").chmod(0o600)
    try:
        assert not os.access(tree.mnt / "closed", os.R_OK)
        with fails(errno.EACCES):
            os.open(tree.mnt / "closed", os.O_RDONLY)
        with fails(errno.EACCES):
            os.stat(tree.mnt / "hidden" / "file")
        with fails(errno.EACCES):
            os.open(tree.mnt / "hidden" / "new", os.O_CREAT | os.O_WRONLY)
        assert os.listdir(tree.mnt / "hidden") == ["file"]
    finally:
        (tree.src / "hidden").chmod(0o700)


@pytest.mark.root
def test_forgotten_inodes_are_looked_up_again(tree: Tree) -> None:
    for number in range(500):
        (tree.src / f"{number}").write_bytes(b"x" * number)
    for _ in range(3):
        for number in range(500):
            assert os.stat(tree.mnt / f"{number}").st_size == number
        forget_unused(tree.server.mountpoint)


@pytest.mark.root
def test_open_files_survive_forget(tree: Tree) -> None:
    (tree.src / "a" / "b").mkdir(parents=True)
    (tree.src / "a" / "b" / "open").write_bytes(b"kept open")
    (tree.src / "a" / "b" / "other").write_bytes(b"other")
    with (
        opened(tree.mnt / "a" / "b" / "open", os.O_RDWR) as descriptor,
        opened(tree.mnt / "a" / "b", os.O_RDONLY) as directory,
    ):
        assert os.stat(tree.mnt / "a" / "b" / "other").st_size == 5
        forget_unused(tree.server.mountpoint)
        assert os.pread(descriptor, 100, 0) == b"kept open"
        assert os.fstat(descriptor).st_size == 9
        assert os.stat("other", dir_fd=directory).st_size == 5
        os.fchmod(descriptor, 0o600)
    assert stat.S_IMODE(os.stat(tree.src / "a" / "b" / "open").st_mode) == 0o600


def test_read_updates_the_access_time(tree: Tree) -> None:
    for name in ("reference", "file"):
        (tree.src / name).write_bytes(b"read me")
        os.utime(tree.src / name, ns=(10**9, 2 * 10**9))
    (tree.src / "reference").read_bytes()
    updated = os.stat(tree.src / "reference").st_atime_ns != 10**9
    assert (tree.mnt / "file").read_bytes() == b"read me"
    assert (os.stat(tree.src / "file").st_atime_ns != 10**9) == updated
    assert os.stat(tree.mnt / "file").st_atime_ns == os.stat(tree.src / "file").st_atime_ns
    assert os.stat(tree.mnt / "file").st_mtime_ns == 2 * 10**9
