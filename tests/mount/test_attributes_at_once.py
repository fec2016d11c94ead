"""What changes an attribute through the mount is seen there at once, also by who asks for that attribute alone.

The kernel asks again for what a request changes as it expects, and keeps the rest as long as it may.
"""

import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.server import Server
from tests.syscalls import AT_STATX_DONT_SYNC as AS_CACHED
from tests.syscalls import AT_SYMLINK_NOFOLLOW as NOFOLLOW
from tests.syscalls import FALLOC_FL_KEEP_SIZE, RENAME_EXCHANGE, Statx, fallocate, opened, renameat2, statx

pytestmark = [pytest.mark.own_loop, pytest.mark.root]

# <linux/stat.h>; without blocks: the kernel does not expect that extended attributes occupy blocks.
FIELDS = {"mode": 2, "nlink": 4, "uid": 8, "gid": 16, "atime": 32, "mtime": 64, "ctime": 128, "size": 512}
# The attributes that the kernel itself keeps with --writeback.
KEPT_BY_KERNEL = {"atime", "mtime", "ctime", "size"}
LONG_AGO = (1_000_000, 1_000_000)
GROUP = 4711


def use(name: str, flags: int, action: Callable[[int], object]) -> Callable[[Path], None]:
    def on_new_file(directory: Path) -> None:
        with opened(directory / name, flags) as fd:
            action(fd)

    return on_new_file


def store(fd: int) -> None:
    with mmap.mmap(fd, 5000) as view:
        view[10] = 1
        view.flush()


def copy(directory: Path) -> None:
    with opened(directory / "file", os.O_RDONLY) as source, opened(directory / "other", os.O_WRONLY) as target:
        os.copy_file_range(source, target, 1000, 0, 10_000)


ACTIONS: dict[str, Callable[[Path], object]] = {
    "write": use("file", os.O_WRONLY, lambda fd: os.write(fd, b"x" * 100)),
    "extend": use("file", os.O_WRONLY, lambda fd: os.pwrite(fd, b"x" * 9000, 3000)),
    "append": use("file", os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"x" * 9000)),
    "store": use("file", os.O_RDWR, store),
    "open with O_TRUNC": use("file", os.O_WRONLY | os.O_TRUNC, lambda fd: None),
    "truncate": lambda directory: os.truncate(directory / "file", 5),
    "allocate": use("file", os.O_RDWR, lambda fd: os.posix_fallocate(fd, 0, 60_000)),
    "allocate beyond": use("file", os.O_RDWR, lambda fd: fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, 60_000)),
    "copy": copy,
    "read": lambda directory: (directory / "file").read_bytes(),
    "chmod": lambda directory: os.chmod(directory / "file", 0o600),
    "chmod of a directory": lambda directory: os.chmod(directory / "below", 0o700),
    "chgrp": lambda directory: os.chown(directory / "set-ID", -1, GROUP),
    "chown that names nobody": lambda directory: os.chown(directory / "set-ID", -1, -1),
    "utime": lambda directory: os.utime(directory / "file", (5, 6)),
    "unlink": lambda directory: os.unlink(directory / "second"),
    "link": lambda directory: os.link(directory / "file", directory / "third"),
    "rename": lambda directory: os.rename(directory / "file", directory / "renamed"),
    "rename over": lambda directory: os.rename(directory / "other", directory / "second"),
    "rename into": lambda directory: os.rename(directory / "file", directory / "below" / "file"),
    "exchange": lambda directory: renameat2(directory / "file", directory / "below", RENAME_EXCHANGE),
    "mkdir": lambda directory: os.mkdir(directory / "below" / "new"),
    "rmdir": lambda directory: os.rmdir(directory / "below" / "empty"),
    "create": lambda directory: (directory / "below" / "new").touch(),
    "symlink": lambda directory: os.symlink("x", directory / "below" / "new"),
}


def make(directory: Path) -> None:
    (directory / "below" / "empty").mkdir(parents=True)
    for name in ("file", "other", "set-ID"):
        (directory / name).write_bytes(b"x" * 5000)
    os.link(directory / "file", directory / "second")
    (directory / "set-ID").chmod(0o6755)
    for path in paths(directory):
        os.utime(path, LONG_AGO)


def paths(directory: Path) -> list[Path]:
    return [directory, *directory.rglob("*")]


def field_of(found: Statx, field: str) -> int:
    value = getattr(found, f"stx_{field}")
    return int(value if isinstance(value, int) else value.ns)


def stale(server: Server, name: str, action: Callable[[Path], object], fields: set[str]) -> set[str]:
    """Do an action in its own directory; ask for each changed field alone; return the fields that are out of date."""
    wrong = set()
    asked: set[tuple[str, str]] = set()
    for intent in range(50):
        source, mounted = (top / f"{name} {intent}" for top in (server.source, server.mountpoint))
        make(source)
        for path in paths(mounted):
            statx(path)
        action(mounted)
        is_done = True
        for path in paths(source):
            relative = path.relative_to(source)
            actual = statx(path)
            cached = statx(mounted / relative, 0xFFF, NOFOLLOW | AS_CACHED)
            # Searching for files reads the directories in the source.
            for field in sorted(fields if stat.S_ISREG(actual.stx_mode) else fields - {"atime"}):
                there = field_of(actual, field)
                if field_of(cached, field) != there and (str(relative), field) not in asked:
                    asked.add((str(relative), field))
                    if field_of(statx(mounted / relative, FIELDS[field]), field) != there:
                        wrong.add(f"{name}: {field} of {relative}")
                    is_done = False
                    break  # the kernel may know everything now
        if is_done:
            return wrong
    raise AssertionError(f"{name} never becomes known")


@pytest.mark.parametrize(
    "options", [[], ["--io=kernel"], ["--writeback"], ["--cache=never"], ["--cache=always"]], ids=str
)
def test_changed_attributes_are_seen_immediately(serve: Serve, serve_options: list[str], options: list[str]) -> None:
    server = serve(*options)
    fields = set(FIELDS)
    if "--writeback" in [*options, *serve_options]:
        fields -= KEPT_BY_KERNEL
    actions = dict(ACTIONS)
    if "--io=kernel" in [*options, *serve_options]:
        del actions["store"]  # it writes to the pages of the source without FUSE
    assert set().union(*(stale(server, name, action, fields) for name, action in actions.items())) == set()
