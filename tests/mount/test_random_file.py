"""Random calls on a file, compared with a model of it in memory, and at the end with the source.

LLLOOP_RANDOM_SECONDS makes each test run for so long, with a new seed every few hundred calls.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.syscalls import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, fallocate, opened

PAGE = mmap.PAGESIZE
LARGEST = 1 << 19  # the maximum size of a file in bytes
CALLS = 300  # the number of calls for one seed
SEEDS = (1, 2, 3)
SECONDS = float(os.environ.get("LLLOOP_RANDOM_SECONDS", "0"))
MODES = (
    *("", "--cache always", "--cache never", "--writeback", "--io auto"),
    pytest.param("--io kernel", marks=pytest.mark.root),
)

pytestmark = [pytest.mark.mounted, pytest.mark.own_loop, pytest.mark.timeout(120 + 3 * SECONDS)]
NOT_HERE = (errno.EOPNOTSUPP, errno.EINVAL, errno.EXDEV)


def seeds() -> Iterator[int]:
    yield from SEEDS
    if SECONDS:
        stop = time.monotonic() + SECONDS
        while time.monotonic() < stop:
            yield random.SystemRandom().randrange(1 << 32)


class File:
    """A file, its model, and its open descriptors."""

    def __init__(self, path: Path, chance: random.Random) -> None:
        self.path = path
        self.chance = chance
        self.model = bytearray()
        self.descriptors: dict[str, int] = {}
        self.mapped: mmap.mmap | None = None
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC))

    def open_again(self) -> None:
        self.close()
        for name, flags in (
            ("both", os.O_RDWR),
            ("read", os.O_RDONLY),
            ("write", os.O_WRONLY),
            ("append", os.O_WRONLY | os.O_APPEND),
            ("sync", os.O_RDWR | os.O_DSYNC),
            ("direct", os.O_RDWR | os.O_DIRECT),
        ):
            if self.chance.random() < 0.7 or name == "both":
                with contextlib.suppress(OSError):  # some file systems lack O_DIRECT
                    self.descriptors[name] = os.open(self.path, flags)

    def map_again(self) -> None:
        self.unmap()
        if self.model:
            self.mapped = mmap.mmap(self.descriptors["both"], len(self.model))

    def unmap(self) -> None:
        if self.mapped is not None:
            self.mapped.close()
            self.mapped = None

    def close(self) -> None:
        if self.chance.random() < 0.5:
            self.unmap()  # otherwise it outlives the descriptors
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])

    def pick(self, *names: str) -> int:
        return self.descriptors[self.chance.choice([name for name in names if name in self.descriptors])]

    def range(self, longest: int = 1 << 18, limit: int = LARGEST) -> tuple[int, int]:
        """Offset and length, short ones being the most likely."""
        chance = self.chance
        length = int(min(longest, limit) ** chance.random())
        offset = chance.randrange(limit - length + 1)
        if chance.random() < 0.3:
            offset = offset // PAGE * PAGE
        return offset, length

    def in_mapping(self) -> tuple[int, int]:
        assert self.mapped is not None
        return self.range(limit=min(len(self.mapped), len(self.model)))

    def can_use_mapping(self) -> bool:
        return self.mapped is not None and len(self.model) > 0

    def enter(self, offset: int, data: bytes) -> None:
        if offset > len(self.model):
            self.model.extend(bytes(offset - len(self.model)))
        self.model[offset : offset + len(data)] = data


class Comparison:
    """Makes random calls on two files, and compares their results with the models."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.files = [File(directory / name, self.chance) for name in ("one", "two")]
        for file in self.files:
            file.open_again()
        # O_DIRECT requires alignment.
        self.buffer = mmap.mmap(-1, 1 << 18)
        self.done: list[str] = []

    def data(self, length: int) -> bytes:
        return self.chance.randbytes(length)

    def run(self, calls: int) -> None:
        doings: list[Callable[[File], str]] = [
            *[self.read, self.write, self.load, self.store] * 4,
            *[self.append, self.truncate, self.seek, self.write_directly, self.read_directly] * 2,
            self.punch,
            self.zero,
            self.allocate,
            self.copy,
            self.synchronize,
            self.drop,
            self.open_again,
            self.map_again,
        ]
        for _ in range(calls):
            file = self.files[self.chance.random() < 0.2]
            doing = self.chance.choice(doings)
            try:
                said = doing(file)
            except AssertionError as error:
                raise AssertionError(
                    f"{file.path.name}: {doing.__name__} {error}\n" + "\n".join(self.done[-25:])
                ) from None
            self.done.append(f"{file.path.name}: {doing.__name__} {said}")

    def check(self, found: bytes, file: File, offset: int, how: str) -> None:
        expected = file.model[offset : offset + len(found)]
        if found != expected:
            where = next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), len(expected))  # noqa: B905
            raise AssertionError(
                f"{how} at {offset}: byte {offset + where} of {len(file.model)} is {bytes(found[where : where + 4])!r},"
                f" not {bytes(expected[where : where + 4])!r}"
            )

    def read(self, file: File) -> str:
        offset, length = file.range()
        descriptor = file.pick("both", "read", "sync")
        found = os.pread(descriptor, length, offset)
        self.check(found, file, offset, "read")
        assert len(found) == max(0, min(length, len(file.model) - offset)), f"{len(found)} bytes at {offset}"
        assert os.fstat(descriptor).st_size == len(file.model)
        return f"{offset}+{length}"

    def write(self, file: File) -> str:
        offset, length = file.range()
        data = self.data(length)
        assert os.pwrite(file.pick("both", "write", "sync"), data, offset) == length
        file.enter(offset, data)
        return f"{offset}+{length}"

    def append(self, file: File) -> str:
        if "append" not in file.descriptors or len(file.model) > LARGEST // 2:
            return "-"
        data = self.data(file.range(1 << 16)[1])
        assert os.write(file.descriptors["append"], data) == len(data)
        file.enter(len(file.model), data)
        return f"{len(data)}"

    def load(self, file: File) -> str:
        if not file.can_use_mapping():
            return "-"
        assert file.mapped is not None
        offset, length = file.in_mapping()
        self.check(file.mapped[offset : offset + length], file, offset, "load")
        return f"{offset}+{length}"

    def store(self, file: File) -> str:
        if not file.can_use_mapping():
            return "-"
        assert file.mapped is not None
        offset, length = file.in_mapping()
        file.mapped[offset : offset + length] = data = self.data(length)
        file.enter(offset, data)
        return f"{offset}+{length}"

    def truncate(self, file: File) -> str:
        size = self.chance.randrange(LARGEST) if self.chance.random() < 0.7 else len(file.model) // 2
        if self.chance.random() < 0.5:
            os.ftruncate(file.pick("both", "write", "append"), size)
        else:
            os.truncate(file.path, size)
        del file.model[size:]
        file.model.extend(bytes(size - len(file.model)))
        assert os.stat(file.path).st_size == size
        return f"{size}"

    def seek(self, file: File) -> str:
        descriptor = file.pick("both", "read")
        end = 0
        while end < len(file.model):
            try:
                start = os.lseek(descriptor, end, os.SEEK_DATA)
            except OSError as error:
                assert error.errno == errno.ENXIO
                start = len(file.model)
            assert not any(file.model[end:start]), f"{end} to {start} is a hole"
            if start == len(file.model):
                break
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
            assert start < end <= len(file.model), f"data from {start} to {end}"
        return ""

    def write_directly(self, file: File) -> str:
        if "direct" not in file.descriptors:
            return "-"
        offset, length = self.in_blocks(file)
        self.buffer[:length] = data = self.data(length)
        with memoryview(self.buffer) as view:
            assert os.pwritev(file.descriptors["direct"], [view[:length]], offset) == length
        file.enter(offset, data)
        return f"{offset}+{length}"

    def read_directly(self, file: File) -> str:
        if "direct" not in file.descriptors:
            return "-"
        offset, length = self.in_blocks(file)
        with memoryview(self.buffer) as view:
            count = os.preadv(file.descriptors["direct"], [view[:length]], offset)
        self.check(self.buffer[:count], file, offset, "read")
        assert count == max(0, min(length, len(file.model) - offset)), f"{count} bytes at {offset}"
        return f"{offset}+{length}"

    def in_blocks(self, file: File) -> tuple[int, int]:
        offset, length = file.range(1 << 17)
        return offset // PAGE * PAGE, (length + PAGE - 1) // PAGE * PAGE

    def punch(self, file: File) -> str:
        return self.clear(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, keeps_size=True)

    def zero(self, file: File) -> str:
        keeps_size = self.chance.random() < 0.5
        return self.clear(file, FALLOC_FL_ZERO_RANGE | keeps_size * FALLOC_FL_KEEP_SIZE, keeps_size=keeps_size)

    def clear(self, file: File, mode: int, *, keeps_size: bool) -> str:
        offset, length = file.range()
        try:
            fallocate(file.pick("both", "write"), mode, offset, length)
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
            return "-"
        if keeps_size:
            length = max(0, min(length, len(file.model) - offset))
        if length:
            file.enter(offset, bytes(length))
        return f"{offset}+{length}"

    def allocate(self, file: File) -> str:
        offset, length = file.range()
        fallocate(file.pick("both", "write"), 0, offset, length)
        file.model.extend(bytes(max(0, offset + length - len(file.model))))
        assert os.stat(file.path).st_size == len(file.model)
        return f"{offset}+{length}"

    def copy(self, file: File) -> str:
        target = self.chance.choice(self.files)
        if not file.model:
            return "-"
        offset, length = file.range(limit=len(file.model))
        to, _ = target.range(limit=LARGEST - length)
        if target is file and abs(offset - to) < length:
            return "-"
        try:
            count = os.copy_file_range(file.pick("both", "read"), target.pick("both", "write"), length, offset, to)
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
            return "-"
        target.enter(to, bytes(file.model[offset : offset + count]))
        return f"{count} bytes from {offset} to {to} of {target.path.name}"

    def synchronize(self, file: File) -> str:
        how = self.chance.choice([os.fsync, os.fdatasync])
        if file.mapped is not None and self.chance.random() < 0.5:
            file.mapped.flush()
        else:
            how(file.pick("both", "read"))
        return ""

    def drop(self, file: File) -> str:
        os.posix_fadvise(file.pick("both", "read"), 0, 0, os.POSIX_FADV_DONTNEED)
        return ""

    def open_again(self, file: File) -> str:
        file.open_again()
        return ""

    def map_again(self, file: File) -> str:
        file.map_again()
        return ""

    def end(self, source: Path) -> None:
        """Compare with the source, and once more with the mount."""
        for file in self.files:
            os.fsync(file.descriptors["both"])
            if file.mapped is not None:
                self.check(file.mapped[: len(file.model)], file, 0, "load at the end")
            content = (source / file.path.name).read_bytes()
            self.check(content, file, 0, "read from the source")
            assert len(content) == len(file.model)
            file.unmap()
            file.close()
            content = file.path.read_bytes()
            self.check(content, file, 0, "read at the end")
            assert len(content) == len(file.model)
            os.unlink(file.path)
        self.buffer.close()


