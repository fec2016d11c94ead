"""O_DIRECT: aligned and unaligned I/O, as the source allows."""

from __future__ import annotations

import fcntl
import mmap
import os

import pytest

from tests.expect import outcome, pattern
from tests.server import Tree
from tests.syscalls import opened

MIB = 1024 * 1024


def aligned(size: int) -> mmap.mmap:
    """Memory at a page's start, as O_DIRECT asks for."""
    return mmap.mmap(-1, max(size, 1))


def direct_write(descriptor: int, content: bytes, offset: int) -> int:
    memory = aligned(len(content))
    memory[: len(content)] = content
    return os.pwritev(descriptor, [memoryview(memory)[: len(content)]], offset)


def direct_read(descriptor: int, size: int, offset: int) -> bytes:
    memory = aligned(size)
    count = os.preadv(descriptor, [memoryview(memory)[:size]], offset)
    return memory[:count]


@pytest.fixture
def tree(tree_of_each: Tree) -> Tree:
    return tree_of_each


@pytest.fixture(autouse=True)
def source_with_direct_io(tree: Tree) -> None:
    try:
        os.close(os.open(tree.src / "probe", os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"the source has no direct I/O: {error}")
    finally:
        os.unlink(tree.src / "probe")


@pytest.mark.parametrize("size", [4096, 8192, 65_536, 128 * 1024, MIB - 4096, MIB, MIB + 4096, 3 * MIB])
def test_aligned_io(tree: Tree, size: int) -> None:
    content = pattern(size, size)
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR | os.O_DIRECT) as descriptor:
        assert direct_write(descriptor, content, 0) == size
        assert (tree.src / "file").read_bytes() == content
        assert direct_read(descriptor, size, 0) == content
        assert direct_read(descriptor, 4096, size - 4096) == content[-4096:]
        assert direct_read(descriptor, 4096, size) == b""
        assert direct_read(descriptor, 4096, size + 4096) == b""
        assert os.fstat(descriptor).st_size == size


@pytest.mark.parametrize(
    ("size", "offset"),
    [(1, 0), (511, 0), (512, 0), (513, 512), (4095, 0), (4096, 1), (4097, 4096), (100, 77), (10_000, 3)],
)
@pytest.mark.own_loop  # llfuse accepts unaligned sizes: it does not open the source with O_DIRECT
def test_unaligned_io(tree: Tree, size: int, offset: int) -> None:
    """Some sources allow any size, some return EINVAL; the mount behaves like its source."""
    content = pattern(20_000)
    outcomes = []
    for path in (tree.src / "reference", tree.mnt / "file"):
        path.write_bytes(content)
        with opened(path, os.O_RDWR | os.O_DIRECT) as descriptor:
            read = outcome(direct_read, descriptor, size, offset)
            written = outcome(direct_write, descriptor, b"n" * size, offset)
        outcomes.append((read, written))
    assert outcomes[1] == outcomes[0]
    assert (tree.src / "file").read_bytes() == (tree.src / "reference").read_bytes()


def test_unaligned_end_of_file(tree: Tree) -> None:
    content = pattern(10_001)
    outcomes = []
    for path in (tree.src / "reference", tree.mnt / "file"):
        path.write_bytes(content)
        with opened(path, os.O_RDONLY | os.O_DIRECT) as descriptor:
            outcomes.append(
                [
                    outcome(direct_read, descriptor, size, at)
                    for size, at in ((4096, 8192), (16_384, 0), (8192, 8192), (4096, 12_288))
                ]
            )
    assert outcomes[1] == outcomes[0]
    assert outcomes[1][0] == content[8192:]


