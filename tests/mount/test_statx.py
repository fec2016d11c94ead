"""statx(2), mainly the birth time."""

from __future__ import annotations

import errno
import os
import time

import pytest

from tests.expect import agree, fails
from tests.server import Tree
from tests.syscalls import AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS, STATX_BTIME, opened, statx

# FUSE supports statx since Linux 6.6.
RELEASE = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
birth_times = pytest.mark.skipif(RELEASE < (6, 6), reason="this kernel's FUSE has no statx")


def source_has_birth_times(tree: Tree) -> bool:
    return bool(statx(tree.src).stx_mask & STATX_BTIME)


def test_basic_fields(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"x" * 5000)
    os.symlink("file", tree.mnt / "symlink")
    for name in ("file", "symlink", ""):
        mounted, native = statx(tree.mnt / name, STATX_BASIC_STATS), statx(tree.src / name, STATX_BASIC_STATS)
        assert mounted.stx_mask & STATX_BASIC_STATS == STATX_BASIC_STATS
        for field in ("mode", "nlink", "uid", "gid", "ino", "size", "blocks", "rdev_major", "rdev_minor"):
            assert getattr(mounted, f"stx_{field}") == getattr(native, f"stx_{field}"), field
        for field in ("atime", "mtime", "ctime"):
            there = getattr(native, f"stx_{field}").ns
            assert agree(f"st_{field}_ns", getattr(mounted, f"stx_{field}").ns, there), field


@pytest.mark.own_loop
@birth_times
def test_birth_time(tree: Tree) -> None:
    if not source_has_birth_times(tree):
        pytest.skip("the source keeps no time of birth")
    before = time.time_ns() - 10**8
    (tree.mnt / "file").write_bytes(b"born")
    (tree.mnt / "directory").mkdir()
    os.symlink("file", tree.mnt / "symlink")
    os.mkfifo(tree.mnt / "fifo")
    for name in ("file", "directory", "symlink", "fifo", ""):
        mounted, native = statx(tree.mnt / name), statx(tree.src / name)
        assert mounted.stx_mask & STATX_BTIME, name
        assert mounted.stx_btime.ns == native.stx_btime.ns, name
        assert before <= mounted.stx_btime.ns <= time.time_ns() or name == ""


@pytest.mark.own_loop
@birth_times
def test_birth_time_does_not_change(tree: Tree) -> None:
    if not source_has_birth_times(tree):
        pytest.skip("the source keeps no time of birth")
    (tree.mnt / "file").write_bytes(b"1")
    born = statx(tree.mnt / "file").stx_btime.ns
    time.sleep(0.02)
    (tree.mnt / "file").write_bytes(b"2")
    os.utime(tree.mnt / "file", ns=(1, 1))
    os.chmod(tree.mnt / "file", 0o600)
    os.rename(tree.mnt / "file", tree.mnt / "renamed")
    assert statx(tree.mnt / "renamed").stx_btime.ns == born
    with opened(tree.mnt / "renamed", os.O_RDONLY) as descriptor:
        assert statx(descriptor).stx_btime.ns == born
        os.unlink(tree.mnt / "renamed")
        unlinked = statx(descriptor)
        assert unlinked.stx_btime.ns == born
        assert unlinked.stx_nlink == 0


def test_by_descriptor_and_by_symlink(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"x" * 100)
    os.symlink("file", tree.mnt / "symlink")
    assert statx(tree.mnt / "symlink", flags=0).stx_size == 100
    assert statx(tree.mnt / "symlink", flags=AT_SYMLINK_NOFOLLOW).stx_size == 4
    with opened(tree.mnt / "file", os.O_RDONLY) as descriptor:
        assert statx(descriptor).stx_size == 100
        assert statx(descriptor).stx_ino == os.stat(tree.mnt / "file").st_ino
    with fails(errno.ENOENT):
        statx(tree.mnt / "missing")


def test_ls_and_stat_programs(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    listing = os.posix_spawnp("stat", ["stat", "--format=%n %W %s", str(tree.mnt / "file")], dict(os.environ))
    assert os.waitstatus_to_exitcode(os.waitpid(listing, 0)[1]) == 0
