"""Data that many processes write through one, two and eight workers is read back unchanged."""

import fcntl
import hashlib
import mmap
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.as_user import run_together
from tests.server import Server, Tree
from tests.syscalls import opened
from tests.watchdog import Watchdog

KIB, MIB = 1 << 10, 1 << 20
# Sizes around each limit: page, slot, pipe, max_write, request buffer.
SIZES = sorted(
    {0, 1, 511, 513}
    | {border + delta for border in (4 * KIB, 64 * KIB, 128 * KIB, 512 * KIB, MIB, 2 * MIB) for delta in (-1, 0, 1)}
    | {3 * MIB + 12_345}
)
PROCESSES = 4


@pytest.fixture(scope="module", params=["1", "2", "8"])
def served(request: pytest.FixtureRequest, via: str, serve_options: list[str], watchdog: Watchdog) -> Iterator[Server]:
    server = Server.prepare(via, watchdog, [*serve_options, "--workers", request.param])
    try:
        server.start()
        yield server
        server.stop()
    finally:
        server.clean_up()
        server.forget_files()


@pytest.fixture
def place(served: Server, request: pytest.FixtureRequest) -> Iterator[Tree]:
    if not served.alive():
        # Another test ended it and failed because of that. This test must not fail, too.
        served.clean_up()
        served.start()
    name = request.node.name.split("[")[0]
    (served.source / name).mkdir()
    yield Tree(served.source / name, served.mountpoint / name, served)
    assert served.alive(), f"the server ended during the test\n{served.all_output()}"
    shutil.rmtree(served.source / name)
    served.check_log()


def noise(size: int, seed: int) -> bytes:
    """Quick to make, and no two places of it are alike."""
    return random.Random(seed).randbytes(size)


def digest(path: Path) -> str:
    # Use another buffer size, so that the test does not only see the pattern of the kernel's read-ahead.
    found = hashlib.sha256()
    with opened(path, os.O_RDONLY) as fd:
        while piece := os.read(fd, 777_777):
            found.update(piece)
    return found.hexdigest()


def drop_pages(path: Path) -> None:
    """What is compared must come from the server, not from the pages that the write left behind."""
    with opened(path, os.O_RDONLY) as fd:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def write_in_pieces(path: Path, content: bytes, choice: random.Random) -> None:
    """From start to end in pieces of odd lengths, then some of it again in no order."""
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        position = 0
        while position < len(content):
            length = choice.choice((1 + choice.randrange(5_000), 100_000 + choice.randrange(MIB), 3 * MIB))
            position += os.write(fd, content[position : position + length])
        for _ in range(5 if content else 0):
            start = choice.randrange(len(content))
            os.pwrite(fd, content[start : start + 70_001], start)


def write_and_compare(src: Path, mnt: Path, process: int) -> int:
    choice = random.Random(process)
    for number, size in enumerate(SIZES):
        content = noise(size, process * 1000 + number)
        name = f"{process}-{size}"
        write_in_pieces(mnt / name, content, choice)
        assert (mnt / name).stat().st_size == size
        drop_pages(mnt / name)
        assert (mnt / name).read_bytes() == content, f"{name} through the mount"
        assert (src / name).read_bytes() == content, f"{name} in the source"
        with opened(mnt / name, os.O_RDONLY) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            for _ in range(10):
                start, length = choice.randrange(size + 2), choice.choice((1, 100, 5_000, 200_000))
                assert os.pread(fd, length, start) == content[start : start + length], f"{name} at {start}"
    return len(SIZES)


def test_many_processes_write_files_of_every_size(place: Tree) -> None:
    counts = run_together((write_and_compare, (place.src, place.mnt, process)) for process in range(PROCESSES))
    assert counts == [len(SIZES)] * PROCESSES
    # Check again at the end: no process may have written to the file of another.
    for process in range(PROCESSES):
        for number, size in enumerate(SIZES):
            assert (place.src / f"{process}-{size}").read_bytes() == noise(size, process * 1000 + number)


