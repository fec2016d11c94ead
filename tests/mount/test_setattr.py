"""setattr: mode, owner, size and times, by name and by descriptor, for each file type."""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

import pytest

from tests.expect import fails, fields_of, outcome, pattern, same_status
from tests.server import Tree
from tests.syscalls import AT_SYMLINK_NOFOLLOW, UTIME_NOW, UTIME_OMIT, opened, utimensat

DISTANT = (
    (0, 0),
    (1, 999_999_999),
    (-1, 500_000_000),
    (-1_000_000_000, 1),
    (2**31 - 1, 999_999_999),
    (2**31, 0),
    (2**32 + 5, 123_456_789),
)


def nanoseconds(value: tuple[int, int]) -> int:
    return value[0] * 10**9 + value[1]


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o644, 0o777, 0o1755, 0o2755, 0o4755, 0o7777])
def test_chmod(tree: Tree, mode: int) -> None:
    (tree.mnt / "file").touch()
    (tree.mnt / "directory").mkdir()
    for name in ("file", "directory"):
        os.chmod(tree.mnt / name, mode)
        assert stat.S_IMODE(os.stat(tree.mnt / name).st_mode) == mode
        assert stat.S_IMODE(os.stat(tree.src / name).st_mode) == mode
    os.chmod(tree.src / "directory", 0o755)


def test_fchmod(tree: Tree) -> None:
    (tree.src / "file").touch()
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        with opened(tree.mnt / "file", flags) as descriptor:
            os.fchmod(descriptor, 0o600 + flags)
            assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o600 + flags
        assert stat.S_IMODE(os.stat(tree.src / "file").st_mode) == 0o600 + flags


def test_chmod_of_a_fifo_and_of_a_symlinks_target(tree: Tree) -> None:
    os.mkfifo(tree.mnt / "fifo")
    (tree.mnt / "file").touch()
    os.symlink("file", tree.mnt / "symlink")
    before = os.lstat(tree.mnt / "symlink").st_mode
    os.chmod(tree.mnt / "fifo", 0o604)
    os.chmod(tree.mnt / "symlink", 0o604)
    assert stat.S_IMODE(os.stat(tree.src / "fifo").st_mode) == 0o604
    assert stat.S_IMODE(os.stat(tree.src / "file").st_mode) == 0o604
    assert os.lstat(tree.mnt / "symlink").st_mode == before


def test_chmod_updates_only_the_change_time(tree: Tree) -> None:
    (tree.src / "file").touch()
    before = os.stat(tree.mnt / "file")
    time.sleep(0.02)
    os.chmod(tree.mnt / "file", 0o600)
    after = os.stat(tree.mnt / "file")
    assert after.st_ctime_ns > before.st_ctime_ns
    assert (after.st_mtime_ns, after.st_atime_ns) == (before.st_mtime_ns, before.st_atime_ns)
    same_status(tree.mnt / "file", tree.src / "file")


def test_chmod_of_the_root(tree: Tree) -> None:
    before = stat.S_IMODE(os.stat(tree.server.source).st_mode)
    try:
        os.chmod(tree.server.mountpoint, 0o705)
        assert stat.S_IMODE(os.stat(tree.server.source).st_mode) == 0o705
        assert stat.S_IMODE(os.stat(tree.server.mountpoint).st_mode) == 0o705
    finally:
        os.chmod(tree.server.mountpoint, before)