def test_mixed_with_cached_io(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"a" * 16_384)
    with (
        opened(tree.mnt / "file", os.O_RDWR | os.O_DIRECT) as direct,
        opened(tree.mnt / "file", os.O_RDWR) as cached,
    ):
        assert os.pread(cached, 20_000, 0) == b"a" * 16_384
        direct_write(direct, b"b" * 4096, 4096)
        assert os.pread(cached, 20_000, 0) == b"a" * 4096 + b"b" * 4096 + b"a" * 8192
        os.pwrite(cached, b"c" * 100, 8000)
        assert direct_read(direct, 8192, 4096) == b"b" * 3904 + b"c" * 100 + b"b" * 92 + b"a" * 4096
        os.ftruncate(cached, 5000)
        assert direct_read(direct, 8192, 4096) == b"b" * 904
    assert (tree.src / "file").read_bytes() == b"a" * 4096 + b"b" * 904


def test_mixed_with_a_mapping(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"a" * 8192)
    with (
        opened(tree.mnt / "file", os.O_RDWR) as cached,
        mmap.mmap(cached, 8192) as mapped,
        opened(tree.mnt / "file", os.O_RDWR | os.O_DIRECT) as direct,
    ):
        mapped[:4] = b"MMAP"
        assert direct_read(direct, 4096, 0)[:6] == b"MMAPaa"
        direct_write(direct, b"d" * 4096, 4096)
        assert mapped[4090:4100] == b"a" * 6 + b"d" * 4


def test_mapping_of_a_direct_descriptor(tree: Tree) -> None:
    """The kernel's writeback of a mapping ends at the end of the file, not at the end of a block."""
    (tree.mnt / "file").write_bytes(b"a" * 10_001)
    with opened(tree.mnt / "file", os.O_RDWR | os.O_DIRECT) as descriptor:
        with mmap.mmap(descriptor, 10_001) as mapped:
            mapped[10_000] = ord("z")
            mapped[0] = ord("A")
            mapped.flush()
        os.fsync(descriptor)
    assert (tree.src / "file").read_bytes() == b"A" + b"a" * 9999 + b"z"


def test_append(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_WRONLY | os.O_DIRECT | os.O_APPEND) as descriptor:
        for number in range(5):
            memory = aligned(4096)
            memory[:] = b"%d" % number * 4096
            assert os.writev(descriptor, [memory]) == 4096
    assert (tree.src / "file").read_bytes() == b"".join(b"%d" % number * 4096 for number in range(5))


@pytest.mark.by_workers
def test_switched_on_and_off_while_open(tree: Tree) -> None:
    content = pattern(16_384)
    (tree.mnt / "file").write_bytes(content)
    with opened(tree.mnt / "file", os.O_RDWR) as descriptor:
        plain = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        assert os.pread(descriptor, 100, 5) == content[5:105]
        fcntl.fcntl(descriptor, fcntl.F_SETFL, plain | os.O_DIRECT)
        assert direct_read(descriptor, 4096, 4096) == content[4096:8192]
        direct_write(descriptor, b"x" * 4096, 8192)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, plain)
        assert os.pread(descriptor, 5000, 8000) == content[8000:8192] + b"x" * 4096 + content[12_288:13_000]
    with opened(tree.mnt / "file", os.O_RDWR | os.O_DIRECT) as descriptor:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, plain)
        assert os.pread(descriptor, 10, 3) == content[3:13]
        assert os.pwrite(descriptor, b"odd", 5) == 3
    assert (tree.src / "file").read_bytes()[:10] == content[:5] + b"odd" + content[8:10]


def test_far_beyond_four_gibibytes(tree: Tree) -> None:
    offset = 5 * 1024 * MIB
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR | os.O_DIRECT) as descriptor:
        assert direct_write(descriptor, pattern(8192), offset) == 8192
        assert direct_read(descriptor, 8192, offset) == pattern(8192)
        assert direct_read(descriptor, 4096, 4096) == bytes(4096)
    assert os.stat(tree.src / "file").st_blocks * 512 < MIB


def test_unlinked_file(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR | os.O_DIRECT) as descriptor:
        os.unlink(tree.mnt / "file")
        direct_write(descriptor, pattern(8192), 0)
        assert direct_read(descriptor, 8192, 0) == pattern(8192)
