"""The handlers of the plain loop as methods: their results, and that they only raise FUSEError."""

from __future__ import annotations

import errno
import inspect
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import llfuse
import pytest

from llloop.front.inodes import ROOT
from llloop.front.llfuse.exchange import Exchange
from llloop.front.llfuse.operations import Operations
from llloop.shared.slots import Slots
from tests.unit.source import Source

CONTEXT = SimpleNamespace(uid=os.geteuid(), gid=os.getegid(), umask=0o022, pid=1)

NOTHING = SimpleNamespace(**{f"update_{name}": False for name in ("mode", "uid", "gid", "size", "atime", "mtime")})


@contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(llfuse.FUSEError) as caught:
        yield
    assert caught.value.errno == number


@pytest.fixture
def operations(source: Source) -> Operations:
    own = Operations()
    own.attach(source.context, Exchange(source.context.router, -1), -1)
    return own


def test_names(operations: Operations, source: Source) -> None:
    made = operations.mkdir(ROOT, b"dir", 0o777, CONTEXT)
    assert stat.S_IMODE(made.st_mode) == 0o755
    link = operations.symlink(ROOT, b"link", b"target", CONTEXT)
    assert operations.readlink(link.st_ino, CONTEXT) == b"target"
    node = operations.mknod(ROOT, b"node", stat.S_IFREG | 0o666, 0, CONTEXT)
    operations.rename(ROOT, b"node", made.st_ino, b"moved", CONTEXT)
    assert operations.lookup(made.st_ino, b"moved", CONTEXT).st_ino == node.st_ino
    assert operations.link(node.st_ino, ROOT, b"second", CONTEXT).st_nlink == 2
    operations.unlink(made.st_ino, b"moved", CONTEXT)
    operations.rmdir(ROOT, b"dir", CONTEXT)
    assert sorted(os.listdir(source.path)) == ["link", "second"]


def test_attributes(operations: Operations, source: Source) -> None:
    (source.path / "file").write_text("content")
    status = os.stat(source.path / "file")
    entry = operations.lookup(ROOT, b"file", CONTEXT)
    again = operations.getattr(entry.st_ino, CONTEXT)
    for found in (entry, again):
        for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_mtime_ns"):
            assert getattr(found, name) == getattr(status, name), name
    assert entry.entry_timeout == 1
    # An entry has the nodeid where the inode number belongs, so its attributes must be asked for again.
    assert (entry.attr_timeout, again.attr_timeout) == (0, 1)
    assert again.st_ino == status.st_ino
    changed = SimpleNamespace(**{**vars(NOTHING), "update_size": True})
    values = llfuse.EntryAttributes()
    values.st_size = 2
    assert operations.setattr(entry.st_ino, values, changed, None, CONTEXT).st_size == 2


def test_missing_name_is_cached(operations: Operations) -> None:
    negative = operations.lookup(ROOT, b"missing", CONTEXT)
    assert (negative.st_ino, negative.entry_timeout) == (0, 1)


def test_listing_continues_at_its_offset(operations: Operations, source: Source) -> None:
    for name in "abc":
        (source.path / name).mkdir()
    handle = operations.opendir(ROOT, CONTEXT)
    whole = list(operations.readdir(handle, 0))
    assert sorted(name for name, _, _ in whole) == [b".", b"..", b"a", b"b", b"c"]
    assert all(stat.S_ISDIR(attributes.st_mode) for _, attributes, _ in whole)
    for entry, _, following in whole:
        rest = [other for other, _, _ in operations.readdir(handle, following)]
        assert rest == [other for other, _, _ in whole][[other for other, _, _ in whole].index(entry) + 1 :]
    operations.releasedir(handle)
    with refused(errno.EBADF):
        operations.readdir(handle, 0)


def test_errors_keep_their_errno(operations: Operations) -> None:
    with refused(errno.ENOENT):
        operations.unlink(ROOT, b"missing", CONTEXT)
    with refused(errno.ESTALE):
        operations.getattr(4711, CONTEXT)
    with refused(errno.EINVAL):
        operations.mkdir(ROOT, b"..", 0o755, CONTEXT)
    with refused(errno.EBADF):
        operations.release(99)


