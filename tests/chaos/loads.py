"""Programs that work in the mount. Each checks every call and, at the end of each round, all of its files.

A load gets its own directory in the mount and in the source, a random number generator, and `more`, which tells
whether to do another round. It always does the first round. It raises an exception if a check fails.
"""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import hashlib
import json
import mmap
import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.as_user import run_together
from tests.programs import Postgres, quiet_environment, run
from tests.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, opened, renameat2


@dataclass(frozen=True)
class Place:
    mnt: Path
    src: Path
    chance: random.Random
    more: Callable[[], bool]
    scratch: Path
    direct: bool  # whether the file system supports O_DIRECT
    size: int  # the number of files in a large tree


Load = Callable[[Place], int]


# Names


def _one_of_each(place: Place, number: int) -> None:
    """Makes each call once. Each must succeed or fail as in a plain directory, and nothing may remain."""
    base = place.mnt / f"names-{number}"
    os.mkdir(base)
    directory = base / "directory"
    os.mkdir(directory)
    _refused(FileExistsError, os.mkdir, directory)
    file = directory / "file"
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
    _refused(FileExistsError, os.open, file, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    content = place.chance.randbytes(place.chance.randrange(5000))
    assert os.write(fd, content) == len(content)
    os.link(file, base / "link")
    _refused(FileExistsError, os.link, file, base / "link")
    assert os.fstat(fd).st_nlink == 2
    os.symlink("directory/file", base / "symlink")
    _refused(FileExistsError, os.symlink, "x", base / "symlink")
    assert os.readlink(base / "symlink") == "directory/file"
    os.mkfifo(base / "fifo")
    os.rename(base / "link", base / "renamed")
    _refused(FileNotFoundError, os.rename, base / "link", base / "renamed")
    (base / "other").write_bytes(b"other")
    renameat2(base / "other", base / "renamed", RENAME_EXCHANGE)
    assert (base / "renamed").read_bytes() == b"other"
    assert (base / "other").read_bytes() == content
    _refused(FileExistsError, renameat2, base / "other", base / "renamed", RENAME_NOREPLACE)
    os.rename(base / "other", base / "renamed")  # replaces another name
    assert (base / "renamed").read_bytes() == content
    assert sorted(os.listdir(base)) == ["directory", "fifo", "renamed", "symlink"]
    _refused(OSError, os.rmdir, directory)
    os.unlink(file)
    _refused(FileNotFoundError, os.unlink, file)
    os.rename(directory, base / "moved")
    os.rmdir(base / "moved")
    _refused(FileNotFoundError, os.rmdir, base / "moved")
    for name in ("fifo", "symlink", "renamed"):
        os.unlink(base / name)
    assert os.pread(fd, 6000, 0) == content, "a file without a name has lost its content"
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)
    os.rmdir(base)


def _refused(kind: type[OSError], function: Callable[..., object], *arguments: object) -> None:
    try:
        function(*arguments)
    except kind:
        return
    raise AssertionError(f"{function.__name__}{arguments} should have failed with {kind.__name__}")


def names(place: Place) -> int:
    count = 0
    while not count or place.more():
        _one_of_each(place, count)
        count += 1
    assert os.listdir(place.src) == []
    return count


def exclusive(place: Place) -> int:
    """Several processes create the same names exclusively: each name is created by exactly one of them."""
    count = 0
    while not count or place.more():
        wanted = [place.mnt / f"{count}-{name}" for name in range(40)]
        got = run_together([(_grab, (wanted, seed)) for seed in range(3)])
        winners = [name for names_of_one in got for name in names_of_one]
        assert sorted(winners) == sorted(map(str, wanted)), f"{len(winners)} of {len(wanted)} names were got"
        for path in wanted:
            os.rmdir(path) if path.is_dir() else os.unlink(path)
        count += 1
    return count


