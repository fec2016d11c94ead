"""Each row of the table for users of bindfs: both programs do the same."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.as_user import Caller, run_as
from tests.conftest import Serve
from tests.expect import outcome
from tests.mount.test_id_maps import make
from tests.server import reachable_directory

pytestmark = [
    pytest.mark.root,
    pytest.mark.mounted,
    pytest.mark.own_loop,
    pytest.mark.at_once("the source has its sizes later"),
]

_PAGE = Path(__file__).parents[2] / "docs/views.md"
_ROW = re.compile(r"^\| `(-[^`]+)` \| `(--[^`]+)` \|$", re.MULTILINE)
_DIFFERENT_BY_NATURE = {"--xattr-ro"}

ROWS = [row for row in _ROW.findall(_PAGE.read_text()) if row[0] not in _DIFFERENT_BY_NATURE]
NOBODY = 65534
CALLERS = {
    "root": Caller(0, 0),
    "owner": Caller(4001, 4001),
    "nobody": Caller(NOBODY, NOBODY),
    "member": Caller(4009, 4009, groups=(4001,)),
    "other": Caller(4009, 4009),
}

OPERATIONS: dict[str, Callable[[Path], Any]] = {
    "list": lambda place: sorted(os.listdir(place)),
    "read": lambda place: (place / "file").read_bytes(),
    "read private": lambda place: (place / "private").read_bytes(),
    "write": lambda place: (place / "file").write_bytes(b"longer content"),
    "write public": lambda place: (place / "public").write_bytes(b"longer content"),
    "truncate": lambda place: os.truncate(place / "file", 2),
    "chmod": lambda place: (place / "file").chmod(0o640),
    "chown": lambda place: os.chown(place / "file", 4009, -1),
    "utime": lambda place: os.utime(place / "file", (1, 2)),
    "touch": lambda place: os.utime(place / "public"),
    "getxattr": lambda place: os.getxattr(place / "file", "user.old"),
    "listxattr": lambda place: os.listxattr(place / "file"),
    "create": lambda place: (place / "new").touch(0o664),
    "mkdir": lambda place: (place / "made").mkdir(),
    "symlink": lambda place: (place / "link").symlink_to("file"),
    "fifo": lambda place: os.mkfifo(place / "fifo", 0o660),
    "readlink": lambda place: os.readlink(place / "symlink"),
    "rename": lambda place: os.rename(place / "file", place / "renamed"),
    "unlink": lambda place: os.unlink(place / "public"),
    "rmdir": lambda place: os.rmdir(place / "empty-directory"),
    "create in shared": lambda place: (place / "shared-directory/new").touch(),
    "list private": lambda place: os.listdir(place / "private-directory"),
}


def fill(source: Path) -> None:
    """For each caller a tree of its own, since operations change it."""
    source.chmod(0o755)
    for name in CALLERS:
        place = make(source / f"{name}-directory", 0o775)
        make(place / "file", 0o664)
        make(place / "private", 0o600)
        make(place / "public", 0o666)
        make(place / "program", 0o755)
        make(place / "shared-directory", 0o1777)
        make(place / "private-directory", 0o700)
        make(place / "empty-directory", 0o755)
        (place / "symlink").symlink_to("file")
        os.setxattr(place / "file", "user.old", b"value")


def listing(top: Path) -> dict[str, tuple[str, int, int, int]]:
    found = {}
    for path in [top, *sorted(top.rglob("*"))]:
        status = path.lstat()
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        found[str(path.relative_to(top))] = (stat.filemode(status.st_mode), status.st_uid, status.st_gid, size)
    return found


def observe(mountpoint: Path, source: Path) -> dict[str, Any]:
    """Return what the mount shows, what each operation of each user does, and what the source is like in the end."""
    seen: dict[str, Any] = {"before": listing(mountpoint)}
    for name, caller in CALLERS.items():
        for what, act in OPERATIONS.items():
            seen[f"{what} as {name}"] = run_as(caller, outcome, act, mountpoint / f"{name}-directory")
    seen["after"] = listing(mountpoint)
    seen["in the source"] = listing(source)
    return seen


@contextmanager
def bindfs(options: str) -> Iterator[tuple[Path, Path]]:
    """A mount of bindfs: the mount point and its source."""
    state = reachable_directory("bindfs-")
    source, mountpoint = state / "src", state / "mnt"
    try:
        source.mkdir()
        mountpoint.mkdir()
        fill(source)
        subprocess.run(["bindfs", *shlex.split(options), source, mountpoint], check=True, timeout=60)
        try:
            yield mountpoint, source
        finally:
            subprocess.run(["umount", "-l", mountpoint], check=True, timeout=60)
    finally:
        subprocess.run(["rm", "-r", "--one-file-system", state], check=True)


def test_the_table_has_rows() -> None:
    assert len(ROWS) >= 15


@pytest.mark.parametrize(("theirs", "ours"), ROWS)
def test_both_do_the_same(serve: Serve, theirs: str, ours: str) -> None:
    with bindfs(theirs) as (mountpoint, source):
        expected = observe(mountpoint, source)
    server = serve(*shlex.split(ours), "--cache=never")
    fill(server.source)
    found = observe(server.mountpoint, server.source)
    different = {name: (expected[name], found[name]) for name in expected if expected[name] != found[name]}
    assert not different