@pytest.mark.parametrize("mode", MODES)
def test_random_calls(serve: Serve, mode: str) -> None:
    server = serve("--workers", "2", *mode.split())
    for seed in seeds():
        comparison = Comparison(server.mountpoint, seed)
        try:
            comparison.run(CALLS)
            comparison.end(server.source)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from None


def test_random_calls_on_the_source(serve: Serve) -> None:
    """Checks the model itself."""
    server = serve()
    for seed in seeds():
        comparison = Comparison(server.source, seed)
        comparison.run(CALLS)
        comparison.end(server.source)


PIECE = 1000  # bytes: neighbours share pages
PIECES = 200


@pytest.mark.parametrize("mode", MODES)
def test_random_calls_of_two_processes(serve: Serve, mode: str) -> None:
    """Each process reads and writes its own parts, which nobody else writes, so it knows their content."""
    server = serve("--workers", "2", *mode.split())
    path = server.mountpoint / "file"
    for seed in SEEDS[:1]:
        path.write_bytes(bytes(PIECE * PIECES))
        command = [sys.executable, "-c", f"from {__name__} import neighbour; neighbour()", str(path), str(seed), mode]
        children = [
            subprocess.Popen([*command, str(own)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
            for own in range(2)
        ]
        try:
            said = [child.communicate(timeout=60 + SECONDS)[0] for child in children]
        finally:
            for child in children:
                child.kill()
        assert [child.returncode for child in children] == [0, 0]
        with opened(path, os.O_RDWR) as descriptor:
            os.fsync(descriptor)
        content = path.read_bytes()
        assert content == (server.source / "file").read_bytes()
        for own in range(2):
            expected = bytes.fromhex(said[own])
            for number in range(own, PIECES, 2):
                piece = slice(number * PIECE, (number + 1) * PIECE)
                assert content[piece] == expected[piece], f"piece {number}"


def neighbour() -> None:
    """One of the two processes; prints the file as far as it knows it."""
    path, seed, mode, own = sys.argv[1:]
    chance = random.Random(int(seed) * 2 + int(own))
    model = bytearray(PIECE * PIECES)
    stop = time.monotonic() + max(SECONDS, 1)
    # Without a page cache, a store and a write to one page race as with O_DIRECT.
    stores = mode != "--cache never"
    calls = 0
    while time.monotonic() < stop:
        with (
            opened(Path(path), os.O_RDWR) as descriptor,
            opened(Path(path), os.O_RDONLY) as reading,
            mmap.mmap(descriptor, len(model)) as mapped,
        ):
            for _ in range(chance.randrange(1, 200)):
                start = (chance.randrange(PIECES // 2) * 2 + int(own)) * PIECE
                first = start + chance.randrange(PIECE)
                piece = slice(first, first + chance.randrange(1, start + PIECE - first + 1))
                doing = chance.randrange(5)
                length = piece.stop - piece.start
                calls += 1
                if doing == 0 or (doing == 1 and not stores):
                    model[piece] = data = chance.randbytes(length)
                    assert os.pwrite(descriptor, data, first) == length
                elif doing == 1:
                    model[piece] = mapped[piece] = chance.randbytes(length)
                elif doing == 2:
                    found = os.pread(reading, length, first)
                    assert found == model[piece], f"read {calls} at {first}+{length}: {found[:8]!r}"
                elif doing == 3:
                    assert mapped[piece] == model[piece], f"load {calls} at {first}+{length}"
                elif chance.random() < 0.1:
                    os.fsync(descriptor)
    sys.stdout.write(model.hex())
