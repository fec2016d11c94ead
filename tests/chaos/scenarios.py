"""Short scenarios of file system calls: each is prepared in the source, then run in the mount.

Each must have the same result as in a plain directory, whichever process dies meanwhile.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.expect import outcome, pattern
from tests.syscalls import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    fallocate,
    link_descriptor,
    opened,
    renameat2,
)

LARGE = 200_000  # bytes; the front gives a write of this size to a worker


@dataclass(frozen=True)
class Scenario:
    """`prepare` runs in the source, `act` in the mount; `act` must return the same in a plain directory."""

    name: str
    prepare: Callable[[Path], object]
    act: Callable[[Path], object]


def _nothing(directory: Path) -> None:
    pass


def _file(directory: Path) -> None:
    (directory / "file").write_bytes(b"content")


def _two_files(directory: Path) -> None:
    _file(directory)
    (directory / "other").write_bytes(b"other's content")


def _two_links(directory: Path) -> None:
    _file(directory)
    os.link(directory / "file", directory / "link")


def _directory(directory: Path) -> None:
    (directory / "directory").mkdir()


def _with_xattr(directory: Path) -> None:
    _file(directory)
    os.setxattr(directory / "file", "user.name", b"value")


def _many(directory: Path) -> None:
    for number in range(400):
        (directory / f"a file with quite a long name, number {number}").touch()


def _create(directory: Path) -> object:
    with opened(directory / "file", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600) as fd:
        return os.write(fd, b"new"), os.pread(fd, 10, 0), os.fstat(fd).st_nlink


def _create_unreadable(directory: Path) -> object:
    with opened(directory / "file", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0) as fd:
        return os.write(fd, b"new")


def _remove_open(remove: Callable[[Path], object]) -> Callable[[Path], object]:
    def act(directory: Path) -> object:
        with opened(directory / "file", os.O_RDWR) as fd:
            remove(directory)
            os.pwrite(fd, b"CON", 0)
            return os.pread(fd, 100, 0), os.fstat(fd).st_nlink, os.listdir(directory)

    return act


def _unlink_and_open_other(directory: Path) -> object:
    os.stat(directory / "link")
    os.unlink(directory / "file")
    with opened(directory / "link", os.O_RDWR) as fd, opened(directory / "link", os.O_RDONLY) as another:
        return os.pwrite(fd, b"X", 3), os.pread(another, 100, 0), os.fstat(fd).st_nlink


def _append(size: int) -> Callable[[Path], object]:
    def act(directory: Path) -> object:
        with opened(directory / "file", os.O_RDWR | os.O_APPEND) as fd:
            counts = os.write(fd, pattern(size, 1)), os.write(fd, pattern(size, 2))
            return counts, os.fstat(fd).st_size, os.pread(fd, 3 * size, 0)

    return act


def _write(size: int, times: int) -> Callable[[Path], object]:
    def act(directory: Path) -> object:
        with opened(directory / "file", os.O_RDWR) as fd:
            counts = [os.pwrite(fd, pattern(size, number), number * size + 1) for number in range(times)]
            os.fsync(fd)
            return counts, os.pread(fd, times * size + 1, 0)

    return act


def _truncate(directory: Path) -> object:
    with opened(directory / "file", os.O_WRONLY | os.O_TRUNC) as fd:
        os.write(fd, b"x")
        os.ftruncate(fd, 100)
    os.truncate(directory / "file", 50)
    os.chmod(directory / "file", 0o600)
    return (directory / "file").stat().st_size


def _tmpfile(directory: Path) -> object:
    with opened(directory, os.O_TMPFILE | os.O_RDWR, 0o600) as fd:
        os.write(fd, b"a file without a name")
        link_descriptor(fd, directory / "named")
        return os.fstat(fd).st_nlink, os.pread(fd, 10, 2)


def _list_and_remove(directory: Path) -> object:
    listed = []
    with os.scandir(directory) as entries:
        for entry in entries:
            listed.append(entry.name)
            os.unlink(entry)
    return sorted(listed)


def _let_forget(directory: Path) -> object:
    descriptors = [os.open(directory / f"{number}", os.O_CREAT | os.O_RDWR) for number in range(6)]
    for number, fd in enumerate(descriptors):
        os.unlink(directory / f"{number}")
        os.close(fd)
    time.sleep(0.1)  # the kernel forgets them at the end
    return os.listdir(directory)


def _map(directory: Path) -> object:
    with opened(directory / "file", os.O_RDWR) as fd:
        os.ftruncate(fd, 3 * 4096)
        with mmap.mmap(fd, 3 * 4096) as memory:
            memory[4000:4200] = b"m" * 200
            memory.flush()
            return memory[:5], os.pread(fd, 300, 3950)


def _ranges(directory: Path) -> object:
    with opened(directory / "file", os.O_RDWR) as fd, opened(directory / "other", os.O_RDWR) as other:
        os.pwrite(other, pattern(LARGE), 0)
        copied = os.copy_file_range(other, fd, LARGE, 0, 0)
        fallocate(fd, 0, 0, LARGE + 5000)
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4096, 8192)
        return copied, os.pread(fd, 2 * LARGE, 0)


def _refused(function: Callable[..., object], *names: str) -> Callable[[Path], object]:
    return lambda directory: outcome(function, *(directory / name for name in names))


def _set_again(path: Path) -> None:
    os.setxattr(path, "user.name", b"value", os.XATTR_CREATE)


NAMES = [
    Scenario("mkdir", _nothing, lambda at: os.mkdir(at / "new", 0o750)),
    Scenario("mkdir where one is", _directory, _refused(os.mkdir, "directory")),
    Scenario("mknod", _nothing, lambda at: os.mkfifo(at / "fifo")),
    Scenario("symlink", _nothing, lambda at: os.symlink("target", at / "symlink")),
    Scenario("symlink where one is", _file, _refused(lambda at: os.symlink("target", at), "file")),
    Scenario("link", _file, lambda at: os.link(at / "file", at / "link")),
    Scenario("link where another is", _two_files, _refused(os.link, "file", "other")),
    Scenario("create", _nothing, _create),
    Scenario("create where one is", _file, _refused(lambda at: os.open(at, os.O_CREAT | os.O_EXCL), "file")),
    Scenario("create what cannot be opened", _nothing, _create_unreadable),
    Scenario("unlink", _file, lambda at: os.unlink(at / "file")),
    Scenario("unlink what is open", _file, _remove_open(lambda at: os.unlink(at / "file"))),
    Scenario("unlink and open the other name", _two_links, _unlink_and_open_other),
    Scenario("rmdir", _directory, lambda at: os.rmdir(at / "directory")),
    Scenario("rmdir what is not empty", _file, _refused(lambda at: os.rmdir(at.parent), "file")),
    Scenario("rename", _file, lambda at: os.rename(at / "file", at / "renamed")),
    Scenario("rename over", _two_files, lambda at: os.rename(at / "other", at / "file")),
    Scenario("rename over what is open", _two_files, _remove_open(lambda at: os.rename(at / "other", at / "file"))),
    Scenario("rename one name over another", _two_links, lambda at: os.rename(at / "file", at / "link")),
    Scenario("exchange", _two_files, lambda at: renameat2(at / "file", at / "other", RENAME_EXCHANGE)),
    Scenario(
        "rename without replacing",
        _two_files,
        _refused(lambda one, other: renameat2(one, other, RENAME_NOREPLACE), "file", "other"),
    ),
    Scenario("set an attribute", _file, lambda at: os.setxattr(at / "file", "user.a", b"b", os.XATTR_CREATE)),
    Scenario(
        "set an attribute that is",
        _with_xattr,
        _refused(lambda at: os.setxattr(at, "user.name", b"b", os.XATTR_CREATE), "file"),
    ),
    Scenario("remove an attribute", _with_xattr, lambda at: os.removexattr(at / "file", "user.name")),
    Scenario("set an attribute again", _with_xattr, _refused(_set_again, "file")),
    Scenario("remove an attribute that is not", _file, _refused(lambda at: os.removexattr(at, "user.name"), "file")),
    Scenario("file without a name", _nothing, _tmpfile),
    Scenario("let files be forgotten", _nothing, _let_forget),
]
LISTING = Scenario("list and remove", _many, _list_and_remove)
DATA = [
    Scenario("append", _file, _append(50)),
    Scenario("append much", _file, _append(LARGE)),
    Scenario("write", _file, _write(50, 2)),
    Scenario("write much", _file, _write(LARGE, 3)),
    Scenario("truncate", _file, _truncate),
    Scenario("map", _file, _map),
    Scenario("ranges", _two_files, _ranges),
]
