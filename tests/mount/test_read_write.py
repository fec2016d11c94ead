"""read and write: each byte is at its place for any size, offset and flags."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import threading
from pathlib import Path

import pytest

from tests.expect import fails, outcome, pattern, same_status, start_python
from tests.server import Server, Tree
from tests.syscalls import opened

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
SIZES = (
    0, 1, 511, 4095, 4096, 4097, 65_535, 65_536, 65_537, 128 * KIB - 1, 128 * KIB, 128 * KIB + 1,
    MIB - 4096, MIB - 1, MIB, MIB + 1, MIB + 4096, 5 * MIB + 3,
)  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_written_through_the_mount(tree: Tree, size: int) -> None:
    content = pattern(size, size)
    with opened(tree.mnt / "file", os.O_CREAT | os.O_WRONLY) as descriptor:
        assert os.write(descriptor, content) == size
    same_status(tree.mnt / "file", tree.src / "file")
    assert (tree.src / "file").read_bytes() == content
    assert (tree.mnt / "file").read_bytes() == content


@pytest.mark.parametrize("size", SIZES)
def test_read_through_the_mount(tree: Tree, size: int) -> None:
    content = pattern(size, size)
    (tree.src / "file").write_bytes(content)
    with opened(tree.mnt / "file", os.O_RDONLY) as descriptor:
        assert os.read(descriptor, size + 10_000) == content
        assert os.read(descriptor, 10_000) == b""
    same_status(tree.mnt / "file", tree.src / "file")


@pytest.mark.parametrize("chunk", [1, 7, 4096, 4097, 100_003])
def test_in_chunks_of_any_size(tree: Tree, chunk: int) -> None:
    content = pattern(min(chunk * 500, 3 * MIB + 17))
    with opened(tree.mnt / "file", os.O_CREAT | os.O_WRONLY) as descriptor:
        for start in range(0, len(content), chunk):
            os.write(descriptor, content[start : start + chunk])
    assert (tree.src / "file").read_bytes() == content
    with opened(tree.mnt / "file", os.O_RDONLY) as descriptor:
        parts = []
        while part := os.read(descriptor, chunk):
            parts.append(part)
    assert b"".join(parts) == content


def test_around_the_end_of_the_file(tree: Tree) -> None:
    (tree.src / "file").write_bytes(b"0123456789")
    with opened(tree.mnt / "file", os.O_RDONLY) as descriptor:
        assert os.pread(descriptor, 5, 8) == b"89"
        assert os.pread(descriptor, 5, 9) == b"9"
        assert os.pread(descriptor, 5, 10) == b""
        assert os.pread(descriptor, 5, 11) == b""
        assert os.pread(descriptor, 100, 5 * GIB) == b""
        assert os.pread(descriptor, 0, 0) == b""
        assert os.pread(descriptor, 100, 2**62) == b""


def test_writing_nothing(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        assert os.write(descriptor, b"") == 0
        assert os.pwrite(descriptor, b"", 1000) == 0
        assert os.fstat(descriptor).st_size == 0
    assert os.stat(tree.src / "file").st_size == 0


def test_at_odd_offsets(tree: Tree) -> None:
    content = bytearray(300_000)
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        for offset, size in ((0, 1), (1, 2), (4095, 2), (4097, 8191), (70_001, 130_001), (299_999, 1), (12_345, 0)):
            data = pattern(size, offset)
            assert os.pwrite(descriptor, data, offset) == size
            content[offset : offset + size] = data
            assert os.pread(descriptor, size, offset) == data
        assert os.pread(descriptor, 400_000, 0) == content
    assert (tree.src / "file").read_bytes() == content


def test_scattered_buffers(tree: Tree) -> None:
    pieces = [pattern(size, size) for size in (1, 4096, 10_000, 3)]
    whole = b"".join(pieces)
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        assert os.writev(descriptor, pieces) == len(whole)
        assert os.pwritev(descriptor, pieces, 50_000) == len(whole)
        buffers = [bytearray(5), bytearray(9000), bytearray(10_000)]
        assert os.preadv(descriptor, buffers, 50_000) == len(whole)
        assert b"".join(buffers)[: len(whole)] == whole
    assert (tree.src / "file").read_bytes() == whole.ljust(50_000, b"\0") + whole


def test_random_operations_against_a_model(tree: Tree) -> None:
    chance = random.Random(42)
    model = bytearray()
    descriptors = [
        os.open(tree.mnt / "file", os.O_CREAT | os.O_RDWR),
        os.open(tree.mnt / "file", os.O_RDWR),
        os.open(tree.mnt / "file", os.O_RDWR | os.O_SYNC),
    ]
    try:
        for step in range(1500):
            descriptor = chance.choice(descriptors)
            offset = chance.randrange(200_000)
            size = chance.choice((1, 13, 4096, 5000, 70_000))
            action = chance.randrange(10)
            if action < 4:
                data = pattern(size, step)
                assert os.pwrite(descriptor, data, offset) == size
                if offset > len(model):
                    model.extend(bytes(offset - len(model)))
                model[offset : offset + size] = data
            elif action < 9:
                assert os.pread(descriptor, size, offset) == model[offset : offset + size], f"step {step}"
            else:
                os.ftruncate(descriptor, offset)
                del model[offset:]
                model.extend(bytes(offset - len(model)))
            assert os.fstat(descriptor).st_size == len(model)
        assert (tree.src / "file").read_bytes() == model
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_written_by_one_descriptor_read_by_another(tree: Tree) -> None:
    with (
        opened(tree.mnt / "file", os.O_CREAT | os.O_WRONLY) as writer,
        opened(tree.mnt / "file", os.O_RDONLY) as reader,
    ):
        for number in range(100):
            os.write(writer, b"%06d" % number)
            assert os.read(reader, 100) == b"%06d" % number
            assert os.read(reader, 100) == b""


@pytest.mark.at_once("the kernel does not ask for blocks again when it has written")
def test_hole_reads_as_zeros_and_takes_no_space(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        os.pwrite(descriptor, b"end", 20 * MIB)
        assert os.pread(descriptor, 4096, 10 * MIB) == bytes(4096)
        assert os.pread(descriptor, 100, 20 * MIB - 5) == bytes(5) + b"end"
        assert os.fstat(descriptor).st_size == 20 * MIB + 3
    status = os.stat(tree.mnt / "file")
    assert status.st_blocks * 512 < MIB
    same_status(tree.mnt / "file", tree.src / "file")
    with opened(tree.mnt / "file", os.O_RDWR) as descriptor:
        os.pwrite(descriptor, bytes(MIB), 5 * MIB)
        os.fsync(descriptor)
        assert os.fstat(descriptor).st_blocks == os.stat(tree.src / "file").st_blocks >= 2048


@pytest.mark.parametrize("offset", [4 * GIB - 3, 4 * GIB, 2**40 + 12_345, 2**43 + 1], ids=hex)
@pytest.mark.by_workers
def test_beyond_four_gibibytes(tree: Tree, offset: int) -> None:
    data = pattern(10_000, 5)
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        os.pwrite(descriptor, b"start", 0)
        assert os.pwrite(descriptor, data, offset) == 10_000
        assert os.pread(descriptor, 20_000, offset) == data
        assert os.pread(descriptor, 10, offset - 5) == bytes(5) + data[:5]
        assert os.lseek(descriptor, 0, os.SEEK_END) == offset + 10_000
    assert os.stat(tree.mnt / "file").st_size == offset + 10_000
    with opened(tree.src / "file", os.O_RDONLY) as descriptor:
        assert os.pread(descriptor, 20_000, offset) == data
        # An offset that is cut to 32 bits would be here.
        assert os.pread(descriptor, 10, 0) == b"start" + bytes(5)
    same_status(tree.mnt / "file", tree.src / "file")
    os.truncate(tree.mnt / "file", 4 * GIB + 1)
    assert os.stat(tree.src / "file").st_size == 4 * GIB + 1


def test_beyond_the_maximum_file_size_of_the_source(tree: Tree) -> None:
    for offset in (2**63 - 10, 2**63 - 2**20, 2**50):
        outcomes = []
        for path in (tree.src / "reference", tree.mnt / "file"):
            with opened(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC) as descriptor:
                outcomes.append(outcome(os.pwrite, descriptor, b"x" * 100, offset))
        assert outcomes[0] == outcomes[1]
        assert os.stat(tree.src / "file").st_size == os.stat(tree.src / "reference").st_size


def test_file_size_limit_of_the_caller_applies(tree: Tree) -> None:
    script = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
import os
fd = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
print(os.write(fd, b"x" * 8000))
try:
    os.write(fd, b"y")
except OSError as error:
    print(error.errno)
"""
    limited = start_python(script, tree.mnt / "file")
    assert limited.communicate(timeout=20)[0].split() == ["5000", str(errno.EFBIG)]
    assert os.stat(tree.src / "file").st_size == 5000