def _grab(wanted: list[Path], seed: int) -> list[str]:
    got = []
    for path in random.Random(seed).sample(wanted, len(wanted)):
        with contextlib.suppress(FileExistsError):
            if int(path.name.split("-")[1]) % 2:
                os.mkdir(path)
            else:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            got.append(str(path))
    return got


def xattrs(place: Place) -> int:
    path = place.mnt / "file"
    path.touch()
    count = 0
    while not count or place.more():
        names_and_values = {f"user.{number}": place.chance.randbytes(50) for number in range(8)}
        for name, value in names_and_values.items():
            os.setxattr(path, name, value, os.XATTR_CREATE)
            _refused(FileExistsError, os.setxattr, path, name, b"x", os.XATTR_CREATE)
            value = names_and_values[name] = value[::-1]
            os.setxattr(path, name, value, os.XATTR_REPLACE)
        assert {name: os.getxattr(path, name) for name in os.listxattr(path)} == names_and_values
        for name in names_and_values:
            os.removexattr(path, name)
            _refused(OSError, os.removexattr, path, name)
        count += 1
    return count


def walks(place: Place) -> int:
    """Lists directories too long for one reply, and removes entries while listing."""
    count = 0
    while not count or place.more():
        top = place.mnt / f"walk-{count}"
        os.mkdir(top)
        expected = set()
        for number in range(700):
            name = f"a file with quite a long name, number {number}"
            os.close(os.open(top / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            expected.add(name)
        for deep in ("one", "one/two", "one/two/three"):
            os.mkdir(top / deep)
        expected.add("one")
        for _ in range(5):
            listed = os.listdir(top)
            assert len(listed) == len(expected) and set(listed) == expected
            with os.scandir(top) as entries:
                assert {entry.name: entry.stat().st_size for entry in entries if entry.is_file()} == dict.fromkeys(
                    expected - {"one"}, 0
                )
        run("rm", "-r", top)
        assert not top.exists()
        count += 1
    assert os.listdir(place.src) == []
    return count


# Data


def _append(path: Path, who: int, lines: int, size: int) -> None:
    with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        for number in range(lines):
            line = f"{who} {number} ".encode().ljust(size - 1, b"." if number % 2 else b"-") + b"\n"
            assert os.write(fd, line) == size


def appends(place: Place) -> int:
    """Several processes append small and large lines: each line is there once, and those of a process in order."""
    count = 0
    while not count or place.more():
        path = place.mnt / f"log-{count}"
        path.touch()
        loggers = [(size, 150) for size in (40, 40, 3000)] + [(150_000, 12)]
        run_together([(_append, (path, who, lines, size)) for who, (size, lines) in enumerate(loggers)])
        found: dict[int, list[int]] = {}
        for line in path.read_bytes().splitlines():
            who, number = map(int, line.split()[:2])
            assert len(line) == loggers[who][0] - 1, f"a line of {who} has {len(line)} bytes"
            found.setdefault(who, []).append(number)
        for who, (_, lines) in enumerate(loggers):
            assert found[who] == list(range(lines)), f"lines of {who}: {found[who]}"
        os.unlink(path)
        count += 1
    return count


def unlinked(place: Place) -> int:
    """Reads and writes files that are unlinked while open, and files that never had a name."""
    count = 0
    while not count or place.more():
        files = []
        for number in range(20):
            if number % 4 == 0:
                fd = os.open(place.mnt, os.O_RDWR | os.O_TMPFILE)
            else:
                path = place.mnt / f"unlinked-{number}"
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                if number % 4 == 1:
                    os.unlink(path)
                elif number % 4 == 2:
                    (place.mnt / "another").write_bytes(b"")
                    os.rename(place.mnt / "another", path)
                    os.unlink(path)
            files.append((fd, bytearray()))
        for _ in range(10):
            for fd, content in files:
                piece = place.chance.randbytes(place.chance.choice([10, 3000, 120_000]))
                at = place.chance.randrange(len(content) + 1)
                assert os.pwrite(fd, piece, at) == len(piece)
                content[at : at + len(piece)] = piece
                assert os.fstat(fd).st_size == len(content)
        for fd, content in files:
            os.ftruncate(fd, len(content) // 2)
            os.fsync(fd)
            assert os.pread(fd, len(content), 0) == content[: len(content) // 2], "a file without a name differs"
            os.close(fd)
        for number in range(3, 20, 4):
            os.unlink(place.mnt / f"unlinked-{number}")
        count += 1
    assert os.listdir(place.src) == []
    return count


def mappings(place: Place) -> int:
    size = 1 << 20
    count = 0
    while not count or place.more():
        path = place.mnt / f"mapped-{count}"
        with opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
            os.ftruncate(fd, size)
            with mmap.mmap(fd, size) as memory:
                expected = bytearray(size)
                for _ in range(100):
                    at = place.chance.randrange(size - 5000)
                    piece = place.chance.randbytes(place.chance.randrange(5000))
                    memory[at : at + len(piece)] = piece
                    expected[at : at + len(piece)] = piece
                    if place.chance.random() < 0.2:
                        memory.flush()
                assert memory[:] == expected
                memory.flush()
        assert path.read_bytes() == expected, "what was mapped differs from what is read"
        assert (place.src / path.name).read_bytes() == expected, "what was mapped is not in the source"
        os.unlink(path)
        count += 1
    return count


def _count_up(path: Path, times: int, lock: Callable[[int, int], None]) -> None:
    with opened(path, os.O_RDWR) as fd:
        for _ in range(times):
            lock(fd, fcntl.LOCK_EX)
            value = int(os.pread(fd, 20, 0))
            assert os.pwrite(fd, b"%020d" % (value + 1), 0) == 20
            lock(fd, fcntl.LOCK_UN)


def locks(place: Place) -> int:
    count = 0
    while not count or place.more():
        for lock in (fcntl.flock, fcntl.lockf):
            path = place.mnt / "counter"
            path.write_bytes(b"%020d" % 0)
            run_together([(_count_up, (path, 60, lock))] * 3)
            assert int(path.read_bytes()) == 180
        count += 1
    return count


def direct(place: Place) -> int:
    """Reads and writes blocks with O_DIRECT."""
    block, blocks = 4096, 128
    flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if place.direct else 0)
    path = place.mnt / "direct"
    count = 0
    with opened(path, flags) as fd, mmap.mmap(-1, block * blocks) as memory:
        expected = bytearray(block * blocks)
        assert os.pwritev(fd, [memory], 0) == len(memory)
        while not count or place.more():
            for _ in range(40):
                at, length = place.chance.randrange(blocks), place.chance.choice([1, 4, 40])
                length = min(length, blocks - at) * block
                at *= block
                with mmap.mmap(-1, length) as piece:
                    piece[:] = place.chance.randbytes(length)
                    assert os.pwritev(fd, [piece], at) == length
                    expected[at : at + length] = piece
                    at, length = at // 2 // block * block, length
                    assert os.preadv(fd, [piece], at) == length
                    assert piece[:] == expected[at : at + length], f"read at {at} differs"
            count += 1
    assert (place.src / "direct").read_bytes() == expected
    return count


def ranges(place: Place) -> int:
    """Preallocates, punches holes, shifts ranges, copies within the source, truncates: each must happen once."""
    count = 0
    while not count or place.more():
        with (
            opened(place.mnt / "from", os.O_RDWR | os.O_CREAT) as source,
            opened(place.mnt / "to", os.O_RDWR | os.O_CREAT) as target,
        ):
            content = place.chance.randbytes(300_000)
            assert os.pwrite(source, content, 0) == len(content)
            for _ in range(10):
                os.ftruncate(target, 0)
                copied = 0
                while copied < len(content):
                    done = os.copy_file_range(source, target, len(content) - copied, copied, copied)
                    assert done > 0
                    copied += done
                os.posix_fallocate(target, 0, 400_000)
                assert os.pread(target, 500_000, 0) == content + bytes(100_000)
                assert os.lseek(target, 0, os.SEEK_END) == 400_000
                os.truncate(place.mnt / "to", 1000)
                assert os.pread(target, 5000, 0) == content[:1000]
        count += 1
    return count


def _flood(path: Path, data: bytes) -> None:
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        assert os.pwrite(fd, data, 0) == len(data)
        os.fsync(fd)


def floods(place: Place) -> int:
    """More concurrent large writes than there are pipes, and slots that were used before."""
    count = 0
    while not count or place.more():
        paths = [place.mnt / f"flood-{number}" for number in range(48)]
        data = [place.chance.randbytes(place.chance.choice([9000, 131_072, 524_288])) for _ in paths]
        with ThreadPoolExecutor(len(paths)) as pool:
            list(pool.map(_flood, paths, data))
        for path, expected in zip(paths, data, strict=True):
            assert (place.src / path.name).read_bytes() == expected, f"{path.name} differs"
            os.unlink(path)
        count += 1
    return count


# Programs


def git(place: Place) -> int:
    identity = {"NAME": "A U Thor", "EMAIL": "author@example.com"}
    people = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in identity.items()}
    env = {**quiet_environment(place.scratch), **people, "GIT_CONFIG_NOSYSTEM": "1"}
    count = 0
    while not count or place.more():
        work = place.mnt / f"git-{count}"
        run("git", "init", "-q", "-b", "main", work, env=env)
        for commit in range(4):
            for number in range(25):
                path = work / f"directory-{number % 5}" / f"file-{place.chance.randrange(40)}"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(place.chance.randbytes(place.chance.randrange(3000)))
            run("git", "-C", work, "add", ".", env=env)
            run("git", "-C", work, "commit", "-q", "-m", f"Commit {commit}", env=env)
        run("git", "-C", work, "gc", "-q", "--prune=now", env=env)
        run("git", "-C", work, "fsck", "--full", "--strict", env=env)
        assert run("git", "-C", work, "status", "--porcelain", env=env) == ""
        assert run("git", "-C", work, "rev-list", "--count", "HEAD", env=env).strip() == "4"
        run("git", "-C", place.src / work.name, "fsck", "--full", "--strict", env=env)
        run("rm", "-rf", work)
        count += 1
    assert os.listdir(place.src) == []
    return count


def archive(place: Place) -> int:
    """Unpacks, compares, copies and removes a tree of many files."""
    original = place.scratch / "original"
    for number in range(place.size):
        path = original / f"{number % 7}" / f"{number % 61}" / f"file {number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(place.chance.randbytes(place.chance.choice([0, 100, 5000])))
    (original / "large").write_bytes(place.chance.randbytes(3 << 20))
    os.link(original / "large", original / "hard link")
    os.symlink("large", original / "symbolic link")
    packed = place.scratch / "packed.tar"
    run("tar", "-C", original, "-cf", packed, ".")
    count = 0
    while not count or place.more():
        unpacked = place.mnt / f"unpacked-{count}"
        os.mkdir(unpacked)
        run("tar", "-C", unpacked, "-xpf", packed)
        for side in (unpacked, place.src / unpacked.name):
            run("diff", "-r", original, side)
        run("cp", "-a", unpacked, place.mnt / "copy")
        run("diff", "-r", original, place.mnt / "copy")
        run("rm", "-rf", unpacked, place.mnt / "copy")
        count += 1
    assert os.listdir(place.src) == []
    return count


def _insert(path: Path, who: int, rows: int) -> None:
    connection = sqlite3.connect(path, timeout=120, isolation_level=None)
    connection.execute("PRAGMA synchronous=NORMAL")
    for row in range(rows):
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (who, row, f"{who}:{row} " * 40))
        connection.execute("UPDATE counter SET value = value + 1")
        connection.execute("COMMIT")
    connection.close()


def database(place: Place) -> int:
    writers, rows = 3, 25
    count = 0
    while not count or place.more():
        for journal in ("delete", "wal"):
            path = place.mnt / f"{journal}-{count}.sqlite"
            connection = sqlite3.connect(path, timeout=120)
            connection.execute(f"PRAGMA journal_mode={journal}")
            connection.executescript(
                "CREATE TABLE entries (writer, row, content, PRIMARY KEY (writer, row));"
                "CREATE TABLE counter (value); INSERT INTO counter VALUES (0);"
            )
            connection.close()
            run_together([(_insert, (path, who, rows)) for who in range(writers)])
            for side in (path, place.src / path.name):
                connection = sqlite3.connect(side)
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                assert connection.execute("SELECT value FROM counter").fetchall() == [(writers * rows,)]
                assert connection.execute("SELECT count(*) FROM entries").fetchall() == [(writers * rows,)]
                connection.close()
            for left in place.mnt.glob(f"{path.name}*"):
                left.unlink()
        count += 1
    return count


def postgres(place: Place) -> int:
    """A database server in the mount crashes and recovers; its pages have checksums."""
    scratch = Path(tempfile.mkdtemp(prefix="llloop-pg-", dir="/tmp"))  # a socket's path has at most 107 bytes
    count = 0
    try:
        while not count or place.more():
            home = place.mnt / f"{count}"
            home.mkdir()
            server = Postgres(home, scratch)
            server.program(
                "initdb", "-D", server.data, "-U", "tester", "--auth=trust", "--data-checksums", "--no-locale"
            )
            try:
                server.start()
                server.bench("-i", "-q", "-s", "1")
                server.bench("-c", "3", "-j", "1", "-t", "50")
                server.stop("immediate")
                server.start()
                assert server.query("SELECT count(*) FROM pgbench_history") == "150"
                balances = (
                    "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)"
                )
                assert server.query(balances) == "t"
                server.stop("fast")
            finally:
                if server.running():
                    server.stop("immediate")
            for side in (home, place.src / home.name):
                assert "Bad checksums:  0" in server.program("pg_checksums", "--check", "-D", side / "data")
            run("rm", "-rf", home)
            count += 1
    finally:
        shutil.rmtree(scratch)
    return count


FIO_JOBS = (
    ["--ioengine=psync", "--rw=randrw", "--bsrange=512-128k", "--bs_unaligned"],
    ["--ioengine=mmap", "--rw=randwrite", "--bs=4k"],
    ["--ioengine=pvsync2", "--rw=write", "--bs=1m", "--fsync=8"],
    ["--ioengine=libaio", "--iodepth=8", "--rw=randwrite", "--bsrange=4k-256k"],
)


def fio(place: Place) -> int:
    common = ["--size=4m", "--numjobs=2", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--thread"]
    report = place.scratch / "report.json"
    count = 0
    while not count or place.more():
        for number, job in enumerate(FIO_JOBS):
            jobs = [*job, "--direct=1"] if place.direct and "libaio" in job[0] else job
            name = f"--name=job{number}"
            output = ["--output-format=json", f"--output={report}"]
            run("fio", name, f"--directory={place.mnt}", *common, *jobs, *output, cwd=place.scratch)
            results = json.loads(report.read_text())["jobs"]
            assert all(result["error"] == 0 and result["write"]["total_ios"] > 0 for result in results)
        for path in place.mnt.iterdir():
            assert _digest(path) == _digest(place.src / path.name)
            path.unlink()
        count += 1
    return count


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def copies(place: Place) -> int:
    """Copies a large file within the mount."""
    original = place.mnt / "original"
    original.write_bytes(place.chance.randbytes(8 << 20))
    count = 0
    while not count or place.more():
        for number in range(3):
            run("cp", "--sparse=never", original, place.mnt / f"copy-{number}")
            assert filecmp.cmp(original, place.mnt / f"copy-{number}", shallow=False)
            assert filecmp.cmp(place.src / "original", place.src / f"copy-{number}", shallow=False)
            shutil.move(place.mnt / f"copy-{number}", original)
        count += 1
    return count