def test_many_processes_write_parts_of_one_file(place: Tree) -> None:
    """Parts with odd borders share pages with their neighbours."""
    part = 1_300_001
    content = noise(part * PROCESSES, 1)
    (place.src / "file").touch()

    def write_part(process: int) -> None:
        choice = random.Random(process)
        pieces = []
        position = process * part
        while position < (process + 1) * part:
            length = min(1 + choice.randrange(60_000), (process + 1) * part - position)
            pieces.append((position, length))
            position += length
        choice.shuffle(pieces)
        with opened(place.mnt / "file", os.O_WRONLY) as fd:
            for position, length in pieces:
                assert os.pwrite(fd, content[position : position + length], position) == length

    run_together((write_part, (process,)) for process in range(PROCESSES))
    expected = hashlib.sha256(content).hexdigest()
    assert digest(place.src / "file") == expected
    assert digest(place.mnt / "file") == expected
    drop_pages(place.mnt / "file")
    assert run_together((digest, (place.mnt / "file",)) for _ in range(PROCESSES)) == [expected] * PROCESSES


def test_many_processes_append_to_one_file(place: Tree) -> None:
    """O_APPEND: no record is lost, torn or overwritten."""
    (place.src / "log").touch()

    def append(process: int) -> None:
        with opened(place.mnt / "log", os.O_WRONLY | os.O_APPEND) as fd:
            for number in range(200):
                record = b"%d %06d " % (process, number)
                record += b"x" * ((number * 37) % 3000) + b"\n"
                assert os.write(fd, record) == len(record)

    run_together((append, (process,)) for process in range(PROCESSES))
    lines = (place.src / "log").read_bytes().splitlines()
    assert len(lines) == 200 * PROCESSES
    for process in range(PROCESSES):
        own = [line for line in lines if line.startswith(b"%d " % process)]
        assert own == [b"%d %06d " % (process, n) + b"x" * ((n * 37) % 3000) for n in range(200)]
    assert (place.mnt / "log").read_bytes() == (place.src / "log").read_bytes()