def test_file_positions(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"0123456789")
    with opened(tree.mnt / "file", os.O_RDWR) as descriptor:
        assert os.lseek(descriptor, 4, os.SEEK_SET) == 4
        assert os.read(descriptor, 2) == b"45"
        assert os.lseek(descriptor, -1, os.SEEK_CUR) == 5
        assert os.lseek(descriptor, -3, os.SEEK_END) == 7
        assert os.read(descriptor, 100) == b"789"
        assert os.lseek(descriptor, 100, os.SEEK_END) == 110
        assert os.read(descriptor, 1) == b""
        os.write(descriptor, b"far")
        with fails(errno.EINVAL):
            os.lseek(descriptor, -1, os.SEEK_SET)
        with fails(errno.EINVAL):
            os.pread(descriptor, 1, -1)
    assert (tree.src / "file").read_bytes() == b"0123456789" + bytes(100) + b"far"


def test_read_of_a_directory_gives_eisdir(tree: Tree) -> None:
    with opened(tree.mnt, os.O_RDONLY) as descriptor:
        with fails(errno.EISDIR):
            os.read(descriptor, 10)
        with fails(errno.EBADF):
            os.write(descriptor, b"x")


def test_append(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"start")
    with opened(tree.mnt / "file", os.O_RDWR | os.O_APPEND) as descriptor:
        os.write(descriptor, b" one")
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, b" two")
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == 13
        # Linux appends even with an offset (man pwrite, BUGS).
        assert os.pwrite(descriptor, b" three", 0) == 6
        assert os.pread(descriptor, 100, 0) == b"start one two three"
        os.ftruncate(descriptor, 2)
        os.write(descriptor, b"!")
    assert (tree.src / "file").read_bytes() == b"st!"