HANDLERS: dict[str, tuple[Any, ...]] = {
    "lookup": (ROOT, b"x", CONTEXT),
    "mknod": (ROOT, b"x", 0o100644, 0, CONTEXT),
    "mkdir": (ROOT, b"x", 0o755, CONTEXT),
    "symlink": (ROOT, b"x", b"y", CONTEXT),
    "link": (ROOT, ROOT, b"x", CONTEXT),
    "unlink": (ROOT, b"x", CONTEXT),
    "rmdir": (ROOT, b"x", CONTEXT),
    "rename": (ROOT, b"x", ROOT, b"y", CONTEXT),
    "readlink": (ROOT, CONTEXT),
    "getattr": (ROOT, CONTEXT),
    "setattr": (ROOT, llfuse.EntryAttributes(), NOTHING, None, CONTEXT),
    "statfs": (CONTEXT,),
    "setxattr": (ROOT, b"user.a", b"b", CONTEXT),
    "getxattr": (ROOT, b"user.a", CONTEXT),
    "listxattr": (ROOT, CONTEXT),
    "removexattr": (ROOT, b"user.a", CONTEXT),
    "opendir": (ROOT, CONTEXT),
    "readdir": (1, 0),
    "releasedir": (1,),
    "open": (ROOT, 0, CONTEXT),
    "create": (ROOT, b"x", 0o644, 0, CONTEXT),
    "read": (1, 0, 1),
    "write": (1, 0, b"x"),
    "flush": (1,),
    "fsync": (1, False),
    "fsyncdir": (1, False),
    "release": (1,),
}


class Faulty:
    """A context in which every attribute raises an unexpected exception, except the counters."""

    def __init__(self, slots: Slots) -> None:
        self.router = SimpleNamespace(slots=slots)
        self.request = SimpleNamespace(taken=0)
        self.calls = 0
        self.closing: list[int] = []

    def __getattr__(self, name: str) -> Any:
        raise ZeroDivisionError("a fault")


@pytest.mark.parametrize("name", sorted(HANDLERS))
def test_unexpected_exception_gives_eio_and_is_logged(
    name: str, slots: Slots, caplog: pytest.LogCaptureFixture
) -> None:
    operations = Operations()
    operations.attach(Faulty(slots), Faulty(slots), -1)  # type: ignore[arg-type]
    with caplog.at_level(logging.ERROR), refused(errno.EIO):
        getattr(operations, name)(*HANDLERS[name])
    assert "a fault" in caplog.text
    assert "Traceback" in caplog.text
    assert [(count.requests, count.errors) for count in slots.metrics.front.snapshot().values()] == [(1, 1)]


def test_each_handler_of_llfuse_is_tested() -> None:
    def handlers(kind: type) -> set[str]:
        return {name for name, _ in inspect.getmembers(kind, inspect.isroutine) if not name.startswith("_")}

    plain = {"init", "destroy", "attach", "forget", "access", "stacktrace"}
    assert handlers(Operations) - plain == set(HANDLERS)
    assert handlers(llfuse.Operations) <= handlers(Operations)
    inherited: list[Callable[..., Any]] = [
        getattr(Operations, name)
        for name in handlers(llfuse.Operations)
        if getattr(Operations, name) is getattr(llfuse.Operations, name)
    ]
    assert inherited == []


def test_forget_never_raises(
    operations: Operations, source: Source, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (source.path / "file").write_text("")
    nodeid = operations.lookup(ROOT, b"file", CONTEXT).st_ino
    forget = source.tree.forget

    def faulty(number: int, lookups: int) -> None:
        if number == 5:
            raise ZeroDivisionError("a fault")
        forget(number, lookups)

    monkeypatch.setattr(source.tree, "forget", faulty)
    with caplog.at_level(logging.ERROR):
        operations.forget([(5, 1), (nodeid, 1)])
    assert "a fault" in caplog.text
    assert nodeid not in source.context.inodes