def test_concurrent_reads_return_old_or_new_data(place: Tree) -> None:
    size, page = 2 * MIB, 4096
    (place.mnt / "file").write_bytes(b"\0" * size)

    def write() -> None:
        with opened(place.mnt / "file", os.O_WRONLY) as fd:
            for value in range(1, 40):
                os.pwrite(fd, bytes([value]) * size, 0)

    def read() -> None:
        seen = [0] * (size // page)
        with opened(place.mnt / "file", os.O_RDONLY) as fd:
            for _ in range(40):
                content = os.pread(fd, size, 0)
                assert len(content) == size
                for number in range(size // page):
                    piece = content[number * page : (number + 1) * page]
                    values = set(piece)
                    assert len(values) <= 2, f"page {number} holds {values}"
                    assert max(values) >= seen[number], f"page {number} went back in time"
                    seen[number] = min(values)

    run_together([(write, ()), (read, ()), (read, ())])
    assert (place.src / "file").read_bytes() == b"\x27" * size


def test_counter_under_a_lock(place: Tree) -> None:
    """Read, add one, write: a process that reads an old value under the lock loses a count."""
    (place.src / "counter").write_bytes(b"%08d" % 0)

    def count() -> None:
        for _ in range(100):
            with opened(place.mnt / "counter", os.O_RDWR) as fd:
                fcntl.lockf(fd, fcntl.LOCK_EX)
                value = int(os.pread(fd, 8, 0))
                os.pwrite(fd, b"%08d" % (value + 1), 0)

    run_together((count, ()) for _ in range(PROCESSES))
    assert (place.mnt / "counter").read_bytes() == (place.src / "counter").read_bytes() == b"%08d" % (100 * PROCESSES)


def test_vectored_and_very_large_calls(place: Tree) -> None:
    content = noise(9 * MIB + 77, 5)
    with opened(place.mnt / "file", os.O_RDWR | os.O_CREAT) as fd:
        pieces = [content[start : start + 10_007] for start in range(0, len(content), 10_007)]
        assert os.writev(fd, pieces) == len(content)
        drop_pages(place.mnt / "file")
        buffers = [bytearray(length) for length in (1, 4095, 2 * MIB, 100, 5 * MIB, 3 * MIB)]
        assert os.preadv(fd, buffers, 0) == len(content)
        assert b"".join(buffers)[: len(content)] == content
        assert os.pread(fd, 2 * len(content), 3) == content[3:]
        assert os.pwrite(fd, content, 5) == len(content)
    assert (place.src / "file").read_bytes() == content[:5] + content


def test_direct_io_at_each_alignment(place: Tree) -> None:
    size = 3 * MIB
    content = noise(size, 6)
    with mmap.mmap(-1, size) as memory:
        memory[:] = content
        try:
            fd = os.open(place.mnt / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        except OSError:
            pytest.skip("the source has no O_DIRECT")
        try:
            assert os.pwritev(fd, [memory], 0) == size
            memory[:] = bytes(size)
            assert os.preadv(fd, [memory], 0) == size
            assert memory[:] == content
            for start, length in ((4096, 4096), (4096, MIB), (MIB - 4096, 8192), (4096 * 3, 2 * MIB), (0, 512 * KIB)):
                view = memoryview(memory)[:length]
                assert os.preadv(fd, [view], start) == length
                assert bytes(view) == content[start : start + length]
                view.release()
        finally:
            os.close(fd)
    assert (place.src / "file").read_bytes() == content


def test_copies_in_the_mount_are_equal(place: Tree) -> None:
    content = noise(5 * MIB + 13, 7)
    (place.mnt / "original").write_bytes(content)
    shutil.copyfile(place.mnt / "original", place.mnt / "copy")
    with opened(place.mnt / "original", os.O_RDONLY) as one:
        with opened(place.mnt / "ranged", os.O_WRONLY | os.O_CREAT) as other:
            left = len(content)
            while left:
                copied = os.copy_file_range(one, other, left)
                assert copied > 0
                left -= copied
        with opened(place.mnt / "sent", os.O_WRONLY | os.O_CREAT) as other:
            offset = 0
            while sent := os.sendfile(other, one, offset, 1_000_003):
                offset += sent
    for name in ("copy", "ranged", "sent"):
        assert (place.src / name).read_bytes() == content, name
        drop_pages(place.mnt / name)
        assert (place.mnt / name).read_bytes() == content, name


def test_shared_mappings_of_many_processes(place: Tree) -> None:
    size = PROCESSES * 300_000
    (place.mnt / "file").write_bytes(bytes(size))

    def store(process: int) -> None:
        with opened(place.mnt / "file", os.O_RDWR) as fd, mmap.mmap(fd, size) as view:
            for position in range(process, size, PROCESSES):
                view[position] = process + 1
            view.flush()

    run_together((store, (process,)) for process in range(PROCESSES))
    expected = bytes(range(1, PROCESSES + 1)) * (size // PROCESSES)
    assert (place.mnt / "file").read_bytes() == expected
    assert (place.src / "file").read_bytes() == expected


def test_truncation_between_writes_leaves_zeros(place: Tree) -> None:
    """A model of one file in memory; every step is compared."""
    choice = random.Random(9)
    model = bytearray()
    with opened(place.mnt / "file", os.O_RDWR | os.O_CREAT) as fd:
        for step in range(300):
            how = choice.randrange(4)
            start = choice.randrange(400_000)
            if how == 0:
                os.ftruncate(fd, start)
                model = model[:start].ljust(start, b"\0")
            elif how in (1, 2):
                piece = choice.randbytes(choice.choice((1, 999, 4096, 150_000)))
                os.pwrite(fd, piece, start)
                model = model.ljust(start, b"\0")
                model[start : start + len(piece)] = piece
            else:
                assert os.pread(fd, 100_000, start) == model[start : start + 100_000], step
            assert os.fstat(fd).st_size == len(model), step
    assert (place.mnt / "file").read_bytes() == model
    assert (place.src / "file").read_bytes() == model


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_some_hundred_mib_at_once(place: Tree) -> None:
    block = noise(4 * MIB - 3, 11)
    blocks = 25

    def write(process: int) -> str:
        found = hashlib.sha256()
        with opened(place.mnt / f"{process}", os.O_WRONLY | os.O_CREAT) as fd:
            for number in range(blocks):
                piece = b"%d %d " % (process, number) + block
                found.update(piece)
                view = memoryview(piece)
                while view:
                    view = view[os.write(fd, view) :]
        return found.hexdigest()

    processes = 3
    expected = run_together((write, (process,)) for process in range(processes))
    for process in range(processes):
        drop_pages(place.mnt / f"{process}")
    assert run_together((digest, (place.mnt / f"{process}",)) for process in range(processes)) == expected
    assert run_together((digest, (place.src / f"{process}",)) for process in range(processes)) == expected