@pytest.mark.own_loop  # llfuse does not pass on the flags of a WRITE request
@pytest.mark.by_workers
def test_append_switched_on_and_off_while_open(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        plain = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        os.write(descriptor, b"0123456789")
        fcntl.fcntl(descriptor, fcntl.F_SETFL, plain | os.O_APPEND)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, b"end")
        assert (tree.src / "file").read_bytes() == b"0123456789end"
        fcntl.fcntl(descriptor, fcntl.F_SETFL, plain)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, b"AB")
        assert (tree.src / "file").read_bytes() == b"AB23456789end"
    with opened(tree.mnt / "file", os.O_RDWR | os.O_APPEND) as descriptor:
        appending = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, appending & ~os.O_APPEND)
        os.pwrite(descriptor, b"CD", 2)
        assert (tree.src / "file").read_bytes() == b"ABCD456789end"
        fcntl.fcntl(descriptor, fcntl.F_SETFL, appending)
        os.pwrite(descriptor, b".", 0)
    assert (tree.src / "file").read_bytes() == b"ABCD456789end."


def test_two_processes_append(tree: Tree) -> None:
    script = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
sys.stdin.readline()
for number in range(1000):
    line = b"%s %04d " % (os.fsencode(sys.argv[2]), number)
    line = line.ljust(50 + number * 7 % 300, b".") + b"\\n"
    assert os.write(fd, line) == len(line)
