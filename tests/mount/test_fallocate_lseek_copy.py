"""fallocate, lseek for holes and data, copy_file_range, syncfs."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.expect import fails, outcome, pattern, same_status
from tests.server import Tree
from tests.syscalls import (
    FALLOC_FL_COLLAPSE_RANGE,
    FALLOC_FL_INSERT_RANGE,
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_UNSHARE_RANGE,
    FALLOC_FL_ZERO_RANGE,
    fallocate,
    opened,
    syncfs,
)

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


@pytest.fixture
def tree(tree_of_each: Tree) -> Tree:
    return tree_of_each


def on_both(tree: Tree, action: Callable[[int], object], content: bytes = b"", flags: int = os.O_RDWR) -> object:
    """Does the same in the source and through the mount, and holds the mount to the source's outcome."""
    outcomes = []
    for path in (tree.src / "reference", tree.mnt / "file"):
        path.write_bytes(content)
        with opened(path, flags) as descriptor:
            outcomes.append(outcome(action, descriptor))
    assert outcomes[1] == outcomes[0]
    reference, file = os.stat(tree.src / "reference"), os.stat(tree.mnt / "file")
    assert file.st_size == reference.st_size
    # Copy-on-write or delayed allocation may make a difference of one block.
    assert abs(file.st_blocks - reference.st_blocks) <= 16
    same_status(tree.mnt / "file", tree.src / "file")
    if reference.st_size < 100 * MIB:
        assert (tree.mnt / "file").read_bytes() == (tree.src / "reference").read_bytes()
    return outcomes[0]


@pytest.mark.own_loop
@pytest.mark.parametrize(
    ("mode", "offset", "length"),
    [
        (0, 0, MIB),
        (0, 5 * MIB, 1),
        (0, 0, 10),
        (0, 4 * GIB, 4096),
        (FALLOC_FL_KEEP_SIZE, 0, 2 * MIB),
        (FALLOC_FL_KEEP_SIZE, 3 * MIB, 100_000),
        (PUNCH, 0, 64 * KIB),
        (PUNCH, 4096, 4096),
        (PUNCH, 1000, 100_000),
        (PUNCH, 10 * MIB, 4096),
        (FALLOC_FL_ZERO_RANGE, 5000, 50_000),
        (FALLOC_FL_ZERO_RANGE, 250_000, 500_000),
        (FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, 250_000, 500_000),
    ],
)
def test_fallocate_behaves_as_in_the_source(tree: Tree, mode: int, offset: int, length: int) -> None:
    on_both(tree, lambda descriptor: fallocate(descriptor, mode, offset, length), pattern(300_000))


@pytest.mark.own_loop
@pytest.mark.mounted
@pytest.mark.parametrize("mode", [FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE, FALLOC_FL_UNSHARE_RANGE])
def test_fallocate_modes_that_fuse_does_not_support(tree: Tree, mode: int) -> None:
    (tree.mnt / "file").write_bytes(b"x" * 100_000)
    with opened(tree.mnt / "file", os.O_RDWR) as descriptor, fails(errno.EOPNOTSUPP):
        fallocate(descriptor, mode, 4096, 4096)
    assert (tree.src / "file").read_bytes() == b"x" * 100_000


@pytest.mark.own_loop
def test_fallocate_errors(tree: Tree) -> None:
    for mode, offset, length in (
        (0, 0, 0),
        (0, -1, 10),
        (0, 0, -1),
        (FALLOC_FL_PUNCH_HOLE, 0, 4096),
        (0, 2**63 - 2, 10),
    ):
        refused = functools.partial(fallocate, mode=mode, offset=offset, length=length)
        assert on_both(tree, refused, b"x" * 5000) is not None
    assert on_both(tree, lambda descriptor: fallocate(descriptor, 0, 0, 4096), b"x", os.O_RDONLY) == "EBADF"