@pytest.mark.root
def test_chown_of_owner_and_group(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    (tree.mnt / "directory").mkdir()
    for name in ("file", "directory"):
        for uid, gid, expected in (
            (1001, 1002, (1001, 1002)),
            (2001, -1, (2001, 1002)),
            (-1, 2002, (2001, 2002)),
            (-1, -1, (2001, 2002)),
            (0xFFFFFFF0, 0xFFFFFFF1, (0xFFFFFFF0, 0xFFFFFFF1)),
        ):
            os.chown(tree.mnt / name, uid, gid)
            for side in (tree.mnt, tree.src):
                status = os.stat(side / name)
                assert (status.st_uid, status.st_gid) == expected


@pytest.mark.root
def test_chown_of_a_symlink_and_its_target(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    os.symlink("file", tree.mnt / "symlink")
    os.symlink("nowhere", tree.mnt / "dangling")
    os.lchown(tree.mnt / "symlink", 1001, 1002)
    os.lchown(tree.mnt / "dangling", 1003, 1004)
    os.chown(tree.mnt / "symlink", 1005, 1006)
    for side in (tree.mnt, tree.src):
        assert os.lstat(side / "symlink")[4:6] == (1001, 1002)
        assert os.lstat(side / "dangling")[4:6] == (1003, 1004)
        assert os.lstat(side / "file")[4:6] == (1005, 1006)


@pytest.mark.root
def test_fchown(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    with opened(tree.mnt / "file", os.O_RDONLY) as descriptor:
        os.fchown(descriptor, 1001, -1)
        assert os.fstat(descriptor).st_uid == 1001
    assert os.stat(tree.src / "file").st_uid == 1001


@pytest.mark.user
@pytest.mark.skipif(os.geteuid() == 0, reason="root may do all this")
def test_forbidden_changes_by_an_ordinary_user(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    with fails(errno.EPERM):
        os.chown(tree.mnt / "file", 0, -1)
    with fails(errno.EPERM):
        os.chown(tree.mnt / "file", -1, 0)
    os.chown(tree.mnt / "file", os.getuid(), os.getgid())
    same_status(tree.mnt / "file", tree.src / "file")


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 10_000, 10_001, 1_000_000])
def test_truncate_by_name(tree: Tree, size: int) -> None:
    content = pattern(10_000)
    (tree.mnt / "file").write_bytes(content)
    os.truncate(tree.mnt / "file", size)
    expected = content[:size].ljust(size, b"\0")
    assert os.stat(tree.mnt / "file").st_size == size
    same_status(tree.mnt / "file", tree.src / "file")
    assert (tree.mnt / "file").read_bytes() == expected
    assert (tree.src / "file").read_bytes() == expected


@pytest.mark.parametrize("size", [0, 1, 4096, 10_000, 1_000_000])
def test_ftruncate(tree: Tree, size: int) -> None:
    content = pattern(10_000)
    (tree.mnt / "file").write_bytes(content)
    expected = content[:size].ljust(size, b"\0")
    with opened(tree.mnt / "file", os.O_RDWR) as descriptor:
        os.ftruncate(descriptor, size)
        assert os.fstat(descriptor).st_size == size
        assert os.pread(descriptor, 2_000_000, 0) == expected
    assert (tree.src / "file").read_bytes() == expected


def test_truncate_by_name_while_open_for_reading(tree: Tree) -> None:
    """The server must not use a descriptor that is open for reading only."""
    (tree.mnt / "file").write_bytes(b"0123456789")
    with opened(tree.mnt / "file", os.O_RDONLY) as descriptor:
        os.truncate(tree.mnt / "file", 4)
        assert os.pread(descriptor, 100, 0) == (tree.src / "file").read_bytes() == b"0123"


def test_ftruncate_of_a_write_only_descriptor(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"0123456789")
    with opened(tree.mnt / "file", os.O_WRONLY) as descriptor:
        # With this mode nobody can open the file, so only the handle works.
        os.fchmod(descriptor, 0)
        os.ftruncate(descriptor, 4)
    assert os.stat(tree.src / "file").st_size == 4


def test_truncated_data_does_not_reappear(tree: Tree) -> None:
    content = pattern(20_000)
    with opened(tree.mnt / "file", os.O_RDWR | os.O_CREAT) as descriptor:
        os.write(descriptor, content)
        os.ftruncate(descriptor, 5_000)
        os.ftruncate(descriptor, 20_000)
        assert os.pread(descriptor, 30_000, 0) == content[:5_000].ljust(20_000, b"\0")
    assert (tree.src / "file").read_bytes() == content[:5_000].ljust(20_000, b"\0")


@pytest.mark.at_once("the kernel takes its own word for sizes and times of a file that it knows")
def test_truncate_updates_the_times(tree: Tree) -> None:
    for size in (5, 10, 20):
        moved = []
        for path in (tree.src / "reference", tree.mnt / "file"):
            path.write_bytes(b"x" * 10)
            os.utime(path, ns=(10**9, 10**9))
            os.truncate(path, size)
            moved.append(os.stat(path).st_mtime_ns != 10**9)
        assert moved[0] == moved[1], size
        same_status(tree.mnt / "file", tree.src / "file")


def test_truncate_errors(tree: Tree) -> None:
    (tree.mnt / "directory").mkdir()
    (tree.mnt / "file").write_bytes(b"12345")
    with fails(errno.EISDIR):
        os.truncate(tree.mnt / "directory", 0)
    with fails(errno.ENOENT):
        os.truncate(tree.mnt / "missing", 0)
    with fails(errno.EINVAL):
        os.truncate(tree.mnt / "file", -1)
    with opened(tree.mnt / "file", os.O_RDONLY) as descriptor, fails(errno.EINVAL):
        os.ftruncate(descriptor, 0)
    assert os.stat(tree.src / "file").st_size == 5


def test_truncate_beyond_the_maximum_file_size(tree: Tree) -> None:
    (tree.src / "reference").touch()
    (tree.src / "file").touch()
    largest = 2**63 - 1
    assert outcome(os.truncate, tree.mnt / "file", largest) == outcome(os.truncate, tree.src / "reference", largest)
    assert os.stat(tree.mnt / "file").st_size == os.stat(tree.src / "reference").st_size


@pytest.mark.parametrize("value", DISTANT, ids=str)
def test_times_to_the_nanosecond(tree: Tree, value: tuple[int, int]) -> None:
    (tree.src / "reference").touch()
    (tree.mnt / "file").touch()
    (tree.mnt / "directory").mkdir()
    other = (1_600_000_000, 7)
    # Some file systems clamp times out of their range. The mirror shows the same value.
    utimensat(tree.src / "reference", value, other)
    kept = os.stat(tree.src / "reference").st_atime_ns
    for name in ("file", "directory"):
        utimensat(tree.mnt / name, value, other)
        for side in (tree.src, tree.mnt):
            status = os.stat(side / name)
            assert (status.st_atime_ns, status.st_mtime_ns) == (kept, nanoseconds(other))
        utimensat(tree.mnt / name, other, value)
        for side in (tree.src, tree.mnt):
            status = os.stat(side / name)
            assert (status.st_atime_ns, status.st_mtime_ns) == (nanoseconds(other), kept)


def test_times_of_an_open_file(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    for number, flags in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_RDWR)):
        with opened(tree.mnt / "file", flags) as descriptor:
            utimensat(descriptor, (100 + number, 5), (200 + number, 6))
            status = os.fstat(descriptor)
            assert (status.st_atime_ns, status.st_mtime_ns) == ((100 + number) * 10**9 + 5, (200 + number) * 10**9 + 6)
        same_status(tree.mnt / "file", tree.src / "file")


def test_times_set_after_a_write_are_kept(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_WRONLY) as descriptor:
        os.write(descriptor, b"copied")
        os.utime(descriptor, ns=(111, 222))
    assert os.stat(tree.src / "file").st_mtime_ns == 222
    assert os.stat(tree.mnt / "file").st_mtime_ns == 222
    assert os.stat(tree.mnt / "file").st_atime_ns == 111


def test_times_now_and_omitted(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    past = (1_000_000_000, 1)

    def times() -> tuple[int, int]:
        status = os.stat(tree.mnt / "file")
        same_status(tree.mnt / "file", tree.src / "file")
        return status.st_atime_ns, status.st_mtime_ns

    def recent(value: int) -> bool:
        # The kernel's coarse clock may lag a few milliseconds behind.
        return before - 10**8 <= value <= time.time_ns()

    utimensat(tree.mnt / "file", past, past)
    utimensat(tree.mnt / "file", UTIME_OMIT, (5, 5))
    assert times() == (nanoseconds(past), 5 * 10**9 + 5)
    utimensat(tree.mnt / "file", (6, 6), UTIME_OMIT)
    assert times() == (6 * 10**9 + 6, 5 * 10**9 + 5)
    utimensat(tree.mnt / "file", UTIME_OMIT, UTIME_OMIT)
    assert times() == (6 * 10**9 + 6, 5 * 10**9 + 5)
    before = time.time_ns()
    utimensat(tree.mnt / "file", UTIME_NOW, UTIME_OMIT)
    atime, mtime = times()
    assert recent(atime)
    assert mtime == 5 * 10**9 + 5
    utimensat(tree.mnt / "file", past, UTIME_NOW)
    atime, mtime = times()
    assert atime == nanoseconds(past)
    assert recent(mtime)
    utimensat(tree.mnt / "file", past, past)
    before = time.time_ns()
    os.utime(tree.mnt / "file")
    assert all(map(recent, times()))


def test_times_of_a_symlink(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    os.symlink("file", tree.mnt / "symlink")
    os.symlink("nowhere", tree.mnt / "dangling")
    target_before = fields_of(os.stat(tree.mnt / "file"))
    for name in ("symlink", "dangling"):
        utimensat(tree.mnt / name, (11, 22), (33, 44), AT_SYMLINK_NOFOLLOW)
        for side in (tree.mnt, tree.src):
            status = os.lstat(side / name)
            assert (status.st_atime_ns, status.st_mtime_ns) == (11 * 10**9 + 22, 33 * 10**9 + 44)
    assert fields_of(os.stat(tree.mnt / "file")) == target_before
    with fails(errno.ENOENT):
        utimensat(tree.mnt / "dangling", (1, 1), (1, 1))


def test_times_of_a_fifo_without_opening_it(tree: Tree) -> None:
    os.mkfifo(tree.mnt / "fifo")
    os.utime(tree.mnt / "fifo", ns=(12, 34))
    os.chmod(tree.mnt / "fifo", 0o600)
    status = os.stat(tree.src / "fifo")
    assert (status.st_atime_ns, status.st_mtime_ns) == (12, 34)
    same_status(tree.mnt / "fifo", tree.src / "fifo")


def test_changes_through_an_o_path_descriptor(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"0123456789")
    with opened(tree.mnt / "file", os.O_PATH) as descriptor:
        os.rename(tree.mnt / "file", tree.mnt / "moved")
        by_descriptor = Path(f"/proc/self/fd/{descriptor}")
        os.chmod(by_descriptor, 0o640)
        os.utime(by_descriptor, ns=(5, 6))
        os.truncate(by_descriptor, 3)
    assert stat.S_IMODE(os.stat(tree.src / "moved").st_mode) == 0o640
    assert (tree.src / "moved").read_bytes() == b"012"


def test_open_with_o_trunc_sets_several_fields(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"0123456789")
    os.utime(tree.mnt / "file", ns=(1, 1))
    with opened(tree.mnt / "file", os.O_WRONLY | os.O_TRUNC):
        status = os.stat(tree.mnt / "file")
        assert status.st_size == 0
        assert status.st_mtime_ns > 10**18
    same_status(tree.mnt / "file", tree.src / "file")