"""
    writers = [start_python(script, tree.mnt / "log", name) for name in ("first", "second")]
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=40)
        assert writer.returncode == 0
    for content in ((tree.src / "log").read_bytes(), (tree.mnt / "log").read_bytes()):
        lines = content.splitlines()
        assert len(lines) == 2000
        for name in (b"first", b"second"):
            own = [line for line in lines if line.startswith(name)]
            assert [int(line.split()[1]) for line in own] == list(range(1000))
            assert all(len(line) == 50 + number * 7 % 300 for number, line in enumerate(own))


@pytest.mark.at_once("the kernel takes its own word for sizes and times of a file that it knows")
@pytest.mark.own_loop  # the write handler of llfuse does not learn that the file is open for appending
def test_append_in_mount_and_source(tree: Tree) -> None:
    with (
        opened(tree.mnt / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND) as through,
        opened(tree.src / "log", os.O_WRONLY | os.O_APPEND) as directly,
    ):
        for number in range(20):
            os.write(through, b"m%02d " % number)
            os.write(directly, b"s%02d " % number)
    expected = b"".join(b"m%02d s%02d " % (number, number) for number in range(20))
    assert (tree.src / "log").read_bytes() == expected


def test_threads_write_their_own_regions(tree: Tree) -> None:
    region, rounds = 100_003, 20
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with opened(tree.mnt / "file", os.O_RDWR) as descriptor:
                for turn in range(rounds):
                    data = pattern(region, number * 1000 + turn)
                    assert os.pwrite(descriptor, data, number * region) == region
                    assert os.pread(descriptor, region, number * region) == data
        except BaseException as failure:
            failures.append(failure)

    (tree.mnt / "file").touch()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    expected = b"".join(pattern(region, number * 1000 + rounds - 1) for number in range(6))
    assert (tree.src / "file").read_bytes() == expected


def test_sendfile_and_splice(tree: Tree) -> None:
    content = pattern(700_001)
    (tree.mnt / "from").write_bytes(content)
    with opened(tree.mnt / "from", os.O_RDONLY) as source, opened(tree.mnt / "to", os.O_CREAT | os.O_WRONLY) as target:
        sent = 0
        while count := os.sendfile(target, source, sent, len(content)):
            sent += count
    assert sent == len(content)
    assert (tree.src / "to").read_bytes() == content
    reading, writing = os.pipe()
    try:
        with (
            opened(tree.mnt / "from", os.O_RDONLY) as source,
            opened(tree.mnt / "spliced", os.O_CREAT | os.O_WRONLY) as target,
        ):
            moved = 0
            while count := os.splice(source, writing, 65_536):
                while count:
                    done = os.splice(reading, target, count)
                    count -= done
                    moved += done
    finally:
        os.close(reading)
        os.close(writing)
    assert moved == len(content)
    assert (tree.src / "spliced").read_bytes() == content


@pytest.mark.at_once("the kernel takes its own word for sizes and times of a file that it knows")
def test_write_updates_the_times(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"x")
    os.utime(tree.mnt / "file", ns=(1, 1))
    with opened(tree.mnt / "file", os.O_WRONLY) as descriptor:
        os.write(descriptor, b"y")
        assert os.fstat(descriptor).st_mtime_ns == os.stat(tree.src / "file").st_mtime_ns > 10**18
    same_status(tree.mnt / "file", tree.src / "file")


@pytest.mark.mounted
@pytest.mark.own_loop
def test_read_ahead_is_larger_for_root(server: Server) -> None:
    if os.geteuid():
        pytest.skip("only root may say how far")
    device = server.mountpoint.stat().st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    assert int(setting.read_text()) >= 512