@pytest.mark.own_loop
def test_allocated_range_takes_space_and_reads_as_zeros(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        fallocate(descriptor, 0, 0, 3 * MIB)
        assert os.fstat(descriptor).st_size == 3 * MIB
        assert os.fstat(descriptor).st_blocks * 512 >= 3 * MIB
        assert os.pread(descriptor, 4 * MIB, 0) == bytes(3 * MIB)
        os.pwrite(descriptor, b"data", MIB)
        fallocate(descriptor, PUNCH, 0, MIB)
        assert os.pread(descriptor, 10, MIB - 4) == bytes(4) + b"data" + bytes(2)
        assert os.fstat(descriptor).st_blocks * 512 <= 2 * MIB + 64 * KIB


@pytest.mark.own_loop
def test_punched_hole_is_seen_by_all_descriptors(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(pattern(100_000))
    with opened(tree.mnt / "file", os.O_RDONLY) as reader, opened(tree.mnt / "file", os.O_RDWR) as puncher:
        assert os.pread(reader, 100_000, 0) == pattern(100_000)
        fallocate(puncher, PUNCH, 10_000, 50_000)
        expected = pattern(100_000)[:10_000] + bytes(50_000) + pattern(100_000)[60_000:]
        assert os.pread(reader, 200_000, 0) == expected
    assert (tree.src / "file").read_bytes() == expected


def test_posix_fallocate(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"start")
    with opened(tree.mnt / "file", os.O_RDWR) as descriptor:
        os.posix_fallocate(descriptor, 100, 200_000)
        assert os.fstat(descriptor).st_size == 200_100
    assert (tree.src / "file").read_bytes() == b"start".ljust(200_100, b"\0")


def segments(descriptor: int) -> list[tuple[int, int]]:
    """Where there is data, found as cp and tar find it."""
    found: list[tuple[int, int]] = []
    end = 0
    while True:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO
            return found
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        found.append((start, end))


def sparse(path: Path) -> None:
    with opened(path, os.O_CREAT | os.O_RDWR) as descriptor:
        for offset in (0, 2 * MIB, 5 * GIB):
            os.pwrite(descriptor, b"x" * 70_000, offset)
        os.ftruncate(descriptor, 6 * GIB)
        os.fsync(descriptor)


@pytest.mark.own_loop
def test_seek_hole_and_data_match_the_source(tree: Tree) -> None:
    sparse(tree.mnt / "file")
    with opened(tree.mnt / "file", os.O_RDONLY) as mounted, opened(tree.src / "file", os.O_RDONLY) as native:
        assert segments(mounted) == segments(native)
        assert len(segments(native)) == 3
        for offset in (0, 1, 70_000, MIB, 2 * MIB + 5, 5 * GIB - 1, 5 * GIB + 80_000, 6 * GIB - 1, 6 * GIB, 7 * GIB):
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                assert outcome(os.lseek, mounted, offset, whence) == outcome(os.lseek, native, offset, whence)
        assert os.lseek(mounted, 2 * MIB, os.SEEK_DATA) == 2 * MIB
        assert os.read(mounted, 3) == b"xxx"


def test_seek_data_in_a_file_without_data(tree: Tree) -> None:
    (tree.mnt / "empty").touch()
    (tree.mnt / "full").write_bytes(b"x" * 100)
    with opened(tree.mnt / "empty", os.O_RDONLY) as descriptor:
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            with fails(errno.ENXIO):
                os.lseek(descriptor, 0, whence)
    with opened(tree.mnt / "full", os.O_RDONLY) as descriptor:
        assert os.lseek(descriptor, 0, os.SEEK_HOLE) == 100
        assert os.lseek(descriptor, 50, os.SEEK_DATA) == 50
        for offset in (100, 101, -1):
            with fails(errno.ENXIO):
                os.lseek(descriptor, offset, os.SEEK_DATA)


def copy_all(source: int, target: int, count: int, offset_in: int, offset_out: int) -> int:
    copied = 0
    while copied < count:
        done = os.copy_file_range(source, target, count - copied, offset_in + copied, offset_out + copied)
        if not done:
            break
        copied += done
    return copied


@pytest.mark.parametrize(
    ("size", "count", "offset_in", "offset_out"),
    [
        (0, 100, 0, 0),
        (10, 10, 0, 0),
        (10, 100, 5, 3),
        (100_000, 100_000, 0, 0),
        (100_000, 50_001, 333, 77_777),
        (5 * MIB + 1, 5 * MIB + 1, 0, 0),
        (5 * MIB, 4 * MIB, MIB, 4 * GIB + 5),
        (100, 10, 100, 0),
        (100, 10, 1000, 0),
    ],
)
def test_copy_file_range(tree: Tree, size: int, count: int, offset_in: int, offset_out: int) -> None:
    content = pattern(size, 3)
    (tree.mnt / "from").write_bytes(content)
    expected = content[offset_in : offset_in + count]
    with opened(tree.mnt / "from", os.O_RDONLY) as source, opened(tree.mnt / "to", os.O_CREAT | os.O_RDWR) as target:
        assert copy_all(source, target, count, offset_in, offset_out) == len(expected)
        assert os.pread(target, len(expected) + 100, offset_out) == expected
        assert os.fstat(target).st_size == (offset_out + len(expected) if expected else 0)
        assert os.lseek(source, 0, os.SEEK_CUR) == os.lseek(target, 0, os.SEEK_CUR) == 0
    same_status(tree.mnt / "to", tree.src / "to")
    with opened(tree.src / "to", os.O_RDONLY) as descriptor:
        assert os.pread(descriptor, len(expected) + 100, offset_out) == expected


def test_copy_file_range_overwrites(tree: Tree) -> None:
    (tree.mnt / "from").write_bytes(b"N" * 50_000)
    (tree.mnt / "to").write_bytes(b"o" * 100_000)
    with (
        opened(tree.mnt / "from", os.O_RDONLY) as source,
        opened(tree.mnt / "to", os.O_RDWR) as target,
        opened(tree.mnt / "to", os.O_RDONLY) as reader,
    ):
        assert os.pread(reader, 200_000, 0) == b"o" * 100_000
        assert copy_all(source, target, 50_000, 0, 20_001) == 50_000
        expected = b"o" * 20_001 + b"N" * 50_000 + b"o" * 29_999
        assert os.pread(reader, 200_000, 0) == expected
    assert (tree.src / "to").read_bytes() == expected


def test_copy_file_range_uses_file_positions(tree: Tree) -> None:
    (tree.mnt / "from").write_bytes(b"0123456789")
    with opened(tree.mnt / "from", os.O_RDONLY) as source, opened(tree.mnt / "to", os.O_CREAT | os.O_RDWR) as target:
        os.lseek(source, 2, os.SEEK_SET)
        os.write(target, b"ab")
        assert os.copy_file_range(source, target, 5) == 5
        assert os.lseek(source, 0, os.SEEK_CUR) == 7
        assert os.lseek(target, 0, os.SEEK_CUR) == 7
    assert (tree.src / "to").read_bytes() == b"ab23456"


def test_copy_file_range_within_one_file(tree: Tree) -> None:
    content = pattern(100_000)
    (tree.mnt / "file").write_bytes(content)
    with opened(tree.mnt / "file", os.O_RDWR) as descriptor:
        assert copy_all(descriptor, descriptor, 10_000, 0, 50_000) == 10_000
        with fails(errno.EINVAL):
            os.copy_file_range(descriptor, descriptor, 10_000, 0, 5_000)
    assert (tree.src / "file").read_bytes() == content[:50_000] + content[:10_000] + content[60_000:]


def test_copy_file_range_errors(tree: Tree) -> None:
    (tree.mnt / "from").write_bytes(b"content")
    (tree.mnt / "to").touch()
    with opened(tree.mnt / "from", os.O_RDONLY) as source:
        with opened(tree.mnt / "to", os.O_RDONLY) as target, fails(errno.EBADF):
            os.copy_file_range(source, target, 5)
        with opened(tree.mnt / "to", os.O_WRONLY | os.O_APPEND) as target, fails(errno.EBADF):
            os.copy_file_range(source, target, 5)
    with (
        opened(tree.mnt, os.O_RDONLY) as directory,
        opened(tree.mnt / "to", os.O_WRONLY) as target,
        fails(errno.EISDIR),
    ):
        os.copy_file_range(directory, target, 5)
    assert os.stat(tree.src / "to").st_size == 0


def test_copy_file_range_between_unlinked_files(tree: Tree) -> None:
    content = pattern(300_000)
    with (
        opened(tree.mnt / "from", os.O_CREAT | os.O_RDWR) as source,
        opened(tree.mnt / "to", os.O_CREAT | os.O_RDWR) as target,
    ):
        os.write(source, content)
        os.unlink(tree.mnt / "from")
        os.unlink(tree.mnt / "to")
        assert copy_all(source, target, 300_000, 0, 0) == 300_000
        assert os.pread(target, 400_000, 0) == content


@pytest.mark.mounted
def test_copy_into_the_mount_and_out_of_it(tree: Tree) -> None:
    content = pattern(300_000)
    (tree.src / "outside").write_bytes(content)
    for source_path, target_path in ((tree.src / "outside", tree.mnt / "in"), (tree.mnt / "in", tree.src / "out")):
        with opened(source_path, os.O_RDONLY) as source, opened(target_path, os.O_CREAT | os.O_WRONLY) as target:
            result = outcome(copy_all, source, target, 300_000, 0, 0)
        # With two kinds of file system, the kernel copies itself or returns EXDEV. It never copies other data.
        assert result in (300_000, "EXDEV")
        if result == "EXDEV":
            target_path.write_bytes(source_path.read_bytes())
        assert target_path.read_bytes() == content


@pytest.mark.own_loop
def test_cp_keeps_a_sparse_file_sparse(tree: Tree) -> None:
    sparse(tree.mnt / "file")
    copying = os.posix_spawnp(
        "cp", ["cp", "--sparse=auto", str(tree.mnt / "file"), str(tree.mnt / "copy")], {"PATH": os.environ["PATH"]}
    )
    assert os.waitstatus_to_exitcode(os.waitpid(copying, 0)[1]) == 0
    status = os.stat(tree.mnt / "copy")
    assert status.st_size == 6 * GIB
    assert status.st_blocks * 512 < 16 * MIB
    with opened(tree.src / "copy", os.O_RDONLY) as descriptor:
        assert os.pread(descriptor, 5, 5 * GIB) == b"xxxxx"
        assert os.pread(descriptor, 5, 4 * GIB) == bytes(5)


def test_syncfs(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_WRONLY) as descriptor:
        os.write(descriptor, b"synchronised")
        syncfs(descriptor)
        assert (tree.src / "file").read_bytes() == b"synchronised"
    with opened(tree.mnt, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        syncfs(descriptor)
    os.sync()
