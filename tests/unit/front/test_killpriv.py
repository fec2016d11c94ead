"""A SETATTR without changes, with which the kernel asks for set-ID bits to be cleared."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from llloop.front.inodes import ROOT
from llloop.front.requester import Requester
from llloop.front.tree import Changes
from llloop.linux import fuse
from llloop.linux.credentials import is_mandatory_lock_mode
from tests.expect import fails
from tests.unit.source import MYSELF, Source
from tests.unit.support import packet_pipe

OWNER = Requester(4001, 4001)
STRANGER = Requester(4003, 4003)
ROOT_USER = Requester(0, 0, pid=7)
TEAM = 5000

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root has other users' files")


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    path = tmp_path / "source"
    path.mkdir()
    with packet_pipe() as pipe:
        own = Source(path, [pipe])
        yield own
        own.close()


@pytest.fixture
def program(source: Source) -> int:
    """A set-ID program of somebody else's with that number."""
    path = source.path / "program"
    path.write_bytes(b"program")
    if os.geteuid() == 0:
        os.chown(path, OWNER.uid, TEAM)
    path.chmod(0o6755)
    return source.tree.lookup(ROOT, b"program")[0]


def mode_after(source: Source, nodeid: int, who: Requester, valid: int = 0) -> int:
    """The mode in the reply, which must be the file's."""
    mode = source.tree.setattr(nodeid, Changes(valid), None, who).mode
    assert mode == (source.path / "program").stat().st_mode
    return stat.S_IMODE(mode)


def open_for_writing(source: Source, nodeid: int, who: Requester = MYSELF) -> int:
    return source.files.open(nodeid, os.O_WRONLY, False, who)[0]


@root_only
@pytest.mark.parametrize("who", [OWNER, ROOT_USER], ids=["owner", "root"])
def test_write_by_owner_or_root_clears_bits(source: Source, program: int, who: Requester) -> None:
    open_for_writing(source, program)
    assert mode_after(source, program, who) == 0o755


@root_only
def test_write_by_the_opener_clears_bits(source: Source, program: int) -> None:
    (source.path / "program").chmod(0o6757)
    open_for_writing(source, program, STRANGER)
    assert mode_after(source, program, STRANGER) == 0o757


@root_only
def test_write_through_a_passed_descriptor_clears_bits(source: Source, program: int) -> None:
    """It may be a chown(2) just as well, which is not for him."""
    handle = source.context.handles.get(open_for_writing(source, program))
    assert not handle.uncached
    assert mode_after(source, program, STRANGER) == 0o6755
    assert handle.uncached


@root_only
def test_passed_descriptor_with_passthrough_is_refused(source: Source, program: int) -> None:
    handle = source.context.handles.get(open_for_writing(source, program))
    handle.backing = 1
    with fails(errno.EPERM):
        mode_after(source, program, STRANGER)
    handle.backing = 0
    assert (source.path / "program").stat().st_mode & 0o7777 == 0o6755


@root_only
@pytest.mark.parametrize("who", [OWNER, ROOT_USER], ids=["owner", "root"])
def test_chown_by_owner_or_root_clears_bits(source: Source, program: int, who: Requester) -> None:
    source.files.open(program, os.O_RDONLY, False, MYSELF)
    assert mode_after(source, program, who) == 0o755


@root_only
def test_chown_by_another_user_is_refused(source: Source, program: int) -> None:
    with fails(errno.EPERM):
        mode_after(source, program, STRANGER)
    open_for_writing(source, program)
    with fails(errno.EPERM):  # where the kernel keeps the times, it says which it is
        mode_after(source, program, STRANGER, fuse.FATTR_CTIME)
    assert (source.path / "program").stat().st_mode & 0o7777 == 0o6755
    (source.path / "program").chmod(0o755)
    assert mode_after(source, program, STRANGER, fuse.FATTR_CTIME) == 0o755


@root_only
def test_write_by_root_keeps_bits_of_a_file_with_capabilities(source: Source, program: int) -> None:
    """The kernel only sends this because of the capabilities, which it has just removed."""
    os.setxattr(
        source.path / "program", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000")
    )
    open_for_writing(source, program)
    source.tree.removexattr(program, b"security.capability", ROOT_USER)
    with fails(errno.ENODATA):
        os.getxattr(source.path / "program", "security.capability")
    assert mode_after(source, program, ROOT_USER) == 0o6755
    assert mode_after(source, program, ROOT_USER) == 0o755


def test_unchangeable_mode_is_cleared_by_the_write(
    source: Source, program: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server of an ordinary user, and a writable file of another user."""

    def refuse(fd: int, mode: int) -> NoReturn:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    handle = source.context.handles.get(open_for_writing(source, program))
    assert not handle.uncached
    monkeypatch.setattr(os, "fchmod", refuse)
    assert mode_after(source, program, MYSELF) == 0o6755
    assert handle.uncached


def test_is_mandatory_lock_mode() -> None:
    assert is_mandatory_lock_mode(stat.S_IFREG | 0o2745)
    assert not is_mandatory_lock_mode(stat.S_IFREG | 0o2755)
    assert not is_mandatory_lock_mode(stat.S_IFREG | 0o745)
    assert not is_mandatory_lock_mode(stat.S_IFDIR | 0o2745)
