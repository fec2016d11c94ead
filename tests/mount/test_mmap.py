"""Shared and private mappings."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys

import pytest

from tests.expect import pattern, same_status, start_python
from tests.server import Tree
from tests.syscalls import opened

PAGE = mmap.PAGESIZE
MIB = 1024 * 1024


def test_shared_writes_reach_the_file(tree: Tree) -> None:
    content = bytearray(pattern(300_000))
    (tree.mnt / "file").write_bytes(content)
    with opened(tree.mnt / "file", os.O_RDWR) as descriptor, mmap.mmap(descriptor, 300_000) as mapped:
        assert mapped[:] == content
        for offset in (0, PAGE - 1, PAGE, 100_001, 299_990):
            mapped[offset : offset + 9] = b"<changed>"
            content[offset : offset + 9] = b"<changed>"
        assert os.pread(descriptor, 400_000, 0) == content
        mapped.flush()
        assert (tree.src / "file").read_bytes() == content
        mapped[5:10] = b"later"
        content[5:10] = b"later"
    with opened(tree.mnt / "file", os.O_RDONLY) as descriptor:
        assert os.pread(descriptor, 400_000, 0) == content
        os.fsync(descriptor)
    assert (tree.src / "file").read_bytes() == content
    same_status(tree.mnt / "file", tree.src / "file")


def test_stores_are_written_back_without_msync(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(bytes(100_000))
    with opened(tree.mnt / "file", os.O_RDWR) as descriptor:
        mapped = mmap.mmap(descriptor, 100_000)
    # The mapping outlives the descriptor.
    mapped[50_000:50_004] = b"data"
    mapped.close()
    with opened(tree.mnt / "file", os.O_RDONLY) as descriptor:
        os.fsync(descriptor)
    assert (tree.src / "file").read_bytes()[50_000:50_004] == b"data"


def test_private_writes_stay_private(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"a" * 10_000)
    with (
        opened(tree.mnt / "file", os.O_RDONLY) as descriptor,
        mmap.mmap(descriptor, 10_000, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapped,
    ):
        mapped[:7] = b"private"
        assert mapped[:8] == b"privatea"
        assert os.pread(descriptor, 8, 0) == b"a" * 8
    assert (tree.src / "file").read_bytes() == b"a" * 10_000


def test_writes_are_seen_in_the_mapping(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"a" * 10_000)
    with (
        opened(tree.mnt / "file", os.O_RDWR) as descriptor,
        opened(tree.mnt / "file", os.O_RDONLY) as reader,
        mmap.mmap(reader, 10_000, mmap.MAP_SHARED, mmap.PROT_READ) as mapped,
    ):
        assert mapped[5_000] == ord("a")
        os.pwrite(descriptor, b"written", 5_000)
        assert mapped[4_999:5_008] == b"awrittena"
        os.ftruncate(descriptor, 5_003)
        os.ftruncate(descriptor, 10_000)
        assert mapped[5_000:5_010] == b"wri" + bytes(7)


def test_two_processes_share_a_mapping(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(bytes(PAGE))
    other = start_python(
        """
import mmap, os, sys
mapped = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), mmap.PAGESIZE)
for line in sys.stdin:
    mapped[0] += 1
    print(mapped[1], flush=True)
""",
        tree.mnt / "file",
    )
    assert other.stdin and other.stdout
    with opened(tree.mnt / "file", os.O_RDWR) as descriptor, mmap.mmap(descriptor, PAGE) as mapped:
        for number in range(1, 50):
            mapped[1] = number
            other.stdin.write("turn\n")
            other.stdin.flush()
            assert other.stdout.readline() == f"{number}\n"
            assert mapped[0] == number
    other.communicate(timeout=30)
    assert (tree.mnt / "file").read_bytes()[:2] == bytes([49, 49])


def test_file_grows_under_the_mapping(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        os.ftruncate(descriptor, 10)
        with mmap.mmap(descriptor, 10) as mapped:
            mapped[:] = b"0123456789"
            os.ftruncate(descriptor, 3 * PAGE)
            mapped.resize(3 * PAGE)
            mapped[2 * PAGE : 2 * PAGE + 3] = b"far"
            mapped.flush()
        assert os.pread(descriptor, 4, 2 * PAGE) == b"far\0"
    assert (tree.src / "file").read_bytes() == b"0123456789".ljust(2 * PAGE, b"\0") + b"far".ljust(PAGE, b"\0")


def test_bytes_beyond_the_end_are_not_written(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"x" * 100)
    script = """
import ctypes, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
address = libc.mmap(None, 4096, 3, 1, fd, ctypes.c_long(0))
assert ctypes.string_at(address + 100, 50) == bytes(50)
ctypes.memmove(address + 90, b"y" * 20, 20)
libc.msync(ctypes.c_void_p(address), 4096, 4)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tree.mnt / "file")], timeout=20)
    assert done.returncode == 0
    assert (tree.src / "file").read_bytes() == b"x" * 90 + b"y" * 10


def test_page_beyond_the_end_gives_sigbus(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"x" * (3 * PAGE))
    script = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
mapped = mmap.mmap(fd, 3 * mmap.PAGESIZE)
assert mapped[2 * mmap.PAGESIZE] == ord("x")
os.ftruncate(fd, mmap.PAGESIZE)
assert mapped[0] == ord("x")
mapped[2 * mmap.PAGESIZE]
"""
    done = subprocess.run([sys.executable, "-c", script, str(tree.mnt / "file")], timeout=20)
    assert done.returncode == -signal.SIGBUS


def test_holes_in_a_mapping(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        os.ftruncate(descriptor, 64 * MIB)
        with mmap.mmap(descriptor, 64 * MIB) as mapped:
            assert mapped[32 * MIB : 32 * MIB + 10] == bytes(10)
            mapped[48 * MIB] = 7
            mapped.flush()
        os.fsync(descriptor)
        assert os.fstat(descriptor).st_blocks * 512 < 8 * MIB
        assert os.pread(descriptor, 3, 48 * MIB - 1) == b"\0\7\0"


@pytest.mark.parametrize("offset", [PAGE, 5 * MIB, 4 * 1024 * MIB + PAGE])
def test_mapped_at_an_offset(tree: Tree, offset: int) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        os.pwrite(descriptor, pattern(2 * PAGE), offset)
        with mmap.mmap(descriptor, 2 * PAGE, offset=offset) as mapped:
            assert mapped[:] == pattern(2 * PAGE)
            mapped[1:4] = b"new"
            mapped.flush()
    with opened(tree.src / "file", os.O_RDONLY) as descriptor:
        assert os.pread(descriptor, 5, offset) == pattern(1) + b"new" + pattern(5)[4:]


def test_large_and_in_random_order(tree: Tree) -> None:
    content = pattern(8 * MIB)
    (tree.src / "file").write_bytes(content)
    with (
        opened(tree.mnt / "file", os.O_RDONLY) as descriptor,
        mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped,
    ):
        mapped.madvise(mmap.MADV_RANDOM)
        for number in range(0, 2048, 7):
            offset = number * 1_000_003 % (8 * MIB)
            assert mapped[offset : offset + 100] == content[offset : offset + 100]
        assert mapped[:] == content
